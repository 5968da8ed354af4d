"""The JSON of the HTTP interface."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from sppfeat.serve.options import MAX_HITS

Reranking = Literal["none", "bins", "expand", "reciprocal", "diffuse"]
Corners = Annotated[list[float], Field(min_length=4, max_length=4, description="x1, y1, x2, y2 in pixels, inclusive")]
Count = Annotated[int, Field(ge=1, le=MAX_HITS)]


class Problem(BaseModel):
    """Why a request failed, in one line."""

    detail: str


class Labels(BaseModel):
    """What a detector or a classifier knows."""

    classes: list[str]


class GalleryInfo(BaseModel):
    """The gallery that is served. grid: bins along a side; null: none are kept, so no parts and no rerank `bins`.
    generation: changes with the rows, which are numbered anew. max_upload: bytes of a request."""

    name: str
    images: int
    values: int
    index: str
    exact: bool
    grid: int | None
    rerank: list[Reranking]
    generation: str
    max_upload: int
    backbone: str
    scales: str
    levels: str
    detector: Labels | None
    classifier: Labels | None
    missing: list[str]
    notes: list[str]


class QueryInfo(BaseModel):
    """The image that was searched with; its id stands for it in later requests."""

    id: str
    name: str
    width: int
    height: int
    box: Corners | None


class LinkInfo(BaseModel):
    """A bin of the query and a bin of the image, row and column from 0, and what they add to the score."""

    query: tuple[int, int]
    image: tuple[int, int]
    score: float


class Why(BaseModel):
    """What each bin adds to the score: grids [n, n] that each add up to it, and the strongest pairs of bins."""

    query: list[list[float]]
    image: list[list[float]]
    links: list[LinkInfo]


class Hit(BaseModel):
    """An image of the gallery, by row. box: where the query was found in it, or the window that the row is of."""

    row: int
    rank: int
    name: str
    score: float
    width: int | None
    height: int | None
    box: Corners | None
    there: bool
    why: Why | None


class Milliseconds(BaseModel):
    """Where the time went."""

    describe: float
    search: float


class SearchAnswer(BaseModel):
    """A query and its hits, the best first. generation: of the gallery that rows are of, as in GalleryInfo."""

    query: QueryInfo
    hits: list[Hit]
    generation: str
    notes: list[str]
    milliseconds: Milliseconds


class ImageInfo(BaseModel):
    """An image of the gallery. box: the window that its row is of."""

    row: int
    name: str
    width: int | None
    height: int | None
    there: bool
    box: Corners | None


class Detected(BaseModel):
    """An object found: its class, its score, and its box."""

    label: str
    score: float
    box: Corners


class DetectAnswer(BaseModel):
    """Objects of an image, the best first."""

    width: int
    height: int
    detections: list[Detected]


class ClassScore(BaseModel):
    """A class and its score; above 0: of that class."""

    label: str
    score: float


class ClassifyAnswer(BaseModel):
    """The classes of an image, the best first."""

    classes: list[ClassScore]


class Twin(BaseModel):
    """An image of a group of duplicates. score: its cosine similarity with the first of the group, the one to keep."""

    row: int
    name: str
    width: int
    height: int
    score: float
    there: bool


class DuplicatesAnswer(BaseModel):
    """Groups of duplicates, the largest first; while they are computed, the fraction done. threshold: null where images
    were compared. more: groups left out. cut: images of the groups told that are left out. notes: such as images that
    could not be read. generation: as in SearchAnswer."""

    state: Literal["computing", "ready", "failed"]
    done: float = 0.0
    detail: str = ""
    threshold: float | None = None
    notes: list[str] = []
    groups: list[list[Twin]] = []
    more: int = 0
    cut: int = 0
    generation: str = ""


class MapAnswer(BaseModel):
    """The map: whether it is there, how far its making is, and how its sheets are cut. state: `unavailable` if there is
    none and none can be made here, for the reason in detail. sheets: of columns x columns tiles of tile x tile pixels.
    generation: as in SearchAnswer."""

    state: Literal["absent", "unavailable", "computing", "ready", "failed"]
    done: float = 0.0
    what: str = ""
    detail: str = ""
    images: int
    tile: int
    columns: int
    sheets: int
    generation: str


class Rows(BaseModel):
    """Rows of the gallery. of: the generation that they are of, as in GalleryInfo; another one is refused."""

    rows: Annotated[list[int], Field(max_length=1_000_000)]
    of: Annotated[str | None, Field(max_length=64)] = None


class Names(BaseModel):
    """The names of rows, in the order asked for."""

    names: list[str]
