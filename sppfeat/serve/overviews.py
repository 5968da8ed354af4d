"""Routes of what is computed over all images in the background: duplicates and the map."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import numpy as np
from fastapi import FastAPI, Path, Query, Response
from fastapi.responses import FileResponse

from sppfeat.errors import MissingExtraError
from sppfeat.retrieval import Gallery, check_map, tile_order
from sppfeat.serve.charting import chart, is_charted, sheet_of
from sppfeat.serve.jobs import Standing
from sppfeat.serve.schemas import DuplicatesAnswer, MapAnswer, Twin
from sppfeat.serve.sheets import COLUMNS, TILE, sheet_count
from sppfeat.serve.state import Of, Refused, State, as_json, check_generation

# Groups that a page is sent: more cannot be looked through, and `sppfeat duplicates --csv` has them all.
_GROUPS: Final = 2000
_TWINS: Final = 100


def add_duplicates(app: FastAPI, server: State) -> None:
    @app.get("/api/duplicates", response_model=DuplicatesAnswer)
    async def duplicates(threshold: Annotated[float | None, Query(gt=0.5, le=1)] = None) -> Response:
        """Groups of copies of one image, by their pixels; with a threshold, of images whose descriptors have such a
        cosine. The first request begins the work; ask again until it is ready."""
        return await server.quick.run(lambda: as_json(ask(threshold)))

    def ask(threshold: float | None) -> DuplicatesAnswer:
        opened = server.collection.current()
        # Images are compared anew once a folder that was missing is there, or the reverse.
        key = opened.about.row_state, threshold, tuple(server.collection.missing(opened))
        job = server.duplicates.ask(key, lambda tell: server.collection.duplicates(opened, threshold, tell))
        if job.failed is not None:
            return DuplicatesAnswer(state="failed", detail=job.failed)
        if job.result is None:
            return DuplicatesAnswer(state="computing", done=job.done)
        found, all_groups = job.result
        groups = [
            [
                Twin(
                    row=row,
                    name=one.name,
                    width=one.size[0],
                    height=one.size[1],
                    score=one.score,
                    there=server.collection.shown(opened, row).item.is_there(),
                )
                for row, one in group[:_TWINS]
            ]
            for group in all_groups[:_GROUPS]
        ]
        return DuplicatesAnswer(
            state="ready",
            done=1,
            threshold=threshold,
            groups=groups,
            more=len(all_groups) - len(groups),
            cut=sum(max(0, len(group) - _TWINS) for group in all_groups[:_GROUPS]),
            notes=found.notes,
            generation=opened.about.row_state,
        )


def add_map(app: FastAPI, server: State) -> None:
    def why_not() -> str | None:
        """Why no map can be laid out here, if none can."""
        try:
            check_map()
        except MissingExtraError as error:
            return str(error)
        return None

    def answer(gallery: Gallery, standing: Standing[bool] | None) -> MapAnswer:
        state: Literal["absent", "unavailable", "computing", "ready", "failed"] = "computing"
        detail = ""
        if standing is None:
            state = "ready" if is_charted(gallery) else "absent"
            if state == "absent" and gallery.points is None and (reason := why_not()):
                state, detail = "unavailable", reason
        elif standing.failed is not None:
            state, detail = "failed", standing.failed
        return MapAnswer(
            state=state,
            done=1.0 if standing is None else standing.done,
            what="laying out" if gallery.points is None else "thumbnails",
            detail=detail,
            images=len(gallery),
            tile=TILE,
            columns=COLUMNS,
            sheets=sheet_count(len(gallery)),
            generation=gallery.about.row_state,
        )

    def look() -> MapAnswer:
        gallery = server.collection.current()
        standing = None if is_charted(gallery) else server.charts.look()
        return answer(gallery, standing)

    def begin() -> MapAnswer:
        gallery = server.collection.current()
        if is_charted(gallery):
            return answer(gallery, None)
        return answer(gallery, server.charts.ask("map", lambda tell: chart(server.collection, tell), again=True))

    @app.get("/api/map")
    async def map_state() -> MapAnswer:
        """Whether there is a map of all images, or how far it is."""
        return await server.quick.run(look)

    @app.post("/api/map")
    async def make_map() -> MapAnswer:
        """Begin to make the map."""
        return await server.quick.run(begin)

    @app.get("/api/map/points", response_class=Response, responses={200: {"content": {"application/octet-stream": {}}}})
    async def points() -> Response:
        """Where each row is: little-endian float32 [N, 2] from 0 to 1, x to the right and y down."""
        found = (await server.gallery()).points
        if found is None:
            raise Refused(404, "there is no map yet")
        return Response(np.ascontiguousarray(found, "<f4").tobytes(), media_type="application/octet-stream")

    @app.get("/api/map/order", response_class=Response, responses={200: {"content": {"application/octet-stream": {}}}})
    async def order() -> Response:
        """Which row each tile of the sheets shows: little-endian uint32 [N]."""

        def work() -> bytes:
            found = server.collection.current().points
            if found is None:
                raise Refused(404, "there is no map yet")
            return np.ascontiguousarray(tile_order(found), "<u4").tobytes()

        return Response(await server.quick.run(work), media_type="application/octet-stream")

    @app.get("/map/sheets/{number}", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}})
    async def sheet(number: Annotated[int, Path(ge=0, le=1 << 32)], of: Of = None) -> Response:
        """A sheet of tiles, as a JPEG."""
        gallery = await server.gallery()
        check_generation(gallery, of)
        file = sheet_of(gallery, number)
        if file is None:
            raise Refused(404, f"expected the number of a sheet that is there, found {number}")
        return FileResponse(file, media_type="image/jpeg", headers={"cache-control": "private, no-cache"})
