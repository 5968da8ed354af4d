"""The HTTP interface and the page: routes that check, call and shape; see `collection` for what they do."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from importlib import resources
from typing import Annotated, Any, Final

from fastapi import FastAPI, File, Form, Path, Query, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles

from sppfeat._version import __version__
from sppfeat.errors import GalleryError, ImageError, SppFeatError, UsageError, one_line
from sppfeat.retrieval import Gallery, Neighbor, SearchOptions
from sppfeat.serve.collection import Collection
from sppfeat.serve.models import Models
from sppfeat.serve.options import ServeOptions
from sppfeat.serve.overviews import add_duplicates, add_map
from sppfeat.serve.pool import BusyError
from sppfeat.serve.schemas import (
    ClassifyAnswer,
    ClassScore,
    Corners,
    Count,
    DetectAnswer,
    Detected,
    GalleryInfo,
    Hit,
    ImageInfo,
    Labels,
    LinkInfo,
    Milliseconds,
    Names,
    Problem,
    QueryInfo,
    Reranking,
    Rows,
    SearchAnswer,
    Why,
)
from sppfeat.serve.state import PATIENCE, Of, Refused, State, as_json, check_generation, sent_by
from sppfeat.serve.thumbnails import SIDES
from sppfeat.store import Box

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem} for status in (400, 401, 403, 404, 408, 409, 410, 413, 415, 422, 503)
}
_Row = Annotated[int, Path(ge=0, le=1 << 48, description="Number of a row of the gallery")]
_Side = Annotated[int, Query(description=f"Longer side in pixels at most: one of {', '.join(map(str, SIDES))}")]
_QueryId = Annotated[str | None, Form(max_length=64, description="Id of an earlier answer, u-... or r-ROW")]


# Swagger's page without its inline script; it sets styles itself and has images in addresses.
_DOCS: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>sppfeat serve: HTTP interface</title>
<link rel="stylesheet" href="/api/swagger/swagger-ui.css"></head>
<body><div id="swagger-ui"></div>
<script src="/api/swagger/swagger-ui-bundle.js"></script><script src="/static/docs.js"></script></body></html>
"""
_DOCS_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_STATUS: dict[type[SppFeatError], int] = {ImageError: 415, UsageError: 422, GalleryError: 409}


