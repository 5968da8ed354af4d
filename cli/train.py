"""`sppfeat train`: train models."""

from typing import Annotated

import typer

from sppfeat_cli import options, train_detector, train_vocabulary
from sppfeat_cli.commands import Commands, Group
from sppfeat_cli.output import convergence_document, finite, options_document, print_json, printable, tell_lost

_SVM = options.Defaults("sppfeat.svm:SvmOptions")


def register(app: typer.Typer) -> None:
    train = Commands(
        cls=Group,
        help="Train models that classify images or detect objects in them, and vocabularies that describe images.",
        epilog="Example: sppfeat train svm feats.h5 -o animals.h5",
        no_args_is_help=True,
    )
    train.command(epilog="Example: sppfeat train svm feats.h5 -o animals.h5")(svm)
    train_detector.register(train)
    train_vocabulary.register(train)
    app.add_typer(train, name="train")


def svm(
    store: Annotated[
        str, typer.Argument(metavar="STORE", help="Store of images of two or more classes.", show_default=False)
    ],
    output: options.Output,
    labels: options.Labels = None,
    c: options.Costs = None,
    c_grid: options.CostGrid = None,
    positive_weight: options.PositiveWeight = _SVM.positive_weight,
    levels: options.StoredLevels = None,
    only: options.StoredParts = None,
    seed: options.Seed = _SVM.seed,
    device: options.Device = _SVM.device,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Train one linear SVM per class, against the rest, on all labeled images of a store.

    C is chosen by 3-fold cross-validation. The model keeps the recipe of the descriptors, for `sppfeat predict`.
    """
    from sppfeat.errors import ModelError
    from sppfeat.files import SVM, check_new_file
    from sppfeat.store import open_store
    from sppfeat.svm import SvmOptions
    from sppfeat.transfer import read_labels, save_classifier

    chosen = SvmOptions(
        costs=options.costs(c, c_grid),
        positive_weight=positive_weight,
        levels=options.stored_levels(levels),
        only=options.stored_parts(only),
        seed=seed,
        device=device,
    )
    known = read_labels(labels) if labels is not None else None
    check_new_file(output, overwrite=overwrite, error=ModelError, kind=SVM)
    opened = open_store(store)
    tell_lost(opened)
    # It imports torch, so options and files are checked first.
    from sppfeat.transfer.train_classifier import train_classifier

    classifier = train_classifier(opened, chosen, labels=known)
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
                "options": options_document(chosen) | {"labels": labels},
                "recipe": options_document(classifier.recipe),
                "weights_sha256": classifier.weights_sha256,
            }
        )
        return
    best = max((value for _, value in classifier.curve), default=None)
    accuracy = "" if best is None else f" (cross-validated accuracy {best:.1f} %)"
    missing = f", {left_out} skipped (failed or without a label)" * bool(left_out)
    typer.echo(
        f"{printable(output)}: {len(classifier.classes)} classes from {classifier.images} images{missing}; "
        f"C = {cost:g}{accuracy}; solver: {classifier.svm.route}"
    )
