"""The map: near in the vectors is near on it, it is of the gallery's rows, and damaged ones are refused."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeStore

from sppfeat import GalleryError, MissingExtraError, UsageError
from sppfeat.retrieval import add_map, map, tile_order
from sppfeat.retrieval.changes import add_to_gallery, create_gallery, remove_from_gallery
from sppfeat.retrieval.faiss_index import IndexOptions
from sppfeat.retrieval.gallery import open_gallery, verify_gallery
from sppfeat.retrieval.map import lay_out, write_map

pytest.importorskip("openTSNE")


def clustered(count: int, clusters: int = 12, dim: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows [N, D], and the cluster [N] of each."""
    generator = np.random.default_rng(seed)
    which = generator.integers(0, clusters, count)
    return generator.normal(size=(clusters, dim))[which] + 0.3 * generator.normal(size=(count, dim)), which


def nearest(rows: np.ndarray, k: int = 10) -> np.ndarray:
    """[N, k] the nearest others, by all distances."""
    distances = ((rows[:, None] - rows) ** 2).sum(2)
    np.fill_diagonal(distances, np.inf)
    return np.argsort(distances, 1, kind="stable")[:, :k]


def kept(rows: np.ndarray, points: np.ndarray) -> float:
    """The share of the 10 nearest rows that are among the 10 nearest points."""
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = zip(nearest(units), nearest(points), strict=True)
    return float(np.mean([len(set(one) & set(other)) / 10 for one, other in pairs]))


def laid_out(rows: np.ndarray) -> np.ndarray:
    found = lay_out(rows)
    assert found is not None
    return found


def check(points: np.ndarray, count: int) -> None:
    assert points.shape == (count, 2) and points.dtype == np.float32
    assert np.isfinite(points).all() and points.min() >= 0 and points.max() <= 1
    assert len(np.unique(points, axis=0)) == count
    if count > 1:
        assert points.max(0).max() - points.min(0).min() > 0


def test_neighbors_stay_neighbors() -> None:
    rows, which = clustered(300)
    progress: list[float] = []
    points = lay_out(rows, progress=progress.append)
    assert points is not None
    check(points, 300)
    assert (points.max(0) - points.min(0)).max() == pytest.approx(1)
    # By chance, 10 of 299.
    assert kept(rows, points) > 0.3
    assert (which[nearest(points)] == which[:, None]).mean() > 0.98
    assert progress == sorted(progress) and progress[0] < 0.2 and progress[-1] == 1
    # The length of a row is not compared.
    assert (which[nearest(laid_out(rows * np.linspace(1, 50, 300)[:, None]))] == which[:, None]).mean() > 0.98


def test_a_seed_gives_the_same_map() -> None:
    rows, _ = clustered(200)
    first = laid_out(rows)
    assert np.array_equal(laid_out(rows.copy()), first)
    other = lay_out(rows, seed=1)
    assert other is not None and not np.array_equal(other, first)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9, 10, 11, 31])
def test_few_images(count: int) -> None:
    check(laid_out(np.random.default_rng(count).normal(size=(count, 6))), count)
    check(laid_out(np.random.default_rng(count).normal(size=(count, 1))), count)
    check(laid_out(np.ones((count, 6))), count)


def test_of_three_images_the_equal_two_are_near() -> None:
    rows = np.array([[1.0, 0, 0], [1, 1e-3, 0], [0, 0, 1]])
    points = laid_out(rows)
    assert np.linalg.norm(points[0] - points[1]) < 0.01 < 0.9 < np.linalg.norm(points[0] - points[2])


def test_odd_vectors() -> None:
    """Equal ones, more than there are neighbors; zeros; very long and very short ones; none at all."""
    rows, which = clustered(200)
    rows[:120] = rows[0]
    rows[120] = 0
    rows[121] *= 1e30
    rows[122] *= 1e-30
    points = laid_out(rows)
    check(points, 200)
    assert (nearest(points)[:120] < 120).mean() > 0.9
    rows[7, 3] = np.nan
    with pytest.raises(UsageError, match="expected finite values"):
        lay_out(rows)
    with pytest.raises(UsageError, match="expected vectors to lay out, found none"):
        lay_out(np.zeros((0, 4)))


def test_a_component_is_found_among_many_values() -> None:
    """The components agree with those of a full decomposition."""
    rows = np.random.default_rng(0).normal(size=(400, 90)) * np.linspace(3, 0.1, 90)
    units = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    found = map._Components(rows, np.arange(400), np.random.default_rng(1), lambda part: None)
    values = np.concatenate([block for _, block in found.of(np.arange(400))])
    exact = np.linalg.svd(units - units.mean(0), compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(values, axis=0)[:20], exact[:20], rtol=0.01)
    assert values.shape == (400, 50)


