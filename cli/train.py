"""`sppfeat train`: models."""

from typing import Annotated

import typer

from sppfeat_cli import svm_options, train_detector
from sppfeat_cli.output import convergence_document, finite, options_document, print_json, printable


def register(app: typer.Typer) -> None:
    train = typer.Typer(
        help="Train models that sort images, or find objects on them.",
        epilog="Example: sppfeat train svm feats.h5 -o animals.h5",
        no_args_is_help=True,
    )
    train.command(epilog="Example: sppfeat train svm feats.h5 -o animals.h5")(svm)
    train_detector.register(train)
    app.add_typer(train, name="train")


def svm(
    store: Annotated[str, typer.Argument(metavar="STORE", help="A store of images of two classes or more.")],
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="FILE", help="The model to write.", show_default=False)
    ],
    labels: svm_options.LabelsFile = None,
    c: svm_options.Costs = None,
    c_grid: svm_options.CostGrid = None,
    positive_weight: svm_options.PositiveWeight = 1.0,
    levels: svm_options.Levels = None,
    seed: Annotated[int, typer.Option(help="Of the folds that C is chosen with.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model if it is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Train one linear SVM a class, against the rest, on all images of a store that have a label.

    C is chosen by 3-fold cross-validation. The model keeps the recipe of the descriptors, for `sppfeat predict`.
    """
    from sppfeat.errors import ModelError
    from sppfeat.files import SVM, check_new_file
    from sppfeat.store import open_store
    from sppfeat.svm import SvmOptions
    from sppfeat.transfer import read_labels, save_classifier
    from sppfeat.transfer.train_classifier import train_classifier

    options = SvmOptions(
        costs=svm_options.costs(c, c_grid),
        positive_weight=positive_weight,
        levels=svm_options.levels(levels),
        seed=seed,
        device=device,
    )
    known = read_labels(labels) if labels is not None else None
    check_new_file(output, overwrite=overwrite, error=ModelError, kind=SVM)
    opened = open_store(store)
    classifier = train_classifier(opened, options, labels=known)
    save_classifier(classifier, output, overwrite=overwrite)
    cost = float(classifier.svm.costs[0])
    left_out = len(opened) - classifier.images
    if as_json:
        print_json(
            {
                "model": output,
                "classes": classifier.classes,
                "images": classifier.images,
                "left_out": left_out,
                "dim": classifier.svm.weights.shape[1],
                "C": cost,
                "curve": [{"C": c, "value": value} for c, value in classifier.curve],
                **convergence_document(classifier.convergence),
                "choice_gap": finite(classifier.choice_gap),
                "route": classifier.svm.route,
                "seed": seed,
                "options": options_document(options) | {"labels": labels},
                "recipe": options_document(classifier.recipe),
                "weights_sha256": classifier.weights_sha256,
            }
        )
        return
    best = max((value for _, value in classifier.curve), default=None)
    chosen = "" if best is None else f" (cross-validated accuracy {best:.1f} %)"
    missing = f", {left_out} left out (failed, or without a label)" * bool(left_out)
    typer.echo(
        f"{printable(output)}: {len(classifier.classes)} classes from {classifier.images} images{missing}; "
        f"C = {cost:g}{chosen}; solver: {classifier.svm.route}"
    )
