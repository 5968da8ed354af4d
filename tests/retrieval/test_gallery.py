"""The gallery: it stays complete whatever happens, names stay with their rows, and damaged files are named."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeStore

from sppfeat import GalleryError, StoreBusyError, StoreError, UsageError
from sppfeat.recipe import Recipe
from sppfeat.retrieval import changes, gallery_files
from sppfeat.retrieval.changes import add_to_gallery, create_gallery, read_names, remove_from_gallery
from sppfeat.retrieval.faiss_index import IndexOptions, core, reconstruct
from sppfeat.retrieval.faiss_library import load_faiss
from sppfeat.retrieval.gallery import open_gallery, verify_gallery
from sppfeat.retrieval.search import SearchOptions, search_descriptors, search_store
from sppfeat.retrieval.whitening import ProjectionOptions
from sppfeat.store.reading import Store, open_store
from sppfeat.store.writing import StoreWriter

FACTORIES = ["Flat", "SQ8", "HNSW8", "IVF4,Flat", "IVF4,SQ8", "PCA16,IVF4,Flat", "IVF4,SQ8,RFlat"]
FACTORIES += ["HR16,IVF4,RaBitQ5", "RR16,IVF4,SQ8"]


def descriptors(count: int, seed: int = 0, dim: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dim))


def assert_every_row_finds_itself(path: Path, *stores: Store, without: Collection[str] = ()) -> None:
    """The central check: each row of the stores, as a query, finds its own name first."""
    gallery = open_gallery(path)
    expected = {name for store in stores for name in store.names} - set(without)
    assert set(gallery.rows.names) == expected and gallery.index.ntotal == len(expected)
    for store in stores:
        for answer in search_store(gallery, store, SearchOptions(k=1)).answers:
            if answer.query not in without:
                assert answer.neighbors[0].name == answer.query
                assert answer.neighbors[0].score > 0.7  # 8-bit codes clip what training did not see


@pytest.mark.parametrize("factory", FACTORIES)
def test_add_and_remove(make_store: MakeStore, tmp_path: Path, factory: str) -> None:
    first = make_store(descriptors(200), "a.h5", names=[f"a/{n}.jpg" for n in range(200)])
    second = make_store(descriptors(90, 1), "b.h5", names=[f"b/{n}.jpg" for n in range(90)], root="/elsewhere")
    path = tmp_path / "g"
    create_gallery(first, path, IndexOptions(factory=factory, recall=1.0))
    assert_every_row_finds_itself(path, first)
    assert add_to_gallery(second, path).added == 90
    assert_every_row_finds_itself(path, first, second)
    gone = set(random.Random(0).sample(first.names, 40) + random.Random(1).sample(second.names, 30))
    done = remove_from_gallery(path, sorted(gone))
    assert (done.removed, done.rows) == (70, 220)
    assert bool(done.notes) == (factory in ("HNSW8", "IVF4,SQ8,RFlat"))
    assert_every_row_finds_itself(path, first, second, without=gone)
    # Removed rows can be added again; the others are recognized as unchanged.
    again = add_to_gallery(second, path)
    assert (again.added, again.skipped) == (30, 60)
    assert_every_row_finds_itself(path, first, second, without=gone - set(second.names))
    gallery = open_gallery(path)
    assert {gallery.rows.image(row)[0].rsplit("/", 2)[0] for row in range(len(gallery))} == {"/nowhere", "/elsewhere"}
    assert verify_gallery(gallery).problems == []
    assert {p.name for p in path.iterdir()} == {"gallery.json", *(entry.file for entry in gallery.about.entries)}


def test_images_are_removed_by_the_paths_that_search_prints(make_store: MakeStore, tmp_path: Path) -> None:
    names = ["a.jpg", "b.jpg", r"c\\d.jpg", "e.jpg"]
    path = tmp_path / "g"
    create_gallery(make_store(descriptors(4), "a.h5", names=names), path, IndexOptions(factory="Flat"))
    remove_from_gallery(path, ["/nowhere/a.jpg", r"/nowhere/c\d.jpg"])
    assert open_gallery(path).rows.names == ["b.jpg", "e.jpg"]
    with pytest.raises(GalleryError, match="unknown name '/elsewhere/b.jpg'"):
        remove_from_gallery(path, ["/elsewhere/b.jpg"])


def few(make_store: MakeStore, count: int, start: int, file: str) -> Store:
    names = [f"new/{number}.jpg" for number in range(start, start + count)]
    return make_store(descriptors(count, 50 + start), file, names=names, root="/elsewhere")


@pytest.mark.parametrize("factory", FACTORIES)
def test_a_few_rows_are_added_beside_the_others(make_store: MakeStore, tmp_path: Path, factory: str) -> None:
    """Files of the base stay as they are until rows of the base are removed, or many are added."""
    first = make_store(descriptors(600), "a.h5")
    second, third = few(make_store, 3, 0, "b.h5"), few(make_store, 4, 3, "c.h5")
    path = tmp_path / "g"
    create_gallery(first, path, IndexOptions(factory=factory, recall=1.0))
    base = {p.name: (p.read_bytes(), p.stat().st_ino) for p in path.iterdir() if p.name != "gallery.json"}

    def kept() -> bool:
        return all((path / name).exists() and (path / name).stat().st_ino == base[name][1] for name in base)

    assert add_to_gallery(second, path).rows == 603
    assert_every_row_finds_itself(path, first, second)
    done = add_to_gallery(third, path)
    assert (done.rows, done.added, done.about.base_rows, done.notes) == (607, 4, 600, []) and kept()
    assert add_to_gallery(second, path).skipped == 3
    assert_every_row_finds_itself(path, first, second, third)
    gallery = open_gallery(path)
    assert gallery.rows.image(0)[0] == "/nowhere/0000.jpg" and gallery.rows.image(606)[0] == "/elsewhere/new/6.jpg"
    assert verify_gallery(gallery).problems == [] and len(list(path.iterdir())) == 5
    held = reconstruct(gallery.index, np.array([605, 1, 600]))
    units = descriptors(600)[1] / np.linalg.norm(descriptors(600)[1])
    assert held.shape == (3, 16) and np.abs(held[1] - units).max() < (0.5 if "PCA" in factory else 0.1)
    # Only added rows are removed: the base stays.
    remove_from_gallery(path, ["new/1.jpg", "new/5.jpg"])
    assert kept()
    gone = {"new/1.jpg", "new/5.jpg"}
    assert_every_row_finds_itself(path, first, second, third, without=gone)
    remove_from_gallery(path, ["new/6.jpg", "0007.jpg"])
    gone |= {"new/6.jpg", "0007.jpg"}
    assert not kept() and len(list(path.iterdir())) == 3
    assert_every_row_finds_itself(path, first, second, third, without=gone)
    add_to_gallery(second, path)
    remove_from_gallery(path, ["new/1.jpg"])  # the only one beside the base
    assert len(list(path.iterdir())) == 3
    assert_every_row_finds_itself(path, first, second, third, without=gone)
    many = make_store(descriptors(300, 8), "d.h5", names=[f"d{n}.jpg" for n in range(300)])
    assert add_to_gallery(many, path).about.files.added is None
    assert_every_row_finds_itself(path, first, second, third, many, without=gone)
    assert verify_gallery(open_gallery(path)).problems == []


def test_added_rows_give_the_answers_of_one_index(make_store: MakeStore, tmp_path: Path) -> None:
    """Also with equal scores, in the order of the rows, and more neighbors than either part has."""
    values = np.rint(3 * descriptors(500, dim=4))
    values[values.any(1) == 0] = 1
    names = [f"{n:04}.jpg" for n in range(500)]
    create_gallery(make_store(values, "all.h5"), tmp_path / "all")
    path = tmp_path / "g"
    create_gallery(make_store(values[:460], "a.h5", names=names[:460]), path)
    add_to_gallery(make_store(values[460:480], "b.h5", names=names[460:480]), path)
    add_to_gallery(make_store(values[480:], "c.h5", names=names[480:]), path)
    one, two = open_gallery(tmp_path / "all"), open_gallery(path)
    assert two.about.base_rows == 460 and two.rows.names == one.rows.names
    for k in (1, 7, 60, 480, 500):
        options = SearchOptions(k=k)
        rows, scores = search_descriptors(one, values[::9], options)
        again, same = search_descriptors(two, values[::9], options)
        np.testing.assert_allclose(same, scores, atol=1e-6)
        assert (np.diff(again, axis=1) > 0)[np.diff(same, axis=1) == 0].all()
        assert [set(found) for found in again.tolist()] == [set(found) for found in rows.tolist()] or k < 480


def test_effort_is_tuned_again_when_rows_join(make_store: MakeStore, tmp_path: Path) -> None:
    path = tmp_path / "g"
    create_gallery(make_store(descriptors(1500), "a.h5"), path, IndexOptions(factory="IVF32,Flat", recall=0.6))
    before = open_gallery(path).about.index.effort["nprobe"]
    # All new rows are in a part of the space that the lists divide coarsely.
    more = 4 + 0.8 * descriptors(3000, 1)
    done = add_to_gallery(make_store(more, "b.h5", names=[f"b{n}.jpg" for n in range(3000)]), path)
    after = open_gallery(path)
    assert core(after.index).nprobe == after.about.index.effort["nprobe"] >= before
    assert re.match(
        r"3000 added rows joined the index; nprobe is \d+ now.*, which finds \d+\.\d % of the 10", done.notes[0]
    )
    assert after.about.files.index.bytes < 4500 * (4 * 16 + 8) + 32 * (4 * 16 + 8) + 1000  # rows, ids, centers
    asked = more[:200]
    rows, _ = search_descriptors(after, asked, SearchOptions(k=10))
    core(after.index).nprobe = 32
    true, _ = search_descriptors(after, asked, SearchOptions(k=10))
    assert np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(rows, true, strict=True)]) > 0.5


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: flip(path / "index-2.faiss", 30, 1), "index-2.faiss: is damaged: its bytes do not match"),
        (lambda path: (path / "rows-2.h5").unlink(), "rows-2.h5: belongs to the gallery, but could not be read"),
        (lambda path: change(path, rows=3), "complete gallery, found 3 added rows of 3"),
        (lambda path: change(path, rows=302), "index-1.faiss: expected 299 rows of 16 values, found 300"),
        (lambda path: change_added(path, count=4), "index-1.faiss: expected 299 rows of 16 values, found 300"),
        (lambda path: change_added(path, count=0), r"Expected `int` >= 1 - at `\$.files.added.count`"),
        (lambda path: change_added(path, bins=None) or change_bins(path), "found bins of some of its rows alone"),
    ],
)
def test_damaged_additions_are_refused(
    make_store: MakeStore, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "g"
    create_gallery(make_store(descriptors(300)), path)
    add_to_gallery(few(make_store, 3, 0, "b.h5"), path)
    damage(path)
    with pytest.raises(GalleryError, match=message):
        open_gallery(path)


def change_added(path: Path, **values: object) -> None:
    files = json.loads((path / "gallery.json").read_text())["files"]
    change(path, files=files | {"added": files["added"] | values})


def change_bins(path: Path) -> None:
    files = json.loads((path / "gallery.json").read_text())["files"]
    files |= {"bins": files["rows"], "channels": files["rows"]}
    change(path, files=files, bins={"dim": 3, "whitened": 3, "bytes": 108})


def test_a_projection_goes_with_the_gallery(make_store: MakeStore, tmp_path: Path) -> None:
    first, second = (
        make_store(descriptors(60), "a.h5"),
        make_store(descriptors(30, 1), "b.h5", names=[f"b{n}.jpg" for n in range(30)]),
    )
    other = make_store(descriptors(50, 2), "c.h5")
    path = tmp_path / "g"
    done = create_gallery(
        first, path, projection=ProjectionOptions(dims=9, whiten=True), whitening_from=other, overwrite=True
    )
    assert (
        done.about.projection is not None
        and done.about.projection.learned_from == str(other.path)
        and done.about.projection.dim == 9
    )
    before = open_gallery(path).projection
    add_to_gallery(second, path)
    remove_from_gallery(path, ["b3.jpg"])
    assert_every_row_finds_itself(path, first, second, without={"b3.jpg"})
    after = open_gallery(path).projection
    assert before is not None and after is not None and np.array_equal(before.matrix, after.matrix)
    assert open_gallery(path).index.d == 9 and sorted(p.name for p in path.glob("projection*")) == ["projection-1.npz"]
    clamped = create_gallery(first, path, projection=ProjectionOptions(dims=500), overwrite=True)
    assert clamped.notes == [f"project: 500 components asked, 16 kept: {len(first)} rows of 16 values have no more"]


def test_what_cannot_be_added_or_removed(make_store: MakeStore, tmp_path: Path) -> None:
    store, path = make_store(descriptors(20), "a.h5"), tmp_path / "g"
    create_gallery(store, path)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    with pytest.raises(GalleryError, match=r"already holds '0000.jpg' with another descriptor .*index --remove"):
        add_to_gallery(make_store(descriptors(20, 9), "b.h5"), path)
    with pytest.raises(
        GalleryError, match=r"recipe than .*c.h5 \(dimensions: gallery 16, store 8\); extract its .* inspect"
    ):
        add_to_gallery(make_store(descriptors(20, 9, dim=8), "c.h5"), path)
    with pytest.raises(GalleryError, match="unknown name '0200.jpg': did you mean .*, and 1 more; nothing is removed"):
        remove_from_gallery(path, ["0001.jpg", "0200.jpg", "0201.jpg"])
    with pytest.raises(GalleryError, match="these 20 names are all it holds"):
        remove_from_gallery(path, store.names)
    with pytest.raises(UsageError, match="expected names to remove, found none"):
        remove_from_gallery(path, [])
    with pytest.raises(UsageError, match=r"none\.txt: expected a text file of names, .*, found no such file$"):
        read_names(tmp_path / "none.txt")
    (tmp_path / "names.txt").write_text("0001.jpg\n")
    with pytest.raises(UsageError, match=r"found no such file; did you mean .*/names\.txt\?$"):
        read_names(tmp_path / "name.txt")
    with pytest.raises(UsageError, match="expected a readable list of names, found: .*directory"):
        read_names(tmp_path)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


@pytest.mark.parametrize("count", [20, 400])
@pytest.mark.parametrize("at", ["write_index", "rows", "description", "after"])
def test_a_failure_at_any_step_leaves_the_old_gallery(
    make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, count: int
) -> None:
    """Five rows join the index of 20; to that of 400 they are added beside it."""
    store, path = make_store(descriptors(count), "a.h5"), tmp_path / "g"
    create_gallery(store, path)
    more = make_store(descriptors(5, 1), "b.h5", names=[f"b{n}.jpg" for n in range(5)])

    class Killed(BaseException):
        """Like SIGKILL, except for the partial file that it would leave."""

    def stop(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if at == "write_index":
            patch.setattr(gallery_files, "_write_index", stop)
        elif at == "rows":
            patch.setattr(gallery_files, "_write_rows", stop)
        elif at == "description":
            patch.setattr(gallery_files, "_versions", stop)
        else:
            # The first time is before the work.
            remove, calls = gallery_files._remove_others, iter(range(2))
            patch.setattr(gallery_files, "_remove_others", lambda *given: (stop if next(calls) else remove)(*given))
        with pytest.raises(Killed):
            add_to_gallery(more, path)
    (path / ".index-7.faiss.partial").write_bytes(b"half")
    # Once the description is replaced, the new gallery is in place, whatever other files there are.
    expected = (store, more) if at == "after" else (store,)
    assert_every_row_finds_itself(path, *expected)
    assert add_to_gallery(more, path).added == (0 if at == "after" else 5)
    remove_from_gallery(path, ["b0.jpg"])
    assert_every_row_finds_itself(path, store, more, without={"b0.jpg"})
    assert len(list(path.iterdir())) == (3 if count == 20 else 5)  # leftovers are removed


@pytest.mark.parametrize(("count", "new"), [(300, 4000), (20_000, 2000)])
def test_kill_9_while_adding(make_store: MakeStore, tmp_path: Path, count: int, new: int) -> None:
    """Many rows join the index; few are added beside it."""
    store = make_store(descriptors(count, dim=64), "a.h5", names=[f"{n:05}.jpg" for n in range(count)])
    more = make_store(descriptors(new, 1, dim=64), "b.h5", names=[f"b{n}.jpg" for n in range(new)])
    path = tmp_path / "g"
    create_gallery(store, path)
    moments, seen = random.Random(0), set()
    code = "import sys\nfrom sppfeat.retrieval.changes import *\nadd_to_gallery(open_store(sys.argv[1]), sys.argv[2])"
    command = [sys.executable, "-c", code, str(more.path), str(path)]
    for _ in range(6):
        child = subprocess.Popen(command)
        before = set(os.listdir(path))
        # From the first new file on, the next tenth of a second is all that writing takes.
        while set(os.listdir(path)) == before and child.poll() is None:
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, 0.03))
        child.send_signal(signal.SIGKILL)
        child.wait()
        gallery = open_gallery(path)
        seen.add(len(gallery))
        assert len(gallery) in (count, count + new) and verify_gallery(gallery).problems == []
        if len(gallery) == count + new:
            remove_from_gallery(path, more.names)
    assert count in seen
    add_to_gallery(more, path)
    assert_every_row_finds_itself(path, store, more)


@pytest.mark.parametrize("count", [30, 600])
def test_readers_never_see_a_mix(make_store: MakeStore, tmp_path: Path, count: int) -> None:
    """While another process adds and removes in turn, beside the base or to it, every open gives one of the two."""
    store, path = make_store(descriptors(count), "a.h5"), tmp_path / "g"
    more = make_store(descriptors(10, 1), "b.h5", names=[f"b{n}.jpg" for n in range(10)])
    create_gallery(store, path)
    # The writer runs until its input ends, with pauses: the result must not depend on scheduling.
    code = (
        "import select, sys, time\nfrom sppfeat.retrieval.changes import *\nfrom sppfeat import open_store\n"
        "more = open_store(sys.argv[1])\nwhile not select.select([sys.stdin], [], [], 0.2)[0]:\n"
        "    add_to_gallery(more, sys.argv[2])\n    time.sleep(0.2)\n    remove_from_gallery(sys.argv[2], more.names)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(more.path), str(path)], stdin=subprocess.PIPE)
    seen, ends = Counter[int](), time.monotonic() + 60
    while child.poll() is None and (len(seen) < 2 or seen.total() < 50) and time.monotonic() < ends:
        gallery = open_gallery(path)
        seen[len(gallery)] += 1
        assert gallery.index.ntotal == len(gallery.rows.names) == len(gallery.rows.root)
        assert ("b0.jpg" in gallery.rows.names) == (len(gallery) == count + 10)
        assert search_descriptors(gallery, descriptors(10, 1), SearchOptions(k=1))[1].min() > 0
    child.communicate()
    assert child.returncode == 0 and set(seen) == {count, count + 10}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "gallery.json").unlink(), "interrupted before it was complete; build it again"),
        (lambda path: (path / "gallery.json").write_text("{"), "a folder whose gallery.json is not that of a gallery"),
        (lambda path: (path / "index-1.faiss").unlink(), "belongs to the gallery, but could not be read"),
        (lambda path: (path / "index-1.faiss").write_bytes(b"x"), r"index-1.faiss: expected \d+ bytes, found 1"),
        (lambda path: flip(path / "index-1.faiss", 900, 1), "index-1.faiss: is damaged: its bytes do not match"),
        (lambda path: flip(path / "rows-1.h5", 900, 1), "rows-1.h5: is damaged: its bytes do not match"),
        (lambda path: flip(path / "index-1.faiss", 0, 4, sign=True), "index-1.faiss: expected a complete FAISS index"),
        (lambda path: flip(path / "index-1.faiss", 4, 4, sign=True), "index-1.faiss: expected"),
        (lambda path: flip(path / "index-1.faiss", 8, 8, sign=True), "index-1.faiss: expected"),
        (lambda path: flip(path / "rows-1.h5", 0, 8, sign=True), "rows-1.h5: expected an HDF5 file, found a file that"),
        (lambda path: change(path, format_version=9), r"its format 9 is newer than this sppfeat can read \(1\)"),
        (lambda path: change(path, rows=7), "index-1.faiss: expected 7 rows of 16 values, found 20 of 16"),
        (lambda path: change(path, dim=7), "index-1.faiss: expected 20 rows of 7 values, found 20 of 16"),
        (lambda path: change(path, recipe={"recipe_version": 99}), "version 99 is newer"),
        (lambda path: change(path, rows="20"), r"expected a complete gallery, found: Expected `int`.*\$.rows"),
        (
            lambda path: change(path, files={}),
            r"complete gallery, found: .*missing required field `index` - at `\$.files`",
        ),
        (lambda path: change(path, odd=1), "complete gallery, found: .*unknown field `odd`"),
        (lambda path: change(path, recipe_hash="0" * 64), "found a recipe that does not match its recipe_hash"),
        (lambda path: change(path, projection=PROJECTION), "found a projection without its file"),
        (lambda path: name_index(path, "../index-1.faiss"), "the name of a gallery file, found '../index-1.faiss'"),
        (lambda path: name_index(path, "rows-1.h5"), "expected the name of a gallery file, found 'rows-1.h5'"),
        (lambda path: fifo(path / "index-1.faiss"), "index-1.faiss: expected a file, found something else"),
    ],
)
def test_damaged_galleries_are_refused(
    make_store: MakeStore, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "g"
    create_gallery(make_store(descriptors(20)), path)
    damage(path)
    with pytest.raises(GalleryError, match=message):
        open_gallery(path)


PROJECTION = {"dim": 3, "kept": 1, "power": 0, "shrinkage": 0, "learned_from": "", "rows": 9, "route": "gram"}


def flip(file: Path, start: int, count: int, *, sign: bool = False) -> None:
    """Change bytes in the middle of a file, which keeps its size; sign: with a matching checksum."""
    content = bytearray(file.read_bytes())
    content[start : start + count] = bytes(255 - byte for byte in content[start : start + count])
    file.write_bytes(content)
    if sign:
        resign(file.parent)


def resign(path: Path) -> None:
    """Write the current sizes and checksums of the files, as an attacker would."""
    files = json.loads((path / "gallery.json").read_text())["files"]
    for entry in files.values():
        content = (path / entry["file"]).read_bytes()
        entry |= {"bytes": len(content), "crc32": zlib.crc32(content)}
    change(path, files=files)


def name_index(path: Path, name: str) -> None:
    files = json.loads((path / "gallery.json").read_text())["files"]
    files["index"]["file"] = name
    change(path, files=files)


def fifo(file: Path) -> None:
    """A file that blocks whoever opens it until there is a writer."""
    file.unlink()
    os.mkfifo(file)


def change(path: Path, **values: object) -> None:
    about = json.loads((path / "gallery.json").read_text())
    (path / "gallery.json").write_text(json.dumps(about | values))


def test_names_that_slipped_are_found(make_store: MakeStore, tmp_path: Path) -> None:
    """Names shifted by one row, in a gallery that looks intact: `--verify` compares rows with the store."""
    store, path = make_store(descriptors(20)), tmp_path / "g"
    create_gallery(store, path)
    gallery = open_gallery(path)
    rows = gallery.rows
    gallery_files._write_rows(
        path / "rows-1.h5",
        gallery_files.GalleryRows(rows.names[1:] + rows.names[:1], rows.roots, rows.root, rows.checksum),
    )
    with pytest.raises(GalleryError, match=r"rows-1\.h5: is damaged"):
        open_gallery(path)
    slipped = gallery_files.GalleryRows(
        rows.names[1:] + rows.names[:1], rows.roots, rows.root, np.roll(rows.checksum, -1)
    )
    gallery_files._write_rows(path / "rows-1.h5", slipped)
    resign(path)
    assert sum("differs from that of" in problem for problem in verify_gallery(open_gallery(path)).problems) == 20


def test_what_was_not_compared_is_said(
    make_store: MakeStore, tmp_path: Path, run_sppfeat: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    first, path = make_store(descriptors(30)), tmp_path / "g"
    second = make_store(descriptors(20, 1), "second.h5", names=[f"second/{n}.jpg" for n in range(20)])
    third = make_store(descriptors(10, 2), "third.h5", names=[f"third/{n}.jpg" for n in range(10)])
    create_gallery(first, path, IndexOptions(factory="Flat"))
    add_to_gallery(second, path)
    add_to_gallery(third, path)
    check = verify_gallery(open_gallery(path))
    assert (check.problems, check.compared, check.passed_over) == ([], 60, [])
    done = run_sppfeat("inspect", path, "--verify")
    assert done.stderr == ""
    assert done.stdout.endswith("verified: all files match their checksums, and all rows those of their stores\n")

    # One store is gone, three images of another were described again, the third has another recipe.
    first.path.unlink()
    values = descriptors(20, 1)
    values[:3] += 1
    make_store(values, "second.h5", names=second.names)
    make_store(descriptors(10, 2), "third.h5", names=third.names, recipe=Recipe(levels=(1,)))
    check = verify_gallery(open_gallery(path))
    assert check.problems == [] and check.compared == 17
    assert check.passed_over == [
        f"{first.path}: expected a store, found no such file",
        f"{third.path} has another recipe by now",
        "3 rows described again in the store since",
        "40 rows in no store that could be compared",
    ]
    done = run_sppfeat("inspect", path, "--verify")
    assert done.returncode == 0
    assert done.stdout.endswith("verified: all files match their checksums, and 17 of 60 rows those of their stores\n")
    assert done.stderr.splitlines() == [f"note: {path}: not compared: {line}" for line in check.passed_over]
    document = json.loads(run_sppfeat("inspect", path, "--verify", "--json").stdout)
    assert document["verified"] is True and document["compared"] == 17 and len(document["passed_over"]) == 4

    create_gallery(second, tmp_path / "coded", IndexOptions(factory="SQ8"))
    check = verify_gallery(open_gallery(tmp_path / "coded"))
    assert (check.compared, check.passed_over) == (0, ["the index holds codes, not rows"])
    done = run_sppfeat("inspect", tmp_path / "coded", "--verify")
    assert done.stdout.endswith("verified: all files match their checksums\n")

    # A store that grew is a source twice, and rows that left it are told.
    grown = make_store(descriptors(10), "grown.h5")
    create_gallery(grown, tmp_path / "grown", IndexOptions(factory="Flat"))
    add_to_gallery(make_store(descriptors(20), "grown.h5"), tmp_path / "grown")
    check = verify_gallery(open_gallery(tmp_path / "grown"))
    assert (check.compared, check.passed_over) == (20, [])
    make_store(descriptors(19), "grown.h5")
    check = verify_gallery(open_gallery(tmp_path / "grown"))
    assert (check.compared, check.passed_over) == (19, ["1 row in no store that could be compared"])


def test_where_a_gallery_can_be_built(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(descriptors(5))
    with pytest.raises(GalleryError, match="its folder .* does not exist"):
        create_gallery(store, tmp_path / "none" / "g")
    (tmp_path / "file").write_text("x")
    with pytest.raises(GalleryError, match="found a file; it is left as it is"):
        create_gallery(store, tmp_path / "file")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(GalleryError, match=r"found 'a.jpg' in it; it is left as it is"):
            create_gallery(store, tmp_path / "photos", overwrite=overwrite)
    (tmp_path / "empty").mkdir()
    create_gallery(store, tmp_path / "empty")
    with pytest.raises(GalleryError, match="already exists; choose another output, --overwrite or --add-to"):
        create_gallery(store, tmp_path / "empty")
    create_gallery(store, tmp_path / "empty", overwrite=True)
    assert_every_row_finds_itself(tmp_path / "empty", store)
    with pytest.raises(GalleryError, match="expected a gallery, found a folder of images; first: sppfeat extract "):
        open_gallery(tmp_path / "photos")
    with pytest.raises(GalleryError, match=re.escape("found a store; first: sppfeat index ")):
        open_gallery(store.path)


def test_unfinished_and_empty_stores_are_refused(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(descriptors(4))
    with StoreWriter(store) as writer:
        writer.reset([1])
    with pytest.raises(StoreError, match="1 of 4 images are still to be described; run extract again"):
        create_gallery(open_store(store.path), tmp_path / "g")
    with StoreWriter(store) as writer:
        for row in range(4):
            writer.fail(row, "broken")
    with pytest.raises(StoreError, match="expected described images, found 4, all of them failed"):
        create_gallery(open_store(store.path), tmp_path / "g")
    assert not (tmp_path / "g").exists()


def replace_index(path: Path, index: object) -> None:
    load_faiss().write_index(index, str(path / "index-1.faiss"))
    resign(path)


def test_lists_in_another_file_are_refused(
    make_store: MakeStore, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Adding rows to such an index would write into that file, whichever it is."""
    faiss = load_faiss()
    store, path, other = make_store(descriptors(200)), tmp_path / "g", tmp_path / "other"
    for factory in ("IVF4,Flat", "PCA8,IVF4,Flat", "IVF4,SQ8,RFlat"):
        create_gallery(store, path, IndexOptions(factory=factory), overwrite=True)
        index = faiss.read_index(str(path / "index-1.faiss"))
        lists = core(index)
        elsewhere = faiss.OnDiskInvertedLists(lists.nlist, lists.code_size, str(other))
        elsewhere.merge_from_1(lists.invlists)
        lists.replace_invlists(elsewhere, False)
        replace_index(path, index)
        before = other.read_bytes()
        more = make_store(descriptors(9, 1), "b.h5", names=[f"b{n}.jpg" for n in range(9)])
        with pytest.raises(GalleryError, match="lists inside the index itself, found OnDiskInvertedLists"):
            add_to_gallery(more, path)
        assert other.read_bytes() == before
        other.unlink()
        with pytest.raises(GalleryError, match="expected a complete FAISS index, found: could not"):
            open_gallery(path)
        for file in path.iterdir():
            file.unlink()
    assert "IO_FLAG" not in capfd.readouterr().out


