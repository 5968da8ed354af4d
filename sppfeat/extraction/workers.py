"""Filling the rows of a store: in this process, or in one process per GPU, each with its own part of the rows.

A worker runs `main` with the number of a file descriptor as its argument. It reads its task from one line of JSON on
standard input, and answers with lines of JSON on that descriptor, since libraries may print on standard output:
`[place, error]` for each row that is about to be written, and finally an object with its times, or with the error that
ended it. The line `stop` makes it finish the rows in flight; the end of its input, when its parent is gone, ends it at
once.
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
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final

import numpy as np

from sppfeat import errors
from sppfeat.errors import BackboneError, SppFeatError, one_line
from sppfeat.extraction.pipeline import Describer
from sppfeat.extraction.plan import Todo
from sppfeat.extraction.stages import Stages
from sppfeat.images import Item
from sppfeat.machine import available_cores
from sppfeat.recipe import Recipe, RunOptions
from sppfeat.store import Store, StoreWriter, open_store, row_names

# A killed run loses at most this much work; a flush waits for the disk.
FLUSH_SECONDS: Final = 0.25

Outcome = tuple[str, str | None]  # a row's name, and why it failed


def fill_rows(
    writer: StoreWriter,
    describer: Describer,
    todo: list[Todo],
    redo: Sequence[int],
    stop: Callable[[], bool],
    work: Stages,
) -> Generator[Outcome, None, None]:
    """Describe items, and write each of their rows in place; adds the time taken to `work`.

    All windows of an image come together. redo: rows that were done or failed; they become pending when the first
    image is described, and not if no network can be run.
    """
    before = describer.times.copy()
    last_flush = time.perf_counter()
    try:
        for done in describer.describe((item for item, _ in todo), stop=stop):
            item, rows = todo[done.position]
            if redo:
                writer.reset(redo)
                redo = ()
            for at, (row, name) in enumerate(zip(rows, row_names(item), strict=True)):
                start = time.perf_counter()
                descriptor, error = done.row(at)
                if descriptor is None:
                    writer.fail(row, error or "", done.fingerprint)
                else:
                    writer.write(row, descriptor, done.image_size, done.fingerprint)
                if start - last_flush > FLUSH_SECONDS:
                    writer.flush()
                    last_flush = time.perf_counter()
                work.write += time.perf_counter() - start
                yield name, error
        start = time.perf_counter()
        writer.flush()
        work.write += time.perf_counter() - start
    finally:
        now = describer.times
        work.add(
            Stages(
                decode=now.decode - before.decode,
                forward=now.forward - before.forward,
                pool=now.pool - before.pool,
                workers=describer.workers,
                streams=describer.streams,
            )
        )


def fill_rows_with(
    devices: list[str],
    options: RunOptions,
    store: Store,
    todo: list[Todo],
    redo: Sequence[int],
    stop: Callable[[], bool],
    work: Stages,
) -> Generator[Outcome, None, None]:
    """`fill_rows` with one process per device. Hold `lock_store`: it keeps others out for all of them.

    If one fails, the others finish their rows in flight, and its error is raised; what is written stays.
    """
    each = options.num_workers or max(1, available_cores() // len(devices))
    heard: queue.Queue[tuple[int, Any]] = queue.Queue()
    again = set(redo)
    parts = [todo[number :: len(devices)] for number in range(len(devices))]
    names = [[name for item, _ in part for name in row_names(item)] for part in parts]
    children = [_Child(number, heard) for number in range(len(devices))]
    failure: SppFeatError | None = None
    try:
        for child, device, part in zip(children, devices, parts, strict=True):
            child.send(
                {
                    "store": str(store.path),
                    "recipe": store.recipe.to_json(),
                    "options": dataclasses.asdict(dataclasses.replace(options, device=device, num_workers=each)),
                    "todo": [_told(one) for one in part],
                    "redo": sorted(again.intersection(row for one in part for row in one.rows)),
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
                yield names[number][message[0]], message[1]
                continue
            left -= 1
            if "error" in message:
                kind = getattr(errors, message["kind"], BackboneError)
                failure = failure or kind(message["error"])
            else:
                work.add(Stages(**message))
        if failure is not None:
            raise failure
    finally:
        for child in children:
            child.end()


def _told(todo: Todo) -> list[Any]:
    """An item and its rows for JSON; a root may contain bytes that are not UTF-8."""
    item, rows = todo
    return [os.fsencode(item.root).hex(), item.name, None if item.windows is None else item.windows.tolist(), rows]


def _heard(told: list[Any]) -> Todo:
    root, name, windows, rows = told
    boxes = None if windows is None else np.array(windows, np.float64).reshape(-1, 4)
    return Todo(Item(os.fsdecode(bytes.fromhex(root)), name, boxes), rows)


class _Child:
    """One process, and the thread that listens to it."""

    def __init__(self, number: int, heard: queue.Queue[tuple[int, Any]]) -> None:
        answers, theirs = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from sppfeat.extraction.workers import main; main()", str(theirs)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs],
                text=True,
                # Ctrl-C signals all processes of a terminal: the parent decides whether it stops this one.
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
            return  # it ended: the listener reports it

    def end(self) -> None:
        """Wait for a process that has finished, or kill it."""
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
            reason = f"the process of GPU {self._number} ended early (exit code {self._process.wait()})"
            last = {"error": f"{reason}; its remaining rows stay pending", "kind": "BackboneError"}
        self._heard.put((self._number, last))


def main() -> None:
    """The worker process that fills a part of the rows; see the module."""
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

    work = Stages()
    try:
        describer = Describer(Recipe.from_json(task["recipe"]), RunOptions(**task["options"]))
        todo = [_heard(one) for one in task["todo"]]
        places = {name: place for place, name in enumerate(name for item, _ in todo for name in row_names(item))}
        with StoreWriter(open_store(task["store"])) as writer:
            for name, error in fill_rows(writer, describer, todo, task["redo"], stop.is_set, work):
                say([places[name], error])
        say(work.told())
    except SppFeatError as error:
        say({"error": str(error), "kind": type(error).__name__})
    except Exception as error:  # reported to the parent, which someone reads
        say({"error": f"{type(error).__name__}: {one_line(error)}", "kind": "BackboneError"})
    # The thread that obeys is still reading: a normal exit would wait for it.

    os._exit(0)
