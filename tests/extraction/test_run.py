"""Extraction: values, resuming, and what can go wrong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

from sppfeat import (
    BackboneError,
    Recipe,
    RunOptions,
    Status,
    Store,
    StoreBusyError,
    StoreError,
    UsageError,
    extract_folder,
    open_store,
    verify_store,
)
from sppfeat.backbones.backbone import Backbone, load_backbone
from sppfeat.engines.torch_engine import TorchEngine
from sppfeat.extraction import ShardOptions
from sppfeat.extraction.pipeline import Describer
from sppfeat.extraction.stages import Stages
from sppfeat.images import resizing as preprocess
from sppfeat.images.resizing import prepare_image
from sppfeat.progress import Observer
from sppfeat.pyramid.pooling import pool_pyramid
from sppfeat.store.locking import lock_store

MakeImages = Callable[..., Path]


class Log:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str | None]] = []
        self.gone: list[str] = []

    def started(self, *, todo: int, reused: int, gone: list[str], device: str) -> None:
        self.gone = gone

    def row(self, name: str, error: str | None) -> None:
        self.rows.append((name, error))


def by_name(store: Store) -> dict[str, np.ndarray]:
    return dict(zip(store.names, np.array(store.descriptors), strict=True))


def same_within_one_unit(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to one unit in the last place of the stored type."""
    return bool((np.abs(a.astype(np.float64) - b) <= np.spacing(np.maximum(np.abs(a), np.abs(b)))).all())


def test_values_are_those_of_one_image_at_a_time(make_images: MakeImages, tmp_path: Path) -> None:
    """The pipeline with its threads and batches against: read, resize, network, pool, normalize, fuse."""
    folder = make_images(17)
    recipe = replace(TINY, scales=(64, 96), levels=(3, 2, 1), dtype="float32", size_multiple=16)
    extract_folder(folder, tmp_path / "f.h5", recipe)
    store = open_store(tmp_path / "f.h5")
    assert store.names == sorted(path.name for path in folder.iterdir())
    backbone = load_backbone(recipe)
    for name, values in by_name(store).items():
        parts = []
        for pixels in prepare_image(str(folder / name), store.recipe).inputs:
            with torch.no_grad():
                row = pool_pyramid(backbone.feature_maps(torch.from_numpy(pixels.copy())[None])[0], recipe.levels)[0]
            parts.append(row / row.norm())
        expected = torch.stack(parts).mean(0).numpy()
        assert np.linalg.norm(values - expected) < 1e-5 * np.linalg.norm(expected)
        with Image.open(folder / name) as image:
            assert store.image_size[store.names.index(name)].tolist() == list(image.size)


@pytest.mark.parametrize(
    ("change", "dim"), [({"fuse": "concat"}, 2), ({"fuse": "max"}, 1), ({"normalize": "none"}, 1)], ids=str
)
def test_fusion_and_length(make_images: MakeImages, tmp_path: Path, change: dict[str, str], dim: int) -> None:
    folder = make_images(3)
    two = replace(TINY, scales=(64, 96), dtype="float32", **change)  # type: ignore[arg-type]
    rows = []
    for number, recipe in enumerate((two, replace(two, scales=(64,)), replace(two, scales=(96,)))):
        done = extract_folder(folder, tmp_path / f"{number}.h5", recipe)
        rows.append(np.array(open_store(tmp_path / f"{number}.h5").descriptors))
    assert done.dim * dim == rows[0].shape[1]
    joined = {"concat": np.hstack, "max": lambda parts: np.max(parts, 0), "mean": lambda parts: np.mean(parts, 0)}
    np.testing.assert_allclose(rows[0], joined[two.fuse](rows[1:]), rtol=1e-4, atol=1e-6)


def test_options_change_speed_not_values(make_images: MakeImages, tmp_path: Path) -> None:
    folder = make_images(23)
    stores = []
    for number, options in enumerate(
        (RunOptions(batch_size=1, num_workers=1), RunOptions(batch_size=16, num_workers=4), RunOptions())
    ):
        extract_folder(folder, tmp_path / f"{number}.h5", replace(TINY, dtype="float32"), options)
        stores.append(open_store(tmp_path / f"{number}.h5"))
    for store in stores[1:]:
        assert store.names == stores[0].names and store.recipe_hash == stores[0].recipe_hash
        np.testing.assert_allclose(store.descriptors, stores[0].descriptors, rtol=1e-4, atol=1e-6)


