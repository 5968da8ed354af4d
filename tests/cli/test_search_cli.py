"""`sppfeat index`, `search` and `inspect` of galleries, through the command line."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import MakeStore
from PIL import Image

from sppfeat import GalleryError, MissingExtraError, Recipe, ReportError, extract_folder, open_store
from sppfeat.retrieval.changes import create_gallery
from sppfeat.retrieval.faiss_library import load_faiss
from sppfeat.retrieval.gallery import open_gallery
from sppfeat.retrieval.gallery_files import _write_rows
from sppfeat.retrieval.search import search_store
from sppfeat_cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line within this process: exit code, standard output, standard error."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sppfeat", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def folder(make_images: Callable[..., Path], tmp_path: Path, tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten images, described in f.h5 of the current folder."""
    images = make_images(10)
    extract_folder(images, tmp_path / "f.h5", tiny)
    monkeypatch.chdir(tmp_path)
    return images


def test_index_search_and_change(folder: Path, call: Run, make_images: Callable[..., Path], tiny: Recipe) -> None:
    _, built, _ = call("index", "f.h5", "-o", "g", "--whiten", "--project", "6", "--json")
    document = json.loads(built)
    assert (document["images"], document["index"]["factory"], document["projection"]["dim"]) == (10, "Flat", 6)
    Path("bad.jpg").write_text("no image")
    query = folder / "0003.png"
    code, out, _ = call("search", "g", query, "bad.jpg", "none.jpg", "-k", "3", "--json", "--html", "hits.html")
    answers = json.loads(out)
    (result,) = answers["results"]
    first = result["neighbors"][0]
    assert (code, result["query"]) == (3, str(query))
    assert (first["name"], first["rank"], first["path"]) == ("0003.png", 1, str(query))
    assert first["score"] == pytest.approx(1, abs=1e-2) and len(result["neighbors"]) == 3
    assert [one["query"] for one in answers["failed"]] == ["bad.jpg", "none.jpg"]
    assert [one["error"].split(":")[0] for one in answers["failed"]] == ["not an image", "no such file or folder"]
    page = Path("hits.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 4 and "could not be described: not an image" in page

    more = make_images(3, "more", seed=5)
    for number, path in enumerate(sorted(more.iterdir())):
        path.rename(more / f"new{number}.png")
    extract_folder(more, "more.h5", tiny)
    assert "13 images now (3 added)" in call("index", "more.h5", "--add-to", "g")[1]
    Path("names.txt").write_text("new1.png\n0003.png\n")
    assert "11 images now (2 removed)" in call("index", "--remove", "names.txt", "--from", "g")[1]
    _, table, notes = call("search", "g", "more.h5", "-k", "99")
    assert "k is 99, but the gallery has 11 images: all are returned" in notes
    assert table.startswith(f"new0.png\n    1   1.0000  {more / 'new0.png'}\n")
    code, shown, _ = call("inspect", "g", "--verify")
    assert code == 0 and "gallery of 11 images" in shown and "verified" in shown


def test_a_part_of_an_image(folder: Path, call: Run) -> None:
    call("index", "f.h5", "-o", "g")
    query = folder / "0003.png"
    with Image.open(query) as image:
        width, height = image.size

    def nearest(box: str) -> tuple[str, float]:
        _, out, _ = call("search", "g", query, "--box", box, "--json")
        found = json.loads(out)["results"][0]["neighbors"][0]
        return found["name"], found["score"]

    # The whole image as a box has the image's own descriptor; a part has another.
    assert nearest(f"0,0,{width - 1},{height - 1}") == ("0003.png", pytest.approx(1, abs=1e-3))
    assert nearest("0,0,20,20")[1] < 0.999
    code, _, errors = call("search", "g", query, "--box", "0,0,20,2000")
    assert code == 3 and f"reaches outside the image of {width} x {height} pixels" in errors


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["index", "f.h5"], 2, "expected index STORE -o GALLERY"),
        (["index", "f.h5", "-o", "g2", "--add-to", "g"], 2, "expected index STORE -o GALLERY"),
        (["index", "--remove", "n.txt"], 2, "expected index STORE -o GALLERY"),
        (
            ["index", "f.h5", "--add-to", "g", "--factory", "Flat"],
            2,
            "--factory: applies only when a gallery is built with -o",
        ),
        (["index", "f.h5", "-o", "g2", "--memory", "lots"], 2, "--memory: expected a size such as 800MB"),
        (["index", "f.h5", "-o", "g2", "--memory", "100B"], 2, "memory: 10 rows of .* take at least"),
        (["index", "f.h5", "-o", "g2", "--factory", "Flut"], 2, "FAISS rejects it .*one that works: IVF1,SQ8"),
        (
            ["index", "f.h5", "-o", "g2", "--factory", "IVF64,PQ8"],
            2,
            "at least 256 rows to train, found 10; Flat",
        ),
        (["index", "f.h5", "-o", "g2", "--device", "auto"], 2, "an index's device must be cpu, cuda"),
        (["index", "f.h5", "-o", "g2", "--whitening-from", "f.h5"], 2, "expected --whiten or --project with it"),
        (["index", "f.h5", "-o", "f.h5"], 1, "expected a gallery folder or no file, found a file"),
        (["index", "g", "-o", "g2"], 1, "g: expected a store"),
        (
            ["search", "f.h5", "q.png"],
            1,
            r"f.h5: expected a gallery, found a store; first: sppfeat index f.h5 -o gallery/",
        ),
        (["search", "nowhere", "q.png"], 1, "nowhere: expected a gallery, found no such folder"),
        (["search", "g", "q.png", "--box", "5,5,1,9"], 2, "box must be x1,y1,x2,y2 .*found 5,5,1,9"),
        (["search", "g", "q.png", "--box", "0,0.2,1,0.9"], 2, "box must be in pixels, found fractions 0,0.2,1,0.9"),
        (["search", "g", "q.png", "--box", "5,5,9"], 2, "--box: expected X1,Y1,X2,Y2, found '5,5,9'"),
        (["search", "g", "nowhere.png"], 2, "nowhere.png: no such file or folder"),
        (["search", "g", "q.png", "-k", "0"], 2, "k must be at least 1"),
        (["search", "g", "f.h5", "q.png"], 2, "expected one store or images as queries, found 2 paths"),
        (["search", "g", "q.png", "--html", "f.h5"], 1, "f.h5: expected an HTML page or a new file"),
        (["duplicates", "g"], 1, "g: expected a store"),
        (["evaluate", "retrieval", "f.h5"], 2, "expected images in several folders"),
        (["inspect", "g", "--failures"], 2, "--failures is for stores and files of windows, found a gallery"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_one_line_for_each_mistake(
    arguments: list[str],
    code: int,
    message: str,
    make_store: MakeStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Run,
) -> None:
    monkeypatch.chdir(tmp_path)
    create_gallery(make_store(np.random.default_rng(0).normal(size=(10, 16))), "g")
    Path("n.txt").write_text("0001.jpg\n")
    Path("q.png").write_text("no image")
    found, _, errors = call(*arguments)
    assert found == code, errors
    assert errors.count("\n") == 1 and re.match("sppfeat: .*" + message, errors), errors
    assert not Path("g2").exists()


def test_without_faiss(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=r"needs faiss, which is not installed: pip install 'sppfeat\[cpu\]'"):
        create_gallery(make_store(np.eye(4)), tmp_path / "g")


def test_an_old_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", SimpleNamespace(__version__="1.10.0"))
    with pytest.raises(MissingExtraError, match=r"needs faiss 1.15 or newer, found 1.10.0: pip install -U"):
        load_faiss()


def test_a_gallery_of_windows(folder: Path, call: Run, tiny: Recipe) -> None:
    """Rows of windows are found by a part of their image, by name, with the image's path and the box."""
    boxes = {"0003.png": np.array([[0, 0, 20, 20], [10, 10, 40, 40]]), "0004.png": np.array([[0, 0, 20, 20]])}
    extract_folder(folder, "w.h5", tiny, windows=boxes)
    call("index", "w.h5", "-o", "g")
    query = folder / "0003.png"
    _, out, _ = call("search", "g", query, "--box", "10,10,40,40", "--json", "--html", "w.html")
    found = json.loads(out)["results"][0]["neighbors"]
    assert len(found) == 3 and found[0]["score"] == pytest.approx(1, abs=1e-3)
    assert (found[0]["name"], found[0]["path"], found[0]["box"]) == (
        "0003.png#10,10,40,40",
        str(query),
        [10, 10, 40, 40],
    )
    page = Path("w.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 4 and page.count(f"Names are below <code>{folder}</code>") == 1
    assert "outlined: 10,10,40,40" in page and page.count('href="./images/') == 4


def test_a_page_that_cannot_be_written_costs_the_page_alone(
    folder: Path, call: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*given: object, **more: object) -> None:
        raise ReportError("p.html: cannot be written: the disk is full")

    monkeypatch.setattr("sppfeat.retrieval.write_hits_page", refused)
    monkeypatch.setattr("sppfeat.retrieval.write_duplicates_page", refused)
    call("index", "f.h5", "-o", "g")
    for arguments, key in ((("search", "g", "f.h5"), "results"), (("duplicates", "f.h5"), "groups")):
        code, out, errors = call(*arguments, "--html", "p.html", "--json")
        assert (code, errors) == (1, "sppfeat: p.html: cannot be written: the disk is full\n")
        assert key in json.loads(out)


def test_answers_to_a_store_stream(folder: Path, call: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes block by block is what comes at once; only the first answers are kept, for the page."""
    call("index", "f.h5", "-o", "g")
    at_once = call("search", "g", "f.h5", "-k", "2")
    _, whole, _ = call("search", "g", "f.h5", "-k", "2", "--json")
    monkeypatch.setattr("sppfeat.retrieval.search.STREAMED", 2)
    monkeypatch.setattr("sppfeat.retrieval.PAGE_QUERIES", 3)
    assert call("search", "g", "f.h5", "-k", "2") == at_once
    code, out, _ = call("search", "g", "f.h5", "-k", "2", "--json", "--html", "p.html")
    streamed, expected = json.loads(out), json.loads(whole)
    assert code == 0 and streamed["results"] == expected["results"] and len(streamed["results"]) > 4
    assert list(streamed) == list(expected) and out.startswith('{\n  "results": [\n    {\n      "query"')
    assert f"3 of {len(streamed['results'])} queries shown" in Path("p.html").read_text()
    refused = call("search", "g", "f.h5", "--parts", "--json")
    assert refused[:2] == (2, "") and "parts: expected images as queries" in refused[2]


def change_gallery(rows: Callable[[list[str]], list[str]] = list, **index: object) -> None:
    """Other names, and another index entry, in the gallery g, as whoever means harm would write them."""
    about = json.loads(Path("g/gallery.json").read_text())
    held = open_gallery("g").rows
    _write_rows(Path("g/rows-1.h5"), dataclasses.replace(held, names=rows(held.names)))
    content = Path("g/rows-1.h5").read_bytes()
    about["files"]["rows"] |= {"bytes": len(content), "crc32": zlib.crc32(content)}
    about["index"] |= index
    Path("g/gallery.json").write_text(json.dumps(about))


def test_windows_that_no_image_has(folder: Path, call: Run) -> None:
    call("index", "f.h5", "-o", "g")
    change_gallery(lambda names: [*names[:7], "0007.png#nan,0,1,1", "0008.png#9,9,1,1", "0009.png#0,0,inf,1"])
    code, out, _ = call("search", "g", folder / "0007.png", "--json", "--html", "hits.html")
    found = json.loads(out)["results"][0]["neighbors"]
    assert (code, len(found), found[0]["name"]) == (0, 10, "0007.png#nan,0,1,1")
    # No window, so an image's name: of one that is not there.
    assert (found[0]["path"], found[0]["box"]) == (str(folder / "0007.png#nan,0,1,1"), None)
    assert Path("hits.html").read_text().count("data:image/jpeg;base64,") == 8


def test_no_text_of_a_gallery_commands_the_terminal(folder: Path, call: Run) -> None:
    call("index", "f.h5", "-o", "g")
    change_gallery(lambda names: ["\x1b[2J", *names[1:]], why="\x1b]0;x\x07", effort={"\x1b[1m": 3}, factory="F\nlat")
    code, shown, _ = call("inspect", "g")
    assert code == 0 and r"index: F\nlat, \x1b[1m 3 (\x1b]0;x\x07)" in shown
    shown += call("search", "g", "f.h5")[1] + "".join(call("inspect", "g", "--verify")[1:])
    assert all(line.isprintable() for line in shown.splitlines())


def test_rows_that_are_not_there_are_never_looked_up(folder: Path, call: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        """An index that FAISS cannot be held to."""

        def __init__(self, row: int, score: float) -> None:
            self.row, self.score = row, score

        def search(self, units: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            return np.full((len(units), k), self.score, np.float32), np.full((len(units), k), self.row)

    call("index", "f.h5", "-o", "g")
    gallery = open_gallery("g")
    for wrong in (Wrong(10, 0.5), Wrong(3, float("nan"))):
        with pytest.raises(GalleryError, match="its index returns unknown rows"):
            search_store(dataclasses.replace(gallery, index=wrong), open_store("f.h5"))
