"""`sppfeat evaluate all`: recipes times data sets."""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sppfeat.recipe import RunOptions
from sppfeat_cli import options
from sppfeat_cli.output import after_results, command_line, print_json, printable
from sppfeat_cli.progress import Progress

if TYPE_CHECKING:
    from sppfeat.progress import Observer


def register(evaluate: typer.Typer) -> None:
    evaluate.command(
        name="all", epilog="Example: sppfeat evaluate all recipes.toml caltech101/ VOC2007/ -o results/ --report r.html"
    )(evaluate_all)


def evaluate_all(
    recipes: Annotated[
        str,
        typer.Argument(metavar="RECIPES.toml", help="A table [NAME] of options for each recipe.", show_default=False),
    ],
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...",
            help="Folders with one folder per class, or in VOC's layout; or TOML files.",
            show_default=False,
        ),
    ],
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="DIR", help="Folder of the stores and results.", show_default=False)
    ],
    device: options.Device = RunOptions.device,
    engine: options.Engine = RunOptions.engine,
    batch_size: options.BatchSize = RunOptions.batch_size,
    num_workers: options.NumWorkers = RunOptions.num_workers,
    report: options.Report = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Describe data sets with several recipes, evaluate each by its protocol, and print one Markdown table.

    A folder in VOC's layout is evaluated by protocol voc2007, one with train/ and test/ or val/ by split, others by
    random. A TOML file of data sets has a table [NAME] for each: path and options of `evaluate transfer`, or gallery,
    queries and options of `evaluate retrieval`. What an earlier run into the same folder has done is kept.
    """
    from sppfeat.matrix import evaluate_matrix, read_data, read_recipes, table, write_matrix_page
    from sppfeat.report import check_page

    run = RunOptions(device=device, engine=engine, batch_size=batch_size, num_workers=num_workers)
    known, sets = read_recipes(recipes), read_data(data)
    page = check_page(report, overwrite=overwrite) if report is not None else None
    with contextlib.ExitStack() as shown:

        def observed(title: str) -> "Observer":
            shown.close()  # of the store before
            if not quiet:
                print(printable(title), file=sys.stderr)
            return shown.enter_context(Progress(quiet=quiet, verb="to describe", can_finish_early=False))

        cells = evaluate_matrix(known, sets, Path(output), run, observer=observed)
    if as_json:
        from msgspec import to_builtins

        print_json({"results": to_builtins(cells)})
    else:
        typer.echo(table(cells))
    if page is not None:
        with after_results(page, quiet=quiet):
            write_matrix_page(page, cells, known, command=command_line())
    if any(cell.failed for cell in cells):
        raise typer.Exit(3)
