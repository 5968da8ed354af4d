"""`sppfeat index`: a store into a gallery."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppfeat.errors import UsageError
from sppfeat_cli.output import byte_count, human_bytes, print_json, printable

if TYPE_CHECKING:
    from sppfeat.retrieval import Change, ProjectionOptions

_WHICH = "expected index STORE -o GALLERY, index STORE --add-to GALLERY, or index --remove NAMES.txt --from GALLERY"
# What is fixed once a gallery is built.
_BUILDING = "factory memory recall measure_recall project whiten whiten_power shrinkage whitening_from seed overwrite"


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: sppfeat index feats.h5 -o gallery/ --project 512 --whiten")(index)


def index(
    context: typer.Context,
    store: Annotated[
        str | None, typer.Argument(metavar="[STORE]", help="The store to index, or to add.", show_default=False)
    ] = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="DIR", help="The gallery to build.", show_default=False)
    ] = None,
    add_to: Annotated[
        str | None, typer.Option(metavar="DIR", help="Add the store's images to this gallery.", show_default=False)
    ] = None,
    remove: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Remove the images named in this text file, one a line.", show_default=False),
    ] = None,
    remove_from: Annotated[
        str | None, typer.Option("--from", metavar="DIR", help="The gallery to remove from.", show_default=False)
    ] = None,
    factory: Annotated[
        str | None,
        typer.Option(metavar="STRING", help="FAISS factory string, such as IVF4096,PQ64.", show_default="chosen"),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Most memory for the index, such as 4GB.", show_default="half of what is available"
        ),
    ] = None,
    recall: Annotated[
        float, typer.Option(help="Part of the 10 true neighbors that an approximate index is set to find.")
    ] = 0.97,
    measure_recall: Annotated[
        int, typer.Option(metavar="N", help="Compare the neighbors of N images with exact search.")
    ] = 0,
    project: Annotated[
        int | None,
        typer.Option(metavar="N", help="Project onto N principal components.", show_default="512 with --whiten"),
    ] = None,
    whiten: Annotated[bool, typer.Option("--whiten", help="Whiten the components.")] = False,
    whiten_power: Annotated[float, typer.Option(help="How far: 0 not at all (PCA), 1 fully.")] = 1.0,
    shrinkage: Annotated[
        float, typer.Option(help="Of the components' variances towards their mean before whitening, 0 to 1.")
    ] = 0.1,
    whitening_from: Annotated[
        str | None,
        typer.Option(metavar="STORE", help="Learn the projection from this store.", show_default="STORE itself"),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the index is filled: cpu, cuda or cuda:N.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the samples of images.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a gallery.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors (and the JSON).")] = False,
) -> None:
    """Build a gallery that `sppfeat search` searches, add images to one, or remove some from one.

    The index is chosen by the number of images, their dimensions and the memory, unless --factory names one. Whatever
    is interrupted leaves the old gallery as it was.
    """
    if [output, add_to, remove].count(None) != 2 or (remove is None) == (store is None):
        raise UsageError(_WHICH)
    if (remove is None) != (remove_from is None):
        raise UsageError(_WHICH)
    if output is None:
        for name in _BUILDING.split():
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                raise UsageError(f"--{name.replace('_', '-')}: is fixed when a gallery is built with -o")
    done = (
        _build(
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
            projection_options(project, whiten, whiten_power, shrinkage, whitening_from, seed),
            whitening_from,
            overwrite,
        )
        if output is not None
        else _change(store, add_to, remove, remove_from, device)
    )
    if as_json:
        print_json(_document(done))
    elif not quiet:
        typer.echo(_summary(done))
    if not quiet:
        for note in done.notes:
            print(f"note: {printable(note)}", file=sys.stderr)


def _build(
    store: str,
    output: str,
    options: dict[str, Any],
    projection: "ProjectionOptions | None",
    whitening_from: str | None,
    overwrite: bool,
) -> "Change":
    from sppfeat.retrieval import IndexOptions, create_gallery
    from sppfeat.store import open_store

    chosen = IndexOptions(**options)
    return create_gallery(
        open_store(store),
        output,
        chosen,
        projection,
        whitening_from=open_store(whitening_from) if whitening_from is not None else None,
        overwrite=overwrite,
    )


def _change(
    store: str | None, add_to: str | None, remove: str | None, remove_from: str | None, device: str
) -> "Change":
    from sppfeat.retrieval import add_to_gallery, read_names, remove_from_gallery
    from sppfeat.store import open_store

    if store is not None and add_to is not None:
        return add_to_gallery(open_store(store), add_to, device=device)
    return remove_from_gallery(str(remove_from), read_names(str(remove)))


def projection_options(
    project: int | None, whiten: bool, power: float, shrinkage: float, whitening_from: str | None, seed: int = 0
) -> "ProjectionOptions | None":
    """What --project, --whiten and the flags that go with them ask for; None: no projection."""
    from sppfeat.retrieval import DEFAULT_DIMS, ProjectionOptions

    if project is None and not whiten:
        if whitening_from is not None:
            raise UsageError("--whitening-from: expected --whiten or --project with it")
        return None
    dims = DEFAULT_DIMS if project is None else project
    return ProjectionOptions(dims=dims, whiten=whiten, power=power, shrinkage=shrinkage, seed=seed)


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
        "index": to_builtins(about.index) | {"bytes": about.files.index.bytes},
        "projection": to_builtins(about.projection),
        "seconds": None if built is None else round(built.seconds, 3),
        "queries_per_second": None if built is None else built.queries_per_second,
    }


def _summary(done: "Change") -> str:
    about, built = done.about, done.built
    index = about.index
    size = human_bytes(about.files.index.bytes)
    if built is None:
        parts = [
            f"{count} {word}"
            for count, word in (
                (done.added, "added"),
                (done.removed, "removed"),
                (done.skipped, "there already"),
            )
            if count or word == "added" and not done.removed
        ]
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