def test_resume_describes_only_what_is_new_or_changed(make_images: MakeImages, tmp_path: Path) -> None:
    folder, output = make_images(8), tmp_path / "f.h5"
    assert extract_folder(folder, output, TINY).described == 8
    before = by_name(open_store(output))
    again = extract_folder(folder, output, TINY)
    assert (again.images, again.described, again.reused, again.failed) == (8, 0, 8, 0)

    make_images(3, "more", seed=1)
    shutil.copy(tmp_path / "more" / "0000.png", folder / "0002.png")  # another image under a known name
    shutil.copy(tmp_path / "more" / "0001.png", folder / "00.png")  # a new name that sorts first
    (folder / "0005.png").unlink()
    log = Log()
    done = extract_folder(folder, output, TINY, observer=log)
    assert (done.described, done.changed, done.reused, done.gone) == (2, 1, 6, 1)
    assert sorted(log.rows) == [("00.png", None), ("0002.png", None)] and log.gone == ["0005.png"]
    store = open_store(output)
    after = by_name(store)
    assert store.names[:8] == list(before) and store.names[8:] == ["00.png"]  # row numbers stay what they were
    for name in before:
        assert np.array_equal(before[name], after[name]) == (name != "0002.png")
    assert same_within_one_unit(after["00.png"], Describer(TINY).describe([str(folder / "00.png")]).__next__().row()[0])
    assert verify_store(store) == []


def test_interrupted_and_resumed_equals_uninterrupted(make_images: MakeImages, tmp_path: Path) -> None:
    folder, output = make_images(80), tmp_path / "f.h5"
    extract_folder(folder, tmp_path / "whole.h5", TINY)
    stop, log = threading.Event(), Log()

    class StopAtFive(Log):
        def row(self, name: str, error: str | None) -> None:
            super().row(name, error)
            if len(self.rows) == 5:
                stop.set()

    first = extract_folder(folder, output, TINY, observer=StopAtFive(), stop=stop.is_set)
    assert first.interrupted and first.described >= 5 and first.pending == 80 - first.described
    assert open_store(output).counts()["done"] == first.described  # those in flight were finished, and kept
    second = extract_folder(folder, output, TINY, observer=log)
    assert second.reused == first.described and second.described == first.pending and not second.interrupted
    whole, resumed = open_store(tmp_path / "whole.h5"), open_store(output)
    assert whole.names == resumed.names
    assert same_within_one_unit(np.array(whole.descriptors), np.array(resumed.descriptors))


def test_an_exception_keeps_what_was_done(make_images: MakeImages, tmp_path: Path) -> None:
    class Break(Log):
        def row(self, name: str, error: str | None) -> None:
            super().row(name, error)
            if len(self.rows) == 4:
                raise KeyboardInterrupt

    folder, output = make_images(30), tmp_path / "f.h5"
    with pytest.raises(KeyboardInterrupt):
        extract_folder(folder, output, TINY, observer=Break())
    assert open_store(output).counts()["done"] == 4
    assert extract_folder(folder, output, TINY).reused == 4


def test_another_recipe_is_refused_with_the_fields_that_differ(make_images: MakeImages, tmp_path: Path) -> None:
    folder, output = make_images(2), tmp_path / "f.h5"
    extract_folder(folder, output, TINY)
    before = output.read_bytes()
    other = replace(TINY, levels=(3, 1), pooling="avg")
    with pytest.raises(StoreError, match=r"levels: store 2,1, asked 3,1; pooling: store max, asked avg") as caught:
        extract_folder(folder, output, other)
    assert "scales" not in str(caught.value) and "\n" not in str(caught.value)
    assert output.read_bytes() == before
    assert extract_folder(folder, output, other, overwrite=True).described == 2


def test_other_weights_are_refused(make_images: MakeImages, tmp_path: Path) -> None:
    folder, output = make_images(2), tmp_path / "f.h5"
    import timm

    files = []
    for number in range(2):
        torch.manual_seed(1 + number)
        network = timm.create_model("test_resnet")
        files.append(tmp_path / f"{number}.pth")
        torch.save(network.state_dict(), files[-1])
    extract_folder(folder, output, replace(TINY, weights=str(files[0])))
    with pytest.raises(StoreError, match=r"weights: store \w{12}, asked \w{12}"):
        extract_folder(folder, output, replace(TINY, weights=str(files[1])))
    # The same weights under another name are the same recipe.
    files[0].rename(tmp_path / "renamed.pth")
    assert extract_folder(folder, output, replace(TINY, weights=str(tmp_path / "renamed.pth"))).reused == 2


