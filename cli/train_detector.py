"""`sppfeat train detector`: train an SPP-net detector on annotated images."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppfeat.recipe import Recipe, RunOptions
from sppfeat_cli import options
from sppfeat_cli.output import byte_count, counted, integers, print_json, printable, scales
from sppfeat_cli.progress import Progress

if TYPE_CHECKING:
    from sppfeat.detection.train_detector import Training

_RECIPE = options.Defaults("sppfeat.detection:detection_recipe")
_TRAINING = options.Defaults("sppfeat.detection:TrainingOptions")


def register(train: typer.Typer) -> None:
    train.command(epilog="Example: sppfeat train detector VOC2007/ -o det.h5 --split trainval")(detector)


def detector(
    output: options.Output,
    voc: options.VocRoot = None,
    split: Annotated[str | None, options.split("trainval")] = None,
    images: options.Images = None,
    annotations: options.Annotations = None,
    classes: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Classes to learn.", show_default="all that are annotated"),
    ] = None,
    windows: options.Windows = None,
    backbone: options.Backbone = Recipe.backbone,
    weights: options.Weights = Recipe.weights,
    layer: options.Layer = Recipe.layer,
    scale_list: options.Scales = _RECIPE.scales,
    level_list: options.Levels = _RECIPE.levels,
    c: Annotated[float, typer.Option("--c", metavar="C", help="Cost C of the SVMs.")] = _TRAINING.c,
    positive_weight: options.PositiveWeight = _TRAINING.positive_weight,
    passes: Annotated[
        int, typer.Option(metavar="N", help="Maximum number of passes over the images for hard negatives.")
    ] = _TRAINING.passes,
    box_regression: Annotated[
        bool, typer.Option("--box-regression/--no-box-regression", help="Learn to move windows onto objects.")
    ] = _TRAINING.box_regression,
    memory: Annotated[str | None, options.memory("1 GiB, for rows of windows")] = None,
    seed: options.Seed = _TRAINING.seed,
    device: options.Device = RunOptions.device,
    engine: options.Engine = RunOptions.engine,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Train an SPP-net detector: one linear SVM per class on windows of shared feature maps, and box regression.

    Without --windows, windows are proposed first and kept beside the detector (det.windows.h5 for det.h5). If
    interrupted, the same command resumes; the detector is written at the end (until then it is null in the JSON).
    Invalid annotations are reported and skipped, and the exit code is 3.
    """
    run = RunOptions(device=device, engine=engine)

    from sppfeat.detection import TrainingOptions, detection_recipe, read_annotations, select_classes
    from sppfeat.windows import windows_from

    recipe = detection_recipe(
        backbone=backbone,
        weights=weights,
        layer=layer,
        scales=scales(scale_list),
        levels=integers("levels", level_list),
    )
    chosen = TrainingOptions(
        c=c,
        positive_weight=positive_weight,
        passes=passes,
        box_regression=box_regression,
        memory=byte_count("memory", memory) if memory is not None else TrainingOptions.memory,
        seed=seed,
    )
    options.check_proposals(windows)
    with Progress(quiet=quiet, verb="to train on") as progress:
        annotated = read_annotations(voc, split=split, images=images, annotations=annotations)
        if classes is not None:
            annotated = select_classes(annotated, [name.strip() for name in classes.split(",")])
        for name, reason in annotated.problems.items():
            progress.note(f"skipped: {name}: {reason}")
        for note in annotated.notes:
            progress.note(note)
        # It imports torch, so annotations are checked first.
        from sppfeat.detection.train_detector import train_detector

        done = train_detector(
            annotated,
            windows_from(windows) if windows is not None else None,
            output,
            recipe,
            chosen,
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
            f"sppfeat: interrupted, {counted(done.pending, 'image')} left in this pass; {how}the same command resumes",
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
        f"{what}{counted(len(done.classes), 'class')}, {counted(objects, 'object')} in "
        f"{counted(done.images, 'image')}, "
        f"{counted(sum(done.hard), 'hard negative')} in {counted(len(done.hard), 'pass')}\n"
        f"{done.seconds:.1f} s on {done.device}{f'; busy: {stages} (over all threads)' * bool(stages)}"
    )
    if done.failed or done.notes:
        skipped, notes = counted(len(done.failed), "image"), counted(len(done.notes), "note")
        text += f"\n{skipped} skipped, {notes} on others: --json lists them all"
    return text
