"""`sppfeat index`: build a gallery from a store, or change one."""

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppfeat.errors import UsageError
from sppfeat_cli import options
from sppfeat_cli.output import byte_count, human_bytes, print_json, printable, tell_lost
from sppfeat_cli.progress import Progress

if TYPE_CHECKING:
    from sppfeat.retrieval import Change, ProjectionOptions
    from sppfeat.store import Store

_WHICH = (
    "expected index STORE -o GALLERY, index STORE --add-to GALLERY, index --remove NAMES.txt --from GALLERY, "
    "or index --map --add-to GALLERY"
)
# Options that are fixed once a gallery is built.
_BUILDING = (
    *("factory", "memory", "recall", "measure_recall", "project", "whiten", "whiten_power", "shrinkage"),
    *("whitening_from", "keep_bins", "bin_dim", "seed", "overwrite"),
)

_INDEX = options.Defaults("sppfeat.retrieval:IndexOptions")
_PROJECTION = options.Defaults("sppfeat.retrieval:ProjectionOptions")


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: sppfeat index feats.h5 -o gallery/ --project 512 --whiten")(index)


def index(
    context: typer.Context,
    store: Annotated[
        str | None, typer.Argument(metavar="[STORE]", help="Store to index, or to add.", show_default=False)
    ] = None,
    output: options.OutputFolder = None,
    add_to: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Add the store's images to this gallery; without a store, add a --map.",
            show_default=False,
        ),
    ] = None,
    remove: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Remove the images named in this text file, one per line.", show_default=False
        ),
    ] = None,
    remove_from: Annotated[
        str | None, typer.Option("--from", metavar="DIR", help="Gallery to remove images from.", show_default=False)
    ] = None,
    factory: Annotated[
        str | None,
        typer.Option(
            metavar="STRING", help="FAISS factory string, such as IVF4096,SQ8.", show_default="by size and memory"
        ),
    ] = None,
    memory: Annotated[str | None, options.memory("half of what is available, for the index")] = None,
    recall: Annotated[
        float,
        typer.Option(metavar="X", help="Fraction of the 10 true neighbors that an approximate index is tuned to find."),
    ] = _INDEX.recall,
    measure_recall: Annotated[
        int, typer.Option(metavar="N", help="Measure recall on N images, by comparison with exact search.")
    ] = _INDEX.measure,
    project: options.Project = None,
    whiten: options.Whiten = False,
    whiten_power: options.WhitenPower = _PROJECTION.power,
    shrinkage: options.Shrinkage = _PROJECTION.shrinkage,
    whitening_from: options.WhiteningFrom = None,
    keep_bins: Annotated[
        bool,
        typer.Option(
            "--keep-bins", help="Keep the bins of each image, one byte a value, for search --parts and --rerank."
        ),
    ] = False,
    bin_dim: options.BinDim = None,
    map_: Annotated[
        bool, typer.Option("--map", help="Lay out all images on a map, in which those that look alike are near.")
    ] = False,
    device: options.IndexDevice = _INDEX.device,
    seed: options.Seed = _INDEX.seed,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Build a gallery for `sppfeat search`, add images to one, remove images from one, or map its images.

    The index is chosen by the number of images, their dimensions and the available memory, unless --factory is given.
    If interrupted, the old gallery is unchanged.
    """
    if [output, add_to, remove].count(None) != 2:
        raise UsageError(_WHICH)
    only_map = map_ and add_to is not None and store is None
    if (remove is None) == (store is None) and not only_map:
        raise UsageError(_WHICH)
    if (remove is None) != (remove_from is None):
        raise UsageError(_WHICH)
    if output is None:
        for name in _BUILDING:
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                raise UsageError(f"--{name.replace('_', '-')}: applies only when a gallery is built with -o")
    if map_:
        from sppfeat.retrieval import check_map

        check_map()  # before the work
    done = (
        None
        if only_map
        else _build(
            str(store),
            output,
            {
                "factory": factory,
                "memory": byte_count("memory", memory) if memory is not None else None,
                "recall": recall,
                "measure": measure_recall,
                "device": device,
                "seed": seed,
            },
            options.projection_options(project, whiten, whiten_power, shrinkage, whitening_from, seed),
            whitening_from,
            keep_bins,
            bin_dim,
            overwrite,
            quiet,
        )
        if output is not None
        else _change(store, add_to, remove, remove_from, device, quiet)
    )
    if map_:
        done = _mapped(str(output or add_to or remove_from), done, quiet)
    assert done is not None
    if as_json:
        print_json(_document(done))
    elif not quiet:
        typer.echo(_summary(done))
    if not quiet:
        notes = list(done.notes)
        if done.map_lost:
            notes.append(f"the map is gone, since images changed; again: sppfeat index --map --add-to {done.path}")
        for note in notes:
            print(f"note: {printable(note)}", file=sys.stderr)


def _opened(store: str, quiet: bool) -> "Store":
    from sppfeat.store import open_store

    opened = open_store(store)
    if not quiet:
        tell_lost(opened)
    return opened


def _build(
    store: str,
    output: str,
    given: dict[str, Any],
    projection: "ProjectionOptions | None",
    whitening_from: str | None,
    keep_bins: bool,
    bin_dim: int | None,
    overwrite: bool,
    quiet: bool,
) -> "Change":
    from sppfeat.retrieval import IndexOptions, create_gallery
    from sppfeat.store import open_store

    chosen = IndexOptions(**given)
    return create_gallery(
        _opened(store, quiet),
        output,
        chosen,
        projection,
        whitening_from=open_store(whitening_from) if whitening_from is not None else None,
        keep_bins=keep_bins,
        bin_dim=bin_dim,
        overwrite=overwrite,
    )


def _change(
    store: str | None, add_to: str | None, remove: str | None, remove_from: str | None, device: str, quiet: bool
) -> "Change":
    from sppfeat.retrieval import add_to_gallery, read_names, remove_from_gallery

    if store is not None and add_to is not None:
        return add_to_gallery(_opened(store, quiet), add_to, device=device)
    return remove_from_gallery(str(remove_from), read_names(str(remove)))


def _mapped(gallery: str, done: "Change | None", quiet: bool) -> "Change":
    """Lay out the images of a gallery; what was changed in it before, if anything, and the map."""
    from sppfeat.retrieval import add_map

    with Progress(quiet=quiet) as progress:
        mapped = add_map(gallery, progress=progress.part)
    assert mapped is not None  # nothing stops it but an interrupt
    if done is None:
        return mapped
    return dataclasses.replace(done, notes=done.notes + mapped.notes, about=mapped.about, mapped=True, map_lost=False)


def _document(done: "Change") -> dict[str, Any]:
    from msgspec import to_builtins

    about = done.about
    built = done.built
    return {
        "gallery": done.path,
        "images": done.rows,
        "added": done.added,
        "skipped": done.skipped,
        "removed": done.removed,
        "dim": about.dim,
        "index": to_builtins(about.index) | {"bytes": about.index_bytes},
        "projection": to_builtins(about.projection),
        "bins": to_builtins(about.bins),
        "map": about.files.map is not None,
        "seconds": None if built is None else round(built.seconds, 3),
        "queries_per_second": None if built is None else built.queries_per_second,
    }


def _summary(done: "Change") -> str:
    about, built = done.about, done.built
    index = about.index
    size = human_bytes(about.index_bytes)
    if built is None:
        parts = [
            f"{count} {word}"
            for count, word in (
                (done.added, "added"),
                (done.removed, "removed"),
                (done.skipped, "already there"),
            )
            if count or word == "added" and not done.removed and not done.mapped
        ]
        parts += ["all on the map"] if done.mapped else []
        return printable(f"{done.path}: {done.rows} images now ({', '.join(parts)}); index {index.factory}, {size}")
    lines = [
        f"{done.path}: {done.rows} images of {about.dim} values",
        f"  index    {index.factory}, {size}: {index.why}",
    ]
    if (projection := about.projection) is not None:
        how = f"whitened (power {projection.power:g}, shrinkage {projection.shrinkage:g})"
        lines.append(
            f"  project  onto {projection.dim} values{', ' + how if projection.power else ''}, which keep "
            f"{100 * projection.kept:.1f} % of the variance of {projection.rows} images ({projection.route})"
        )
    if (bins := about.bins) is not None:
        lines.append(f"  bins     {bins.dim} values each, {human_bytes(bins.bytes)} an image")
    if done.mapped:
        lines.append("  map      of all images")
    if built.effort:
        name, value = next(iter(built.effort.items()))
        lines.append(f"  effort   {name} {value}")
    if built.recall is not None:
        measured = "exact" if not built.measured else f"measured on {built.measured} of the images"
        lines.append(f"  recall   {100 * built.recall:.1f} % of the 10 true neighbors ({measured})")
    if built.queries_per_second is not None:
        lines.append(f"  speed    {built.queries_per_second:.0f} queries/s")
    lines.append(f"  time     {built.seconds:.1f} s")
    return "\n".join(map(printable, lines))
