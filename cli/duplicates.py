"""`sppfeat duplicates`: find near-duplicates."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppfeat_cli import options
from sppfeat_cli.output import counted, print_json, printable
from sppfeat_cli.progress import Progress

if TYPE_CHECKING:
    from sppfeat.retrieval import Duplicates

_DUPLICATES = options.Defaults("sppfeat.retrieval:find_duplicates")


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: sppfeat duplicates feats.h5 --threshold 0.95 --html dups.html")(duplicates)


def duplicates(
    store: Annotated[str, typer.Argument(metavar="STORE", help="Store made by `sppfeat extract`.", show_default=False)],
    threshold: Annotated[
        float, typer.Option(metavar="X", help="Minimum cosine similarity of duplicates.")
    ] = _DUPLICATES.threshold,
    html: options.Html = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Find groups of near-duplicates, the largest first, by comparing every pair of images.

    The first image of a group has the most pixels; scores are cosine similarities to it.
    """
    from sppfeat.report import check_page
    from sppfeat.retrieval import find_duplicates, write_duplicates_page
    from sppfeat.store import open_store

    page = check_page(html, overwrite=overwrite) if html is not None else None
    opened = open_store(store)
    with Progress(quiet=quiet) as progress:
        found = find_duplicates(opened, threshold, progress=progress.part)
    if as_json:
        print_json(_document(found))
    else:
        typer.echo(_text(found))
    # The page comes after the groups, which its failure does not affect.
    if page is not None:
        write_duplicates_page(page, found)


def _document(found: "Duplicates") -> dict[str, Any]:
    return {
        "store": found.store,
        "threshold": found.threshold,
        "images": found.images,
        "pairs": found.pairs,
        "groups": [
            [
                {"name": one.name, "score": one.score, "size": list(one.size), "bytes": one.file_size, "path": one.path}
                for one in group
            ]
            for group in found.groups
        ],
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
        f"{found.spare} removable (keeps one per group)"
    )
    return "\n".join(lines)