def create_app(collection: Collection, models: Models, options: ServeOptions) -> FastAPI:
    """The application, without its guard."""
    server = State(collection, models, options)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # The page is there at once; the first search waits for the network.
        warm = threading.Thread(target=collection.warm, args=(server.notes.append,), name="warm", daemon=True)
        warm.start()
        yield
        server.close()
        # Python must not end while a library works in another thread.
        warm.join(PATIENCE)

    app = FastAPI(
        title="sppfeat serve",
        version=__version__,
        description="Search a gallery with images and with parts of images.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/openapi.json",
        responses=_PROBLEMS,
    )
    _handle_errors(app)
    _add_gallery(app, server)
    _add_search(app, server)
    _add_images(app, server)
    add_duplicates(app, server)
    add_map(app, server)
    _add_models(app, server)
    static = str(resources.files("sppfeat.serve") / "static")

    @app.get("/api/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(_DOCS, headers={"content-security-policy": _DOCS_POLICY})

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(f"{static}/index.html", headers={"cache-control": "no-cache"})

    swagger = str(resources.files("fastapi_offline") / "static")
    app.mount("/api/swagger", StaticFiles(directory=swagger), name="swagger")
    app.mount("/static", StaticFiles(directory=static), name="static")
    return app


def _handle_errors(app: FastAPI) -> None:
    def problem(status: int, reason: str) -> JSONResponse:
        return JSONResponse({"detail": reason}, status)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return problem(error.status, str(error))

    @app.exception_handler(BusyError)
    async def busy(request: Request, error: BusyError) -> JSONResponse:
        return problem(503, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return problem(422, f"{'.'.join(map(str, first['loc'][1:]))}: {one_line(first['msg'])}")

    @app.exception_handler(SppFeatError)
    async def failed(request: Request, error: SppFeatError) -> JSONResponse:
        return problem(next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 503), str(error))


def _add_gallery(app: FastAPI, server: State) -> None:
    @app.get("/api/gallery")
    async def gallery() -> GalleryInfo:
        """The gallery that is served."""

        def look() -> GalleryInfo:
            opened = server.collection.current()
            recipe = opened.recipe
            detector, classifier = server.models.detector, server.models.classifier
            rerankings: list[Reranking] = ["none", "expand", "reciprocal", "diffuse"]
            if opened.bins is not None:
                rerankings.insert(1, "bins")
            return GalleryInfo(
                name=opened.path.resolve().name,
                images=len(opened),
                values=opened.about.dim if opened.projection is None else opened.projection.dim,
                index=opened.factory,
                exact=opened.exact,
                grid=None if opened.bins is None else max(recipe.levels),
                rerank=rerankings,
                generation=opened.about.row_state,
                max_upload=server.options.max_upload,
                backbone=recipe.backbone,
                scales=",".join(map(str, recipe.scales)),
                levels=",".join(map(str, recipe.levels)),
                detector=None if detector is None else Labels(classes=list(detector.classes)),
                classifier=None if classifier is None else Labels(classes=classifier.classes),
                missing=server.collection.missing(opened),
                notes=[*server.collection.notes(), *server.notes],
            )

        return await server.quick.run(look)

    @app.post("/api/names", response_model=Names)
    async def names(asked: Rows) -> Response:
        """The names of rows."""

        def work() -> Response:
            opened = server.collection.current()
            check_generation(opened, asked.of)
            if asked.rows and not 0 <= min(asked.rows) <= max(asked.rows) < len(opened):
                raise Refused(404, f"expected rows from 0 to {len(opened) - 1}")
            return as_json(Names(names=[opened.rows.names[row] for row in asked.rows]))

        return await server.quick.run(work)


def _add_search(app: FastAPI, server: State) -> None:
    @app.post("/api/search")
    async def search(
        request: Request,
        image: Annotated[UploadFile | None, File(description="The image to search with")] = None,
        query: _QueryId = None,
        box: Annotated[str | None, Form(max_length=200, description="Part of it: x1,y1,x2,y2 in pixels")] = None,
        k: Annotated[Count, Form()] = 24,
        parts: Annotated[bool, Form(description="Whether it may be a part of an image")] = False,
        rerank: Annotated[Reranking, Form()] = "none",
    ) -> SearchAnswer:
        """Search with an image, or with a part of it."""
        sent = await sent_by(image)

        def work() -> SearchAnswer:
            opened = server.collection.current()
            asked = server.query(opened, sent, query)
            part = None if box is None else _box(box, asked.size)
            options = SearchOptions(k=k, parts=parts, rerank=rerank)
            options = replace(options, explain=options.aligned)
            found = server.collection.search(opened, asked, options, part)
            (answer,) = found.answers
            if answer.error is not None:
                raise ImageError(answer.error)
            hits = [_hit(server.collection, opened, one) for one in answer.neighbors]
            width, height = asked.size
            return SearchAnswer(
                query=QueryInfo(id=asked.id, name=asked.name, width=width, height=height, box=_corners(part)),
                hits=hits,
                generation=opened.about.row_state,
                notes=found.notes,
                milliseconds=Milliseconds(
                    describe=round(1000 * found.describing, 1), search=round(1000 * found.searching, 1)
                ),
            )

        return await server.searches.run(work, request.is_disconnected)


def _add_images(app: FastAPI, server: State) -> None:
    @app.get("/api/images/{row}")
    async def about(row: _Row) -> ImageInfo:
        """An image of the gallery."""

        def work() -> ImageInfo:
            opened = server.collection.current()
            _check_row(opened, row)
            shown = server.collection.shown(opened, row)
            width, height = server.collection.size_of(opened, row) or (None, None)
            return ImageInfo(
                row=row,
                name=shown.name,
                width=width,
                height=height,
                there=shown.item.is_there(),
                box=_corners(shown.window),
            )

        return await server.images.run(work)

    @app.get("/images/{row}", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}})
    async def pixels(request: Request, row: _Row, side: _Side = 320, of: Of = None) -> Response:
        """An image of the gallery, as a JPEG."""
        _check_side(side)

        def work() -> Response:
            opened = server.collection.current()
            check_generation(opened, of)
            _check_row(opened, row)
            item = server.collection.shown(opened, row).item
            tag = f'"{opened.about.row_state}-{row}-{side}-{"-".join(map(str, item.fingerprint()))}"'
            headers = {"etag": tag, "cache-control": "private, no-cache"}
            if request.headers.get("if-none-match") == tag:
                return Response(status_code=304, headers=headers)
            try:
                return Response(server.thumbnails.get(item, side), media_type="image/jpeg", headers=headers)
            except ImageError as error:
                raise Refused(410, str(error)) from None

        return await server.images.run(work, request.is_disconnected)

    @app.get("/queries/{key}", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}})
    async def query_pixels(key: Annotated[str, Path(max_length=64)], side: _Side = 1280, of: Of = None) -> Response:
        """An image that was searched with, as a JPEG."""
        _check_side(side)

        def work() -> Response:
            opened = server.collection.current()
            if key.startswith("r-"):
                check_generation(opened, of)
            item = server.query(opened, None, key).item
            return Response(server.thumbnails.get(item, side), media_type="image/jpeg")

        return await server.images.run(work)


