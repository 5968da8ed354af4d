"""What `sppfeat detect` does with results as they come."""

from collections.abc import Sequence
from typing import Any

import typer

from sppfeat.detection import DetectionObserver, DetectionPage, Detections, Detector, DrawingFolder
from sppfeat.errors import ImageError, ReportError
from sppfeat.images import ImageList, Item
from sppfeat_cli.output import printable
from sppfeat_cli.progress import Progress


class Results(DetectionObserver):
    """Prints or collects detections, and draws them.

    not_drawn: images that could not be drawn, and why. unwritten: errors that stopped the drawing.
    """

    def __init__(
        self,
        progress: Progress,
        model: Detector,
        drawings: DrawingFolder | None,
        page: DetectionPage | None,
        as_json: bool,
    ) -> None:
        self._progress, self._model, self._as_json = progress, model, as_json
        self._drawings, self._page = drawings, page
        self.found_on: dict[str, dict[str, Any]] = {}
        self.not_drawn: dict[str, str] = {}
        self.unwritten: list[ReportError] = []

    def listed(self, images: ImageList) -> None:
        if self._drawings is not None:
            self._drawings.plan(images)

    def started(self, *, todo: int, reused: int, gone: Sequence[str] = (), device: str = "") -> None:
        self._progress.started(todo=todo, reused=reused)

    def row(self, name: str, error: str | None) -> None:
        self._progress.row(name, error)

    def found(self, item: Item, found: Detections) -> None:
        entries: list[dict[str, Any]] = [
            {
                "label": self._model.classes[int(label)],
                "score": round(float(score), 4),
                "box": [round(float(edge), 2) for edge in box],
            }
            for label, score, box in zip(found.labels, found.scores, found.boxes, strict=True)
        ]
        name = item.name
        if self._as_json:
            self.found_on[name] = {"image": name, "detections": entries}
        else:
            for entry in entries:
                box = ",".join(f"{edge:.0f}" for edge in entry["box"])
                typer.echo(f"{printable(name)}\t{printable(entry['label'])}\t{entry['score']:.3f}\t{box}")
        if self._drawings is not None:
            try:
                self._drawings.draw(item, name, found, self._model.classes)
            except ImageError as error:
                self.not_drawn[name] = str(error)
                self._progress.note(f"not drawn: {name}: {error}")
            except ReportError as error:
                self.unwritten.append(error)
                self._drawings = None
        if self._page is not None:
            self._page.add(item, name, found)
