"""`sppfeat detect`: detect objects in images."""

import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Final

import typer

from sppfeat.recipe import RunOptions
from sppfeat_cli import options
from sppfeat_cli.output import command_line, counted, print_json, printable, wrote
from sppfeat_cli.progress import Progress

if TYPE_CHECKING:
    from sppfeat.detection import Detecting

# Seconds of proposing windows, over all processes, from which keeping them for the next run is worth a thought.
_LONG: Final = 20.0

_DETECT = options.Defaults("sppfeat.detection:DetectOptions")


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: sppfeat detect det.h5 photos/ --html hits.html")(detect)


def detect(
    detector: options.DetectorFile,
    sources: options.Sources,
    windows: options.Windows = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Minimum score, a probability from 0 to 1; of a detector that is not calibrated (`sppfeat inspect` "
            "shows it), an SVM score. A higher one gives fewer but surer detections.",
            show_default="0.25; -0.5 as an SVM score",
        ),
    ] = _DETECT.threshold,
    nms: options.Nms = _DETECT.nms,
    voting: options.Voting = _DETECT.voting,
    max_detections: Annotated[
        int, typer.Option(metavar="N", help="Maximum number of detections per class and image.")
    ] = _DETECT.max_detections,
    draw: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Also draw the detections on copies of the images.", show_default=False),
    ] = None,
    html: options.Html = None,
    root: options.Root = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Weights file of the detector, if it has moved.", show_default=False),
    ] = None,
    overwrite: options.Overwrite = False,
    device: options.Device = RunOptions.device,
    engine: options.Engine = RunOptions.engine,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Detect objects in images: print the label, score and box of each.

    The score is the probability that the detection is correct (of a detector that is not calibrated, an SVM score).
    Boxes are x1,y1,x2,y2 in pixels of the upright image, both ends inclusive. Without --windows, windows are proposed
    first, in the same way as for the detector's training, which takes most of the time: `sppfeat windows` keeps them.
    """
    run = RunOptions(device=device, engine=engine)
    options.check_sources(sources)

    from sppfeat.detection import (
        DetectionPage,
        DetectOptions,
        DrawingFolder,
        detect_images,
        open_detector,
        threshold_for,
    )
    from sppfeat.errors import ReportError
    from sppfeat.report import check_page
    from sppfeat.windows import windows_from
    from sppfeat_cli.detect_results import Results

    chosen = DetectOptions(threshold=threshold, nms=nms, max_detections=max_detections, voting=voting)
    page_path = check_page(html, overwrite=overwrite) if html is not None else None
    model = open_detector(detector)
    least = threshold_for(model, chosen)
    options.check_proposals(windows)
    boxes = windows_from(windows) if windows is not None else None
    page = DetectionPage(model) if page_path is not None else None
    drawings = DrawingFolder(draw, sources, overwrite=overwrite) if draw is not None else None
    with Progress(quiet=quiet) as progress:
        results = Results(progress, model, drawings, page, as_json)
        done = detect_images(
            model,
            sources,
            boxes,
            chosen,
            run,
            weights=weights,
            root=root,
            observer=results,
            stop=progress.stop.is_set,
        )
        for note in done.notes:
            progress.note(note)
    if as_json:
        print_json(
            {
                "results": [results.found_on[name] for name in sorted(results.found_on)],
                "failed": done.failed,
                "notes": done.notes,
                "not_drawn": results.not_drawn,
                "seconds": round(done.seconds, 3),
                "device": done.device,
                "stages": {name: round(seconds, 3) for name, seconds in done.stages.items()},
            }
        )
    elif not quiet:
        stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in done.stages.items())
        print(
            f"{counted(done.found, 'detection')} in {counted(done.searched, 'image')}, "
            f"{done.seconds:.1f} s on {done.device}; busy: {stages}",
            file=sys.stderr,
        )
        if (hint := _about_windows(done, windows, sources)) is not None:
            print(f"note: {printable(hint)}", file=sys.stderr)
    # Drawings and the page come after the results, which their failure does not affect.
    unwritten = results.unwritten
    if draw is not None and not unwritten:
        wrote(draw, quiet=quiet)
    if page is not None and page_path is not None:
        kind = "probability" if model.probable else "score"
        try:
            page.write(
                page_path,
                title=f"Detections of {detector}",
                note=f"{kind} at least {least:g}",
                command=command_line(),
            )
        except ReportError as error:
            unwritten.append(error)
        else:
            wrote(page_path, quiet=quiet)
    for reason in unwritten:
        print(f"sppfeat: {printable(str(reason))}", file=sys.stderr)
    if unwritten:
        raise typer.Exit(1)
    if done.searched + len(done.failed) < done.images:
        left = counted(done.images - done.searched - len(done.failed), "image")
        print(f"sppfeat: interrupted, {left} left", file=sys.stderr)
        raise typer.Exit(130)
    if done.failed or done.notes or results.not_drawn:
        raise typer.Exit(3)


def _about_windows(done: "Detecting", windows: str | None, sources: list[str]) -> str | None:
    """What `sppfeat windows` would do for the next run; None: nothing."""
    given = shlex.join(sources)
    if windows is not None:
        of = counted(done.bare, "image") + (" has" if done.bare == 1 else " have")
        return f"{of} no windows in {windows}: sppfeat windows {given} -o windows.h5" if done.bare else None
    spent = done.stages.get("windows", 0.0)
    if spent < _LONG or spent < sum(done.stages.values()) / 2:
        return None
    return f"most of the time went into windows; to keep them for other runs: sppfeat windows {given} -o windows.h5"
