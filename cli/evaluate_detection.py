"""`sppfeat evaluate detection`: evaluate a detector."""

import dataclasses
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppfeat.recipe import RunOptions
from sppfeat_cli import options
from sppfeat_cli.output import after_results, command_line, options_document, print_json, printable
from sppfeat_cli.progress import Progress

if TYPE_CHECKING:
    from sppfeat.detection import DetectionEvaluation

_DETECT = options.Defaults("sppfeat.detection:DetectOptions")
_EVALUATION = options.Defaults("sppfeat.detection:evaluate_detector")
# JSON keys are a contract: they keep their names when an option is renamed.
_KEYS = {"nms": "overlap"}


def register(evaluate: typer.Typer) -> None:
    evaluate.command(epilog="Example: sppfeat evaluate detection det.h5 VOC2007/ --split test --report test.html")(
        detection
    )


def detection(
    detector: options.DetectorFile,
    voc: options.VocRoot = None,
    split: Annotated[str | None, options.split("test")] = None,
    images: options.Images = None,
    annotations: options.Annotations = None,
    windows: options.Windows = None,
    iou: Annotated[
        float, typer.Option(metavar="IOU", help="Overlap (IoU) from which a detection is correct, in VOC's metrics.")
    ] = _EVALUATION.overlap,
    nms: options.Nms = _DETECT.nms,
    voting: options.Voting = _DETECT.voting,
    report: options.Report = None,
    overwrite: options.Overwrite = False,
    device: options.Device = RunOptions.device,
    engine: options.Engine = RunOptions.engine,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Evaluate a detector by average precision per class and its mean: VOC 2007 (11-point), VOC 2010 (area) and COCO.

    Also the precision and recall of all classes at the default threshold of `sppfeat detect`.
    Difficult objects are ignored; a second detection of the same object is wrong. Up to 100 detections per class and
    image count. Invalid annotations are reported and skipped, and the exit code is 3.
    """
    run = RunOptions(device=device, engine=engine)

    from sppfeat.detection import (
        DetectOptions,
        complete_options,
        evaluate_detector,
        open_detector,
        read_annotations,
        write_evaluation,
    )
    from sppfeat.report import check_page
    from sppfeat.windows import windows_from

    chosen = DetectOptions(nms=nms, voting=voting)
    page = check_page(report, overwrite=overwrite) if report is not None else None
    model = open_detector(detector)
    complete = complete_options(model, chosen)
    options.check_proposals(windows)
    split = split or ("test" if voc is not None else None)
    annotated = read_annotations(voc, split=split, images=images, annotations=annotations)
    boxes = windows_from(windows) if windows is not None else None
    with Progress(quiet=quiet, can_finish_early=False) as progress:
        for name, reason in annotated.problems.items():
            progress.note(f"skipped: {name}: {reason}")
        done = evaluate_detector(model, annotated, boxes, complete, run, overlap=iou, observer=progress)
    if as_json:
        given = {"detector": detector, "voc": voc, "split": split, "images": images, "annotations": annotations}
        print_json(
            _document(done)
            | {
                # Only proposing windows is random.
                "seed": model.proposals.seed,
                "options": {**given, "windows": windows, "iou": iou, "device": device, "engine": engine}
                | {_KEYS.get(name, name): value for name, value in options_document(complete).items()},
                "proposals": options_document(model.proposals),
                "recipe": options_document(model.recipe),
                "weights_sha256": model.weights_sha256,
            }
        )
    else:
        typer.echo(_table(done))
    if page is not None:
        with after_results(page, quiet=quiet):
            write_evaluation(
                page,
                done,
                model,
                title=f"Detection: {detector}",
                note=voc or annotations or "",
                command=command_line(),
            )
    if done.failed or done.notes:
        raise typer.Exit(3)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def _document(done: "DetectionEvaluation") -> dict[str, Any]:
    return {
        "mAP": _number(done.eleven_point),
        "mAP_area": _number(done.area),
        "mAP_coco": _number(done.coco),
        "coco": {name: _number(100 * value) for name, value in dataclasses.asdict(done.figures).items()},
        "per_class": {one.name: _number(one.eleven_point) for one in done.classes},
        "per_class_area": {one.name: _number(one.area) for one in done.classes},
        "per_class_coco": {one.name: _number(one.coco) for one in done.classes},
        "iou": done.overlap,
        "threshold": done.threshold,
        "precision": _number(done.kept_precision),
        "recall": _number(done.kept_recall),
        "images": done.images,
        "windows": done.windows,
        "failed": done.failed,
        "notes": done.notes,
        "seconds": round(done.seconds, 3),
        "stages": {name: round(seconds, 3) for name, seconds in done.stages.items()},
    }


def _table(done: "DetectionEvaluation") -> str:
    width = max(len("class"), *(len(printable(one.name)) for one in done.classes))
    lines = [f"{'class':<{width}}  11-point    area    COCO  objects"]
    for one in [*done.classes, None]:
        if one is None:
            name, values, count = (
                "mean",
                (done.eleven_point, done.area, done.coco),
                sum(x.objects for x in done.classes),
            )
        else:
            name, values, count = printable(one.name), (one.eleven_point, one.area, one.coco), one.objects
        numbers = "".join(f"{'-' if math.isnan(value) else f'{value:.1f}':>8}" for value in values)
        lines.append(f"{name:<{width}}  {numbers}  {count:>7}")
    lines.append(
        f"average precision in %, IoU {done.overlap:g} (COCO: 0.5 to 0.95); {done.images} images, "
        f"{done.windows} windows, {done.seconds:.1f} s"
    )
    precision, recall = (
        "-" if math.isnan(value) else f"{value:.1f} %" for value in (done.kept_precision, done.kept_recall)
    )
    lines.append(f"at the default threshold of detect, {done.threshold:g}: precision {precision}, recall {recall}")
    for kind in ("ap", "ar"):
        told = [
            f"{(name.removeprefix(kind).lstrip('_') or 'all')} {'-' if math.isnan(value) else f'{100 * value:.1f}'}"
            for name, value in dataclasses.asdict(done.figures).items()
            if name.startswith(kind)
        ]
        lines.append(f"COCO {kind.upper()}: " + ", ".join(told))
    return "\n".join(lines)
