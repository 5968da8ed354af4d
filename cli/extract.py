"""`sppfeat extract`: images into a store."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppfeat.recipe import (
    CROPS,
    DTYPES,
    ENGINES,
    FUSIONS,
    INTERPOLATIONS,
    NORMALIZATIONS,
    ORIENTATIONS,
    POOLINGS,
    PRECISIONS,
    Recipe,
    RunOptions,
)
from sppfeat_cli.output import counted, integers, numbers, print_json, printable, scales
from sppfeat_cli.progress import Progress

if TYPE_CHECKING:
    from sppfeat.extraction import Extraction

_WHAT, _HOW, _STORE = "What is described (kept in the store as its recipe)", "How fast", "The store"


def _one_of(valid: tuple[str, ...]) -> str:
    return " | ".join(valid)


def _commas(values: tuple[Any, ...]) -> str:
    return ",".join(map(str, values))


def register(app: typer.Typer) -> None:
    app.command(
        epilog="Example: sppfeat extract photos/ -o feats.h5 --scales 224,320 --levels 4,2,1",
    )(extract)


def extract(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Folders, images, text lists (.txt, a path a line), or - for a list on standard input.",
            show_default=False,
        ),
    ],
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="FILE", help="The store to write or resume.", show_default=False)
    ],
    backbone: Annotated[
        str, typer.Option(help="efficientnet_lite0|1|2, torchvision:NAME or timm:NAME; see `sppfeat models`.")
    ] = Recipe.backbone,
    weights: Annotated[
        str, typer.Option(metavar="FILE", help="Weights file (.safetensors, .pth), `pretrained`, or `random`.")
    ] = Recipe.weights,
    layer: Annotated[
        str | None,
        typer.Option(
            help="Module whose output is pooled; see `sppfeat models NAME`.", show_default="the backbone's own"
        ),
    ] = Recipe.layer,
    scale_list: Annotated[
        str, typer.Option("--scales", metavar="PIXELS,...", help="Short sides, or `native` for no resizing.")
    ] = _commas(Recipe.scales),
    level_list: Annotated[
        str, typer.Option("--levels", metavar="N,...", help="Pyramid levels; level n is an n x n grid.")
    ] = _commas(Recipe.levels),
    pooling: Annotated[str, typer.Option(metavar="NAME", help=_one_of(POOLINGS))] = Recipe.pooling,
    gem_p: Annotated[float, typer.Option(help="Exponent of gem pooling.")] = Recipe.gem_p,
    fuse: Annotated[
        str, typer.Option(metavar="NAME", help=f"How scales become one descriptor: {_one_of(FUSIONS)}")
    ] = Recipe.fuse,
    normalize: Annotated[
        str, typer.Option(metavar="NAME", help=f"Of each scale's descriptor: {_one_of(NORMALIZATIONS)}")
    ] = Recipe.normalize,
    precision: Annotated[
        str, typer.Option(metavar="NAME", help=f"Of the network's arithmetic: {_one_of(PRECISIONS)}")
    ] = Recipe.precision,
    dtype: Annotated[str, typer.Option(metavar="NAME", help=f"Of the stored values: {_one_of(DTYPES)}")] = Recipe.dtype,
    crop: Annotated[
        str, typer.Option(metavar="NAME", help=f"Whole picture or central square: {_one_of(CROPS)}")
    ] = Recipe.crop,
    size_multiple: Annotated[
        int, typer.Option(help="Sides are rounded to a multiple of this many pixels; 1 = exact.")
    ] = Recipe.size_multiple,
    min_side: Annotated[int, typer.Option(help="Pictures with a shorter side fail.")] = Recipe.min_side,
    max_aspect: Annotated[
        float, typer.Option(help="Pictures with a larger long/short ratio fail.")
    ] = Recipe.max_aspect,
    max_pixels: Annotated[
        int, typer.Option(help="Pictures with more pixels than this once resized fail.")
    ] = Recipe.max_pixels,
    mean: Annotated[
        str | None, typer.Option(metavar="R,G,B", help="Input mean, 0 to 1.", show_default="that of the weights")
    ] = None,
    std: Annotated[
        str | None, typer.Option(metavar="R,G,B", help="Input standard deviation.", show_default="that of the weights")
    ] = None,
    interpolation: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=_one_of(INTERPOLATIONS), show_default="that of the weights"),
    ] = Recipe.interpolation,
    orientation: Annotated[
        str, typer.Option(metavar="NAME", help=f"Turn upright, or take pixels as stored: {_one_of(ORIENTATIONS)}")
    ] = Recipe.orientation,
    jpeg_draft: Annotated[
        bool, typer.Option("--jpeg-draft", help="Shrink large JPEGs while decoding: faster, other values.")
    ] = Recipe.jpeg_draft,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:N, or several GPUs: cuda:N,M,...")
    ] = RunOptions.device,
    engine: Annotated[
        str, typer.Option(metavar="NAME", help=f"What runs the network: {_one_of(ENGINES)}")
    ] = RunOptions.engine,
    batch_size: Annotated[
        int | None, typer.Option("-b", "--batch-size", help="Most pictures in a pass.", show_default="by device")
    ] = RunOptions.batch_size,
    num_workers: Annotated[
        int | None, typer.Option("-j", "--num-workers", help="Decoding threads.", show_default="one a core")
    ] = RunOptions.num_workers,
    windows: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Describe these windows of the images instead: .csv or .json, with name,x1,y1,x2,y2 in pixels, or "
            "what `sppfeat windows` made.",
            show_default="whole images",
        ),
    ] = None,
    root: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Names are relative to this.", show_default="the folder that holds all sources"
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on with a store that is there.")] = True,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try failed images again.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew, replacing the store.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors (and the JSON).")] = False,
) -> None:
    """Describe images of any size by one fixed-length descriptor each, into one HDF5 file.

    Run the same command again to resume: described images are kept, changed and new ones are described. An image that
    cannot be described is reported and marked failed, and never stops the run.
    """
    recipe = Recipe(
        backbone=backbone,
        weights=weights,
        layer=layer,
        scales=scales(scale_list),
        levels=integers("levels", level_list),
        pooling=pooling,
        gem_p=gem_p,
        fuse=fuse,
        normalize=normalize,
        precision=precision,
        dtype=dtype,
        crop=crop,
        size_multiple=size_multiple,
        min_side=min_side,
        max_aspect=max_aspect,
        max_pixels=max_pixels,
        mean=numbers("mean", mean) if mean is not None else None,  # type: ignore[arg-type]
        std=numbers("std", std) if std is not None else None,  # type: ignore[arg-type]
        interpolation=interpolation,
        orientation=orientation,
        jpeg_draft=jpeg_draft,
    )
    options = RunOptions(device=device, engine=engine, batch_size=batch_size, num_workers=num_workers)

    from sppfeat.extraction import extract_folder
    from sppfeat.windows import windows_from

    boxes = windows_from(windows) if windows is not None else None
    unit, failures = "image" if boxes is None else "window", f"`sppfeat inspect {output} --failures`"
    with Progress(quiet=quiet, verb="to describe", unit=unit, all_listed_by=failures) as progress:
        done = extract_folder(
            sources,
            output,
            recipe,
            options,
            windows=boxes,
            root=root,
            resume=resume,
            retry_failed=retry_failed,
            overwrite=overwrite,
            observer=progress,
            stop=progress.stop.is_set,
        )
    if as_json:
        print_json(_document(done))
    elif not quiet:
        typer.echo(_summary(done))
    if done.interrupted:
        how = "without --overwrite and --no-resume, " if overwrite or not resume else ""
        left = f"{counted(done.pending, _unit(done))} left"
        print(f"sppfeat: interrupted, {left}; {how}the same command resumes", file=sys.stderr)
        raise typer.Exit(130)
    if done.failed:
        raise typer.Exit(3)


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
        "pending": done.pending,
        "dim": done.dim,
        "seconds": round(done.seconds, 3),
        "images_per_second": round(done.images_per_second, 2),
        "device": done.device,
        "engine": done.engine,
        "stages": {
            "decode": round(done.decode, 3),
            "forward": round(done.forward, 3),
            "write": round(done.write, 3),
        },
        "bottleneck": done.bottleneck,
        **windows,
    }


def _bottleneck(done: "Extraction") -> str:
    """Which stage held up the run, and what would help."""
    import importlib.util

    on_cpu = done.device == "cpu"
    if done.bottleneck == "write":
        return "writing; a faster disk would help"
    if done.bottleneck == "decode":
        return "decoding; more cores would help, or, with other values, --jpeg-draft"
    if on_cpu and done.engine == "torch" and importlib.util.find_spec("openvino") is None:
        return "the network; pip install 'sppfeat[cpu]' would help, or a GPU"
    helps = "a GPU or more cores would help" if on_cpu else "a faster GPU would help"
    return f"the network; {helps}, or, with other values, --precision bfloat16"


def _summary(done: "Extraction") -> str:
    parts = [f"{done.described} described"]
    for count, word in (
        (done.changed, "of them changed"),
        (done.reused, "reused"),
        (done.failed, "failed"),
        (done.gone, "gone"),
        (done.repeated, "listed twice"),
        (done.pending, "left"),
        (done.without_windows, "images without windows"),
    ):
        if count:
            parts.append(f"{count} {word}")
    text = (
        f"{printable(done.store)}: {counted(done.images, _unit(done))} ({', '.join(parts)}), {done.dim} values each\n"
        f"{done.seconds:.1f} s, {done.images_per_second:.1f} {_unit(done)}s/s on {done.device} ({done.engine}); "
        f"busy: decode {done.decode:.1f} s, forward {done.forward:.1f} s (over all threads), write {done.write:.1f} s"
    )
    if done.bottleneck is not None:
        text += f"\nbottleneck: {_bottleneck(done)}"
    if done.failed:
        text += f"\nwhich failed, and why: sppfeat inspect {printable(done.store)} --failures"
    return text
