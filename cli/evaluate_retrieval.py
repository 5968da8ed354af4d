"""`sppfeat evaluate retrieval`: evaluate search for images of the same thing."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppfeat.errors import UsageError
from sppfeat_cli import options
from sppfeat_cli.output import after_results, command_line, counted, options_document, print_json, printable, tell_lost

if TYPE_CHECKING:
    from sppfeat.retrieval import Retrieval

_PROJECTION = options.Defaults("sppfeat.retrieval:ProjectionOptions")
_RETRIEVAL = options.Defaults("sppfeat.retrieval:RetrievalOptions")
_TRUTH = options.Defaults("sppfeat.retrieval:read_ground_truth")


def retrieval(
    store: Annotated[
        str | None,
        typer.Argument(
            metavar="[STORE]",
            help="Store in which each image in turn is the query, searched among the others.",
            show_default=False,
        ),
    ] = None,
    gallery: Annotated[
        str | None,
        typer.Option(
            metavar="STORE", help="Instead of STORE: the store to search, with --queries.", show_default=False
        ),
    ] = None,
    queries: Annotated[
        str | None, typer.Option(metavar="STORE", help="Store of queries for --gallery.", show_default=False)
    ] = None,
    relevant: Annotated[
        str,
        typer.Option(
            metavar="RULE",
            help="Relevant images: folder (those in the query's folder), or regex:PATTERN (those whose names have the "
            "same text in the pattern's group).",
        ),
    ] = _RETRIEVAL.relevant,
    ground_truth: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="JSON file: query -> lists relevant and junk, or easy, hard and junk, with bbx for a part of the "
            "query's image; or a folder of NAME_query.txt files, as in Oxford5k.",
            show_default=False,
        ),
    ] = None,
    difficulty: Annotated[
        str, typer.Option(metavar="NAME", help="Which of the lists easy, hard and junk count: easy, medium or hard.")
    ] = _TRUTH.difficulty,
    write_windows: Annotated[
        str | None,
        typer.Option(
            metavar="CSV",
            help="Only write the boxes of the ground truth's queries, for `extract --windows`.",
            show_default=False,
        ),
    ] = None,
    parts: Annotated[
        bool,
        typer.Option(
            "--parts",
            help="Queries may be parts of images: look for them in every image. --queries is described smaller.",
        ),
    ] = _RETRIEVAL.parts,
    boxes: Annotated[
        str | None,
        typer.Option(
            metavar="CSV",
            help="Which image holds a query and where, query,name,x1,y1,x2,y2: also measures localization.",
            show_default=False,
        ),
    ] = None,
    whole_queries: Annotated[
        bool, typer.Option("--whole-queries", help="Search by whole images, even if the ground truth has boxes.")
    ] = _RETRIEVAL.whole_queries,
    ap: Annotated[
        str | None,
        typer.Option(
            "--ap",
            metavar="NAME",
            help="Average precision: step, trapezoid, area or 11-point.",
            show_default="step; trapezoid with --ground-truth",
        ),
    ] = _RETRIEVAL.ap,
    project: options.Project = None,
    whiten: options.Whiten = False,
    whiten_power: options.WhitenPower = _PROJECTION.power,
    shrinkage: options.Shrinkage = _PROJECTION.shrinkage,
    whitening_from: options.WhiteningFrom = None,
    rerank: options.Rerank = _RETRIEVAL.rerank,
    candidates: options.Candidates = _RETRIEVAL.candidates,
    neighborhood: options.Neighborhood = _RETRIEVAL.neighborhood,
    alpha: options.Alpha = _RETRIEVAL.alpha,
    bin_dim: options.BinDim = _RETRIEVAL.bin_dim,
    report: options.Report = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Rank a gallery exactly for every query, and report mAP and recall@1, 5 and 10.

    Recall@k is the fraction of queries with a relevant image among the first k. Revisited Oxford and Paris also give
    mP@k, the mean precision of the first k. With --boxes, IoU>0.5 is the fraction of boxes found that overlap the true
    one by more than half. Queries with a box are searched by as rows of windows:

      sppfeat evaluate retrieval --ground-truth gnd.json --write-windows queries.csv

      sppfeat extract images/ --windows queries.csv -o queries.h5

      sppfeat evaluate retrieval --ground-truth gnd.json --gallery gallery.h5 --queries queries.h5
    """
    from sppfeat.report import check_page
    from sppfeat.retrieval import (
        RetrievalOptions,
        evaluate_retrieval,
        read_boxes,
        read_ground_truth,
        write_query_windows,
        write_retrieval_page,
    )
    from sppfeat.store import open_store

    if boxes is not None and ground_truth is not None:
        raise UsageError("expected --ground-truth or --boxes, found both")
    truth = read_ground_truth(ground_truth, difficulty=difficulty) if ground_truth is not None else None
    if boxes is not None:
        truth = read_boxes(boxes)
    if write_windows is not None:
        if truth is None or store is not None or gallery is not None or queries is not None or report is not None:
            raise UsageError("--write-windows: expected --ground-truth PATH, and no store or --report")
        count = write_query_windows(truth, write_windows)
        if as_json:
            print_json({"windows": write_windows, "queries": count})
        else:
            typer.echo(f"{printable(write_windows)}: {counted(count, 'window')}")
        return
    if (store is None) == (gallery is None) or (gallery is None) != (queries is None):
        raise UsageError("expected STORE, or --gallery STORE --queries STORE")
    chosen = RetrievalOptions(
        relevant=relevant,
        ap=ap,
        projection=options.projection_options(project, whiten, whiten_power, shrinkage, whitening_from),
        rerank=rerank,
        parts=parts,
        candidates=candidates,
        neighborhood=neighborhood,
        alpha=alpha,
        whole_queries=whole_queries,
        bin_dim=bin_dim,
    )
    page = check_page(report, overwrite=overwrite) if report is not None else None
    opened = open_store(str(store or gallery))
    asked = open_store(queries) if queries is not None else None
    done = evaluate_retrieval(
        opened,
        asked,
        chosen,
        truth=truth,
        whitening_from=open_store(whitening_from) if whitening_from is not None else None,
    )
    if as_json:
        given = {"store": store, "gallery": gallery, "queries": queries, "whitening_from": whitening_from}
        given |= {"ground_truth": ground_truth, "difficulty": difficulty, "boxes": boxes}
        print_json(
            _document(done)
            | {
                # Only the choice of rows that a projection is learned from is random, and only of very many.
                "seed": None if chosen.projection is None else chosen.projection.seed,
                "options": options_document(chosen) | given,
                "recipe": options_document(opened.recipe),
                "weights_sha256": opened.weights_sha256,
            }
        )
    else:
        typer.echo(_text(done))
    for note in done.notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    for each in {one.place: one for one in (opened, asked) if one is not None}.values():
        tell_lost(each)
    if page is not None:
        with after_results(page):
            write_retrieval_page(page, done, command=command_line())


