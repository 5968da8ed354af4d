"""`sppfeat predict`: classify images."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppfeat.recipe import RunOptions
from sppfeat_cli import options
from sppfeat_cli.output import after_results, command_line, finite, print_json, printable
from sppfeat_cli.progress import Progress

if TYPE_CHECKING:
    from sppfeat.transfer import Ranked


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: sppfeat predict animals.h5 new-photos/ --html classes.html")(predict)


def predict(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model made by `sppfeat train svm`.", show_default=False)
    ],
    sources: options.SourcesOrStores,
    top: Annotated[int, typer.Option(metavar="N", help="Number of classes to print per image.")] = 3,
    csv: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Also write a CSV file of the classes of each image.", show_default=False),
    ] = None,
    html: options.Html = None,
    root: options.Root = None,
    weights: Annotated[
        str | None, typer.Option(metavar="FILE", help="Weights file of the model, if it has moved.", show_default=False)
    ] = None,
    overwrite: options.Overwrite = False,
    device: options.Device = RunOptions.device,
    engine: options.Engine = RunOptions.engine,
    batch_size: options.BatchSize = RunOptions.batch_size,
    num_workers: options.NumWorkers = RunOptions.num_workers,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Classify images: print the best classes of each image, with scores, ordered by path.

    The class with the highest score is the answer; where all scores are below 0, the image may be of none. Images are
    described with the model's own recipe; descriptors of a store with that recipe are used as they are. Paths are
    printed as given, or relative to --root.
    """
    chosen = RunOptions(device=device, engine=engine, batch_size=batch_size, num_workers=num_workers)
    options.check_sources(sources)

    from sppfeat.report import check_page
    from sppfeat.transfer import (
        check_predictions_csv,
        open_classifier,
        ranked,
        write_predictions_csv,
        write_predictions_page,
    )
    from sppfeat.transfer import predict as predictions

    page = check_page(html, overwrite=overwrite) if html is not None else None
    table = check_predictions_csv(csv, overwrite=overwrite) if csv is not None else None
    classifier = open_classifier(model)
    with Progress(quiet=quiet, verb="to classify", can_finish_early=False) as progress:

        def note(text: str) -> None:
            progress.note(f"note: {text}")

        found = ranked(
            classifier,
            predictions(classifier, sources, chosen, weights=weights, root=root, note=note, observer=progress),
            top,
        )
    if as_json:
        print_json({"results": [_document(one) for one in found]})
    else:
        for one in found:
            if one.error is None:
                shown = ", ".join(f"{printable(label)} {score:.2f}" for label, score in one.top)
                typer.echo(f"{printable(one.path)}: {shown}")
    if table is not None:
        with after_results(table, quiet=quiet):
            write_predictions_csv(table, found)
    if page is not None:
        with after_results(page, quiet=quiet):
            write_predictions_page(page, found, title=f"Classes by {model}", command=command_line())
    if any(one.error is not None for one in found):
        raise typer.Exit(3)


def _document(one: "Ranked") -> dict[str, Any]:
    if one.error is not None:
        return {"image": one.path, "error": one.error}
    return {
        "image": one.path,
        "label": one.top[0][0],
        "score": finite(one.top[0][1]),
        "top": [{"label": label, "score": finite(score)} for label, score in one.top],
    }
