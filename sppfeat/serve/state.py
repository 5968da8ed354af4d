"""What routes of the HTTP interface share, and how a request is refused."""

from __future__ import annotations

import time
from typing import Annotated, Final

from fastapi import Query, Response, UploadFile
from pydantic import BaseModel

from sppfeat.retrieval import Duplicates, Gallery, Member
from sppfeat.serve.collection import Collection
from sppfeat.serve.jobs import Jobs
from sppfeat.serve.models import Models
from sppfeat.serve.options import ServeOptions
from sppfeat.serve.pool import Pool
from sppfeat.serve.thumbnails import Thumbnails
from sppfeat.serve.uploads import Query as QueryImage
from sppfeat.serve.uploads import Uploads

# Seconds that the end waits for work in other threads.
PATIENCE: Final = 30.0


class Refused(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class State:
    """What routes share."""

    def __init__(self, collection: Collection, models: Models, options: ServeOptions) -> None:
        self.collection, self.models, self.options = collection, models, options
        self.uploads = Uploads(options.uploads, options.max_pixels)
        self.thumbnails = Thumbnails(options.thumbnails)
        self.searches = Pool(options.workers, options.waiting, options.seconds, "search")
        # A page asks for many small images at once: they wait behind each other, not behind searches.
        self.images = Pool(options.workers, 16 * options.waiting, options.seconds, "image")
        # What is in memory is answered at once, however slow the images are.
        self.quick = Pool(2, 16 * options.waiting, options.seconds, "quick")
        self.slow = Pool(1, options.waiting // 4, options.seconds, "models")
        self.duplicates: Jobs[tuple[Duplicates, list[list[tuple[int, Member]]]]] = Jobs("duplicates")
        self.charts: Jobs[bool] = Jobs("map")
        self.notes: list[str] = []

    def close(self) -> None:
        for pool in (self.searches, self.images, self.quick, self.slow):
            pool.close()
        deadline = time.monotonic() + PATIENCE
        for jobs in (self.duplicates, self.charts):
            jobs.end()
        for jobs in (self.duplicates, self.charts):
            jobs.join(max(0.0, deadline - time.monotonic()))
        self.thumbnails.close()

    async def gallery(self) -> Gallery:
        """The gallery; opening a newer one takes a while, and other requests go on."""
        return await self.quick.run(self.collection.current)

    def query(self, gallery: Gallery, image: tuple[str, bytes] | None, key: str | None) -> QueryImage:
        """The image of a request. Raises Refused, ImageError."""
        if (image is None) == (key is None):
            raise Refused(400, "expected an image or a query, and not both")
        if image is not None:
            return self.uploads.add(*image)
        assert key is not None
        if key.startswith("r-") and key[2:].isascii() and key[2:].isdigit() and len(key) < 20:
            if int(key[2:]) >= len(gallery):
                raise Refused(404, f"expected a row from 0 to {len(gallery) - 1}, found {key[2:]}")
            return self.collection.query(gallery, int(key[2:]))
        if (found := self.uploads.get(key)) is None:
            raise Refused(404, "this image was not kept; send it again")
        return found


Of = Annotated[str | None, Query(max_length=64, description="Generation of the gallery that the row is of")]


def check_generation(gallery: Gallery, of: str | None) -> None:
    """Raise Refused for rows of another gallery than this: their numbers are those of other images here."""
    if of is not None and of != gallery.about.row_state:
        raise Refused(409, "the gallery was changed since; its rows have other numbers now")


def as_json(answer: BaseModel) -> Response:
    """An answer of any length, made where it is called: not where other requests wait for it."""
    return Response(answer.model_dump_json(), media_type="application/json")


async def sent_by(image: UploadFile | None) -> tuple[str, bytes] | None:
    """The name and bytes of an image that was sent."""
    if image is None:
        return None
    # A name may hold halves of characters, which no answer can.
    name = (image.filename or "image").encode("utf-8", "replace").decode()
    return name[:200], await image.read()
