"""Learning a vocabulary: the sample, k-means, images that fail, and too few descriptors."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from textures import make_textures

from sppfeat import MissingExtraError, ModelError, Recipe, UsageError
from sppfeat.backbones import dense_sift, open_vocabulary
from sppfeat.images import Item
from sppfeat.progress import Observer
from sppfeat.vocabulary import VocabularyOptions, learn_vocabulary, sample_descriptors
from sppfeat.vocabulary.learning import READING
from sppfeat.vocabulary.sampling import choose_items

pytest.importorskip("cv2")
pytest.importorskip("faiss")

FEW = VocabularyOptions(words=5, images=8, descriptors=20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_textures(tmp_path / "images", 4)


class Noted(Observer):
    """What was told about images."""

    def __init__(self) -> None:
        self.todo = 0
        self.rows: list[tuple[str, str | None]] = []

    def started(self, *, todo: int, reused: int, gone: Sequence[str] = (), device: str = "") -> None:
        self.todo = todo

    def row(self, name: str, error: str | None) -> None:
        self.rows.append((name, error))


def test_a_vocabulary_is_learned_and_written(folder: Path, tmp_path: Path) -> None:
    observer = Noted()
    done = learn_vocabulary(folder, tmp_path / "v.h5", FEW, observer=observer)
    found = open_vocabulary(tmp_path / "v.h5")
    assert (found.words, found.images, found.descriptors, found.seed) == (5, 8, 160, 0)
    assert done.vocabulary.sha256 == found.sha256 and done.failed == {} and done.file == str(tmp_path / "v.h5")
    assert {"sppfeat", "opencv", "numpy"} <= set(found.versions) and any("faiss" in name for name in found.versions)
    assert observer.todo == len(observer.rows) == 8 and all(error is None for _, error in observer.rows)


def test_the_objective_is_the_mean_squared_distance_and_words_are_means(folder: Path, tmp_path: Path) -> None:
    items = [Item.at(path) for path in sorted(folder.rglob("*.png"))]
    options = VocabularyOptions(words=4, descriptors=30)
    learned = learn_vocabulary(folder, tmp_path / "v.h5", options).vocabulary
    rows = sample(items, most=30).astype(np.float64)
    distances = ((rows[:, None] - learned.centers.astype(np.float64)[None]) ** 2).sum(2)
    # FAISS reports the distances of its last assignment, before it moves the centers for the last time.
    assert distances.min(1).mean() == pytest.approx(learned.objective, rel=0.02)
    for word, center in enumerate(learned.centers):
        own = rows[distances.argmin(1) == word]
        assert len(own) and np.linalg.norm(own.mean(0) - center) < 0.1 * np.linalg.norm(center)


def sample(items: list[Item], *, most: int, seed: int = 0, workers: int = 2, recipe: Recipe = READING) -> np.ndarray:
    return sample_descriptors(
        items, recipe, most=most, seed=seed, workers=workers, minimum=16, observer=Observer()
    ).descriptors


def test_the_same_seed_gives_the_same_words(folder: Path, tmp_path: Path) -> None:
    def words(seed: int, workers: int) -> str:
        options = VocabularyOptions(words=5, images=8, descriptors=20, seed=seed)
        path = tmp_path / "v.h5"
        return learn_vocabulary(folder, path, options, workers=workers, overwrite=True).vocabulary.sha256

    assert words(0, 1) == words(0, 3) != words(1, 1)


def test_a_sample_is_of_different_patches_of_the_native_image(folder: Path) -> None:
    path = next(iter(sorted(folder.rglob("*.png"))))
    with Image.open(path) as image:
        every = dense_sift(np.asarray(image))
    whole = sample([Item.at(path)], most=10_000)
    assert whole.dtype == np.uint8
    np.testing.assert_array_equal(whole, every)
    some = sample([Item.at(path)], most=12)
    places = [np.flatnonzero((every == one).all(1)) for one in some]
    assert len(some) == 12 and all(len(each) for each in places)
    assert [int(each[0]) for each in places] == sorted(int(each[0]) for each in places)


def test_each_image_is_as_likely_to_be_chosen() -> None:
    items = [Item("/r", f"{number}.png") for number in range(10)]
    counts = Counter(item.name for seed in range(2000) for item in choose_items(items, 3, seed))
    # 600 each; the standard deviation is 20.
    assert set(counts) == {item.name for item in items} and all(abs(count - 600) < 100 for count in counts.values())
    assert choose_items(items, 3, 7) == choose_items(iter(items), 3, 7)
    assert choose_items(items, 20, 0) == items
    chosen = [int(item.name[:-4]) for item in choose_items(items, 5, 1)]
    assert chosen == sorted(chosen) and len(chosen) == 5


def test_images_that_fail_are_counted_and_do_not_stop_it(folder: Path, tmp_path: Path) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    Image.new("RGB", (15, 40)).save(folder / "small.png")
    Image.new("RGB", (2000, 16)).save(folder / "long.png")
    observer = Noted()
    done = learn_vocabulary(folder, tmp_path / "v.h5", VocabularyOptions(words=5, descriptors=20), observer=observer)
    assert sorted(done.failed) == ["broken.png", "long.png", "small.png"] and done.vocabulary.images == 12
    assert "at least 16 per side" in done.failed["small.png"] and "aspect ratio" in done.failed["long.png"]
    assert {name: error for name, error in observer.rows if error is not None} == done.failed


def test_what_is_listed_and_is_no_image_fails(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{folder}/train/down/00.png\n{folder}/train/down/none.png\n")
    done = learn_vocabulary(tmp_path / "list.txt", tmp_path / "v.h5", FEW)
    assert list(done.failed) == ["none.png"] and done.vocabulary.images == 1


def test_running_out_of_memory_fails_one_image(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[type[Exception]] = [MemoryError, RuntimeError]

    def fail(*arguments: Any) -> np.ndarray:
        if failures:
            raise failures.pop()("OpenCV: no")
        return dense_sift(*arguments)

    monkeypatch.setattr("sppfeat.vocabulary.sampling.dense_sift", fail)
    done = learn_vocabulary(folder, tmp_path / "v.h5", FEW, workers=1)
    assert sorted(done.failed.values()) == ["OpenCV: no", "cannot be described: out of memory"]


@pytest.mark.parametrize("kind", ["few", "flat"])
def test_fewer_different_descriptors_than_words(kind: str, tmp_path: Path) -> None:
    size = (24, 16) if kind == "few" else (200, 200)
    (tmp_path / "images").mkdir()
    Image.new("RGB", size, (90, 90, 90)).save(tmp_path / "images" / "a.png")
    message = "expected at least 5 different SIFT descriptors for as many words, found 1 in 1 of 1 images: use more"
    with pytest.raises(UsageError, match=message) as error:
        learn_vocabulary(tmp_path / "images", tmp_path / "v.h5", FEW)
    assert "\n" not in str(error.value) and not (tmp_path / "v.h5").exists()


def test_as_many_descriptors_as_words_are_enough(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    image = next(iter(sorted(folder.rglob("*.png"))))
    options = VocabularyOptions(words=10, images=1, descriptors=10)
    found = learn_vocabulary(image, tmp_path / "v.h5", options).vocabulary
    assert found.objective == pytest.approx(0, abs=1) and np.isfinite(found.centers).all()
    # FAISS would print that there are few.
    assert capfd.readouterr() == ("", "")


def test_outputs_and_sources_are_checked_first(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "v.h5").write_bytes(b"a photograph")
    with pytest.raises(ModelError, match="v.h5: "):
        learn_vocabulary(folder, tmp_path / "v.h5", FEW, overwrite=True)
    with pytest.raises(ModelError, match="does not exist"):
        learn_vocabulary(folder, tmp_path / "none" / "v.h5", FEW)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty: expected images, found none"):
        learn_vocabulary(tmp_path / "empty", tmp_path / "w.h5", FEW)
    with pytest.raises(UsageError, match="num_workers"):
        learn_vocabulary(folder, tmp_path / "w.h5", FEW, workers=0)


@pytest.mark.parametrize(
    ("module", "extra", "purpose"),
    [("cv2", "detect", "backbone sift-bow"), ("faiss", "cpu", "learning a vocabulary")],
)
def test_missing_extras_are_told(
    module: str, extra: str, purpose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    message = f"{purpose} needs {module}, which is not installed: pip install 'sppfeat\\[{extra}\\]'"
    with pytest.raises(MissingExtraError, match=message):
        learn_vocabulary(tmp_path / "none", tmp_path / "v.h5", FEW)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": 1}, "words must be a whole number from 2 to 65536, found 1"),
        ({"words": 2.5}, "words must be"),
        ({"images": 0}, "images must be a whole number from 1"),
        ({"descriptors": 0}, "descriptors must be"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": True}, "seed must be"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        VocabularyOptions(**options)
