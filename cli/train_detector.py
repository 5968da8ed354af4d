"""`sppfeat train detector`: train an SPP-net detector on annotated images."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppfeat.errors import UsageError
from sppfeat.recipe import Recipe, RunOptions
from sppfeat_cli import options
from sppfeat_cli.output import (
    after_results,
    byte_count,
    command_line,
    counted,
    end_learning,
    epochs_document,
    integers,
    print_json,
    printable,
    scales,
)
from sppfeat_cli.progress import Progress

if TYPE_CHECKING:
    from sppfeat.detection.train_detector import Training
    from sppfeat.detection.tune_detector import TunedDetector

_RECIPE = options.Defaults("sppfeat.detection:detection_recipe")
_TRAINING = options.Defaults("sppfeat.detection:TrainingOptions")
_LEARNING = options.Defaults("sppfeat.training:LearningOptions")


def register(train: typer.Typer) -> None:
    train.command(epilog="Example: sppfeat train detector VOC2007/ -o det.h5 --split trainval")(detector)


def detector(
    context: typer.Context,
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
    calibration: Annotated[
        bool,
        typer.Option(
            "--calibration/--no-calibration",
            help="Turn scores into probabilities, which takes one more pass over the images.",
        ),
    ] = _TRAINING.calibration,
    memory: Annotated[str | None, options.memory("1 GiB, for rows of windows")] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Tune the network with the detector, as Fast R-CNN, instead of training SVMs on its output."
        ),
    ] = False,
    train_scales: Annotated[
        str | None,
        typer.Option(
            metavar="PIXELS,...",
            help="Short sides of the images, one after the other from epoch to epoch.",
            show_default="those of --scales",
        ),
    ] = None,
    from_layer: options.FromLayer = None,
    epochs: options.Epochs = _LEARNING.epochs,
    learning_rate: options.LearningRate = _LEARNING.learning_rate,
    head_rate: options.HeadRate = _LEARNING.head_rate,
    optimizer: options.Optimizer = _LEARNING.optimizer,
    schedule: options.Schedule = _LEARNING.schedule,
    weight_decay: options.WeightDecay = _LEARNING.weight_decay,
    held_out: options.HeldOut = _LEARNING.held_out,
    checkpoint_minutes: options.CheckpointMinutes = _LEARNING.checkpoint_minutes,
    precision: options.Precision = _LEARNING.precision,
    report: options.Report = None,
    seed: options.Seed = _TRAINING.seed,
    device: options.Device = RunOptions.device,
    engine: options.Engine = RunOptions.engine,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Train an SPP-net detector: one linear SVM per class on windows of shared feature maps, box regression, and the
    probabilities of scores.

    Without --windows, windows are proposed first and kept beside the detector (det.windows.h5 for det.h5). If
    interrupted, the same command resumes; the detector is written at the end (until then it is null in the JSON).
    Invalid annotations are reported and skipped, and the exit code is 3.
    """
    run = RunOptions(device=device, engine=engine)
    _check_given(options.given(context), tune)

    from sppfeat.detection import TrainingOptions, detection_recipe, read_annotations, select_classes
    from sppfeat.report import check_page
    from sppfeat.training import LearningOptions
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
        calibration=calibration,
        memory=byte_count("memory", memory) if memory is not None else TrainingOptions.memory,
        seed=seed,
    )
    options.check_proposals(windows)
    page = check_page(report, overwrite=overwrite) if report is not None else None
    with Progress(quiet=quiet, verb="to train on") as progress:
        annotated = read_annotations(voc, split=split, images=images, annotations=annotations)
        if classes is not None:
            annotated = select_classes(annotated, [name.strip() for name in classes.split(",")])
        for name, reason in annotated.problems.items():
            progress.note(f"skipped: {name}: {reason}")
        for note in annotated.notes:
            progress.note(note)
        # They import torch, so annotations are checked first.
        proposed = windows_from(windows) if windows is not None else None
        watched: dict[str, Any] = {"overwrite": overwrite, "observer": progress, "stop": progress.stop.is_set}
        if tune:
            from sppfeat.detection.tune_detector import tune_detector

            learning = LearningOptions(
                scales=integers("train-scales", train_scales) if train_scales is not None else None,
                from_layer=from_layer,
                epochs=epochs,
                learning_rate=learning_rate,
                head_rate=head_rate,
                optimizer=optimizer,
                schedule=schedule,
                weight_decay=weight_decay,
                precision=precision,
                held_out=held_out,
                checkpoint_minutes=checkpoint_minutes,
                seed=seed,
                device=device,
            )
            tuned = tune_detector(annotated, proposed, output, recipe, learning, **watched)
        else:
            from sppfeat.detection.train_detector import train_detector

            done = train_detector(annotated, proposed, output, recipe, chosen, run, **watched)
    if tune:
        _end_tuning(tuned, page, as_json, quiet, overwrite)
        return
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


def _check_given(given: set[str], tune: bool) -> None:
    """Raise UsageError for options of the one way to train that come with the other."""
    svms = {"c", "positive_weight", "passes", "box_regression", "calibration", "memory", "engine"}
    learning = {
        "train_scales",
        "from_layer",
        "epochs",
        "learning_rate",
        "head_rate",
        "optimizer",
        "schedule",
        "weight_decay",
        "held_out",
    }
    learning |= {"checkpoint_minutes", "precision", "report"}
    if wrong := sorted(given & (svms if tune else learning)):
        name = {"from_layer": "from"}.get(wrong[0], wrong[0].replace("_", "-"))
        raise UsageError(f"--{name} is for SVMs: expected no --tune" if tune else f"--{name}: expected --tune with it")


def _end_tuning(done: "TunedDetector", page: Path | None, as_json: bool, quiet: bool, overwrite: bool) -> None:
    if as_json:
        print_json(
            {
                "detector": done.file,
                "weights": done.weights,
                "images": done.images,
                "held_out": done.held_out,
                "classes": done.classes,
                "positives": done.positives,
                "failed": done.failed,
                "notes": done.notes,
                "best": done.best,
                "diverged": done.diverged,
                "history": epochs_document(done.history),
                "seconds": round(done.seconds, 3),
                "device": done.device,
            }
        )
    elif not quiet and done.file is not None:
        text = (
            f"{printable(done.file)}: {'tuned detector' if done.weights else 'detector'} of "
            f"{counted(len(done.classes), 'class')}, {counted(sum(done.positives.values()), 'object')} in "
            f"{counted(done.images, 'image')}"
        )
        if done.options.epochs:
            held = done.history[done.best].held_out
            text += f"; epoch {done.best} of {done.options.epochs} kept" + (
                "" if held is None else f", mAP {held:.1f} on {counted(done.held_out, 'held-out image')}"
            )
        if done.weights is not None:
            text += f"\n{printable(done.weights)}: its network"
        typer.echo(f"{text}\n{done.seconds:.1f} s on {done.device}")
    if page is not None and done.file is not None:
        from sppfeat.detection import write_detector_page

        with after_results(page, quiet=quiet):
            write_detector_page(page, done, command=command_line())
    end_learning(done.file, done.history, done.diverged, overwrite=overwrite)
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
