"""`sppfeat duplicates`: groups of near-duplicates."""

import sys
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from sppfeat_cli.output import print_json, printable

if TYPE_CHECKING:
    from sppfeat.retrieval import Duplicates


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: sppfeat duplicates feats.h5 --threshold 0.95 --html dups.html")(duplicates)


def duplicates(
    store: Annotated[str, typer.Argument(metavar="STORE", help="As `sppfeat extract` made it.", show_default=False)],
    threshold: Annotated[float, typer.Option(help="Cosine similarity from which images belong together.")] = 0.95,
    html: Annotated[
        str | None, typer.Option(metavar="FILE", help="Also write a page with thumbnails.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a page.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print no progress.")] = False,
) -> None:
    """Find groups of near-duplicates, the largest first, by comparing every pair of images.

    The first of a group is the image with the most pixels; scores are cosine similarities with it.
    """
    from sppfeat.report import check_page
    from sppfeat.retrieval import find_duplicates, write_duplicates_page
    from sppfeat.store import open_store

    page = check_page(html, overwrite=overwrite) if html is not None else None
    with _Bar(quiet) as bar:
        found = find_duplicates(open_store(store), threshold, progress=bar.show)
    if as_json:
        print_json(_document(found))
    else:
        typer.echo(_text(found))
    # After the groups, which a page that cannot be written does not cost.
    if page is not None:
        write_duplicates_page(page, found)


class _Bar:
    """Progress on standard error, where that is a terminal."""

    def __init__(self, quiet: bool) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=100, unit="%", disable=True if quiet else None, file=sys.stderr, leave=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def show(self, part: float) -> None:
        self._bar.update(100 * part - self._bar.n)


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
        f"{len(found.groups)} groups at {found.threshold:g} among {found.images} images; {found.spare} of them could go"
    )
    return "\n".join(lines)
