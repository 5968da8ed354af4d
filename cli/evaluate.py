"""`sppfeat evaluate`: evaluate descriptors and detectors."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppfeat.errors import UsageError
from sppfeat_cli import evaluate_all, evaluate_detection, options
from sppfeat_cli.commands import Commands, Group
from sppfeat_cli.evaluate_retrieval import retrieval
from sppfeat_cli.output import (
    after_results,
    command_line,
    convergence_document,
    counted,
    finite,
    options_document,
    print_json,
    printable,
    tell_lost,
)

if TYPE_CHECKING:
    from sppfeat.transfer.evaluation import Comparison, Shots, Transfer

_TRANSFER = options.Defaults("sppfeat.transfer:TransferOptions")


def register(app: typer.Typer) -> None:
    evaluate = Commands(
        cls=Group,
        help="Evaluate descriptors and detectors by established protocols.",
        epilog="Example: sppfeat evaluate transfer feats.h5",
        no_args_is_help=True,
    )
    evaluate.command(epilog="Example: sppfeat evaluate transfer feats.h5 --protocol split --c 1")(transfer)
    evaluate.command(epilog="Example: sppfeat evaluate retrieval feats.h5 --relevant folder")(retrieval)
    evaluate_detection.register(evaluate)
    evaluate_all.register(evaluate)
    app.add_typer(evaluate, name="evaluate")


def transfer(
    stores: Annotated[
        list[str], typer.Argument(metavar="STORE...", help="Stores of the same images.", show_default=False)
    ],
    protocol: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Protocol: random, caltech101, split (names in train/... and test/... or val/...), voc2007, or "
            "voc2007-vissl (as VISSL evaluates it).",
        ),
    ] = _TRANSFER.protocol,
    classifier: Annotated[
        str, typer.Option(metavar="NAME", help="Classifier: svm, knn or logistic (multinomial regression).")
    ] = _TRANSFER.classifier,
    labels: options.Labels = None,
    voc: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="VOC folder with ImageSets/Main, for protocols of VOC 2007.", show_default=False
        ),
    ] = None,
    c: options.Costs = None,
    c_grid: options.CostGrid = None,
    positive_weight: options.PositiveWeight = _TRANSFER.positive_weight,
    levels: options.StoredLevels = None,
    only: options.StoredParts = None,
    per_class: Annotated[
        int | None,
        typer.Option(metavar="N", help="Number of training images per class.", show_default="by protocol"),
    ] = None,
    max_test: Annotated[
        int | None,
        typer.Option(metavar="N", help="Maximum number of test images per class.", show_default="by protocol"),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(metavar="N", help="Number of random splits.", show_default="by protocol")
    ] = None,
    shots: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help="Also train with so many images per class, drawn for each trial.",
            show_default=False,
        ),
    ] = None,
    neighbors: Annotated[
        int, typer.Option(metavar="N", help="Nearest training images that vote, for knn.")
    ] = _TRANSFER.neighbors,
    temperature: Annotated[
        float, typer.Option(metavar="X", help="Temperature of their votes, exp(similarity / X).")
    ] = _TRANSFER.temperature,
    seed: options.Seed = _TRANSFER.seed,
    device: options.Device = _TRANSFER.device,
    report: options.Report = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Train a classifier on some of the images and report mean per-class accuracy, or mAP, on others.

    C of SVMs and of logistic regression is chosen by 3-fold cross-validation on the training images. The interval is
    that of 95 % of bootstrap draws of test images, within each class. Several stores are compared with the first on
    the same splits: p is that of Nadeau and Bengio's corrected t-test for repeated splits, of McNemar's test for one.
    """
    from sppfeat.report import check_page
    from sppfeat.store import open_store
    from sppfeat.transfer import TransferOptions, read_labels, read_voc_labels

    chosen = TransferOptions(
        protocol=protocol,
        classifier=classifier,
        neighbors=neighbors,
        temperature=temperature,
        shots=options.shots(shots),
        costs=options.costs(c, c_grid),
        positive_weight=positive_weight,
        levels=options.stored_levels(levels),
        only=options.stored_parts(only),
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
    opened = [open_store(store) for store in stores]
    # These import torch, so options and files are checked first.
    from sppfeat.transfer.evaluation import evaluate_transfer
    from sppfeat.transfer.page import write_transfer_report

    done = evaluate_transfer(opened, chosen, labels=known)
    for each in opened:
        tell_lost(each)
    if as_json:
        documents = [_document(one, labels, voc) for one in done]
        print_json(documents[0] if len(documents) == 1 else {"stores": documents})
    else:
        typer.echo(_table(done))
    if page is not None:
        with after_results(page):
            write_transfer_report(page, done, command=command_line())


def _document(done: "Transfer", labels: str | None, voc: str | None) -> dict[str, Any]:
    document = {
        "store": done.store,
        "protocol": done.options.protocol,
        "metric": done.metric,
        "value": done.value,
        "std": done.std,
        "interval": [finite(edge) for edge in done.interval],
        "top1": finite(done.top1),
        "top5": finite(done.top5),
        "shots": [_few(few) for few in done.shots],
        "comparison": None if done.comparison is None else dataclasses.asdict(done.comparison),
        "trials": done.trials,
        "C": [_costs(done, trial) for trial in range(len(done.trials))],
        "per_class": {name: finite(value) for name, value in done.per_class.items()},
        "curve": [{"C": c, "value": value} for c, value in done.curve],
        "rows": done.rows,
        "train": done.train,
        "test": done.test,
        "test_part": done.test_part,
        "left_out": done.left_out,
        "left_out_by_reason": done.left_out_by_reason,
        **convergence_document(done.convergence),
        "choice_gap": finite(done.convergence.choice_gap),
        "dim": done.dim,
        "levels": done.recipe.levels,
        "route": done.route,
        "seconds": round(done.seconds, 3),
        "seed": done.options.seed,
        "options": options_document(done.options) | {"labels": labels, "voc": voc},
        "recipe": options_document(done.recipe),
        "weights_sha256": done.weights_sha256,
    }
    if done.area_per_class:
        areas = {name: finite(value) for name, value in done.area_per_class.items()}
        document |= {"value_area": finite(done.area), "per_class_area": areas}
    return document


def _few(found: "Shots") -> dict[str, Any]:
    return {
        "shots": found.count,
        "value": found.value,
        "std": found.std,
        "trials": found.trials,
        "C": found.costs,
        "gap": finite(found.gap),
    }


def _costs(done: "Transfer", trial: int) -> float | dict[str, float] | None:
    """One C, or one per class where they differ; null where there is none."""
    costs = done.costs[trial].tolist()
    return None if not costs else costs[0] if len(set(costs)) == 1 else dict(zip(done.per_class, costs, strict=True))


def _table(done: "list[Transfer]") -> str:
    first = done[0]
    several = first.metric == "mAP"
    lines = []
    for one in done:
        costs = ",".join(f"{c:g}" for c in sorted({float(c) for costs in one.costs for c in costs}))
        line = f"{printable(one.store)}: {one.value:.2f} %"
        if len(one.trials) > 1:
            line += f" +- {one.std:.2f}"
        line += f" [{one.interval[0]:.2f}, {one.interval[1]:.2f}]"
        if several:
            line += f" ({'area' if one.options.protocol == 'voc2007-vissl' else f'11 points; area {one.area:.2f} %'})"
        else:
            line += f"  top-1 {one.top1:.2f} %"
            line += f", top-5 {one.top5:.2f} %" * (len(one.per_class) > 5)  # of five classes it is 100 %
        line += f"  ({one.dim} values, {f'C = {costs}, ' if costs else ''}{one.seconds:.1f} s)"
        if one.comparison is not None:
            line += f"  {_difference(one.comparison)}"
        lines.append(line)
        lines += [
            f"  {counted(few.count, 'image')} per class: {few.value:.2f} % +- {few.std:.2f}"
            + (f"  (C = {','.join(f'{c:g}' for c in few.costs)})" if few.costs else "")
            for few in one.shots
        ]
    lines.append(
        f"{'mAP' if several else 'mean per-class accuracy'}, {counted(len(first.per_class), 'class')}, "
        f"{counted(first.rows, 'image')}: {first.train} for training and {first.test} for testing{_part(first)}"
        f"{', in each trial' * (len(first.trials) > 1)}{_left_out(first)}; protocol {first.options.protocol}, "
        f"{counted(len(first.trials), 'trial')}; {_classifier(first)}"
    )
    known = {name: value for name, value in first.per_class.items() if name not in first.untested}
    worst = sorted(known.items(), key=lambda item: item[1])[:5]
    if any(value < 100 for _, value in worst):
        told = ", ".join(f"{printable(name)} {value:.0f} %" for name, value in worst if value < 100)
        lines.append(f"hardest{f' for {printable(first.store)}' if len(done) > 1 else ''}: {told}")
    if first.untested:
        named = ", ".join(map(printable, first.untested[:5])) + ", ..." * (len(first.untested) > 5)
        lines.append(f"no test images, excluded from the mean: {named} ({counted(len(first.untested), 'class')})")
    return "\n".join(lines)


def _part(done: "Transfer") -> str:
    """Which part is tested, if not the one that the protocol names."""
    return f" (part {done.test_part!r}, because there is no 'test')" if done.test_part not in (None, "test") else ""


def _left_out(done: "Transfer") -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in done.left_out_by_reason.items())
    return f"; {done.left_out} skipped ({reasons})" if done.left_out else ""


def _classifier(done: "Transfer") -> str:
    chosen = done.options
    if chosen.classifier == "knn":
        return f"classifier: knn, {chosen.neighbors} neighbors, temperature {chosen.temperature:g}"
    return f"classifier: {chosen.classifier}, solver: {done.route}"


def _difference(found: "Comparison") -> str:
    spread = "" if found.std is None else f" +- {found.std:.2f}"
    return f"{found.difference:+.2f}{spread} compared to the first (p = {found.p:.2g}, {found.test})"