def test_numbers_beyond_the_rows_are_refused(make_store: MakeStore, tmp_path: Path) -> None:
    faiss = load_faiss()
    store, path = make_store(descriptors(200)), tmp_path / "g"
    create_gallery(store, path, IndexOptions(factory="IVF4,Flat"))
    index = faiss.read_index(str(path / "index-1.faiss"))
    ids = faiss.rev_swig_ptr(index.invlists.get_ids(2), index.invlists.list_size(2))
    for wrong in (200, -1):
        ids[3] = wrong
        replace_index(path, index)
        with pytest.raises(GalleryError, match="list 2 holds row ids beyond 200"):
            open_gallery(path)
    flat = faiss.IndexFlatIP(16)
    mapped = faiss.IndexIDMap(flat)
    mapped.add_with_ids(np.float32(descriptors(200)), np.arange(200) + 7)
    replace_index(path, mapped)
    with pytest.raises(GalleryError, match="rows are numbered from 0"):
        open_gallery(path)
    index.invlists.reset()
    replace_index(path, index)
    with pytest.raises(GalleryError, match="expected 200 rows in its lists, found 0"):
        open_gallery(path)


def test_sizes_beyond_the_file_are_refused_before_memory_is_taken(make_store: MakeStore, tmp_path: Path) -> None:
    path = tmp_path / "g"
    create_gallery(make_store(descriptors(20)), path)
    content = (path / "index-1.faiss").read_bytes()
    count = (20 * 16).to_bytes(8, "little")
    assert content.count(count) == 1
    (path / "index-1.faiss").write_bytes(content.replace(count, (1 << 33).to_bytes(8, "little")))
    resign(path)
    before = load_faiss().get_deserialization_vector_byte_limit()
    with pytest.raises(GalleryError, match=r"complete FAISS index, found: .*deserialization_vector_byte_limit"):
        open_gallery(path)
    assert load_faiss().get_deserialization_vector_byte_limit() == before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/a.jpg", "is absolute"),
        ("a/../../b.jpg", "leads out"),
        ("../b.jpg#0,0,1,1", "leads out"),
        (r"\x2e\x2e/b.jpg", "an invalid escape"),
    ],
)
def test_names_that_lead_elsewhere_are_refused(make_store: MakeStore, tmp_path: Path, name: str, reason: str) -> None:
    path = tmp_path / "g"
    create_gallery(make_store(descriptors(5)), path)
    rows = open_gallery(path).rows
    gallery_files._write_rows(path / "rows-1.h5", dataclasses.replace(rows, names=[*rows.names[:4], name]))
    resign(path)
    with pytest.raises(
        GalleryError, match=rf"row 4 .*: expected a name inside its folder, found one that .*{re.escape(reason)}"
    ):
        open_gallery(path)