def test_stopped() -> None:
    rows, _ = clustered(300)
    for after in (0, 5, 20):
        asked = []

        def stop(after: int = after, asked: list[int] = asked) -> bool:
            asked.append(1)
            return len(asked) > after

        assert lay_out(rows, stop=stop) is None
        assert len(asked) == after + 1


def test_many_images_are_placed_among_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MOST": 400, "SAMPLE": 300, "_PLACED_AT_ONCE": 90, "_LEARNED_FROM": 150}.items():
        monkeypatch.setattr(map, name, value)
    rows, which = clustered(700)
    progress: list[float] = []
    points = lay_out(rows, progress=progress.append)
    assert points is not None
    check(points, 700)
    assert (which[nearest(points)] == which[:, None]).mean() > 0.95 and kept(rows, points) > 0.1
    assert progress == sorted(progress) and progress[-1] == 1
    assert np.array_equal(laid_out(rows), points)


def test_neighbors_from_lists_and_forces_from_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """As among very many images; a list may hold fewer rows than are asked for."""
    for name, value in {"_COMPARED": 100, "_INTERPOLATED": 100, "_LISTS_SEARCHED": 2}.items():
        monkeypatch.setattr(map, name, value)
    rows, which = clustered(1600)
    points = laid_out(rows)
    check(points, 1600)
    assert (which[nearest(points)] == which[:, None]).mean() > 0.95


def test_tiles_near_each_other_are_near_on_the_map() -> None:
    grid = np.stack(np.meshgrid(np.arange(32), np.arange(32)), -1).reshape(-1, 2)
    order = tile_order((grid + 0.5) / 32)
    assert order.dtype == np.uint32 and sorted(order.tolist()) == list(range(1024))
    assert (np.abs(np.diff(grid[order], axis=0)).sum(1) == 1).all()
    assert tile_order(np.array([[1, 1], [0, 0], [1, 1], [0, 0]], np.float32)).tolist() in ([1, 3, 0, 2], [0, 2, 1, 3])
    assert tile_order(np.zeros((0, 2), np.float32)).tolist() == []


@pytest.mark.parametrize("factory", ["Flat", "IVF4,SQ8", "HNSW8", "HR16,IVF4,RaBitQ5"])
def test_a_gallery_keeps_its_map(make_store: MakeStore, tmp_path: Path, factory: str) -> None:
    rows, which = clustered(240, dim=16)
    path = tmp_path / "g"
    create_gallery(make_store(rows), path, IndexOptions(factory=factory))
    assert open_gallery(path).points is None
    before = {p.name: p.stat().st_ino for p in path.iterdir() if p.name != "gallery.json"}
    done = add_map(path)
    assert done is not None and done.mapped and done.rows == 240 and done.notes == []
    gallery = open_gallery(path)
    assert gallery.points is not None and gallery.about.generation > 1
    check(gallery.points, 240)
    assert (which[nearest(gallery.points)] == which[:, None]).mean() > 0.8
    assert before.items() <= {p.name: p.stat().st_ino for p in path.iterdir()}.items()
    assert verify_gallery(gallery).problems == []
    again = add_map(path)
    assert again is not None and np.array_equal(open_gallery(path).points, gallery.points)  # type: ignore[arg-type]
    assert {p.name for p in path.iterdir()} == {"gallery.json", *(entry.file for entry in again.about.entries)}


def test_a_map_goes_when_rows_change(make_store: MakeStore, tmp_path: Path) -> None:
    rows, _ = clustered(120, dim=16)
    names = [f"{n:04}.jpg" for n in range(120)]
    first = make_store(rows[:116], "a.h5", names=names[:116])
    second = make_store(rows[116:], "b.h5", names=names[116:])
    path = tmp_path / "g"
    create_gallery(first, path)
    assert add_to_gallery(first, path).notes == [] and add_map(path) is not None
    # Nothing is added, so nothing changes.
    assert add_to_gallery(first, path).skipped == 116 and open_gallery(path).points is not None
    assert add_to_gallery(second, path).map_lost
    gallery = open_gallery(path)
    assert gallery.points is None and len(gallery) == 120 and gallery.about.files.added is not None
    assert not list(path.glob("map-*"))
    # The map is of added rows, too, which stay beside the base.
    assert add_map(path) is not None
    gallery = open_gallery(path)
    assert gallery.points is not None and len(gallery.points) == 120 and gallery.about.base_rows == 116
    assert remove_from_gallery(path, ["0003.jpg"]).map_lost
    assert open_gallery(path).points is None and not list(path.glob("map-*"))
    assert not remove_from_gallery(path, ["0004.jpg"]).map_lost
    create_gallery(first, path, overwrite=True)
    assert open_gallery(path).points is None


def test_a_stopped_map_changes_nothing(make_store: MakeStore, tmp_path: Path) -> None:
    path = tmp_path / "g"
    create_gallery(make_store(clustered(50)[0]), path)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    assert add_map(path, stop=lambda: True) is None
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    with pytest.raises(GalleryError, match="expected a gallery, found no such folder"):
        add_map(tmp_path / "nothing")


