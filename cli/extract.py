"""`sppfeat extract`: describe images in a store."""

import re
import sys
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from sppfeat.errors import UsageError, one_of
from sppfeat.recipe import (
    CROPS,
    DTYPES,
    FUSIONS,
    INTERPOLATIONS,
    NORMALIZATIONS,
    ORIENTATIONS,
    POOLINGS,
    PRECISIONS,
    SIFT_BOW,
    Recipe,
    RunOptions,
)
from sppfeat.recipes import NAMED, named_recipe
from sppfeat_cli import options
from sppfeat_cli.output import counted, integers, numbers, print_json, printable, scales
from sppfeat_cli.progress import Progress

if TYPE_CHECKING:
    from sppfeat.extraction import Extraction


_RECIPE = options.Defaults("sppfeat.recipe:Recipe")


def register(app: typer.Typer) -> None:
    app.command(
        epilog="Example: sppfeat extract photos/ -o feats.h5 --scales 224,320 --levels 4,2,1",
    )(extract)


def extract(
    sources: options.Sources,
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE|DIR",
            help="Output file, or with a trailing slash a folder of shards; s3://BUCKET/FOLDER/ for one in a bucket.",
            show_default=False,
        ),
    ],
    context: typer.Context,
    recipe_name: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="NAME",
            help="Recipe to start from: " + "; ".join(f"`{name}` ({one.use})" for name, one in NAMED.items()) + ".",
            show_default="the default of each option",
        ),
    ] = None,
    backbone: options.Backbone = Recipe.backbone,
    weights: options.Weights = Recipe.weights,
    vocabulary: options.VocabularyFile = None,
    layer: options.Layer = Recipe.layer,
    scale_list: options.Scales = _RECIPE.scales,
    level_list: options.Levels = _RECIPE.levels,
    pooling: Annotated[str, typer.Option(metavar="NAME", help=f"Pooling: {one_of(POOLINGS)}.")] = Recipe.pooling,
    gem_p: Annotated[float, typer.Option(metavar="X", help="Exponent of gem pooling.")] = Recipe.gem_p,
    fuse: Annotated[
        str, typer.Option(metavar="NAME", help=f"Fusion of scales into one descriptor: {one_of(FUSIONS)}.")
    ] = Recipe.fuse,
    normalize: Annotated[
        str, typer.Option(metavar="NAME", help=f"Normalization of each scale's descriptor: {one_of(NORMALIZATIONS)}.")
    ] = Recipe.normalize,
    precision: Annotated[
        str, typer.Option(metavar="NAME", help=f"Precision of the network: {one_of(PRECISIONS)}.")
    ] = Recipe.precision,
    calibration_of: Annotated[
        str | None,
        typer.Option(
            metavar="STORE",
            help="With --precision int8, the store whose network to use: that of a gallery, for its queries.",
            show_default="the resumed store, else calibrated on the first images",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help=f"Type of the stored values: {one_of(DTYPES)}.")
    ] = Recipe.dtype,
    crop: Annotated[
        str, typer.Option(metavar="NAME", help=f"Crop: {one_of(CROPS)} (the central square).")
    ] = Recipe.crop,
    size_multiple: Annotated[
        int, typer.Option(metavar="PIXELS", help="Round sides to a multiple of this many pixels; 1 = exact.")
    ] = Recipe.size_multiple,
    min_side: Annotated[
        int, typer.Option(metavar="PIXELS", help="Minimum short side; smaller images fail.")
    ] = Recipe.min_side,
    max_aspect: Annotated[
        float, typer.Option(metavar="X", help="Maximum ratio of long to short side; images above it fail.")
    ] = Recipe.max_aspect,
    max_pixels: Annotated[
        int, typer.Option(metavar="N", help="Maximum number of pixels after resizing; images above it fail.")
    ] = Recipe.max_pixels,
    mean: Annotated[
        str | None,
        typer.Option(metavar="R,G,B", help="Mean of the network's input, from 0 to 1.", show_default="by weights"),
    ] = None,
    std: Annotated[
        str | None,
        typer.Option(metavar="R,G,B", help="Standard deviation of the network's input.", show_default="by weights"),
    ] = None,
    interpolation: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help=f"Interpolation when resizing: {one_of(INTERPOLATIONS)}.", show_default="by weights"
        ),
    ] = Recipe.interpolation,
    orientation: Annotated[
        str,
        typer.Option(metavar="NAME", help=f"Orientation: {one_of(ORIENTATIONS)} (pixels as stored)."),
    ] = Recipe.orientation,
    jpeg_draft: Annotated[
        bool, typer.Option("--jpeg-draft", help="Shrink large JPEGs while decoding: faster, but changes values.")
    ] = Recipe.jpeg_draft,
    windows: options.DescribedWindows = None,
    device: options.Devices = RunOptions.device,
    engine: options.Engine = RunOptions.engine,
    batch_size: options.BatchSize = RunOptions.batch_size,
    num_workers: options.NumWorkers = RunOptions.num_workers,
    root: options.Root = None,
    shard_rows: Annotated[
        int | None,
        typer.Option(metavar="N", help="Write a folder of shards of at most N rows.", show_default="65536 in a folder"),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Describe only part I of N of the images, into a folder of its own; see `sppfeat merge`.",
            show_default="all images",
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Describe on a Ray cluster: its address, auto or local (this machine alone).",
            show_default="this process",
        ),
    ] = None,
    image_column: options.ImageColumn = None,
    name_column: options.NameColumn = None,
    resume: options.Resume = True,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Retry failed images.")] = False,
    prune: Annotated[
        bool,
        typer.Option("--prune", help="Remove the rows of images that are gone from the folders and archives given."),
    ] = False,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Describe images of any size by one fixed-length descriptor each, in one HDF5 file or a folder of them (a store).

    Run the same command again to resume: described images are kept, changed and new ones are described. An image that
    cannot be described is reported and marked failed, and never stops the run. Rows of deleted images are kept, unless
    --prune removes them.
    """
    fields: dict[str, Any] = {
        "backbone": backbone,
        "weights": weights if vocabulary is None else _weights(backbone, weights, vocabulary),
        "layer": layer,
        "scales": scales(scale_list),
        "levels": integers("levels", level_list),
        "pooling": pooling,
        "gem_p": gem_p,
        "fuse": fuse,
        "normalize": normalize,
        "precision": precision,
        "dtype": dtype,
        "crop": crop,
        "size_multiple": size_multiple,
        "min_side": min_side,
        "max_aspect": max_aspect,
        "max_pixels": max_pixels,
        "mean": numbers("mean", mean) if mean is not None else None,
        "std": numbers("std", std) if std is not None else None,
        "interpolation": interpolation,
        "orientation": orientation,
        "jpeg_draft": jpeg_draft,
    }
    if recipe_name is None:
        recipe = Recipe(**fields)
    else:
        given = options.given(context)
        recipe = named_recipe(recipe_name, **{name: value for name, value in fields.items() if name in given})
    run = RunOptions(device=device, engine=engine, batch_size=batch_size, num_workers=num_workers)
    options.check_sources(sources)

    from sppfeat.extraction import ShardOptions, calibrated_as, extract_folder
    from sppfeat.images import Columns
    from sppfeat.windows import windows_from

    shards = None
    if shard_rows is not None or part is not None:
        rows = ShardOptions.rows if shard_rows is None else shard_rows
        shards = ShardOptions(rows=rows, part=_part(part) if part is not None else None)

    if calibration_of is not None:
        recipe = calibrated_as(recipe, calibration_of)
    boxes = windows_from(windows) if windows is not None else None
    unit, failures = "image" if boxes is None else "window", f"`sppfeat inspect {output} --failures`"
    with Progress(quiet=quiet, verb="to describe", unit=unit, all_listed_by=failures) as progress:
        done = extract_folder(
            sources,
            output,
            recipe,
            run,
            windows=boxes,
            root=root,
            columns=Columns(image_column, name_column),
            resume=resume,
            retry_failed=retry_failed,
            prune=prune,
            overwrite=overwrite,
            shards=shards,
            cluster=cluster,
            observer=progress,
            stop=progress.stop.is_set,
        )
    if as_json:
        print_json(_document(done))
    elif not quiet:
        typer.echo(_summary(done, recipe.precision, prune=prune))
    if done.interrupted:
        how = "without --overwrite and --no-resume, " if overwrite or not resume else ""
        left = f"{'at least ' * done.stopped}{counted(done.pending, _unit(done))} left"
        print(f"sppfeat: interrupted, {left}; {how}the same command resumes", file=sys.stderr)
        raise typer.Exit(130)
    if done.failed:
        raise typer.Exit(3)


def _weights(backbone: str, weights: str, vocabulary: str) -> str:
    """The weights of each backbone, of which sift-bow has the vocabulary."""
    names = [name.partition("@")[0] for name in backbone.split("+")]
    if SIFT_BOW not in names:
        raise UsageError(f"--vocabulary: expected backbone {SIFT_BOW} with it, found {backbone}")
    if "+" in weights or (weights != Recipe.weights and set(names) == {SIFT_BOW}):
        raise UsageError(f"--vocabulary: expected no weights of backbone {SIFT_BOW} beside it, found {weights}")
    return "+".join(vocabulary if name == SIFT_BOW else weights for name in names)


def _part(text: str) -> tuple[int, int]:
    """`3/64` as numbers."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if found is None:
        raise UsageError(f"--part: expected I/N such as 3/64, found {text!r}")
    return int(found[1]), int(found[2])


