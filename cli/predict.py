"""`sppfeat predict`: classify images."""

import sys
from typing import Annotated, Any

import typer

from sppfeat.recipe import RunOptions
from sppfeat_cli import options
from sppfeat_cli.output import finite, print_json, printable


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: sppfeat predict animals.h5 new-photos/ --json")(predict)


def predict(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model made by `sppfeat train svm`.", show_default=False)
    ],
    sources: options.SourcesOrStores,
    top: Annotated[int, typer.Option(metavar="N", help="Number of classes to print per image.", min=1)] = 3,
    device: options.Device = RunOptions.device,
    engine: options.Engine = RunOptions.engine,
    batch_size: options.BatchSize = RunOptions.batch_size,
    num_workers: options.NumWorkers = RunOptions.num_workers,
    as_json: options.AsJson = False,
) -> None:
    """Classify images: print the best classes of each image, with scores.

    A score above 0 means that the image belongs to the class. Images are described with the model's own recipe;
    descriptors of a store with that recipe are used as they are.
    """
    chosen = RunOptions(device=device, engine=engine, batch_size=batch_size, num_workers=num_workers)
    options.check_sources(sources)

    from sppfeat.transfer import open_classifier
    from sppfeat.transfer import predict as predictions

    classifier = open_classifier(model)
    results: list[dict[str, Any]] = []
    failed = 0

    def note(text: str) -> None:
        print(f"note: {printable(text)}", file=sys.stderr)

    for one in predictions(classifier, sources, chosen, note=note):
        if one.scores is None:
            failed += 1
            print(f"failed: {printable(one.name)}: {printable(one.error or '')}", file=sys.stderr)
            results.append({"image": one.name, "error": one.error})
            continue
        best = (-one.scores).argsort(kind="stable")[:top].tolist()
        ranked = [(classifier.classes[at], float(one.scores[at])) for at in best]
        if as_json:
            results.append(
                {
                    "image": one.name,
                    "label": ranked[0][0],
                    "score": finite(ranked[0][1]),
                    "top": [{"label": label, "score": finite(score)} for label, score in ranked],
                }
            )
        else:
            shown = ", ".join(f"{printable(label)} {score:.2f}" for label, score in ranked)
            typer.echo(f"{printable(one.name)}: {shown}")
    if as_json:
        print_json({"results": results})
    if failed:
        raise typer.Exit(3)