def test_names_that_lead_elsewhere_come_into_no_gallery(make_store: MakeStore, tmp_path: Path) -> None:
    path = tmp_path / "g"
    create_gallery(make_store(descriptors(2)), path)
    store = make_store(descriptors(2), "b.h5")
    outside = dataclasses.replace(store, names=["b.jpg", "../c.jpg"])
    for change in (lambda: create_gallery(outside, tmp_path / "new"), lambda: add_to_gallery(outside, path)):
        with pytest.raises(GalleryError, match=r"b\.h5: row 1 \('\.\./c\.jpg'\): expected a name inside its folder"):
            change()
    assert len(open_gallery(path)) == 2 and not (tmp_path / "new").exists()


def test_roots_are_folders(make_store: MakeStore, tmp_path: Path) -> None:
    path = tmp_path / "g"
    create_gallery(make_store(descriptors(5)), path)
    rows = open_gallery(path).rows
    for root in ("images", "/a\0b"):
        gallery_files._write_rows(path / "rows-1.h5", dataclasses.replace(rows, roots=[root]))
        resign(path)
        with pytest.raises(GalleryError, match="expected the absolute path of a folder"):
            open_gallery(path)


def test_a_folder_is_taken_and_cleared_before_the_work(
    make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, path = make_store(descriptors(20)), tmp_path / "g"
    create_gallery(store, path)
    left = ["index-9.faiss", ".index-9.faiss.partial", ".rows-9.h5.partial", ".gallery.json.partial"]
    for name in left:
        (path / name).write_bytes(b"x")
    seen = []

    def build(*given: object) -> None:
        seen.extend(sorted(os.listdir(path)))
        with pytest.raises(StoreBusyError):
            add_to_gallery(store, path)
        raise GalleryError("stopped")

    monkeypatch.setattr(changes, "build_index", build)
    with pytest.raises(GalleryError, match="stopped"):
        create_gallery(store, path, overwrite=True)
    assert seen == [".lock", "gallery.json", "index-1.faiss", "rows-1.h5"]
    assert_every_row_finds_itself(path, store)
    monkeypatch.setattr(changes, "build_index", lambda *given: pytest.fail("began to work"))

    def refused(**given: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(gallery_files.tempfile, "TemporaryFile", refused)
    with pytest.raises(GalleryError, match="g: is not writable: Read-only file system"):
        create_gallery(store, path, overwrite=True)
    with pytest.raises(GalleryError, match="new: is not writable"):
        create_gallery(store, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_gallery_in_the_current_folder(
    make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(descriptors(20))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    create_gallery(store, ".")
    assert_every_row_finds_itself(Path("."), store)
    assert not list(tmp_path.glob("here/.*"))


def test_folders_that_are_not_utf_8(make_store: MakeStore, tmp_path: Path) -> None:
    root = os.fsdecode(b"/images/\xff")
    create_gallery(make_store(descriptors(5), root=root), tmp_path / "g")
    gallery = open_gallery(tmp_path / "g")
    assert gallery.rows.image(0) == (f"{root}/0000.jpg", None)
    assert gallery.about.sources[0].source_root == r"/images/\xff"
