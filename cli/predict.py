"""`sppfeat predict`: images into the classes of a model."""

import sys
from typing import Annotated, Any

import typer

from sppfeat.recipe import ENGINES, RunOptions
from sppfeat_cli.output import finite, print_json, printable


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: sppfeat predict animals.h5 new-photos/ --json")(predict)


def predict(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model of `sppfeat train svm`.", show_default=False)],
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="Folders, images, text lists, -, or stores.", show_default=False),
    ],
    top: Annotated[int, typer.Option(help="Classes shown for each image.", min=1)] = 3,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = RunOptions.device,
    engine: Annotated[
        str, typer.Option(metavar="NAME", help=f"What runs the network: {' | '.join(ENGINES)}")
    ] = RunOptions.engine,
    batch_size: Annotated[
        int | None, typer.Option("-b", "--batch-size", help="Most images in a pass.", show_default="by device")
    ] = RunOptions.batch_size,
    num_workers: Annotated[
        int | None, typer.Option("-j", "--num-workers", help="Decoding threads.", show_default="one a core")
    ] = RunOptions.num_workers,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say of which class each image is, with scores; above 0 means: of that class.

    Images are described by the model's own recipe. A store that was made by it is taken as it is.
    """
    from sppfeat.transfer import open_classifier
    from sppfeat.transfer import predict as predictions

    classifier = open_classifier(model)
    options = RunOptions(device=device, engine=engine, batch_size=batch_size, num_workers=num_workers)
    results: list[dict[str, Any]] = []
    failed = 0

    def note(text: str) -> None:
        print(f"note: {printable(text)}", file=sys.stderr)

    for one in predictions(classifier, sources, options, note=note):
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
