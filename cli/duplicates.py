"""`sppfeat duplicates`: find near-duplicates."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppfeat_cli import options
from sppfeat_cli.output import counted, print_json, printable
from sppfeat_cli.progress import Progress

if TYPE_CHECKING:
    from sppfeat.retrieval import Duplicates

_DUPLICATES = options.Defaults("sppfeat.retrieval:find_duplicates")


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: sppfeat duplicates feats.h5 --threshold 0.95 --csv dups.csv --html dups.html")(
        duplicates
    )


def duplicates(
    store: Annotated[str, typer.Argument(metavar="STORE", help="Store made by `sppfeat extract`.", show_default=False)],
    threshold: Annotated[
        float, typer.Option(metavar="X", help="Minimum cosine similarity of duplicates.")
    ] = _DUPLICATES.threshold,
    keep: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Image to keep in each group: largest (most pixels), sharpest (reads the images of groups) or oldest.",
        ),
    ] = _DUPLICATES.keep,
    csv: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Also write a CSV file that says which images to keep and remove.", show_default=False
        ),
    ] = None,
    html: options.Html = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Find groups of near-duplicates, the largest first: every two images of a group reach the threshold.

    All pairs are compared, also of a million images. The first image of a group is the one to keep; scores are cosine
    similarities to it. Nothing is deleted.
    """
    from sppfeat.report import check_page
    from sppfeat.retrieval import check_duplicates_csv, find_duplicates, write_duplicates_csv, write_duplicates_page
    from sppfeat.store import open_store

    page = check_page(html, overwrite=overwrite) if html is not None else None
    table = check_duplicates_csv(csv, overwrite=overwrite) if csv is not None else None
    opened = open_store(store)
    with Progress(quiet=quiet) as progress:
        found = find_duplicates(opened, threshold, keep=keep, progress=progress.part)
    if as_json:
        print_json(_document(found))
    else:
        typer.echo(_text(found))
    if not quiet:
        for note in found.notes:
            print(f"note: {printable(note)}", file=sys.stderr)
    # Files come after the groups, which their failure does not affect.
    if table is not None:
        write_duplicates_csv(table, found)
    if page is not None:
        write_duplicates_page(page, found)


def _document(found: "Duplicates") -> dict[str, Any]:
    return {
        "store": found.store,
        "threshold": found.threshold,
        "keep": found.keep,
        "images": found.images,
        "pairs": found.pairs,
        "groups": [
            [
                {"name": one.name, "score": one.score, "size": list(one.size), "bytes": one.file_size, "path": one.path}
                for one in group
            ]
            for group in found.groups
        ],
        "unreadable": [{"name": name, "error": reason} for name, reason in found.unreadable.items()],
        "notes": found.notes,
    }


def _text(found: "Duplicates") -> str:
    lines = []
    for number, group in enumerate(found.groups, 1):
        lines.append(f"group {number}: {len(group)} images")
        for one in group:
            width, height = one.size
            lines.append(f"  {one.score:7.4f}  {width} x {height}  {printable(one.path or one.name)}")
    lines.append(
        f"{counted(len(found.groups), 'group')} at {found.threshold:g} in {counted(found.images, 'image')}; "
        f"{found.spare} removable (keeps the {found.keep} of each group)"
    )
    return "\n".join(lines)