def _document(done: "Retrieval") -> dict[str, Any]:
    from sppfeat.retrieval import percent

    return {
        "queries": done.queries,
        "gallery": done.gallery,
        **percent(done),
        **({} if done.overlap is None else {"mean_iou": done.overlap}),
        "interval": list(done.interval),
        "method": done.ap,
        "dim": done.dim,
        "left_out": done.left_out,
        "variance_kept": None if done.projection is None else 100 * done.projection.kept,
        "projection": None
        if done.projection is None
        else {
            "learned_from": done.projection.learned_from,
            "learned_from_evaluated_rows": done.learned_here,
            "rows": done.projection.rows,
            "route": done.projection.route,
        },
        "per_query": done.average_precisions,
    }


def _text(done: "Retrieval") -> str:
    from sppfeat.retrieval import percent

    lines = ["  ".join(f"{name} {value:.2f} %" for name, value in percent(done).items())]
    low, high = done.interval
    about = f"{done.queries} queries, {done.gallery} images, {done.dim} values; average precision: {done.ap}; "
    about += f"mAP of 95 % of draws of queries: {low:.2f} to {high:.2f} %"
    if done.projection is not None:
        about += f"; {100 * done.projection.kept:.1f} % of the variance kept ({done.projection.route})"
    lines.append(about)
    if done.overlap is not None:
        lines.append(f"mean IoU of the boxes found {done.overlap:.3f}")
    if done.projection is not None:
        kind = "whitening" if done.projection.power else "projection"
        here = ", which are also evaluated: results on other images may be lower" * done.learned_here
        source = printable(done.projection.learned_from)
        lines.append(f"{kind} learned from {counted(done.projection.rows, 'row')} of {source}{here}")
    if done.left_out:
        lines.append(f"skipped, no relevant images: {len(done.left_out)}, such as {printable(done.left_out[0])}")
    worst = sorted(done.average_precisions.items(), key=lambda item: item[1])[:5]
    if worst[0][1] < 100:
        lines.append(
            "hardest: " + ", ".join(f"{printable(name)} {value:.0f} %" for name, value in worst if value < 100)
        )
    return "\n".join(lines)
