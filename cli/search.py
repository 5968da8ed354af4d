"""`sppfeat search`: search a gallery by images or by a store."""

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppfeat.errors import UsageError
from sppfeat.recipe import RunOptions
from sppfeat_cli import options
from sppfeat_cli.output import after_results, command_line, numbers, print_json_list, printable

if TYPE_CHECKING:
    from sppfeat.retrieval import Answer, Explanation, Neighbor, SearchResult

_SEARCH = options.Defaults("sppfeat.retrieval:SearchOptions")


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: sppfeat search gallery/ query.jpg -k 10 --html hits.html")(search)


def search(
    gallery: Annotated[
        str, typer.Argument(metavar="GALLERY", help="Gallery made by `sppfeat index`.", show_default=False)
    ],
    queries: Annotated[
        list[str],
        typer.Argument(
            metavar="QUERY...", help="Images, folders, text lists (.txt), -, or one store.", show_default=False
        ),
    ],
    k: options.Neighbors = _SEARCH.k,
    exclude_self: Annotated[
        bool, typer.Option("--exclude-self", help="Leave out the query's own image, and windows of it.")
    ] = _SEARCH.exclude_self,
    box: Annotated[
        str | None,
        typer.Option(
            metavar="X1,Y1,X2,Y2", help="Part of the query image to search by, in pixels.", show_default="whole image"
        ),
    ] = None,
    parts: Annotated[
        bool,
        typer.Option(
            "--parts",
            help="The query is a part of an image: find it and say where. Whole images: --rerank bins.",
        ),
    ] = _SEARCH.parts,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="Also say, in --html and --json, what adds up to the scores of --parts and --rerank bins."
        ),
    ] = _SEARCH.explain,
    rerank: options.Rerank = _SEARCH.rerank,
    candidates: options.Candidates = _SEARCH.candidates,
    neighborhood: options.Neighborhood = _SEARCH.neighborhood,
    alpha: options.Alpha = _SEARCH.alpha,
    weights: options.GalleryWeights = None,
    device: options.SearchDevice = RunOptions.device,
    engine: options.Engine = RunOptions.engine,
    batch_size: options.BatchSize = RunOptions.batch_size,
    num_workers: options.NumWorkers = RunOptions.num_workers,
    html: options.Html = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Find the images of a gallery that are nearest to each query, by cosine similarity.

    Query images are described with the gallery's own recipe. One that cannot be described is reported and the others
    are answered; the exit code is then 3.
    """
    run = RunOptions(device=device, engine=engine, batch_size=batch_size, num_workers=num_workers)
    if os.path.lexists(gallery) and not any(query == "-" or os.path.lexists(query) for query in queries):
        options.check_sources(queries[:1])

    from sppfeat.report import check_page
    from sppfeat.retrieval import (
        PAGE_QUERIES,
        SearchOptions,
        open_gallery,
        search_images,
        stream_store,
        write_hits_page,
    )
    from sppfeat.store import is_store, open_store

    chosen = SearchOptions(
        k=k,
        exclude_self=exclude_self,
        explain=explain,
        rerank=rerank,
        parts=parts,
        candidates=candidates,
        neighborhood=neighborhood,
        alpha=alpha,
    )
    part = _box(box)
    page = check_page(html, overwrite=overwrite) if html is not None else None
    opened = open_gallery(gallery, device=device if device.startswith("cuda") else "cpu")
    if any(is_store(query) for query in queries):
        if len(queries) > 1:
            raise UsageError(f"expected one store or images as queries, found {len(queries)} paths with a store")
        if part is not None:
            raise UsageError(
                "--box: expected images as queries, found a store; `sppfeat extract --windows` describes parts"
            )
        blocks = stream_store(opened, open_store(queries[0]), chosen)
    else:
        blocks = iter((search_images(opened, queries, chosen, run, weights=weights, box=part),))
    shown = _Shown(PAGE_QUERIES)
    if as_json:
        print_json_list("results", _results(blocks, shown), lambda: _rest(shown))
    else:
        for done in blocks:
            if text := _table(done, first=not shown.answered):
                typer.echo(text)
            shown.add(done)
    for answer in shown.failed:
        print(f"failed: {printable(answer.query)}: {printable(answer.error or '')}", file=sys.stderr)
    if not quiet:
        if explain and html is None and not as_json:
            print("note: --explain is shown by --html and --json, found neither", file=sys.stderr)
        for note in shown.notes:
            print(f"note: {printable(note)}", file=sys.stderr)
    # The page comes after the results, which its failure does not affect.
    if page is not None and shown.result is not None:
        with after_results(page, quiet=quiet):
            write_hits_page(page, opened, shown.result, queries=shown.count, command=command_line())
    if shown.failed:
        raise typer.Exit(3)


class _Shown:
    """What is left of answers that were printed: the first of them, for a page, and those that failed."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.result: SearchResult | None = None
        self.count = self.answered = 0
        self.failed: list[Answer] = []
        self.notes: list[str] = []
        self.describing = self.searching = 0.0

    def add(self, done: "SearchResult") -> None:
        from dataclasses import replace

        kept = [] if self.result is None else self.result.answers
        self.result = replace(done, answers=[*kept, *done.answers[: self._limit - len(kept)]])
        self.count += len(done.answers)
        self.answered += len(done.answers) - done.failed
        self.failed += [answer for answer in done.answers if answer.error is not None]
        self.notes = done.notes
        self.describing += done.describing
        self.searching += done.searching


def _box(text: str | None) -> tuple[float, float, float, float] | None:
    if text is None:
        return None
    found = numbers("box", text)
    if len(found) != 4:
        raise UsageError(f"--box: expected X1,Y1,X2,Y2, found {text!r}")
    return found[0], found[1], found[2], found[3]


def _results(blocks: "Iterator[SearchResult]", shown: _Shown) -> Iterator[dict[str, Any]]:
    for done in blocks:
        for answer in done.answers:
            if answer.error is None:
                yield {"query": answer.query, "neighbors": [_neighbor(one) for one in answer.neighbors]}
        shown.add(done)


def _rest(shown: _Shown) -> dict[str, Any]:
    return {
        "failed": [{"query": answer.query, "error": answer.error} for answer in shown.failed],
        "seconds": {"describe": round(shown.describing, 4), "search": round(shown.searching, 4)},
    }


def _neighbor(one: "Neighbor") -> dict[str, Any]:
    found = {"name": one.name, "score": one.score, "rank": one.rank, "path": one.path, "box": one.box}
    return found if one.explanation is None else found | {"explanation": _explanation(one.explanation)}


def _explanation(why: "Explanation") -> dict[str, Any]:
    return {
        "query": why.query.tolist(),
        "image": why.image.tolist(),
        "links": [{"query": one.query, "image": one.image, "score": one.score} for one in why.links],
    }


def _table(done: "SearchResult", *, first: bool) -> str:
    """The answers as text, with an empty line between queries."""
    from sppfeat.store import window_text

    lines: list[str] = []
    for answer in done.answers:
        if answer.error is not None:
            continue
        lines += [""] * (bool(lines) or not first) + [printable(answer.query)]
        for one in answer.neighbors:
            # Rows of windows differ by name; their path is that of the image.
            name = printable(one.name if one.box or not one.path else one.path)
            where = f"  at {window_text(one.box)}" if done.located and one.box is not None else ""
            lines.append(f"{one.rank:>5}  {one.score:7.4f}  {name}{where}")
    return "\n".join(lines)
