"""The training loop: steps of gradient descent, checkpoints, and the best state by held-out images."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from sppfeat.errors import ModelError, one_line
from sppfeat.progress import Observer
from sppfeat.training.checkpoint import Progress, read_checkpoint, restore, save_checkpoint
from sppfeat.training.epoch import Epoch
from sppfeat.training.options import LearningOptions


class Learner(Protocol):
    """What is learned: a network, its batches, and their losses. All of it depends on the seed alone.

    module: all that is tuned. groups: parameters, each with its `lr` at its highest.
    """

    module: nn.Module
    groups: Sequence[dict[str, Any]]

    def steps(self) -> int:
        """Steps in an epoch."""

    def batches(self, epoch: int, first: int) -> Iterator[Any]:
        """The batches of an epoch from step `first` on."""

    def backward(self, batch: Any) -> tuple[float, int]:
        """Add up the gradients of a batch; returns the sum of its losses and the number of its images."""

    def held_out(self) -> float | None:
        """How good the network is on held-out images, in percent; None without any."""


@dataclass(frozen=True)
class Learned:
    """history: by epoch, 0 first. best: number of the epoch whose weights the module has now. diverged: why the run
    ended early, else None. finished: False if it was stopped."""

    history: list[Epoch]
    best: int
    diverged: str | None
    finished: bool


def learn(
    learner: Learner,
    options: LearningOptions,
    checkpoint: Path,
    key: str,
    *,
    measure: str = "of held-out images right",
    observer: Observer | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Learned:
    """Tune until the last epoch, and leave the module with the best weights.

    measure: what `Learner.held_out` tells, for messages.
    checkpoint: a file that holds the state of the run every few minutes, and when it is stopped; a run with the same
    key resumes from it, and ends in the same weights on the same machine. A checkpoint that cannot be written is
    noted, and the run continues. Raises ModelError for a checkpoint of another run, and for a network that fails.
    """
    return _Run(learner, options, checkpoint, key, measure, observer or Observer(), stop).run()


class _Run:
    def __init__(
        self,
        learner: Learner,
        options: LearningOptions,
        checkpoint: Path,
        key: str,
        measure: str,
        observer: Observer,
        stop: Callable[[], bool],
    ) -> None:
        self._learner, self._options, self._checkpoint = learner, options, checkpoint
        self._measure, self._observer, self._stop = measure, observer, stop
        groups = [dict(group) for group in learner.groups]
        self._highest = [float(group["lr"]) for group in groups]
        if options.optimizer == "adamw":
            self._optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
        else:
            self._optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=options.weight_decay)
        self._parameters = [p for group in groups for p in group["params"]]
        self._weights = learner.module.state_dict()  # references: they follow the training
        self._progress = Progress(key=key)
        self._best: dict[str, torch.Tensor] = {}
        self._saved = time.monotonic()

    def run(self) -> Learned:
        progress = self._progress
        if self._checkpoint.exists():
            progress = self._resume()
        else:
            self._finish_epoch(Epoch(0, None, self._learner.held_out(), 0.0))
        steps = self._learner.steps()
        diverged, stopped = None, self._stop()
        while progress.epoch <= self._options.epochs and not stopped and diverged is None:
            diverged, stopped = self._epoch(steps)
        if stopped:
            self._save()
        self._put_back_best()
        return Learned(progress.history, progress.best, diverged, not stopped)

    def _resume(self) -> Progress:
        progress, tensors = read_checkpoint(self._checkpoint)
        if progress.key != self._progress.key:
            raise ModelError(
                f"{self._checkpoint}: a checkpoint of a run with other images or options; give the same ones to resume "
                "it, or use --overwrite"
            )
        self._best = restore(tensors, self._weights, self._optimizer, self._checkpoint)
        self._progress = progress
        self._observer.say(f"resumed in epoch {progress.epoch} of {self._options.epochs}")
        return progress

    def _epoch(self, steps: int) -> tuple[str | None, bool]:
        """Why the run diverged, and whether it was stopped."""
        progress, learner = self._progress, self._learner
        for batch in learner.batches(progress.epoch, progress.step):
            began = time.perf_counter()
            done = (progress.epoch - 1 + progress.step / steps) / self._options.epochs
            for group, highest in zip(self._optimizer.param_groups, self._highest, strict=True):
                group["lr"] = highest * self._options.rate(done)
            self._optimizer.zero_grad(set_to_none=True)
            try:
                loss, count = learner.backward(batch)
            except (RuntimeError, MemoryError, AssertionError) as error:
                self._save()
                raise ModelError(
                    f"epoch {progress.epoch}, step {progress.step + 1}: the network failed on its images "
                    f"({one_line(error)})"
                ) from None
            length = float(nn.utils.clip_grad_norm_(self._parameters, self._options.clip))
            if not (math.isfinite(loss) and math.isfinite(length)):
                what = "loss" if not math.isfinite(loss) else "gradient"
                return f"the {what} is not finite in epoch {progress.epoch}, step {progress.step + 1}", False
            self._optimizer.step()
            progress.step += 1
            progress.loss, progress.count = progress.loss + loss, progress.count + count
            progress.seconds += time.perf_counter() - began
            if self._stop():
                return None, True
            if time.monotonic() - self._saved >= 60 * self._options.checkpoint_minutes:
                self._save()
        mean = progress.loss / max(progress.count, 1)
        self._finish_epoch(Epoch(progress.epoch, mean, learner.held_out(), progress.seconds))
        progress.epoch, progress.step = progress.epoch + 1, 0
        progress.loss, progress.count, progress.seconds = 0.0, 0, 0.0
        return None, False

    def _finish_epoch(self, epoch: Epoch) -> None:
        history = self._progress.history
        history.append(epoch)
        before = None if not self._best else history[self._progress.best].held_out
        if self._is_best(epoch, before):
            self._progress.best = epoch.number
            self._best = {name: value.detach().clone() for name, value in self._weights.items()}
        shown = "" if epoch.held_out is None else f", {epoch.held_out:.2f} % {self._measure}"
        loss = "before tuning" if epoch.loss is None else f"loss {epoch.loss:.4f}"
        self._observer.say(f"epoch {epoch.number} of {self._options.epochs}: {loss}{shown}")

    def _is_best(self, epoch: Epoch, before: float | None) -> bool:
        """Whether an epoch is the best so far; before: what held-out images say of the best before it."""
        if epoch.held_out is None or before is None:
            return True  # without held-out images, the last one is kept
        # Of equally good epochs the later one has seen more; the untuned network is left for a better one alone.
        return epoch.held_out > before or (epoch.held_out == before and self._progress.best > 0)

    def _save(self) -> None:
        self._saved = time.monotonic()
        try:
            save_checkpoint(self._checkpoint, self._progress, self._weights, self._best, self._optimizer)
        except ModelError as error:
            self._observer.note(f"{error}; training continues without this checkpoint")

    def _put_back_best(self) -> None:
        with torch.no_grad():
            for name, value in self._weights.items():
                value.copy_(self._best[name])