def test_damaged_maps_are_refused(make_store: MakeStore, tmp_path: Path) -> None:
    path = tmp_path / "g"
    create_gallery(make_store(clustered(30)[0]), path)
    done = add_map(path)
    assert done is not None and done.about.files.map is not None
    file, about = path / done.about.files.map.file, json.loads((path / "gallery.json").read_text())
    whole = file.read_bytes()

    def refused(fault: str) -> None:
        """With checksums that match: the damage is no accident."""
        content = file.read_bytes()
        about["files"]["map"] = {"file": file.name, "bytes": len(content), "crc32": zlib.crc32(content)}
        (path / "gallery.json").write_text(json.dumps(about))
        with pytest.raises(GalleryError, match=fault) as error:
            open_gallery(path)
        assert "\n" not in str(error.value)

    file.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    with pytest.raises(GalleryError, match=r"map-\d+\.npz: is damaged"):
        open_gallery(path)
    file.write_bytes(whole[:-9])
    with pytest.raises(GalleryError, match="expected .* bytes, found"):
        open_gallery(path)
    refused("expected complete arrays")
    points = np.zeros((30, 2), np.float32)
    for value, fault in ((np.nan, "not finite"), (1.5, "from 0 to 1, found 0 to 1.5"), (-0.1, "found -0.1 to 0")):
        points[3, 1] = value
        write_map(file, points)
        refused(fault)
    write_map(file, points[:29])
    refused(r"expected points of \[30, 2\] float32, found \[29, 2\]")
    np.savez(file, points=np.zeros((30, 2)))
    refused(r"found \[30, 2\] float64")
    np.savez_compressed(file, points=np.zeros((30, 2), np.float32))
    refused("found it compressed")
    np.savez(file, points=np.array([[object()] * 2] * 30))
    refused("found .* object")
    np.savez(file, other=np.zeros((30, 2), np.float32))
    refused("expected an array 'points', found none")
    file.unlink()
    with pytest.raises(GalleryError, match="belongs to the gallery, but could not be read"):
        open_gallery(path)
    file.mkdir()
    with pytest.raises(GalleryError, match="expected a file, found something else"):
        open_gallery(path)
    for odd in ("../map-2.npz", "rows-1.h5", "/etc/passwd", "map-2.h5", ""):
        about["files"]["map"]["file"] = odd
        (path / "gallery.json").write_text(json.dumps(about))
        with pytest.raises(GalleryError, match="expected the name of a gallery file"):
            open_gallery(path)


def test_without_the_extra(make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "g"
    create_gallery(make_store(clustered(30)[0]), path)
    monkeypatch.setitem(sys.modules, "openTSNE", None)
    with pytest.raises(MissingExtraError, match=r"a layout of all images needs openTSNE.*pip install 'sppfeat\[map\]'"):
        add_map(path)


def test_from_the_command_line(make_store: MakeStore, tmp_path: Path, run_sppfeat: Callable[..., object]) -> None:
    rows, _ = clustered(44)
    names = [f"{n}.jpg" for n in range(44)]
    make_store(rows[:40], "a.h5", names=names[:40])
    make_store(rows[40:], "b.h5", names=names[40:])

    def run(*words: str) -> tuple[int, str, str]:
        done = run_sppfeat("index", *words, cwd=tmp_path)
        return done.returncode, done.stdout, done.stderr  # type: ignore[attr-defined]

    status, out, error = run("a.h5", "-o", "g", "--map")
    assert (status, error) == (0, "") and "  map      of all images" in out
    assert open_gallery(tmp_path / "g").points is not None
    assert "  map: of all images" in run_sppfeat("inspect", "g", cwd=tmp_path).stdout  # type: ignore[attr-defined]
    status, out, error = run("b.h5", "--add-to", "g")
    assert status == 0 and "note: the map is gone, since images changed; again: sppfeat index --map --add-to g" in error
    assert open_gallery(tmp_path / "g").points is None
    assert "  map: " not in run_sppfeat("inspect", "g", cwd=tmp_path).stdout  # type: ignore[attr-defined]
    status, out, error = run("--map", "--add-to", "g")
    assert (status, error) == (0, "") and out.startswith("g: 44 images now (all on the map)")
    (tmp_path / "names.txt").write_text("3.jpg\n")
    status, out, error = run("--remove", "names.txt", "--from", "g", "--map", "--json")
    found = json.loads(out)
    assert (status, error) == (0, "") and found["map"] is True and (found["images"], found["removed"]) == (43, 1)
    for wrong in (["--map"], ["--map", "-o", "g"], ["--add-to", "g"], ["--map", "--from", "g"]):
        status, out, error = run(*wrong)
        assert status == 2 and "or index --map --add-to GALLERY" in error
