"""`sppfeat evaluate retrieval`: how well descriptors find images of the same thing."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppfeat.errors import UsageError
from sppfeat_cli.index import projection_options
from sppfeat_cli.output import counted, options_document, print_json, printable

if TYPE_CHECKING:
    from sppfeat.retrieval import Retrieval


def retrieval(
    store: Annotated[
        str | None,
        typer.Argument(metavar="[STORE]", help="Each image is the query once, and left out then.", show_default=False),
    ] = None,
    gallery: Annotated[
        str | None, typer.Option(metavar="STORE", help="Instead: a store to be searched ...", show_default=False)
    ] = None,
    queries: Annotated[
        str | None, typer.Option(metavar="STORE", help="... by the images of this one.", show_default=False)
    ] = None,
    relevant: Annotated[
        str,
        typer.Option(metavar="RULE", help="folder, or regex:PATTERN: images that share the text in its group."),
    ] = "folder",
    ground_truth: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="JSON: query -> lists relevant and junk, or easy, hard and junk, with bbx for a part of the query's "
            "image; or a folder with NAME_query.txt, as Oxford5k has it.",
            show_default=False,
        ),
    ] = None,
    difficulty: Annotated[
        str, typer.Option(metavar="NAME", help="easy | medium | hard: what counts of lists easy, hard, junk.")
    ] = "medium",
    write_windows: Annotated[
        str | None,
        typer.Option(
            metavar="CSV",
            help="Only write the boxes of the ground truth's queries, for `extract --windows`.",
            show_default=False,
        ),
    ] = None,
    whole_queries: Annotated[
        bool, typer.Option("--whole-queries", help="Search by whole images, whatever boxes the ground truth has.")
    ] = False,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of average precision: step | trapezoid | area | 11-point.",
            show_default="step; trapezoid with --ground-truth",
        ),
    ] = None,
    project: Annotated[
        int | None,
        typer.Option(metavar="N", help="Project onto N principal components.", show_default="512 with --whiten"),
    ] = None,
    whiten: Annotated[bool, typer.Option("--whiten", help="Whiten the components.")] = False,
    whiten_power: Annotated[float, typer.Option(help="How far: 0 not at all (PCA), 1 fully.")] = 1.0,
    shrinkage: Annotated[
        float, typer.Option(help="Of the components' variances towards their mean before whitening, 0 to 1.")
    ] = 0.1,
    whitening_from: Annotated[
        str | None,
        typer.Option(metavar="STORE", help="Learn the projection from this store.", show_default="the gallery"),
    ] = None,
    expand: Annotated[
        int, typer.Option(metavar="N", help="Search again with the query and its N nearest together.")
    ] = 0,
    alpha: Annotated[float, typer.Option(help="With --expand: neighbors weigh their score to this power.")] = 3.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Rank a gallery for every query, exactly, and report mAP and recall@1, 5 and 10.

    Recall@k is the part of the queries with a relevant image among the first k. Revisited Oxford and Paris also give
    mP@k, the mean precision of the first k. Queries that have a box are searched by as rows of windows:

      sppfeat evaluate retrieval --ground-truth gnd.json --write-windows queries.csv

      sppfeat extract images/ --windows queries.csv -o queries.h5

      sppfeat evaluate retrieval --ground-truth gnd.json --gallery gallery.h5 --queries queries.h5
    """
    from sppfeat.retrieval import RetrievalOptions, evaluate_retrieval, read_ground_truth, write_query_windows
    from sppfeat.store import open_store

    truth = read_ground_truth(ground_truth, difficulty=difficulty) if ground_truth is not None else None
    if write_windows is not None:
        if truth is None or store is not None or gallery is not None or queries is not None:
            raise UsageError("--write-windows: expected --ground-truth PATH, and no store")
        count = write_query_windows(truth, write_windows)
        if as_json:
            print_json({"windows": write_windows, "queries": count})
        else:
            typer.echo(f"{printable(write_windows)}: {counted(count, 'window')}")
        return
    if (store is None) == (gallery is None) or (gallery is None) != (queries is None):
        raise UsageError("expected STORE, or --gallery STORE --queries STORE")
    options = RetrievalOptions(
        relevant=relevant,
        method=method,
        projection=projection_options(project, whiten, whiten_power, shrinkage, whitening_from),
        expand=expand,
        alpha=alpha,
        whole_queries=whole_queries,
    )
    opened = open_store(str(store or gallery))
    done = evaluate_retrieval(
        opened,
        open_store(queries) if queries is not None else None,
        options,
        truth=truth,
        whitening_from=open_store(whitening_from) if whitening_from is not None else None,
    )
    if as_json:
        given = {"store": store, "gallery": gallery, "queries": queries, "whitening_from": whitening_from}
        given |= {"ground_truth": ground_truth, "difficulty": difficulty}
        print_json(
            _document(done)
            | {
                # Of the rows that a projection is learned from, where there are very many; nothing else is random.
                "seed": None if options.projection is None else options.projection.seed,
                "options": options_document(options) | given,
                "recipe": options_document(opened.recipe),
                "weights_sha256": opened.weights_sha256,
            }
        )
    else:
        typer.echo(_text(done))


def _document(done: "Retrieval") -> dict[str, Any]:
    from sppfeat.retrieval import percent

    return {
        "queries": done.queries,
        "gallery": done.gallery,
        **percent(done),
        "method": done.method,
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
    about = f"{done.queries} queries, {done.gallery} images, {done.dim} values; average precision: {done.method}"
    if done.projection is not None:
        about += f"; {100 * done.projection.kept:.1f} % of the variance kept ({done.projection.route})"
    lines.append(about)
    if done.projection is not None:
        kind = "whitening" if done.projection.power else "projection"
        here = ", which are evaluated here: other images may give less" * done.learned_here
        source = printable(done.projection.learned_from)
        lines.append(f"{kind} learned from {counted(done.projection.rows, 'row')} of {source}{here}")
    if done.left_out:
        lines.append(f"left out, without a relevant image: {len(done.left_out)}, such as {printable(done.left_out[0])}")
    worst = sorted(done.average_precisions.items(), key=lambda item: item[1])[:5]
    if worst[0][1] < 100:
        lines.append(
            "hardest: " + ", ".join(f"{printable(name)} {value:.0f} %" for name, value in worst if value < 100)
        )
    return "\n".join(lines)
