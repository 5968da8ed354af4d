"""Proposals of windows: their file, resuming, and what cannot be searched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import sppfeat_command
from PIL import Image
from typer.testing import CliRunner

from sppfeat import Recipe, UsageError, WindowsError, extract_folder, open_store
from sppfeat.images import Fingerprint
from sppfeat.windows.boxes import overlaps
from sppfeat.windows.proposals import _Journal, open_windows, propose_folder, windows_from
from sppfeat.windows.selective_search import ProposalOptions, Proposed, propose


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """An image of 150 x 120: a red and a blue block on gray."""
    pixels = np.full((120, 150, 3), 128, np.uint8)
    pixels[20:70, 30:90] = (220, 30, 30)
    pixels[60:110, 100:140] = (30, 30, 220)
    path = tmp_path / "scene" / "a.png"
    path.parent.mkdir()
    Image.fromarray(pixels).save(path)
    return path


def test_windows_hold_the_objects(scene: Path) -> None:
    found = propose(str(scene))
    assert found.error is None and found.image_size == (150, 120)
    objects = np.array([[30, 20, 89, 69], [100, 60, 139, 109]])
    assert overlaps(found.windows, objects).max(0).min() > 0.9
    assert (found.windows[:, :2] >= 0).all() and (found.windows[:, 2:] < [150, 120]).all()
    assert (found.windows[:, 2:] - found.windows[:, :2] + 1 >= 20).all()
    assert len(np.unique(found.windows, axis=0)) == len(found.windows)


def test_windows_of_a_large_image_are_in_its_own_pixels(scene: Path) -> None:
    with Image.open(scene) as image:
        image.resize((1500, 1200), Image.Resampling.NEAREST).save(scene.with_name("large.png"))
    found = propose(str(scene.with_name("large.png")))
    assert found.image_size == (1500, 1200)
    assert overlaps(found.windows, np.array([[300, 200, 899, 699]])).max() > 0.9
    assert found.windows[:, 2].max() <= 1499


def test_windows_are_reproducible_and_cut_by_rank(photos: Path) -> None:
    path = str(photos / "objects" / "coins.png")
    whole = propose(path)
    np.testing.assert_array_equal(propose(path).windows, whole.windows)
    few = propose(path, ProposalOptions(max_windows=10))
    np.testing.assert_array_equal(few.windows, whole.windows[:10])
    other = propose(path, ProposalOptions(seed=1))
    assert {tuple(w) for w in other.windows.tolist()} == {tuple(w) for w in whole.windows.tolist()}
    assert not np.array_equal(other.windows, whole.windows)


def test_a_finer_segmentation_finds_more_windows(photos: Path) -> None:
    path = str(photos / "objects" / "coins.png")
    fine, coarse = propose(path).windows, propose(path, ProposalOptions(base_k=150)).windows
    assert len(fine) > len(coarse)
    quality = ProposalOptions(method="selective-search-quality", base_k=500)
    assert len(propose(path, quality).windows) < len(propose(path, ProposalOptions(method=quality.method)).windows)


def test_images_without_windows(tmp_path: Path) -> None:
    Image.new("RGB", (12, 300)).save(tmp_path / "narrow.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    assert propose(str(tmp_path / "narrow.png")).windows.shape == (0, 4)
    broken = propose(str(tmp_path / "broken.png"))
    assert broken.windows.shape == (0, 4) and "damaged PNG" in (broken.error or "")
    done = propose_folder(tmp_path, tmp_path / "w.h5", workers=1)
    assert (done.images, done.proposed, done.failed, done.empty, done.windows) == (2, 1, 1, 1, 0)
    found = open_windows(tmp_path / "w.h5")
    assert found["narrow.png"].shape == (0, 4) and found.errors.keys() == {"broken.png"}


def test_a_file_goes_on(make_images: Callable[..., Path], tmp_path: Path) -> None:
    folder, path = make_images(3), tmp_path / "w.h5"
    first = propose_folder(folder, path, workers=1)
    assert (first.images, first.proposed, first.reused, first.pending) == (3, 3, 0, 0)
    before = {name: boxes.copy() for name, boxes in open_windows(path).items()}
    make_images(4)
    os.utime(folder / "0000.png", ns=(1, 1))
    (folder / "0002.png").unlink()
    again = propose_folder(folder, path, workers=1)
    assert (again.images, again.proposed, again.reused) == (3, 2, 1)
    after = open_windows(path)
    assert list(after) == ["0000.png", "0001.png", "0002.png", "0003.png"]
    for name, boxes in before.items():
        np.testing.assert_array_equal(after[name], boxes)
    assert windows_from(path)["0003.png"].shape == after["0003.png"].shape
    with pytest.raises(
        WindowsError, match=r"expected .*seed 3, found selective-search, base k 50, at most 2000 windows, seed 0;"
    ):
        propose_folder(folder, path, ProposalOptions(seed=3))
    with pytest.raises(WindowsError, match="its names are relative to .*, these images to"):
        propose_folder(folder, path, root=str(tmp_path))
    with pytest.raises(WindowsError, match="already exists"):
        propose_folder(folder, path, resume=False)
    assert propose_folder(folder, path, ProposalOptions(seed=3), overwrite=True, workers=1).proposed == 3


def test_an_archive_has_the_windows_of_its_folder(make_images: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_images(3)
    for kind in ("tar", "tgz"):
        with tarfile.open(tmp_path / f"x.{kind}", "w:gz" if kind == "tgz" else "w") as tar:
            tar.add(folder, ".")
        propose_folder(tmp_path / f"x.{kind}", tmp_path / f"{kind}.h5", workers=2)
        assert propose_folder(tmp_path / f"x.{kind}", tmp_path / f"{kind}.h5", workers=1).reused == 3
    propose_folder(folder, tmp_path / "w.h5", workers=1)
    expected = open_windows(tmp_path / "w.h5")
    for kind in ("tar", "tgz"):
        found = open_windows(tmp_path / f"{kind}.h5")
        assert sorted(found) == [f"x.{kind}/{name}" for name in expected]
        for name, boxes in expected.items():
            np.testing.assert_array_equal(found[f"x.{kind}/{name}"], boxes)


def test_stopped_and_killed_runs_go_on(
    make_images: Callable[..., Path], tmp_path: Path, run_sppfeat: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    folder, path = make_images(40), tmp_path / "w.h5"
    journal = tmp_path / ".w.h5.journal"
    process = subprocess.Popen(
        sppfeat_command("windows", folder, "-o", path, "-j", "1"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 4):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    lines = journal.read_bytes().count(b"\n") - 1
    assert lines >= 4 and not path.exists()
    with open(journal, "ab") as file:
        file.write(b'{"name": "cut sh')  # as a full disk leaves it
    process = subprocess.Popen(
        sppfeat_command("windows", folder, "-o", path, "-j", "1"), stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    while journal.read_bytes().count(b"\n") - 1 < lines + 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and b"the same command resumes" in errors and not journal.exists()
    stopped = open_windows(path)
    assert lines + 3 <= len(stopped) < 40
    done = run_sppfeat("windows", folder, "-o", path, "--json")
    document = json.loads(done.stdout)
    assert document["reused"] == len(stopped) and document["proposed"] == 40 - len(stopped) and not document["pending"]
    whole = open_windows(path)
    again = propose_folder(folder, tmp_path / "again.h5", workers=1)
    assert again.windows == whole.count
    for name, boxes in open_windows(tmp_path / "again.h5").items():
        np.testing.assert_array_equal(boxes, whole[name])


def test_a_damaged_journal_is_refused(make_images: Callable[..., Path], tmp_path: Path) -> None:
    folder, path, options = make_images(1), tmp_path / "w.h5", ProposalOptions()
    kept = _Journal(path, options, str(folder), fresh=True)
    kept.add("a.png", Proposed(np.array([[1, 2, 3, 4]]), (9, 9), Fingerprint(1, 1), None))
    assert kept.read("a.png").windows == [(1, 2, 3, 4)]
    header, line = (tmp_path / ".w.h5.journal").read_bytes().splitlines(keepends=True)
    kept.remove()
    for old, new, reason in (
        (b'"name"', b'"nome"', "unknown field `nome`"),
        (b"[1, 2, 3, 4]", b"[1, 2, 3]", "Expected `array` of length 4 - at `$.windows[0]`"),
        (b"[9, 9]", b"[9, 99999999999]", "at `$.size[1]`"),
        (b'"error": ""', b'"error": "\\u0000"', "at `$.error`"),
        (b"{", b"", "Expected `object`, got `str`"),
    ):
        (tmp_path / ".w.h5.journal").write_bytes(header + line.replace(old, new))
        with pytest.raises(WindowsError, match=r"\.w\.h5\.journal: expected an intact journal .*found: ") as caught:
            propose_folder(folder, path, options, root=str(folder))
        assert reason in str(caught.value)


def test_files_that_are_none(tmp_path: Path, make_images: Callable[..., Path]) -> None:
    folder = make_images(1)
    for path in (tmp_path / "no.h5", tmp_path):
        with pytest.raises(WindowsError, match="expected a file of windows, found"):
            open_windows(path)
    (tmp_path / "text.h5").write_text("text")
    with pytest.raises(WindowsError, match="cannot be opened"):
        open_windows(tmp_path / "text.h5")
    with pytest.raises(WindowsError, match="it is left as it is"):
        propose_folder(folder, tmp_path / "text.h5")
    propose_folder(folder, tmp_path / "w.h5", workers=1)
    with h5py.File(tmp_path / "w.h5", "r+") as file:
        del file["start"]
        file["start"] = np.array([0, 9999])
    with pytest.raises(WindowsError, match="damaged: expected a file of windows, found: its windows do not add up"):
        open_windows(tmp_path / "w.h5")
    with pytest.raises(UsageError, match="expected images, found none"):
        (tmp_path / "empty").mkdir()
        propose_folder(tmp_path / "empty", tmp_path / "x.h5")
    for change in ({"method": "edge-boxes"}, {"max_windows": 0}, {"seed": -1}, {"base_k": 0}):
        with pytest.raises(UsageError, match=next(iter(change))):
            ProposalOptions(**change)  # type: ignore[arg-type]


def test_extract_takes_proposals(scene: Path, tmp_path: Path, tiny: Recipe) -> None:
    propose_folder(scene.parent, tmp_path / "w.h5", workers=1)
    windows = windows_from(tmp_path / "w.h5")
    done = extract_folder(scene.parent, tmp_path / "f.h5", tiny, windows=windows)
    assert done.described == len(windows["a.png"]) == len(open_store(tmp_path / "f.h5")) and not done.failed


def test_inspect(scene: Path, tmp_path: Path) -> None:
    from sppfeat_cli.app import build

    propose_folder(scene.parent, tmp_path / "w.h5", workers=1)
    shown = CliRunner().invoke(build(), ["inspect", str(tmp_path / "w.h5")])
    assert "windows of 1 image," in shown.stdout and "selective-search, base k 50, at most 2000" in shown.stdout
    document = json.loads(CliRunner().invoke(build(), ["inspect", str(tmp_path / "w.h5"), "--json"]).stdout)
    assert document["format"] == "windows" and document["windows"] == len(open_windows(tmp_path / "w.h5")["a.png"])
