"""The training loop on a small problem: resumed runs, the best epoch, divergence, disks that are full."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sppfeat.errors import ModelError, UsageError
from sppfeat.progress import Observer
from sppfeat.training import LearningOptions
from sppfeat.training.checkpoint import read_checkpoint
from sppfeat.training.learning import Learned, learn

STEPS = 5


class Line:
    """Fits a line; held-out values are given, so that any epoch can be the best one."""

    def __init__(self, held_out: Sequence[float | None] = (), broken_at: int | None = None) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = nn.Linear(3, 1)
        self.groups: Sequence[dict[str, Any]] = [{"params": list(self.module.parameters()), "lr": 0.05}]
        self.backwards = 0
        self.seen: list[tuple[int, int]] = []
        self._held_out, self._broken_at = list(held_out), broken_at
        self._epoch = 0

    def steps(self) -> int:
        return STEPS

    def batches(self, epoch: int, first: int) -> Iterator[tuple[int, int]]:
        for step in range(first, STEPS):
            self._epoch = epoch
            self.seen.append((epoch, step))
            yield epoch, step

    def backward(self, batch: tuple[int, int]) -> tuple[float, int]:
        self.backwards += 1
        rows = torch.from_numpy(np.random.default_rng(batch).normal(size=(4, 3)).astype(np.float32))
        loss = ((self.module(rows) - rows.sum(1, keepdim=True)) ** 2).sum()
        loss.backward()
        return float("nan") if self.backwards == self._broken_at else float(loss.detach()), 4

    def held_out(self) -> float | None:
        return self._held_out[self._epoch] if self._held_out else None


class Notes(Observer):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)

    say = note


def weights(line: Line) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in line.module.state_dict().items()}


def run(
    line: Line, path: Path, stop_after: int | None = None, observer: Observer | None = None, **options: Any
) -> Learned:
    chosen = LearningOptions(**{"epochs": 4, **options})
    return learn(
        line,
        chosen,
        path,
        "key",
        observer=observer,
        stop=lambda: stop_after is not None and line.backwards >= stop_after,
    )


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("stops", [(1,), (5,), (7, 6), (19,), (3, 3, 3, 3)])
def test_a_resumed_run_ends_in_the_same_weights(tmp_path: Path, optimizer: str, stops: tuple[int, ...]) -> None:
    whole = Line()
    expected = run(whole, tmp_path / "whole", optimizer=optimizer)
    assert not (tmp_path / "whole").exists(), "nothing was stopped, and five minutes did not pass"
    seen = []
    for stop in stops:
        part = Line()
        assert not run(part, tmp_path / "c", stop, optimizer=optimizer).finished
        seen += part.seen[: part.backwards]
    last = Line()
    found = run(last, tmp_path / "c", optimizer=optimizer)
    assert seen + last.seen == whole.seen, "no batch twice, none left out"
    assert all(torch.equal(a, b) for a, b in zip(weights(last).values(), weights(whole).values(), strict=True))
    assert [(one.number, one.loss) for one in found.history] == [(one.number, one.loss) for one in expected.history]


def test_the_best_epoch_is_kept(tmp_path: Path) -> None:
    tried = (
        ((50, 60, 70, 65, 70), 4),
        ((50, 60, 40, 30, 20), 1),
        ((90, 60, 40, 30, 20), 0),
        ((60, 60, 40, 60, 60), 0),  # the untuned network stays, if none is better
    )
    for held_out, best in tried:
        line = Line(held_out)
        start = weights(line)
        done = run(line, tmp_path / "c")
        assert done.best == best and [one.held_out for one in done.history] == list(held_out)
        after = [Line(held_out[: best + 1]) for _ in range(1)][0]
        if best == 0:
            assert all(torch.equal(a, b) for a, b in zip(weights(line).values(), start.values(), strict=True))
        elif best == 4:
            run(after, tmp_path / "d")
            assert all(torch.equal(a, b) for a, b in zip(weights(line).values(), weights(after).values(), strict=True))


def test_without_held_out_images_the_last_epoch_is_kept(tmp_path: Path) -> None:
    assert run(Line(), tmp_path / "c").best == 4


def test_a_run_that_diverges_says_so_and_keeps_the_best_state(tmp_path: Path) -> None:
    line = Line(held_out=(50, 60, 70, 80, 90), broken_at=2 * STEPS + 3)
    done = run(line, tmp_path / "c")
    assert done.diverged == "the loss is not finite in epoch 3, step 3"
    assert (done.best, done.finished) == (2, True) and all(bool(v.isfinite().all()) for v in weights(line).values())


def test_a_gradient_that_is_not_finite_is_divergence(tmp_path: Path) -> None:
    class Broken(Line):
        def backward(self, batch: tuple[int, int]) -> tuple[float, int]:
            found = super().backward(batch)
            if batch == (2, 1):
                for parameter in self.module.parameters():
                    assert parameter.grad is not None
                    parameter.grad.fill_(float("inf"))
            return found

    assert run(Broken(), tmp_path / "c").diverged == "the gradient is not finite in epoch 2, step 2"


def test_a_full_disk_does_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise ModelError("c: cannot be written: the disk is full")

    monkeypatch.setattr("sppfeat.training.learning.save_checkpoint", full)
    notes = Notes()
    done = run(Line(), tmp_path / "c", observer=notes, checkpoint_minutes=1e-9)
    assert done.finished and done.history[-1].number == 4
    assert "c: cannot be written: the disk is full; training continues without this checkpoint" in notes.texts


def test_checkpoints_are_written_every_few_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=61)
    monkeypatch.setattr("sppfeat.training.learning.time.monotonic", lambda: next(clock))
    written: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "sppfeat.training.learning.save_checkpoint", lambda path, at, *rest: written.append((at.epoch, at.step))
    )
    run(Line(), tmp_path / "c", epochs=1, checkpoint_minutes=1.0)
    assert written == [(1, 1), (1, 2), (1, 3), (1, 4), (1, 5)]


def test_checkpoints_of_other_runs_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    run(Line(), path, 3)
    progress, _ = read_checkpoint(path)
    assert (progress.epoch, progress.step, progress.key) == (1, 3, "key")
    with pytest.raises(ModelError, match="c: a checkpoint of a run with other images or options"):
        learn(Line(), LearningOptions(), path, "other")
    content = path.read_bytes()
    for damage in (content[: len(content) // 2], b"", b"nothing of the kind", content[:8] + b"x" * 20):
        path.write_bytes(damage)
        with pytest.raises(ModelError, match="c: expected a checkpoint, found"):
            run(Line(), path)
    path.write_bytes(content)
    other = Line()
    other.module = nn.Linear(4, 1)
    other.groups = [{"params": list(other.module.parameters()), "lr": 0.05}]
    with pytest.raises(ModelError, match="c: not a checkpoint of this network: weight differs"):
        run(other, path)


def test_the_rate_rises_and_falls() -> None:
    cosine, steps = LearningOptions(), LearningOptions(schedule="steps")
    assert cosine.rate(0) == 0 and cosine.rate(0.025) == pytest.approx(0.5) and cosine.rate(0.05) == pytest.approx(1)
    assert cosine.rate(0.525) == pytest.approx(0.5) and cosine.rate(1) == pytest.approx(0)
    assert (steps.rate(0.7), steps.rate(0.76)) == (1, 0.1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", -1),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("clip", -1.0),
        ("weight_decay", -0.1),
        ("held_out", 0.6),
        ("optimizer", "adam"),
        ("schedule", "linear"),
        ("precision", "int8"),
        ("seed", -1),
        ("checkpoint_minutes", 0.0),
    ],
)
def test_bad_options_are_named(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=field):
        LearningOptions(**{field: value})
