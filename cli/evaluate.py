"""`sppfeat evaluate`: how good descriptors are."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppfeat_cli import evaluate_detection, svm_options
from sppfeat_cli.evaluate_retrieval import retrieval
from sppfeat_cli.output import print_json, printable

if TYPE_CHECKING:
    from sppfeat.transfer import Transfer


def register(app: typer.Typer) -> None:
    evaluate = typer.Typer(
        help="Evaluate descriptors by the field's protocols.",
        epilog="Example: sppfeat evaluate transfer feats.h5",
        no_args_is_help=True,
    )
    evaluate.command(epilog="Example: sppfeat evaluate transfer feats.h5 --protocol split --c 1")(transfer)
    evaluate_detection.register(evaluate)
    evaluate.command(epilog="Example: sppfeat evaluate retrieval feats.h5 --relevant folder")(retrieval)
    app.add_typer(evaluate, name="evaluate")


def transfer(
    stores: Annotated[
        list[str], typer.Argument(metavar="STORE...", help="Stores of the same images.", show_default=False)
    ],
    protocol: Annotated[
        str,
        typer.Option(metavar="NAME", help="random | caltech101 | split (names in train/... and test/...) | voc2007"),
    ] = "random",
    labels: svm_options.LabelsFile = None,
    voc: Annotated[
        str | None, typer.Option(metavar="DIR", help="VOC folder with ImageSets/Main, for protocol voc2007.")
    ] = None,
    c: svm_options.Costs = None,
    c_grid: svm_options.CostGrid = None,
    positive_weight: svm_options.PositiveWeight = 1.0,
    levels: svm_options.Levels = None,
    per_class: Annotated[int | None, typer.Option(help="Training images a class.", show_default="by protocol")] = None,
    max_test: Annotated[int | None, typer.Option(help="Most test images a class.", show_default="by protocol")] = None,
    trials: Annotated[int | None, typer.Option(help="Random splits.", show_default="by protocol")] = None,
    seed: Annotated[int, typer.Option(help="Of the random splits and folds.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "cpu",
    report: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write an HTML page: classes, confusions, mistakes, C.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page if it is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Train linear SVMs on part of the images and report mean per-class accuracy, or mAP, on others.

    C is chosen by 3-fold cross-validation inside the training images. Several stores are compared on the same splits.
    """
    from sppfeat.errors import UsageError
    from sppfeat.labels import read_labels, read_voc_labels
    from sppfeat.report import check_page
    from sppfeat.store import open_store
    from sppfeat.transfer import TransferOptions, evaluate_transfer
    from sppfeat.transfer_report import write_transfer_report

    options = TransferOptions(
        protocol=protocol,
        costs=svm_options.costs(c, c_grid),
        positive_weight=positive_weight,
        levels=svm_options.levels(levels),
        per_class=per_class,
        max_test=max_test,
        trials=trials,
        seed=seed,
        device=device,
    )
    if labels is not None and voc is not None:
        raise UsageError("--labels and --voc: expected one of them, found both")
    known = read_labels(labels) if labels is not None else read_voc_labels(voc) if voc is not None else None
    page = check_page(report, overwrite=overwrite) if report is not None else None
    done = evaluate_transfer([open_store(store) for store in stores], options, labels=known)
    if page is not None:
        write_transfer_report(page, done)
    if as_json:
        documents = [_document(one) for one in done]
        print_json(documents[0] if len(documents) == 1 else {"stores": documents})
    else:
        typer.echo(_table(done))


def _document(done: "Transfer") -> dict[str, Any]:
    document = {
        "store": done.store,
        "protocol": done.protocol,
        "metric": done.metric,
        "value": done.value,
        "std": done.std,
        "trials": done.trials,
        "C": [_costs(done, trial) for trial in range(len(done.trials))],
        "per_class": done.per_class,
        "curve": [{"C": c, "value": value} for c, value in done.curve],
        "rows": done.rows,
        "left_out": done.left_out,
        "dim": done.dim,
        "levels": done.recipe.levels,
        "route": done.route,
        "seconds": round(done.seconds, 3),
    }
    if done.area_per_class:
        document |= {"value_area": done.area, "per_class_area": done.area_per_class}
    return document


def _costs(done: "Transfer", trial: int) -> float | dict[str, float]:
    """One C, or where the classes have their own, those."""
    costs = done.costs[trial].tolist()
    return costs[0] if len(set(costs)) == 1 else dict(zip(done.per_class, costs, strict=True))


def _table(done: "list[Transfer]") -> str:
    first = done[0]
    several = first.metric == "mAP"
    lines = []
    for one in done:
        costs = ",".join(f"{c:g}" for c in sorted({float(c) for costs in one.costs for c in costs}))
        line = f"{printable(one.store)}: {one.value:.2f} %"
        if len(one.trials) > 1:
            line += f" +- {one.std:.2f}"
        if several:
            line += f" (11 points; area {one.area:.2f} %)"
        line += f"  ({one.dim} values, C = {costs}, {one.seconds:.1f} s)"
        if one is not first:
            line += f"  {_difference(one, first)}"
        lines.append(line)
    left_out = f", {first.left_out} left out (failed, or without a label)" if first.left_out else ""
    lines.append(
        f"{'mAP' if several else 'mean per-class accuracy'}, {len(first.per_class)} classes, {first.rows} images"
        f"{left_out}; protocol {first.protocol}, {len(first.trials)} trial{'s' * (len(first.trials) > 1)}; "
        f"solver: {first.route}"
    )
    worst = sorted(first.per_class.items(), key=lambda item: item[1])[:5]
    lines.append("hardest: " + ", ".join(f"{printable(name)} {value:.0f} %" for name, value in worst))
    return "\n".join(lines)


def _difference(one: "Transfer", first: "Transfer") -> str:
    import statistics

    pairs = [a - b for a, b in zip(one.trials, first.trials, strict=True)]
    spread = f" +- {statistics.stdev(pairs):.2f}" if len(pairs) > 1 else ""
    return f"{statistics.fmean(pairs):+.2f}{spread} against the first"
