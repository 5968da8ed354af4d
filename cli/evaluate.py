"""`sppfeat evaluate`: how good descriptors are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppfeat_cli.evaluate_retrieval import retrieval
from sppfeat_cli.output import numbers, print_json, printable

if TYPE_CHECKING:
    from sppfeat.transfer import Transfer


def register(app: typer.Typer) -> None:
    evaluate = typer.Typer(
        help="Evaluate descriptors by the field's protocols.",
        epilog="Example: sppfeat evaluate transfer feats.h5",
        no_args_is_help=True,
    )
    evaluate.command(epilog="Example: sppfeat evaluate transfer feats.h5 --protocol split --c 1")(transfer)
    evaluate.command(epilog="Example: sppfeat evaluate retrieval feats.h5 --relevant folder")(retrieval)
    app.add_typer(evaluate, name="evaluate")


def transfer(
    stores: Annotated[
        list[str], typer.Argument(metavar="STORE...", help="Stores of the same images.", show_default=False)
    ],
    protocol: Annotated[
        str,
        typer.Option(metavar="NAME", help="random | caltech101 | split (names in train/... and test/...)"),
    ] = "random",
    labels: Annotated[
        str | None, typer.Option(metavar="CSV", help="Columns name,label[,split].", show_default="parent folders")
    ] = None,
    c: Annotated[
        str | None, typer.Option("--c", metavar="C,...", help="One C, or a grid.", show_default="0.01 to 1000")
    ] = None,
    positive_weight: Annotated[float, typer.Option(help="Weight of a class's own images against the rest.")] = 1.0,
    per_class: Annotated[int | None, typer.Option(help="Training images a class.", show_default="by protocol")] = None,
    max_test: Annotated[int | None, typer.Option(help="Most test images a class.", show_default="by protocol")] = None,
    trials: Annotated[int | None, typer.Option(help="Random splits.", show_default="by protocol")] = None,
    seed: Annotated[int, typer.Option(help="Of the random splits and folds.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Train linear SVMs on part of the images and report mean per-class accuracy on others.

    C is chosen by 3-fold cross-validation inside the training images. Several stores are compared on the same splits.
    """
    from sppfeat.store import open_store
    from sppfeat.transfer import C_GRID, TransferOptions, evaluate_transfer, read_labels

    options = TransferOptions(
        protocol=protocol,
        costs=numbers("c", c) if c is not None else C_GRID,
        positive_weight=positive_weight,
        per_class=per_class,
        max_test=max_test,
        trials=trials,
        seed=seed,
        device=device,
    )
    known = read_labels(labels) if labels is not None else None
    done = evaluate_transfer([open_store(store) for store in stores], options, labels=known)
    if as_json:
        documents = [_document(one) for one in done]
        print_json(documents[0] if len(documents) == 1 else {"stores": documents})
    else:
        typer.echo(_table(done))


def _document(done: Transfer) -> dict[str, Any]:
    return {
        "store": done.store,
        "protocol": done.protocol,
        "metric": "mean_per_class_accuracy",
        "value": done.value,
        "std": done.std,
        "trials": done.accuracies,
        "C": done.costs,
        "per_class": done.per_class,
        "rows": done.rows,
        "left_out": done.left_out,
        "dim": done.dim,
        "route": done.route,
    }


def _table(done: list[Transfer]) -> str:
    first = done[0]
    lines = []
    for one in done:
        costs = ",".join(f"{c:g}" for c in sorted(set(one.costs)))
        line = f"{printable(one.store)}: {one.value:.2f} %"
        if len(one.accuracies) > 1:
            line += f" +- {one.std:.2f}"
        line += f"  ({one.dim} values, C = {costs})"
        if one is not first:
            line += f"  {_difference(one, first)}"
        lines.append(line)
    left_out = f", {first.left_out} left out (failed, or without a label)" if first.left_out else ""
    lines.append(
        f"mean per-class accuracy, {len(first.per_class)} classes, {first.rows} images{left_out}; protocol "
        f"{first.protocol}, {len(first.accuracies)} trial{'s' * (len(first.accuracies) > 1)}; solver: {first.route}"
    )
    worst = sorted(first.per_class.items(), key=lambda item: item[1])[:5]
    lines.append("hardest: " + ", ".join(f"{printable(name)} {value:.0f} %" for name, value in worst))
    return "\n".join(lines)


def _difference(one: Transfer, first: Transfer) -> str:
    import statistics

    pairs = [a - b for a, b in zip(one.accuracies, first.accuracies, strict=True)]
    spread = f" +- {statistics.stdev(pairs):.2f}" if len(pairs) > 1 else ""
    return f"{statistics.fmean(pairs):+.2f}{spread} against the first"
