"""`sppfeat tune`: tune a network on classes of images."""

from typing import Annotated

import typer

from sppfeat.errors import one_of
from sppfeat.recipe import POOLINGS, Recipe
from sppfeat_cli import options
from sppfeat_cli.output import (
    after_results,
    command_line,
    counted,
    end_learning,
    epochs_document,
    human_bytes,
    integers,
    options_document,
    print_json,
    printable,
)
from sppfeat_cli.progress import Progress

_RECIPE = options.Defaults("sppfeat.recipe:Recipe")
_TUNING = options.Defaults("sppfeat.tuning:TuningOptions")


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: sppfeat tune train/ -o tuned.safetensors --from blocks.5 --epochs 10")(tune)


def tune(
    sources: options.Sources,
    output: options.Output,
    labels: options.Labels = None,
    backbone: options.Backbone = Recipe.backbone,
    weights: options.Weights = Recipe.weights,
    layer: options.Layer = Recipe.layer,
    level_list: options.Levels = _RECIPE.levels,
    pooling: Annotated[
        str, typer.Option(metavar="NAME", help=f"Pooling of each bin: {one_of(POOLINGS)}.")
    ] = Recipe.pooling,
    scale_list: Annotated[
        str,
        typer.Option(
            "--scales", metavar="PIXELS,...", help="Short sides of the images, one after the other from epoch to epoch."
        ),
    ] = _TUNING.scales,
    from_layer: options.FromLayer = None,
    epochs: options.Epochs = _TUNING.epochs,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", metavar="N", help="Images of a step.")
    ] = _TUNING.batch_size,
    learning_rate: options.LearningRate = _TUNING.learning_rate,
    head_rate: options.HeadRate = _TUNING.head_rate,
    optimizer: options.Optimizer = _TUNING.optimizer,
    schedule: options.Schedule = _TUNING.schedule,
    weight_decay: options.WeightDecay = _TUNING.weight_decay,
    held_out: options.HeldOut = _TUNING.held_out,
    checkpoint_minutes: options.CheckpointMinutes = _TUNING.checkpoint_minutes,
    precision: options.Precision = _TUNING.precision,
    seed: options.Seed = _TUNING.seed,
    device: options.Device = _TUNING.device,
    report: options.Report = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Tune a network on your own classes, for `--weights` of any command: images of any size, through the pyramid.

    Classes are the parent folders, or those of --labels. A share of the images is held out, and the epoch that gets
    most of them right is kept: the untuned network if none is better. If interrupted, the same command resumes.
    """
    from sppfeat.report import check_page
    from sppfeat.transfer import read_labels
    from sppfeat.tuning import TuningOptions, write_tuning_page

    chosen = TuningOptions(
        scales=integers("scales", scale_list),
        from_layer=from_layer,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        head_rate=head_rate,
        optimizer=optimizer,
        schedule=schedule,
        weight_decay=weight_decay,
        held_out=held_out,
        checkpoint_minutes=checkpoint_minutes,
        precision=precision,
        seed=seed,
        device=device,
    )
    recipe = Recipe(
        backbone=backbone, weights=weights, layer=layer, levels=integers("levels", level_list), pooling=pooling
    )
    known = read_labels(labels) if labels is not None else None
    options.check_sources(sources)
    page = check_page(report, overwrite=overwrite) if report is not None else None
    with Progress(quiet=quiet, verb="to train on") as progress:
        # It imports torch, so options and files are checked first.
        from sppfeat.tuning.tune import tune as run

        done = run(
            sources,
            output,
            recipe,
            chosen,
            labels=known,
            overwrite=overwrite,
            observer=progress,
            stop=progress.stop.is_set,
        )
    if as_json:
        print_json(
            {
                "weights": done.file,
                "weights_sha256": done.weights_sha256,
                "classes": done.classes,
                "images": done.images,
                "held_out": done.held_out,
                "failed": done.failed,
                "best": done.best,
                "diverged": done.diverged,
                "history": epochs_document(done.history),
                "seconds": done.seconds,
                "peak_bytes": done.peak_bytes,
                "options": options_document(chosen) | {"labels": labels},
                "recipe": options_document(done.recipe),
            }
        )
    elif not quiet and done.file is not None:
        before, after = done.history[0].held_out, done.history[done.best].held_out
        held = (
            ""
            if after is None or before is None
            else f"; {before:.1f} % of held-out images right before, {after:.1f} after"
        )
        typer.echo(
            f"{printable(done.file)}: {len(done.classes)} classes, {counted(done.images, 'image')}; epoch {done.best} "
            f"of {chosen.epochs} kept{held}; {done.seconds:.0f} s, {human_bytes(done.peak_bytes)}"
        )
    if page is not None and done.file is not None:
        with after_results(page, quiet=quiet):
            write_tuning_page(page, done, command=command_line())
    end_learning(done.file, done.history, done.diverged, overwrite=overwrite)
    if done.failed:
        raise typer.Exit(3)