def _unit(done: "Extraction") -> str:
    return "image" if done.without_windows is None else "window"


def _document(done: "Extraction") -> dict[str, Any]:
    windows = {} if done.without_windows is None else {"images_without_windows": done.without_windows}
    return {
        "store": done.store,
        "images": done.images,
        "described": done.described,
        "reused": done.reused,
        "failed": done.failed,
        "changed": done.changed,
        "gone": done.gone,
        "removed": done.removed,
        "pending": done.pending,
        "left_out": done.unread,
        "dim": done.dim,
        "seconds": round(done.seconds, 3),
        "images_per_second": round(done.images_per_second, 2),
        "device": done.device,
        "engine": done.engine,
        "stages": {
            "decode": round(done.stages.decode, 3),
            "forward": round(done.stages.forward, 3),
            "write": round(done.stages.write, 3),
        },
        "bottleneck": done.bottleneck,
        **windows,
    }


# Of a shorter run, loading the network is the most.
_SECONDS_THAT_TELL: Final = 10.0


def _bottleneck(done: "Extraction", precision: str) -> str:
    """Which stage limited the speed, and what would help."""
    import importlib.util

    on_cpu = done.device == "cpu"
    if done.bottleneck == "write":
        return "writing; a faster disk would help"
    if done.bottleneck == "decode":
        return "decoding; more cores would help, or --jpeg-draft, which changes values"
    if on_cpu and done.engine == "torch" and importlib.util.find_spec("openvino") is None:
        return "the network; a GPU or OpenVINO (pip install 'sppfeat[cpu]') would help"
    if "sift" in (engines := done.engine.split("+")):  # on the processor, and in float32 alone
        return f"{'SIFT' if len(engines) == 1 else 'the network, or SIFT'}; more cores would help"
    helps = "a GPU or more cores would help" if on_cpu else "a faster GPU would help"
    if precision != "float32":
        return f"the network; {helps}"
    faster = "int8 or bfloat16" if on_cpu else "bfloat16"
    return f"the network; {helps}, or --precision {faster}, which changes values"


