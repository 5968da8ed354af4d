"""Filling the rows of a store: by this process, or by one process a card, each its own part of the rows.

A process of its own is started with `python -m sppfeat.extraction.workers DESCRIPTOR`. It is told what to do by one
line of JSON on standard input, and answers with lines of JSON on that descriptor, since libraries may print on standard
output: `[place, error]` for each row that is on its way to the disk, and at last an object with its times, or with the
error that ended it. The line `stop` makes it finish the rows in flight; the end of its
input, which is how it learns that the process that started it is gone, ends it at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, Final

import numpy as np

from sppfeat import errors
from sppfeat.errors import BackboneError, SppFeatError, one_line
from sppfeat.extraction.pipeline import Described, Describer
from sppfeat.images import name_to_path
from sppfeat.machine import available_cores
from sppfeat.recipe import Recipe, RunOptions
from sppfeat.store import Store, StoreWriter, open_store, split_row_name

# A killed run loses at most this much work; a flush waits for the disk.
FLUSH_SECONDS: Final = 0.25

Outcome = tuple[str, str | None]  # a row's name, and why it failed


@dataclasses.dataclass
class Work:
    """Seconds of each stage, the first two summed over their threads, of which there are `workers` and `streams`."""

    decode: float = 0.0
    forward: float = 0.0
    write: float = 0.0
    workers: int = 0
    streams: int = 0

    def add(self, other: Work) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def fill_rows(
    writer: StoreWriter,
    describer: Describer,
    root: str,
    rows: dict[str, int],
    names: list[str],
    windowed: bool,
    stop: Callable[[], bool],
    work: Work,
) -> Generator[Outcome, None, None]:
    """Describe the images (or windows) of these names, and write each into its row; `work` is what it took."""
    before = dataclasses.replace(describer.times)
    last_flush = time.perf_counter()
    try:
        for name, done in _described(describer, root, names, windowed, stop):
            start = time.perf_counter()
            if done.descriptor is None:
                writer.fail(rows[name], done.error or "", done.fingerprint)
            else:
                writer.write(rows[name], done.descriptor, done.image_size, done.fingerprint)
            if start - last_flush > FLUSH_SECONDS:
                writer.flush()
                last_flush = time.perf_counter()
            work.write += time.perf_counter() - start
            yield name, done.error
        start = time.perf_counter()
        writer.flush()
        work.write += time.perf_counter() - start
    finally:
        times = describer.times
        work.add(
            Work(
                times.decode - before.decode,
                times.forward - before.forward,
                workers=describer.workers,
                streams=describer.streams,
            )
        )


def _described(
    describer: Describer, root: str, names: list[str], windowed: bool, stop: Callable[[], bool]
) -> Iterator[tuple[str, Described]]:
    """What became of each row, with its name; all windows of an image come together."""
    if not windowed:
        for done in describer.describe((name_to_path(root, name) for name in names), stop=stop):
            yield names[done.position], done
        return
    rows_of: dict[str, list[str]] = {}
    for name in names:
        rows_of.setdefault(split_row_name(name)[0], []).append(name)
    pictures = list(rows_of)
    tasks = (
        (name_to_path(root, picture), np.array([split_row_name(row)[1] for row in rows_of[picture]], np.float64))
        for picture in pictures
    )
    for found in describer.describe_windows(tasks, stop=stop):
        for at, name in enumerate(rows_of[pictures[found.position]]):
            error = found.error or found.window_errors.get(at)
            descriptor = None if error is not None or found.descriptors is None else found.descriptors[at]
            yield name, Described(found.position, descriptor, found.image_size, found.fingerprint, error)


def fill_rows_with(
    devices: list[str],
    options: RunOptions,
    store: Store,
    root: str,
    rows: dict[str, int],
    names: list[str],
    windowed: bool,
    stop: Callable[[], bool],
    work: Work,
) -> Generator[Outcome, None, None]:
    """`fill_rows` by one process for each device. Hold `lock_store`: it keeps others out for all of them.

    Should one fail, the others finish their rows in flight, and its error is raised; what is written stays.
    """
    each = options.num_workers or max(1, available_cores() // len(devices))
    heard: queue.Queue[tuple[int, Any]] = queue.Queue()
    parts = _shares(names, len(devices), windowed)
    children = [_Child(number, heard) for number in range(len(devices))]
    failure: SppFeatError | None = None
    try:
        for child, device, part in zip(children, devices, parts, strict=True):
            child.send(
                {
                    "store": str(store.path),
                    "root": os.fsencode(root).hex(),
                    "recipe": store.recipe.to_json(),
                    "options": dataclasses.asdict(dataclasses.replace(options, device=device, num_workers=each)),
                    "rows": [[rows[name], name] for name in part],
                    "windowed": windowed,
                }
            )
        left, stopped = len(children), False
        while left:
            if not stopped and (failure is not None or stop()):
                stopped = True
                for child in children:
                    child.send_line("stop")
            try:
                number, message = heard.get(timeout=0.1)
            except queue.Empty:
                continue
            if isinstance(message, list):
                yield parts[number][message[0]], message[1]
                continue
            left -= 1
            if "error" in message:
                kind = getattr(errors, message["kind"], BackboneError)
                failure = failure or kind(message["error"])
            else:
                work.add(Work(**message))
        if failure is not None:
            raise failure
    finally:
        for child in children:
            child.end()


def _shares(names: list[str], count: int, windowed: bool) -> list[list[str]]:
    """Every `count`-th name; all windows of an image stay together."""
    if not windowed:
        return [names[part::count] for part in range(count)]
    numbers: dict[str, int] = {}
    shares: list[list[str]] = [[] for _ in range(count)]
    for name in names:
        shares[numbers.setdefault(split_row_name(name)[0], len(numbers)) % count].append(name)
    return shares


class _Child:
    """One process, and the thread that listens to it."""

    def __init__(self, number: int, heard: queue.Queue[tuple[int, Any]]) -> None:
        answers, theirs = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sppfeat.extraction.workers", str(theirs)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs],
                text=True,
                # A Ctrl-C goes to all processes of a terminal: whether it stops this one is for its parent to say.
                start_new_session=True,
            )
        finally:
            os.close(theirs)
        self._answers = os.fdopen(answers, encoding="utf-8")
        self._number = number
        self._heard = heard
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def send(self, document: dict[str, Any]) -> None:
        self.send_line(json.dumps(document))

    def send_line(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except OSError:
            return  # it ended: the listener says so

    def end(self) -> None:
        """Wait for a process that has said its last, or end it."""
        if self._listener.is_alive():
            self._process.kill()
        self._process.wait()
        self._listener.join()
        self._answers.close()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def _listen(self) -> None:
        last: Any = None
        for line in self._answers:
            last = json.loads(line)
            if isinstance(last, list):
                self._heard.put((self._number, last))
        if not isinstance(last, dict):
            reason = f"the process of card {self._number} ended early (exit code {self._process.wait()})"
            last = {"error": f"{reason}; its rows are left for a next run", "kind": "BackboneError"}
        self._heard.put((self._number, last))


def main() -> None:
    """The process that fills a part of the rows; see the module."""
    answers = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")
    task = json.loads(sys.stdin.readline())
    stop = threading.Event()

    def obey() -> None:
        for line in sys.stdin:
            if line == "stop\n":
                stop.set()
        os._exit(1)

    threading.Thread(target=obey, daemon=True).start()

    def say(message: object) -> None:
        print(json.dumps(message), file=answers, flush=True)

    work = Work()
    try:
        describer = Describer(Recipe.from_json(task["recipe"]), RunOptions(**task["options"]))
        rows = {name: row for row, name in task["rows"]}
        places = {name: place for place, name in enumerate(rows)}
        with StoreWriter(open_store(task["store"])) as writer:
            root = os.fsdecode(bytes.fromhex(task["root"]))
            filled = fill_rows(writer, describer, root, rows, list(rows), task["windowed"], stop.is_set, work)
            for name, error in filled:
                say([places[name], error])
        say(dataclasses.asdict(work))
    except SppFeatError as error:
        say({"error": str(error), "kind": type(error).__name__})
    except Exception as error:  # said where someone reads it
        say({"error": f"{type(error).__name__}: {one_line(error)}", "kind": "BackboneError"})
    # The thread that obeys is still reading: an ordinary exit would wait for it.
    os._exit(0)


if __name__ == "__main__":
    main()
