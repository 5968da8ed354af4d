"""`sppfeat train detector`: an SPP-net detector from annotated images."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppfeat_cli.output import counted, integers, print_json, printable, scales
from sppfeat_cli.progress import Progress

if TYPE_CHECKING:
    from sppfeat.detection.train_detector import Training

VocRoot = Annotated[
    str | None,
    typer.Argument(
        metavar="[VOCROOT]",
        help="Folder in the VOC layout (JPEGImages, Annotations, ImageSets/Main).",
        show_default=False,
    ),
]
Images = Annotated[
    str | None, typer.Option(metavar="DIR", help="The images, where there is no VOC layout.", show_default=False)
]
Annotations = Annotated[
    str | None,
    typer.Option(metavar="DIR|JSON", help="Their VOC XML files, or a COCO instances file.", show_default=False),
]
Windows = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="What `sppfeat windows` made of the images, or .csv, .json.", show_default="found now"
    ),
]


def register(train: typer.Typer) -> None:
    train.command(epilog="Example: sppfeat train detector VOC2007/ -o det.h5 --split trainval")(detector)


def detector(
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="FILE", help="The detector to write.", show_default=False)
    ],
    voc: VocRoot = None,
    split: Annotated[
        str | None, typer.Option(help="List of images below ImageSets/Main.", show_default="trainval")
    ] = None,
    images: Images = None,
    annotations: Annotations = None,
    classes: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Learn only these.", show_default="all that occur")
    ] = None,
    windows: Windows = None,
    backbone: Annotated[
        str | None, typer.Option(help="See `sppfeat models`.", show_default="efficientnet_lite0")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="FILE", help="Weights file, or `random`.", show_default="pretrained")
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="Whose output is pooled.", show_default="the backbone's own")
    ] = None,
    scale_list: Annotated[
        str | None, typer.Option("--scales", metavar="PIXELS,...", help="Short sides.", show_default="480")
    ] = None,
    level_list: Annotated[
        str | None, typer.Option("--levels", metavar="N,...", help="Pyramid levels.", show_default="3,2,1")
    ] = None,
    c: Annotated[float, typer.Option("--c", help="Cost of the SVMs.")] = 0.001,
    positive_weight: Annotated[float, typer.Option(help="Weight of objects against other windows.")] = 2.0,
    passes: Annotated[int, typer.Option(help="Most passes over the images for hard negatives.")] = 3,
    box_regression: Annotated[
        bool, typer.Option("--box-regression/--no-box-regression", help="Learn to move windows onto objects.")
    ] = True,
    memory: Annotated[int, typer.Option(metavar="MB", help="For rows of windows.")] = 1074,
    seed: Annotated[int, typer.Option(help="Of all that is drawn by lot.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    engine: Annotated[str, typer.Option(help="auto, torch or openvino.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew, replacing the detector.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors (and the JSON).")] = False,
) -> None:
    """Train an SPP-net detector: one linear SVM a class on windows of shared feature maps, and box regression.

    Without --windows they are found first and kept beside the detector (det.windows.h5 for det.h5). Stopped, the same
    command goes on; until it ends, there is no detector (null in the JSON). What is odd in the annotations is named and
    left out; exit code 3 then.
    """
    from sppfeat.detection import TrainingOptions, detection_recipe, read_annotations, select_classes
    from sppfeat.detection.train_detector import train_detector
    from sppfeat.recipe import RunOptions
    from sppfeat.windows import windows_from

    given: dict[str, Any] = {
        "backbone": backbone,
        "weights": weights,
        "layer": layer,
        "scales": None if scale_list is None else scales(scale_list),
        "levels": None if level_list is None else integers("levels", level_list),
    }
    recipe = detection_recipe(**{name: value for name, value in given.items() if value is not None})
    options = TrainingOptions(
        c=c,
        positive_weight=positive_weight,
        passes=passes,
        box_regression=box_regression,
        cache_bytes=memory * 1_000_000,
        seed=seed,
    )
    run = RunOptions(device=device, engine=engine)
    with Progress(quiet=quiet, verb="to learn from") as progress:
        annotated = read_annotations(voc, split=split, images=images, annotations=annotations)
        if classes is not None:
            annotated = select_classes(annotated, [name.strip() for name in classes.split(",")])
        for name, reason in annotated.problems.items():
            progress.note(f"left out: {name}: {reason}")
        for note in annotated.notes:
            progress.note(note)
        done = train_detector(
            annotated,
            windows_from(windows) if windows is not None else None,
            output,
            recipe,
            options,
            run,
            overwrite=overwrite,
            observer=progress,
            stop=progress.stop.is_set,
        )
    if as_json:
        print_json(_document(done))
    elif not quiet:
        typer.echo(_summary(done))
    if done.interrupted:
        how = "without --overwrite, " if overwrite and done.stages else ""
        print(
            f"sppfeat: interrupted, {counted(done.pending, 'image')} left of this pass; {how}the same command resumes",
            file=sys.stderr,
        )
        raise typer.Exit(130)
    if done.failed or done.notes:
        raise typer.Exit(3)


def _document(done: "Training") -> dict[str, Any]:
    return {
        "detector": done.file,
        "images": done.images,
        "classes": done.classes,
        "positives": done.positives,
        "hard_negatives": done.hard,
        "rows": done.rows,
        "failed": done.failed,
        "notes": done.notes,
        "pending": done.pending,
        "seconds": round(done.seconds, 3),
        "device": done.device,
        "stages": {name: round(seconds, 3) for name, seconds in done.stages.items()},
    }


def _summary(done: "Training") -> str:
    objects = sum(done.positives.values())
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in done.stages.items())
    what = "no detector yet: " if done.file is None else f"{printable(done.file)}: detector of "
    text = (
        f"{what}{counted(len(done.classes), 'class')}, {counted(objects, 'object')} on "
        f"{counted(done.images, 'image')}, "
        f"{counted(sum(done.hard), 'hard negative')} in {counted(len(done.hard), 'pass')}\n"
        f"{done.seconds:.1f} s on {done.device}{f'; busy: {stages} (over all threads)' * bool(stages)}"
    )
    if done.failed or done.notes:
        left_out, notes = counted(len(done.failed), "image"), counted(len(done.notes), "note")
        text += f"\n{left_out} left out, {notes} on others: --json lists them all"
    return text
