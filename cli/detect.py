"""`sppfeat detect`: find objects on images."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppfeat_cli.output import counted, print_json, printable
from sppfeat_cli.progress import Progress
from sppfeat_cli.train_detector import Windows

if TYPE_CHECKING:
    from sppfeat.detection import DetectionPage, Detections, Detector, DrawingFolder
    from sppfeat.errors import ReportError
    from sppfeat.images import ImageList


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: sppfeat detect det.h5 photos/ --html hits.html")(detect)


def detect(
    detector: Annotated[
        str, typer.Argument(metavar="DETECTOR", help="What `sppfeat train detector` made.", show_default=False)
    ],
    sources: Annotated[
        list[str], typer.Argument(metavar="IMAGES...", help="Folders, images, text lists, or -.", show_default=False)
    ],
    windows: Windows = None,
    threshold: Annotated[float, typer.Option(help="Least score; higher gives fewer, surer ones.")] = -0.5,
    overlap: Annotated[
        float, typer.Option(help="Of two detections of a class that overlap by more, the better one stays.")
    ] = 0.3,
    max_detections: Annotated[int, typer.Option(help="Most detections of each class in an image.")] = 100,
    draw: Annotated[
        str | None, typer.Option(metavar="DIR", help="Draw what is found on copies of the images, in this folder.")
    ] = None,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Write a page of what is found.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier drawings and the page.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    engine: Annotated[str, typer.Option(help="auto, torch or openvino.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but results and errors.")] = False,
) -> None:
    """Find objects on images: boxes in pixels of the upright image, both ends inclusive, with label and score.

    Without --windows, they are found on the way, as those were that the detector was trained with.
    """
    from sppfeat.detection import DetectionPage, DetectOptions, DrawingFolder, detect_images, open_detector
    from sppfeat.errors import ReportError
    from sppfeat.recipe import RunOptions
    from sppfeat.report import check_page
    from sppfeat.windows import windows_from

    options = DetectOptions(threshold=threshold, overlap=overlap, max_detections=max_detections)
    run = RunOptions(device=device, engine=engine)
    page_path = check_page(html, overwrite=overwrite) if html is not None else None
    model = open_detector(detector)
    boxes = windows_from(windows) if windows is not None else None
    page = DetectionPage(model) if page_path is not None else None
    drawings = DrawingFolder(draw, sources, overwrite=overwrite) if draw is not None else None
    with Progress(quiet=quiet) as progress:
        results = _Results(progress, model, drawings, page, as_json)
        done = detect_images(model, sources, boxes, options, run, observer=results, stop=progress.stop.is_set)
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
            f"{counted(done.found, 'detection')} on {counted(done.searched, 'image')}, "
            f"{done.seconds:.1f} s on {done.device}; busy: {stages}",
            file=sys.stderr,
        )
    # What is written beside the results comes after them, and fails alone.
    unwritten = results.unwritten
    if page is not None and page_path is not None:
        try:
            page.write(page_path, title=f"Detections of {detector}", note=f"score at least {threshold:g}")
        except ReportError as error:
            unwritten.append(error)
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


class _Results:
    """Prints or keeps what is found, and draws it.

    not_drawn: images that could not be drawn, and why. unwritten: why the drawings ended early.
    """

    def __init__(
        self,
        progress: Progress,
        model: "Detector",
        drawings: "DrawingFolder | None",
        page: "DetectionPage | None",
        as_json: bool,
    ) -> None:
        self._progress, self._model, self._as_json = progress, model, as_json
        self._drawings, self._page = drawings, page
        self.found_on: dict[str, dict[str, Any]] = {}
        self.not_drawn: dict[str, str] = {}
        self.unwritten: list[ReportError] = []

    def listed(self, images: "ImageList") -> None:
        if self._drawings is not None:
            self._drawings.plan(images)

    def started(self, *, todo: int, reused: int) -> None:
        self._progress.started(todo=todo, reused=reused)

    def row(self, name: str, error: str | None) -> None:
        self._progress.row(name, error)

    def found(self, path: str, name: str, found: "Detections") -> None:
        from sppfeat.errors import ImageError, ReportError

        entries: list[dict[str, Any]] = [
            {
                "label": self._model.classes[int(label)],
                "score": round(float(score), 4),
                "box": [round(float(edge), 2) for edge in box],
            }
            for label, score, box in zip(found.labels, found.scores, found.boxes, strict=True)
        ]
        if self._as_json:
            self.found_on[name] = {"image": name, "detections": entries}
        else:
            for entry in entries:
                box = ",".join(f"{edge:.0f}" for edge in entry["box"])
                typer.echo(f"{printable(name)}\t{printable(entry['label'])}\t{entry['score']:.3f}\t{box}")
        if self._drawings is not None:
            try:
                self._drawings.draw(path, name, found, self._model.classes)
            except ImageError as error:
                self.not_drawn[name] = str(error)
                self._progress.note(f"not drawn: {name}: {error}")
            except ReportError as error:
                self.unwritten.append(error)
                self._drawings = None
        if self._page is not None:
            self._page.add(path, name, found)
