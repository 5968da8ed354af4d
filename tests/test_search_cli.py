"""`sppfeat index`, `search` and `inspect` of galleries, through the command line."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeStore

from sppfeat import Recipe, extract_folder

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def folder(make_images: Callable[..., Path], tmp_path: Path, tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten pictures, described in f.h5 of the current folder."""
    images = make_images(10)
    extract_folder(images, tmp_path / "f.h5", tiny)
    monkeypatch.chdir(tmp_path)
    return images


def test_index_search_and_change(
    folder: Path, run_sppfeat: Run, make_images: Callable[..., Path], tiny: Recipe
) -> None:
    built = run_sppfeat("index", "f.h5", "-o", "g", "--whiten", "--project", "6", "--json")
    document = json.loads(built.stdout)
    assert (document["images"], document["index"]["factory"], document["projection"]["dim"]) == (10, "Flat", 6)
    Path("bad.jpg").write_text("no image")
    done = run_sppfeat(
        "search", "g", folder / "0003.png", "bad.jpg", "none.jpg", "-k", "3", "--json", "--html", "hits.html"
    )
    assert done.returncode == 3, done.stderr
    answers = json.loads(done.stdout)
    (result,) = answers["results"]
    assert result["query"] == str(folder / "0003.png")
    first = result["neighbors"][0]
    assert (first["name"], first["rank"], first["path"]) == ("0003.png", 1, str(folder / "0003.png"))
    assert first["score"] == pytest.approx(1, abs=1e-2) and len(result["neighbors"]) == 3
    assert [(one["query"], one["error"]) for one in answers["failed"]] == [
        (
            "bad.jpg",
            "not an image: expected JPEG, PNG, WEBP, BMP, TIFF, GIF, AVIF, found a file that starts b'no image'",
        ),
        ("none.jpg", "no such file or folder"),
    ]
    page = Path("hits.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 4 and "could not be described: not an image" in page

    # The whole picture as a box gives the picture's own descriptor; a part another one.
    from PIL import Image

    with Image.open(folder / "0003.png") as picture:
        width, height = picture.size
    whole = run_sppfeat("search", "g", folder / "0003.png", "--box", f"0,0,{width - 1},{height - 1}", "--json")
    found = json.loads(whole.stdout)["results"][0]["neighbors"]
    assert found[0]["name"] == "0003.png" and found[0]["score"] == pytest.approx(1, abs=1e-2)
    part = run_sppfeat("search", "g", folder / "0003.png", "--box", "0,0,20,20", "--json")
    assert json.loads(part.stdout)["results"][0]["neighbors"][0]["score"] < 0.99
    beyond = run_sppfeat("search", "g", folder / "0003.png", "--box", "0,0,20,2000")
    assert beyond.returncode == 3 and f"reaches outside the picture of {width} x {height} pixels" in beyond.stderr

    more = make_images(3, "more", seed=5)
    for number, path in enumerate(sorted(more.iterdir())):
        path.rename(more / f"new{number}.png")
    extract_folder(more, "more.h5", tiny)
    added = run_sppfeat("index", "more.h5", "--add-to", "g")
    assert "13 images now (3 added)" in added.stdout
    Path("names.txt").write_text("new1.png\n0003.png\n")
    assert "11 images now (2 removed)" in run_sppfeat("index", "--remove", "names.txt", "--from", "g").stdout
    table = run_sppfeat("search", "g", "more.h5", "-k", "99")
    assert "k is 99, the gallery has 11 images: all are given" in table.stderr
    assert table.stdout.startswith(f"new0.png\n    1   1.0000  {more / 'new0.png'}\n")
    shown = run_sppfeat("inspect", "g", "--verify")
    assert shown.returncode == 0 and "gallery of 11 images" in shown.stdout and "verified" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["index", "f.h5"], 2, "expected index STORE -o GALLERY"),
        (["index", "f.h5", "-o", "g2", "--add-to", "g"], 2, "expected index STORE -o GALLERY"),
        (["index", "--remove", "n.txt"], 2, "expected index STORE -o GALLERY"),
        (["index", "f.h5", "--add-to", "g", "--factory", "Flat"], 2, "--factory: is fixed when a gallery is built"),
        (["index", "f.h5", "-o", "g2", "--memory", "lots"], 2, "--memory: expected a size such as 800MB"),
        (["index", "f.h5", "-o", "g2", "--memory", "1kB"], 2, "memory: 10 rows of .* take at least"),
        (["index", "f.h5", "-o", "g2", "--factory", "Flut"], 2, "FAISS refuses it .*one that works: IVF1,SQ8"),
        (
            ["index", "f.h5", "-o", "g2", "--factory", "IVF64,PQ8"],
            2,
            "at least 256 rows to train, found 10; Flat",
        ),
        (["index", "f.h5", "-o", "g2", "--device", "auto"], 2, "an index's device must be cpu, cuda"),
        (["index", "f.h5", "-o", "g2", "--whitening-from", "f.h5"], 2, "expected --whiten or --project with it"),
        (["index", "f.h5", "-o", "f.h5"], 1, "expected a gallery's folder or nothing, found a file"),
        (["index", "g", "-o", "g2"], 1, "g: expected a store"),
        (["search", "f.h5", "q.png"], 1, r"f.h5: expected a gallery, found a store \(a gallery is a folder\)"),
        (["search", "nowhere", "q.png"], 1, "nowhere: expected a gallery, found no such folder"),
        (["search", "g", "q.png", "--box", "5,5,1,9"], 2, "box must be x1,y1,x2,y2 .*found 5,5,1,9"),
        (["search", "g", "q.png", "--box", "5,5,9"], 2, "--box: expected X1,Y1,X2,Y2, found '5,5,9'"),
        (["search", "g", "nowhere.png"], 2, "nowhere.png: no such file or folder"),
        (["search", "g", "q.png", "-k", "0"], 2, "k must be at least 1"),
        (["search", "g", "f.h5", "q.png"], 2, "expected one store or images as queries, found 2 paths"),
        (["search", "g", "q.png", "--html", "f.h5"], 1, "f.h5: expected an HTML page or a new file"),
        (["duplicates", "g"], 1, "g: expected a store"),
        (["evaluate", "retrieval", "f.h5"], 2, "expected images in several folders"),
        (["inspect", "g", "--failures"], 2, "--failures and --verify are for stores, found a gallery"),
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
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re
    import sys

    from sppfeat.gallery import create_gallery
    from sppfeat_cli import main

    monkeypatch.chdir(tmp_path)
    create_gallery(make_store(np.random.default_rng(0).normal(size=(10, 16))), "g")
    Path("n.txt").write_text("0001.jpg\n")
    Path("q.png").write_text("no image")
    monkeypatch.setattr(sys, "argv", ["sppfeat", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    captured = capsys.readouterr()
    assert end.value.code == code, captured.err
    assert captured.err.count("\n") == 1 and re.match("sppfeat: .*" + message, captured.err), captured.err
    assert not Path("g2").exists()


def test_without_faiss(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    from sppfeat import MissingExtraError
    from sppfeat.gallery import create_gallery

    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=r"needs faiss, which is not installed: pip install 'sppfeat\[cpu\]'"):
        create_gallery(make_store(np.eye(4)), tmp_path / "g")
