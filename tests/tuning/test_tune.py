"""Tuning a small network on textures: better than before, resumed after anything, used by other commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sppfeat.backbones.backbone import load_backbone, load_trunk, read_weights
from sppfeat.errors import BackboneError, SppFeatError, UsageError
from sppfeat.extraction import extract_folder
from sppfeat.progress import Observer
from sppfeat.recipe import Recipe
from sppfeat.store import open_store
from sppfeat.transfer import Labels, read_labels
from sppfeat.tuning import TuningOptions
from sppfeat.tuning import tune as tuning
from sppfeat.tuning.tune import tune

TINY = Recipe(backbone="timm:test_resnet", weights="random", layer="layer3", levels=(2, 1), size_multiple=16)
FAST = TuningOptions(epochs=3, batch_size=8, scales=(48, 64), learning_rate=3e-3, device="cpu", held_out=0.2)


@pytest.fixture
def textures(tmp_path: Path) -> Path:
    """Three classes of noise that differ in grain, of different sizes."""
    folder = tmp_path / "textures"
    for label, grain in (("coarse", 8), ("middle", 4), ("fine", 1)):
        (folder / label).mkdir(parents=True)
        for number in range(10):
            random = np.random.default_rng([grain, number])
            height, width = 48 + 16 * (number % 2), 64
            cells = random.integers(0, 256, (height // grain, width // grain, 3), np.uint8)
            Image.fromarray(cells.repeat(grain, 0).repeat(grain, 1)).save(folder / label / f"{number}.png")
    return folder


def test_a_tuned_network_is_used_like_any_weights(textures: Path, tmp_path: Path) -> None:
    output = tmp_path / "tuned.safetensors"
    done = tune(textures, output, TINY, replace(FAST, scales=(64,), learning_rate=1e-3, held_out=0.0))
    assert done.file == str(output) and done.classes == ["coarse", "fine", "middle"]
    assert (done.images, done.held_out, done.failed, done.diverged) == (30, 0, {}, None)
    assert [one.number for one in done.history] == [0, 1, 2, 3] and done.history[0].loss is None
    losses = [one.loss for one in done.history[1:]]
    assert losses[-1] is not None and losses[0] is not None and losses[-1] < losses[0]
    tuned = replace(TINY, weights=str(output))
    extract_folder(textures, tmp_path / "f.h5", tuned)
    store = open_store(tmp_path / "f.h5")
    assert store.weights_sha256 == done.weights_sha256 != load_backbone(TINY).descriptions[0].weights_sha256
    assert not (tmp_path / "tuned.safetensors.checkpoint").exists()
    with pytest.raises(BackboneError, match="not the weights of this network"):
        load_backbone(replace(tuned, backbone="timm:test_efficientnet", layer=None))


def test_what_comes_before_the_first_tuned_layer_stays(textures: Path, tmp_path: Path) -> None:
    output = tmp_path / "tuned.safetensors"
    tune(textures, output, TINY, replace(FAST, from_layer="layer3", held_out=0.0))
    before, after = load_trunk(TINY).weights(), read_weights(str(output))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("layer3.") for name in changed)
    # Batch norms keep the statistics that they were trained with.
    assert not any("running" in name for name in changed)


def test_the_gradient_of_a_batch_is_the_sum_of_its_images(textures: Path) -> None:
    """Images of different shapes are batched without padding, and batch norms do not tie them together."""
    from torch import nn
    from torch.nn import functional as F  # noqa: N812

    from sppfeat.images import find_images, prepare_image
    from sppfeat.tuning.classes import ClassLearner, Examples, descriptors

    items = find_images([textures]).items
    labels = np.array([("coarse", "fine", "middle").index(item.name.split("/")[0]) for item in items])
    trunk = load_trunk(TINY)
    torch.manual_seed(0)
    head = nn.Linear(5 * 192, 3)
    examples = Examples(items, labels)
    none = Examples([], np.zeros(0, int))
    learner = ClassLearner(trunk, head, examples, none, FAST, torch.device("cpu"), lambda *a: None, lambda n: None)
    batch = next(learner.batches(1, 0))
    assert len(batch) == 8 and len({each.pixels.shape for each in batch}) > 1
    loss, count = learner.backward(batch)
    found = {name: p.grad.clone() for name, p in learner.module.named_parameters() if p.grad is not None}
    learner.module.zero_grad()
    total = 0.0
    for each in batch:
        scores = head(descriptors(learner.network(torch.from_numpy(each.pixels.copy())[None]), trunk.recipe))
        one = F.cross_entropy(scores, torch.tensor([each.label]))
        (one / len(batch)).backward()  # type: ignore[no-untyped-call]
        total += float(one.detach())
    assert count == 8 and loss == pytest.approx(total, rel=1e-5)
    for name, parameter in learner.module.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)
    # What the network sees is the image at the scale of the epoch, mirrored or not.
    recipe = replace(trunk.recipe, scales=(48,))
    known = [prepare_image(item, recipe).inputs[0] for item in items]
    for each in batch:
        assert any(np.array_equal(each.pixels, one) or np.array_equal(each.pixels, one[:, ::-1]) for one in known)
    second = next(learner.batches(2, 0))
    assert {min(each.pixels.shape[:2]) for each in second} == {64}


def test_descriptors_are_those_of_an_extraction(textures: Path, tmp_path: Path) -> None:
    from sppfeat.images import find_images, prepare_image
    from sppfeat.training.trunks import TunedTrunk
    from sppfeat.tuning.classes import descriptors

    recipe = replace(TINY, scales=(64,), dtype="float32", normalize="signed-sqrt-l2")
    extract_folder(textures, tmp_path / "f.h5", recipe)
    store, trunk = open_store(tmp_path / "f.h5"), load_trunk(recipe)
    network = TunedTrunk(trunk)
    for item, expected in list(zip(find_images([textures]).items, store.descriptors, strict=True))[::7]:
        with torch.no_grad():
            maps = network(torch.from_numpy(prepare_image(item, trunk.recipe).inputs[0].copy())[None])
            row = descriptors(maps, trunk.recipe)[0]
        np.testing.assert_allclose(row.numpy(), expected, rtol=2e-3, atol=2e-3)


SCRIPT = """
import sys
from sppfeat_cli import main
sys.argv = ["sppfeat", *sys.argv[1:]]
main()
"""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", SCRIPT, *map(str, arguments)]


ARGUMENTS: tuple[object, ...] = (
    *("--backbone", TINY.backbone, "--weights", "random", "--layer", "layer3", "--levels", "2,1", "--scales", "48,64"),
    *("--epochs", 3, "--batch-size", 4, "--learning-rate", 3e-3, "--device", "cpu", "--held-out", 0.2),
)


def test_a_killed_run_ends_in_the_same_weights(textures: Path, tmp_path: Path) -> None:
    """`kill -9` again and again, with a checkpoint after every step."""
    run = ("tune", textures, *ARGUMENTS, "--checkpoint-minutes", 1e-9, "--quiet")
    done = subprocess.run(command(*run, "-o", tmp_path / "whole.safetensors"), check=True, capture_output=True)
    assert done.stdout == done.stderr == b"", "--quiet"
    output = tmp_path / "parts.safetensors"
    checkpoint = tmp_path / "parts.safetensors.checkpoint"
    kills = 0
    for _ in range(12):
        process = subprocess.Popen(command(*run, "-o", output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before, deadline = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0, time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns != before and kills < 2:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        if process.wait() == 0:
            break
    assert kills == 2 and output.exists() and not checkpoint.exists()
    whole, parts = (read_weights(str(tmp_path / f"{name}.safetensors")) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_an_interrupted_run_resumes(textures: Path, tmp_path: Path) -> None:
    output = tmp_path / "t.safetensors"
    run = command("tune", textures, *ARGUMENTS, "-o", output)
    process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch 1 of 3"):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=60)
    if process.returncode == 130:  # else it was done before the signal came
        assert "interrupted in epoch 2; the same command resumes" in errors and not output.exists()
        done = subprocess.run([*run, "--json"], capture_output=True, text=True)
        assert done.returncode == 0 and "resumed in epoch" in done.stderr
        assert [one["epoch"] for one in json.loads(done.stdout)["history"]] == [0, 1, 2, 3]


def test_the_command_line_tunes_and_writes_a_page(textures: Path, tmp_path: Path) -> None:
    output, page = tmp_path / "t.safetensors", tmp_path / "t.html"
    (textures / "fine" / "broken.png").write_bytes(b"no image")
    run = command("tune", textures, "-o", output, *ARGUMENTS, "--report", page)
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 3 and "3 classes" in done.stdout and "of held-out images right before" in done.stdout
    assert "fine/broken.png: " in done.stderr and "left out" in done.stderr
    assert done.stderr.count("broken.png") == 1, "not in every epoch"
    text = page.read_text()
    assert "Held-out images right" in text and "(kept)" in text and "at scales 48, 64, one per epoch" in text
    again = subprocess.run(run, capture_output=True, text=True)
    assert again.returncode == 1 and "already exists; choose another output, or use --overwrite" in again.stderr
    assert "Traceback" not in done.stderr + again.stderr


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ({}, {"from_layer": "layer9"}, "backbone timm:test_resnet: unknown layer 'layer9'"),
        (
            {"layer": "maxpool"},
            {"from_layer": "maxpool"},
            "expected a layer with parameters at or after maxpool, found none",
        ),
        (
            {"backbone": "timm:test_resnet+timm:test_vit", "layer": None},
            {},
            "backbone: expected one network to tune, found",
        ),
        ({"weights": "nope.safetensors"}, {}, "nope.safetensors: expected a weights file"),
        ({"crop": "center"}, {}, "crop: expected none for tuning"),
        ({}, {"scales": (8,)}, "scales must be different short sides"),
    ],
)
def test_bad_recipes_and_options(
    textures: Path, tmp_path: Path, recipe: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SppFeatError, match=message):
        tune(textures, tmp_path / "t.safetensors", replace(TINY, **recipe), replace(FAST, **options))
    assert not list(tmp_path.glob("t.*"))


def test_bad_outputs(textures: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a name that ends with .safetensors"):
        tune(textures, tmp_path / "t.pth", TINY, FAST)
    photo = tmp_path / "photo.safetensors"
    Image.new("RGB", (8, 8)).save(photo, "png")
    with pytest.raises(SppFeatError, match="expected a file of weights or a new file, found another file"):
        tune(textures, photo, TINY, FAST, overwrite=True)


def test_classes_and_labels_that_do_not_suit(textures: Path, tmp_path: Path, make_images: Callable[..., Path]) -> None:
    output = tmp_path / "t.safetensors"
    with pytest.raises(UsageError, match="expected images of at least two classes, found 1: coarse"):
        tune([textures / "coarse"], output, TINY, FAST, labels=Labels({f"{n}.png": "coarse" for n in range(10)}, {}))
    with pytest.raises(UsageError, match="found none among 30 .an image is named 'coarse/0.png', a label is for 'x"):
        tune(textures, output, TINY, FAST, labels=Labels({"x.png": "coarse"}, {}))
    with pytest.raises(UsageError, match="expected images with a class, found none among 3"):
        tune(make_images(3), output, TINY, FAST)


class Notes:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **named: self.texts.append(str(arguments[0] if arguments else named))


def test_a_class_of_one_image_is_trained_on_and_not_held_out(textures: Path, tmp_path: Path) -> None:
    for number in range(1, 10):
        (textures / "fine" / f"{number}.png").unlink()
    notes: Any = Notes()
    done = tune(textures, tmp_path / "t.safetensors", TINY, replace(FAST, epochs=1), observer=notes)
    assert (done.images, done.held_out) == (17, 4)
    assert "1 classes of fewer than 3 images are not held out: fine" in notes.texts


def test_parts_for_testing_are_left_out(textures: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    rows = [f"{c}/{n}.png,{c},{'test' if n > 6 else 'train'}" for c in ("coarse", "fine", "middle") for n in range(10)]
    table.write_text("\n".join(["name,label,split", *rows]))
    notes: Any = Notes()
    options = replace(FAST, epochs=1, held_out=0.0)
    done = tune(textures, tmp_path / "t.safetensors", TINY, options, labels=read_labels(table), observer=notes)
    assert (done.images, done.held_out, done.best) == (21, 0, 1)
    assert "9 of 30 images have no class, or are of a part for testing: left out" in notes.texts


def test_a_loss_that_is_not_finite_is_told(textures: Path, tmp_path: Path) -> None:
    """With a rate that blows the network up, the best weights before are kept."""
    options = replace(FAST, learning_rate=1e30, optimizer="sgd", clip=1e30, held_out=0.2)
    done = tune(textures, tmp_path / "t.safetensors", TINY, options)
    assert done.diverged is not None and "not finite in epoch 1" in done.diverged and done.best == 0
    before, after = load_trunk(TINY).weights(), read_weights(str(tmp_path / "t.safetensors"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_checkpoints_of_other_options_are_refused(textures: Path, tmp_path: Path) -> None:
    output = tmp_path / "t.safetensors"
    stopped = iter([False] * 4 + [True] * 100)
    assert tune(textures, output, TINY, FAST, stop=lambda: next(stopped)).file is None
    with pytest.raises(SppFeatError, match="t.safetensors.checkpoint: a checkpoint of a run with other images or"):
        tune(textures, output, TINY, replace(FAST, learning_rate=1e-3))
    assert tune(textures, output, TINY, replace(FAST, checkpoint_minutes=2.0)).file is not None
    assert os.listdir(tmp_path).count("t.safetensors") == 1


def test_transformers_are_tuned_too(textures: Path, tmp_path: Path) -> None:
    recipe = Recipe(backbone="timm:test_vit", weights="random", layer="blocks.1", levels=(2, 1))
    output = tmp_path / "v.safetensors"
    tune(textures, output, recipe, replace(FAST, epochs=1, held_out=0.0, from_layer="blocks.1"))
    before, after = load_trunk(recipe).weights(), read_weights(str(output))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("blocks.1.") for name in changed)


def test_a_run_on_changed_images_is_not_resumed(textures: Path, tmp_path: Path) -> None:
    stopped = iter([False] * 4 + [True] * 100)
    assert tune(textures, tmp_path / "t.safetensors", TINY, FAST, stop=lambda: next(stopped)).file is None
    Image.new("RGB", (64, 64)).save(textures / "fine" / "1.png")
    with pytest.raises(SppFeatError, match="a checkpoint of a run with other images or options"):
        tune(textures, tmp_path / "t.safetensors", TINY, FAST)


def test_a_head_that_starts_from_a_sample_says_so(
    textures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    class Heard(Observer):
        def say(self, text: str) -> None:
            said.append(text)

    for least, counted in ((2 << 30, "24 images"), (0, "6 of 24 images")):
        monkeypatch.setattr(tuning, "_HEAD_BYTES", least)
        tune(textures, tmp_path / f"{least}.safetensors", TINY, replace(FAST, epochs=1), observer=Heard())
        assert f"describing {counted} with the untuned network, for the head to start from" in said


def test_images_that_cannot_be_read_at_all(textures: Path, tmp_path: Path) -> None:
    for path in textures.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UsageError, match="expected images that can be read, found none of 24"):
        tune(textures, tmp_path / "t.safetensors", TINY, FAST)


def test_a_failing_network_leaves_a_checkpoint(textures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sppfeat.tuning.classes import ClassLearner

    backward, calls = ClassLearner.backward, 0

    def fails(self: ClassLearner, batch: Any) -> tuple[float, int]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore text")
        return backward(self, batch)

    monkeypatch.setattr(ClassLearner, "backward", fails)
    with pytest.raises(SppFeatError, match="epoch 1, step 3: the network failed on its images .CUDA out of memory"):
        tune(textures, tmp_path / "t.safetensors", TINY, FAST)
    assert (tmp_path / "t.safetensors.checkpoint").exists()
    assert tune(textures, tmp_path / "t.safetensors", TINY, FAST).file is not None


def test_networks_that_keep_their_biases_in_evaluation_are_tuned() -> None:
    """Whatever an evaluation without gradients has left."""
    from sppfeat.training.trunks import TunedTrunk

    trunk = load_trunk(Recipe(backbone="timm:efficientvit_m0", weights="random"))
    network = TunedTrunk(trunk)
    images = torch.randint(0, 256, (1, 224, 224, 3), dtype=torch.uint8)
    for _ in range(2):
        with torch.no_grad():
            network(images)
        network.zero_grad()
        network(images)[0].square().mean().backward()  # type: ignore[no-untyped-call]
        biases = [p for name, p in trunk.network.named_parameters() if name.endswith("attention_biases")]
        assert biases and all(p.grad is not None for p in biases)