def _summary(done: "Extraction", precision: str, *, prune: bool) -> str:
    parts = [f"{done.described} described"]
    for count, word in (
        (done.changed, "of them changed"),
        (done.reused, "reused"),
        (done.failed, "failed"),
        (done.gone, "gone"),
        (done.removed, "removed"),
        (done.repeated, "listed twice"),
        (done.pending, "left"),
        (done.without_windows, "images without windows"),
    ):
        if count:
            parts.append(f"{count} {word}")
    busy = done.stages
    text = f"{printable(done.store)}: {counted(done.images, _unit(done))} ({', '.join(parts)}), {done.dim} values each"
    if busy.decode:
        text += (
            f"\n{done.seconds:.1f} s, {done.images_per_second:.1f} {_unit(done)}s/s on {done.device} ({done.engine}); "
            f"busy: decode {busy.decode:.1f} s, forward {busy.forward:.1f} s (over all threads), "
            f"write {busy.write:.1f} s"
        )
    if done.bottleneck is not None and done.seconds >= _SECONDS_THAT_TELL:
        text += f"\nbottleneck: {_bottleneck(done, precision)}"
    if done.gone and not prune:
        text += "\nto remove the rows of images that are gone: the same command with --prune"
    if done.failed:
        text += f"\nto list failures: sppfeat inspect {printable(done.store)} --failures"
    return text
