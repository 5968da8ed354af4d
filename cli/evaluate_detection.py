"""`sppfeat evaluate detection`: how good a detector is."""

import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppfeat_cli.output import options_document, print_json, printable
from sppfeat_cli.progress import Progress
from sppfeat_cli.train_detector import Annotations, Images, VocRoot, Windows

if TYPE_CHECKING:
    from sppfeat.detection import DetectionEvaluation


def register(evaluate: typer.Typer) -> None:
    evaluate.command(epilog="Example: sppfeat evaluate detection det.h5 VOC2007/ --split test --report test.html")(
        detection
    )


def detection(
    detector: Annotated[
        str, typer.Argument(metavar="DETECTOR", help="What `sppfeat train detector` made.", show_default=False)
    ],
    voc: VocRoot = None,
    split: Annotated[str | None, typer.Option(help="List of images below ImageSets/Main.", show_default="test")] = None,
    images: Images = None,
    annotations: Annotations = None,
    windows: Windows = None,
    iou: Annotated[float, typer.Option(help="Overlap from which a detection is right, for VOC's figures.")] = 0.5,
    overlap: Annotated[
        float, typer.Option(help="Of two detections of a class that overlap by more, the better one stays.")
    ] = 0.3,
    report: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a page with the curves of all classes.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page if it is there.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    engine: Annotated[str, typer.Option(help="auto, torch or openvino.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but results and errors.")] = False,
) -> None:
    """Average precision of every class, and their means: VOC 2007 (11-point), VOC 2010 (area), and COCO's.

    Difficult objects count neither way, a second detection of one object is wrong. What is odd in the annotations is
    named and left out; exit code 3 then. An image counts up to 100 detections of each class.
    """
    from sppfeat.detection import complete_options, evaluate_detector, open_detector, read_annotations, write_evaluation
    from sppfeat.errors import ReportError
    from sppfeat.recipe import RunOptions
    from sppfeat.report import check_page
    from sppfeat.windows import windows_from

    run = RunOptions(device=device, engine=engine)
    page = check_page(report, overwrite=overwrite) if report is not None else None
    model = open_detector(detector)
    options = complete_options(overlap)
    split = split or ("test" if voc is not None else None)
    annotated = read_annotations(voc, split=split, images=images, annotations=annotations)
    boxes = windows_from(windows) if windows is not None else None
    with Progress(quiet=quiet, can_finish_early=False) as progress:
        for name, reason in annotated.problems.items():
            progress.note(f"left out: {name}: {reason}")
        done = evaluate_detector(model, annotated, boxes, options, run, overlap=iou, observer=progress)
    if as_json:
        given = {"detector": detector, "voc": voc, "split": split, "images": images, "annotations": annotations}
        print_json(
            _document(done)
            | {
                # Of the windows that are proposed on the way; nothing else is left to chance.
                "seed": model.proposals.seed,
                "options": {**given, "windows": windows, "iou": iou, "device": device, "engine": engine}
                | options_document(options),
                "proposals": options_document(model.proposals),
                "recipe": options_document(model.recipe),
                "weights_sha256": model.weights_sha256,
            }
        )
    else:
        typer.echo(_table(done))
    # The page comes after the results, and fails alone.
    if page is not None:
        try:
            write_evaluation(page, done, title=f"Detection: {detector}", note=voc or annotations or "")
        except ReportError as error:
            print(f"sppfeat: {printable(str(error))}", file=sys.stderr)
            raise typer.Exit(1) from None
    if done.failed or done.notes:
        raise typer.Exit(3)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def _document(done: "DetectionEvaluation") -> dict[str, Any]:
    return {
        "mAP": _number(done.eleven_point),
        "mAP_area": _number(done.area),
        "mAP_coco": _number(done.coco),
        "per_class": {one.name: _number(one.eleven_point) for one in done.classes},
        "per_class_area": {one.name: _number(one.area) for one in done.classes},
        "per_class_coco": {one.name: _number(one.coco) for one in done.classes},
        "iou": done.overlap,
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
        f"average precision in %, overlap {done.overlap:g} (COCO: 0.5 to 0.95); {done.images} images, "
        f"{done.windows} windows, {done.seconds:.1f} s"
    )
    return "\n".join(lines)