def test_names_of_several_sources_and_lists(
    make_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_images(2, "data/train")
    make_images(2, "data/test", seed=1)
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text("data/train/0000.png\ndata/extra.png\n")
    shutil.copy("data/train/0001.png", "data/extra.png")
    done = extract_folder(["data/train", "data/test", "list.txt"], "f.h5", TINY)
    store = open_store("f.h5")
    assert store.names == ["train/0000.png", "train/0001.png", "test/0000.png", "test/0001.png", "extra.png"]
    assert store.source_root == str(tmp_path / "data") and done.repeated == 1
    values = by_name(store)
    assert np.array_equal(values["extra.png"], values["train/0001.png"])
    assert not np.array_equal(values["test/0001.png"], values["train/0001.png"])


def test_a_part_of_the_sources_joins_the_same_rows(make_images: MakeImages, tmp_path: Path) -> None:
    make_images(2, "data/train")
    make_images(2, "data/test")
    output = tmp_path / "f.h5"
    extract_folder(tmp_path / "data", output, TINY)
    make_images(3, "data/test")
    done = extract_folder(tmp_path / "data" / "test", output, TINY)
    assert (done.images, done.described, done.reused, done.gone) == (3, 1, 2, 0)
    assert open_store(output).names[-1] == "test/0002.png"


def test_a_moved_collection_resumes(make_images: MakeImages, tmp_path: Path) -> None:
    folder, output = make_images(3), tmp_path / "f.h5"
    extract_folder(folder, output, TINY)
    folder.rename(tmp_path / "moved")
    done = extract_folder(tmp_path / "moved", output, TINY)
    assert done.reused == 3 and open_store(output).source_root == str(tmp_path / "moved")


def test_images_of_another_folder_are_not_mixed_in(make_images: MakeImages, tmp_path: Path) -> None:
    """The same names below another folder are other images: nothing may be overwritten by mistake."""
    output = tmp_path / "f.h5"
    extract_folder(make_images(3, "a"), output, TINY)
    before = output.read_bytes()
    with pytest.raises(StoreError, match="names are relative to .*a, these images to .*b"):
        extract_folder(make_images(3, "b", seed=1), output, TINY)
    assert output.read_bytes() == before
    both = extract_folder(tmp_path / "b", tmp_path / "both.h5", TINY, root=str(tmp_path))
    assert both.described == 3
    assert extract_folder(tmp_path / "a", tmp_path / "both.h5", TINY).described == 3
    assert open_store(tmp_path / "both.h5").counts()["done"] == 6


def test_overflow_of_the_stored_type_fails_the_row(make_images: MakeImages, tmp_path: Path) -> None:
    folder = make_images(2)
    recipe = replace(TINY, normalize="none", std=(1e-7, 1e-7, 1e-7))
    done = extract_folder(folder, tmp_path / "f.h5", recipe)
    assert done.failed == 2
    assert all("not finite as float16" in reason for reason in open_store(tmp_path / "f.h5").errors().values())


def test_invalid_outputs(make_images: MakeImages, tmp_path: Path) -> None:
    folder = make_images(1)
    photo = folder / "0000.png"
    before = photo.read_bytes()
    for overwrite in (False, True):  # a photograph is never replaced, not even on request
        with pytest.raises(StoreError, match="is not a store; it is left as it is"):
            extract_folder(folder, photo, TINY, overwrite=overwrite)
    assert photo.read_bytes() == before
    with pytest.raises(StoreError, match="found .0000.png. in it; it is left as it is"):
        extract_folder(folder, folder, TINY)
    with pytest.raises(StoreError, match="its folder .* does not exist"):
        extract_folder(folder, tmp_path / "none" / "f.h5", TINY)
    extract_folder(folder, tmp_path / "f.h5", TINY)
    with pytest.raises(StoreError, match="already exists"):
        extract_folder(folder, tmp_path / "f.h5", TINY, resume=False)


def test_only_stores_are_overwritten(make_images: MakeImages, tmp_path: Path) -> None:
    folder, output = make_images(1), tmp_path / "results.h5"
    with h5py.File(output, "w") as file:
        file["precious"] = 1
    with pytest.raises(StoreError, match="found an HDF5 file of format None; it is left as it is"):
        extract_folder(folder, output, TINY, overwrite=True)
    with h5py.File(output) as file:
        assert "precious" in file
    os.mkfifo(tmp_path / "pipe.h5")
    with pytest.raises(StoreError, match="found a special file"):
        extract_folder(folder, tmp_path / "pipe.h5", TINY)


def test_an_output_that_is_a_symlink(make_images: MakeImages, tmp_path: Path) -> None:
    """What counts is the file behind it: for the lock, and when it is rewritten."""
    folder, real, link = make_images(2), tmp_path / "disk" / "real.h5", tmp_path / "link.h5"
    real.parent.mkdir()
    link.symlink_to(real)
    extract_folder(folder, link, TINY)
    make_images(3)
    with lock_store(real), pytest.raises(StoreBusyError):
        extract_folder(folder, link, TINY)
    assert extract_folder(folder, link, TINY).reused == 2
    assert link.is_symlink() and len(open_store(real)) == 3


def test_images_that_are_gone_keep_their_rows_in_lists_too(make_images: MakeImages, tmp_path: Path) -> None:
    folder, output, listing = make_images(3), tmp_path / "f.h5", tmp_path / "list.txt"
    listing.write_text("".join(f"{path}\n" for path in sorted(folder.iterdir())))
    extract_folder(listing, output, TINY)
    before = by_name(open_store(output))
    (folder / "0001.png").unlink()
    done = extract_folder(listing, output, TINY)
    assert (done.images, done.described, done.reused, done.failed, done.gone) == (3, 0, 2, 0, 1)
    assert np.array_equal(by_name(open_store(output))["0001.png"], before["0001.png"])


def test_a_folder_further_up_joins_the_same_rows(make_images: MakeImages, tmp_path: Path) -> None:
    """Rows of `a` stay, named from the folder that contains both."""
    output = tmp_path / "f.h5"
    extract_folder(make_images(2, "data/a"), output, TINY)
    make_images(1, "data/b", seed=1)
    done = extract_folder([tmp_path / "data" / "a", tmp_path / "data" / "b"], output, TINY)
    assert (done.described, done.reused, done.gone) == (1, 2, 0)
    assert open_store(output).names == ["a/0000.png", "a/0001.png", "b/0000.png"]


def test_a_failing_network_is_not_the_fault_of_the_images(
    make_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost GPU: the run ends with one line, and the rows stay pending."""
    folder, output = make_images(5), tmp_path / "f.h5"

    def fail(*arguments: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: unspecified launch failure\nMore text")

    monkeypatch.setattr("sppfeat.backbones.backbone.Backbone.feature_maps", fail)
    with pytest.raises(BackboneError, match=r"failed on a batch of \d images .* \(CUDA error: unsp.*failure") as e:
        extract_folder(folder, output, TINY, RunOptions(engine="torch"))
    assert "\n" not in str(e.value)
    assert open_store(output).counts() == {"pending": 5, "done": 0, "failed": 0}
    monkeypatch.undo()
    assert extract_folder(folder, output, TINY).described == 5


@pytest.mark.parametrize("fits", [5, 1, 0])
def test_out_of_memory_halves_batches_and_loses_no_row(
    make_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: int
) -> None:
    """With a network that has room for `fits` images at a time."""
    folder, output, options = make_images(40), tmp_path / "f.h5", RunOptions(engine="torch", batch_size=16)
    recipe = replace(TINY, size_multiple=64)
    extract_folder(folder, tmp_path / "whole.h5", recipe, RunOptions(engine="torch"))
    feature_maps, sizes = Backbone.feature_maps, []

    def small(self: Backbone, images: torch.Tensor) -> list[torch.Tensor]:
        sizes.append(len(images))
        if len(images) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore text")
        return feature_maps(self, images)

    monkeypatch.setattr(Backbone, "feature_maps", small)
    if not fits:
        assert extract_folder(folder, output, recipe, options).failed == 40
        assert open_store(output).counts() == {"pending": 0, "done": 0, "failed": 40}
        reasons = set(open_store(output).errors().values())
        assert all(re.match(r"one image of \d+ x \d+ does not fit .* cpu .CUDA out of mem", r) for r in reasons)
        return
    assert extract_folder(folder, output, recipe, options).described == 40
    expected, found = by_name(open_store(tmp_path / "whole.h5")), by_name(open_store(output))
    assert all(same_within_one_unit(found[name], expected[name]) for name in expected)
    assert max(sizes) > fits  # it happened
    assert sum(size for size in sizes if size <= fits) == 40


def test_a_shape_that_does_not_fit_leaves_batches_of_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for eight small images at a time, or one large one, which comes first."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(96):
        Image.new("RGB", (640, 64) if i < 48 else (64, 64), (i, i, i)).save(folder / f"{i:02}.png")
    feature_maps, passes = Backbone.feature_maps, list[tuple[int, int]]()

    def small(self: Backbone, images: torch.Tensor) -> list[torch.Tensor]:
        passes.append((images.shape[2], len(images)))
        time.sleep(0.05)  # decoding stays ahead, also on a busy machine
        if images.shape[2] > 64 and len(images) > 1:
            raise MemoryError
        return feature_maps(self, images)

    monkeypatch.setattr(Backbone, "feature_maps", small)
    monkeypatch.setattr("sppfeat.engines.engine.cpu_streams", lambda: (1, 1))
    options = RunOptions(device="cpu", engine="torch", batch_size=8)
    assert extract_folder(folder, tmp_path / "f.h5", TINY, options).described == 96
    small_batches = [size for width, size in passes if width == 64]
    # The first waited for all the large ones, so its batch is full; how far decoding is ahead decides the others.
    assert small_batches[0] == 8 and sum(small_batches) == 48
    assert [size for width, size in passes if width == 640][-8:] == [1] * 8


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")]
)
def test_an_image_that_does_not_fit_fails_alone(
    make_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    folder, output = make_images(12), tmp_path / "f.h5"
    Image.new("RGB", (640, 64)).save(folder / "wide.png")
    feature_maps = Backbone.feature_maps

    def small(self: Backbone, images: torch.Tensor) -> list[torch.Tensor]:
        if images.shape[2] >= 500:
            raise error
        return feature_maps(self, images)

    monkeypatch.setattr(Backbone, "feature_maps", small)
    done = extract_folder(folder, output, TINY, RunOptions(device="cpu", engine="torch"))
    assert (done.described, done.failed, done.pending) == (12, 1, 0)
    assert "does not fit into the memory of cpu" in open_store(output).errors()["wide.png"]
    before = output.read_bytes()
    monkeypatch.setattr(Backbone, "feature_maps", None)  # a resume has nothing to compute
    again = extract_folder(folder, output, TINY, RunOptions(device="cpu", engine="torch"))
    assert (again.described, again.failed, again.pending) == (0, 1, 0) and output.read_bytes() == before


def test_memory_that_others_take_costs_no_row(
    make_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of a size that did fit are not at fault: their rows stay pending."""
    folder, feature_maps, passes = make_images(24), Backbone.feature_maps, 0

    def small(self: Backbone, images: torch.Tensor) -> list[torch.Tensor]:
        nonlocal passes
        passes += 1
        if passes > 4:
            raise MemoryError
        return feature_maps(self, images)

    monkeypatch.setattr(Backbone, "feature_maps", small)
    options = RunOptions(device="cpu", engine="torch", batch_size=4)
    with pytest.raises(BackboneError, match="out of memory .* the remaining rows stay pending"):
        extract_folder(folder, tmp_path / "f.h5", TINY, options)
    counts = open_store(tmp_path / "f.h5").counts()
    assert counts["failed"] == 0 and counts["pending"] > 0
    monkeypatch.setattr(Backbone, "feature_maps", feature_maps)
    assert extract_folder(folder, tmp_path / "f.h5", TINY, options).pending == 0


def test_an_image_that_does_not_fit_while_it_is_prepared_fails_alone(
    make_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_images(4)
    Image.new("RGB", (640, 64)).save(folder / "wide.png")
    resized = preprocess._resized

    def small(pixels: Image.Image, *rest: object) -> np.ndarray:
        if pixels.width == 640:
            raise MemoryError
        return resized(pixels, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(preprocess, "_resized", small)
    done = extract_folder(folder, tmp_path / "f.h5", TINY, RunOptions(device="cpu", engine="torch"))
    assert (done.described, done.failed, done.pending) == (4, 1, 0)
    assert open_store(tmp_path / "f.h5").errors()["wide.png"].endswith("out of memory")


def test_a_batch_is_tried_again_with_no_other_pass_beside_it(
    make_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_images(24)
    feature_maps, release = Backbone.feature_maps, TorchEngine.release
    lock, inside, beside = threading.Lock(), 0, list[int]()

    def small(self: Backbone, images: torch.Tensor) -> list[torch.Tensor]:
        nonlocal inside
        with lock:
            inside += 1
        try:
            time.sleep(0.005)
            if len(images) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return feature_maps(self, images)
        finally:
            with lock:
                inside -= 1

    def watched(self: TorchEngine) -> None:
        beside.append(inside)
        release(self)

    monkeypatch.setattr(Backbone, "feature_maps", small)
    monkeypatch.setattr(TorchEngine, "release", watched)
    monkeypatch.setattr("sppfeat.engines.torch_engine.cpu_streams", lambda: (4, 1))
    done = extract_folder(folder, tmp_path / "f.h5", TINY, RunOptions(device="cpu", engine="torch", batch_size=8))
    assert done.described == 24
    assert beside and not any(beside)


def test_a_scale_too_small_for_the_backbone_is_refused_at_once(make_images: MakeImages, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="scale 16: backbone timm:test_resnet needs at least 32 pixels per side"):
        extract_folder(make_images(1), tmp_path / "f.h5", replace(TINY, scales=(64, 16)))


def test_no_images(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected images, found none"):
        extract_folder(tmp_path, tmp_path / "f.h5", TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_store_cut_short_is_not_resumed_but_can_be_overwritten(make_images: MakeImages, tmp_path: Path) -> None:
    folder, output = make_images(2), tmp_path / "f.h5"
    extract_folder(folder, output, TINY)
    output.write_bytes(output.read_bytes()[:-10])
    with pytest.raises(StoreError, match="cut short"):
        extract_folder(folder, output, TINY)
    assert extract_folder(folder, output, TINY, overwrite=True).described == 2


@pytest.mark.skipif(os.geteuid() != 0 if hasattr(os, "geteuid") else True, reason="mounting a small disk needs root")
def test_a_full_disk(make_images: MakeImages, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        folder, output = make_images(200), disk / "f.h5"
        recipe = replace(TINY, levels=(6, 3, 2, 1))
        with pytest.raises(
            StoreError, match=r"f\.h5: cannot be written: the disk is full; free some space, then resume"
        ):
            extract_folder(folder, output, recipe)
        assert list(disk.iterdir()) == []
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert extract_folder(folder, output, recipe).described == 200
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    """Peak memory of a process that describes 3,000 images is that of one that describes 500."""
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png", compress_level=0)
    code = (
        "import sys; from conftest import TINY; from memory import peak_kb\n"
        "from sppfeat.extraction.pipeline import Describer\n"
        "n = sum(1 for d in Describer(TINY).describe([sys.argv[1]] * int(sys.argv[2])) if d.error is None)\n"
        "print(n, peak_kb())"
    )
    peaks = []
    for count in (500, 3000):
        output = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "one.png"), str(count)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        ).stdout.split()
        assert int(output[0]) == count
        peaks.append(int(output[1]))
    assert peaks[1] < 1.1 * peaks[0]


def test_real_data(shared: Path, tmp_path: Path) -> None:
    """The default recipe on real images: images of one class are closer than those of others."""
    classes = ["airplanes", "Motorbikes", "Leopards", "Faces"]
    sources = [shared / "data" / "caltech101-subset" / "test" / name for name in classes]
    done = extract_folder(sources, tmp_path / "f.h5", Recipe())
    assert (done.described, done.failed, done.dim) == (20, 0, 16000)
    store = open_store(tmp_path / "f.h5")
    assert (store.status == Status.DONE).all()
    rows = np.array(store.descriptors, np.float32)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3)
    labels = np.array([name.split("/")[0] for name in store.names])
    similar = rows @ rows.T
    np.fill_diagonal(similar, -1)
    assert (labels[similar.argmax(1)] == labels).mean() >= 0.9


def test_the_bottleneck_is_the_stage_that_the_others_wait_for(make_images: MakeImages, tmp_path: Path) -> None:
    done = extract_folder(make_images(2), tmp_path / "f.h5", TINY)
    assert done.bottleneck in ("decode", "forward")

    def slowest(device: str, decode: float, forward: float, write: float = 1.0) -> str | None:
        stages = Stages(decode, forward, write=write, workers=8, streams=1)
        return replace(done, device=device, seconds=10.0, stages=stages).bottleneck

    assert slowest("cpu", 3, 9) == "forward"
    assert slowest("cpu", 12, 9) == "decode"
    assert slowest("cpu", 3, 9, 9.5) == "write"
    assert slowest("cpu", 3, 5, 8) == "forward"  # the writing thread still rests
    # Beside a GPU, eight threads decode while one feeds it.
    assert slowest("cuda:0", 12, 9) == "forward"
    assert slowest("cuda:0", 79, 9) == "decode"
    assert replace(done, described=0).bottleneck is None


def test_a_network_that_cannot_run_changes_nothing(
    make_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, path = make_images(3), tmp_path / "s.h5"
    extract_folder(folder, path, TINY, RunOptions(engine="torch"))
    before = path.read_bytes()
    changed = next(iter(folder.iterdir()))
    Image.new("RGB", (90, 80), "red").save(changed)

    def refuse(*arguments: object) -> None:
        raise BackboneError("cannot be run")

    monkeypatch.setattr(TorchEngine, "__init__", refuse)
    with pytest.raises(BackboneError, match="cannot be run"):
        extract_folder(folder, path, TINY, RunOptions(engine="torch"))
    assert path.read_bytes() == before
    with pytest.raises(BackboneError, match="cannot be run"):
        extract_folder(folder, tmp_path / "new.h5", TINY, RunOptions(engine="torch"))
    assert not (tmp_path / "new.h5").exists()


def test_windows_with_a_recipe_that_crops_are_refused_before_a_store_is_made(
    make_images: MakeImages, tmp_path: Path
) -> None:
    folder = make_images(1)
    windows = {next(iter(folder.iterdir())).name: np.array([[0, 0, 9, 9]])}
    with pytest.raises(UsageError, match="windows need crop 'none'"):
        extract_folder(folder, tmp_path / "s.h5", replace(TINY, crop="center"), windows=windows)
    assert not (tmp_path / "s.h5").exists()


def test_an_image_that_was_still_being_copied_is_tried_again(
    make_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_images(1)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])

    def finished_meanwhile(*arguments: object, **options: object) -> object:
        try:
            return prepare_image(*arguments, **options)  # type: ignore[arg-type]
        finally:
            file.write_bytes(whole)

    monkeypatch.setattr("sppfeat.images.decoder.prepare_image", finished_meanwhile)
    assert extract_folder(folder, tmp_path / "s.h5", TINY).failed == 1
    monkeypatch.undo()
    assert extract_folder(folder, tmp_path / "s.h5", TINY).described == 1


def test_paths_are_those_of_the_system(make_images: MakeImages, tmp_path: Path) -> None:
    """`link/..` is the folder above the one that the link leads to."""
    folder = make_images(1)
    (file,) = folder.iterdir()
    (tmp_path / "elsewhere").mkdir()
    (folder / "inside").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(folder / "inside")
    (done,) = Describer(TINY).describe([tmp_path / "elsewhere" / "link" / ".." / file.name])
    assert done.error is None


def test_threads_share_one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    load = TorchEngine.__init__

    def counted(self: TorchEngine, *arguments: object) -> None:
        made.append(self)
        load(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(TorchEngine, "__init__", counted)
    describer = Describer(TINY, RunOptions(engine="torch"))
    threads = [threading.Thread(target=describer.load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


@pytest.mark.parametrize("windows", [None, {"0000.png": np.array([[0.0, 0, 40, 40]])}], ids=["images", "windows"])
@pytest.mark.parametrize("shards", [None, ShardOptions(rows=4)], ids=["one file", "shards"])
def test_what_is_not_read_is_told(
    make_images: MakeImages,
    tmp_path: Path,
    shards: ShardOptions | None,
    windows: dict[str, np.ndarray] | None,
) -> None:
    folder, notes = make_images(2), list[str]()
    observer = Observer()
    observer.note = notes.append  # type: ignore[method-assign]
    for name in ("a.heic", "b.heic", "c.CR2"):
        (folder / name).write_bytes(b"x")
    done = extract_folder(folder, tmp_path / "f", TINY, windows=windows, shards=shards, observer=observer)
    assert done.images == (2 if windows is None else 1)
    assert notes == ["3 files left out, of kinds that are not read: 1 .cr2, 2 .heic; convert them to JPEG or PNG"]
    assert done.unread == {".cr2": 1, ".heic": 2}