def _add_models(app: FastAPI, server: State) -> None:
    @app.post("/api/detect")
    async def detect(image: Annotated[UploadFile | None, File()] = None, query: _QueryId = None) -> DetectAnswer:
        """Objects in an image, if a detector was given. Takes seconds."""
        if (detector := server.models.detector) is None:
            raise Refused(404, "no detector was given; `sppfeat serve --detector FILE` gives one")
        sent = await sent_by(image)

        def work() -> DetectAnswer:
            found = server.models.detect(server.query(server.collection.current(), sent, query).item)
            width, height = found.image_size
            return DetectAnswer(
                width=width,
                height=height,
                detections=sorted(
                    (
                        Detected(label=detector.classes[label], score=float(score), box=_rounded(box))
                        for label, score, box in zip(found.labels, found.scores, found.boxes, strict=True)
                    ),
                    key=lambda one: -one.score,
                ),
            )

        return await server.slow.run(work)

    @app.post("/api/classify")
    async def classify(image: Annotated[UploadFile | None, File()] = None, query: _QueryId = None) -> ClassifyAnswer:
        """The classes of an image, if a classifier was given."""
        if server.models.classifier is None:
            raise Refused(404, "no classifier was given; `sppfeat serve --classifier FILE` gives one")
        sent = await sent_by(image)

        def work() -> ClassifyAnswer:
            found = server.models.classify(server.query(server.collection.current(), sent, query).item)
            return ClassifyAnswer(classes=[ClassScore(label=one.label, score=one.score) for one in found])

        return await server.searches.run(work)


def _box(text: str, size: tuple[int, int]) -> Box:
    """A part of an image of this width and height. Raises Refused."""
    try:
        x1, y1, x2, y2 = map(float, text.split(","))
    except ValueError:
        raise Refused(422, f"box: expected x1,y1,x2,y2, found {text!r}") from None
    width, height = size
    if not (0 <= x1 <= x2 <= width - 1 and 0 <= y1 <= y2 <= height - 1):  # also what is not finite
        raise Refused(400, f"box: expected a part of the image of {width} x {height} pixels, found {text}")
    return x1, y1, x2, y2


def _check_row(gallery: Gallery, row: int) -> None:
    if row >= len(gallery):
        raise Refused(404, f"expected a row from 0 to {len(gallery) - 1}, found {row}")


def _check_side(side: int) -> None:
    if side not in SIDES:
        raise Refused(422, f"side: expected one of {', '.join(map(str, SIDES))}, found {side}")


def _corners(box: Box | None) -> Corners | None:
    return None if box is None else _rounded(box)


def _rounded(box: Iterable[float]) -> Corners:
    return [round(float(value), 2) for value in box]


def _hit(collection: Collection, gallery: Gallery, one: Neighbor) -> Hit:
    width, height = collection.size_of(gallery, one.row, quick=True) or (None, None)
    why = None
    if one.explanation is not None:
        why = Why(
            query=one.explanation.query.tolist(),
            image=one.explanation.image.tolist(),
            links=[LinkInfo(query=link.query, image=link.image, score=link.score) for link in one.explanation.links],
        )
    return Hit(
        row=one.row,
        rank=one.rank,
        name=one.name,
        score=one.score,
        width=width,
        height=height,
        box=_corners(one.box),
        there=collection.shown(gallery, one.row).item.is_there(),
        why=why,
    )
