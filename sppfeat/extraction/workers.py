"""Filling the rows of a store: in this process, or in one process per GPU, each with its own part of the rows.

A worker runs `main` with the number of a file descriptor as its argument. It reads its task from one line of JSON on
standard input, and answers with lines of JSON on that descriptor, since libraries may print on standard output:
`[place, error]` for each row that is given to the writer, and finally an object with its times, or with the error that
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
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sppfeat import errors
from sppfeat.errors import BackboneError, SppFeatError, one_line
from sppfeat.extraction.pipeline import Describer
from sppfeat.extraction.plan import Job, Todo
from sppfeat.extraction.stages import Stages
from sppfeat.images import Item, from_builtins, to_builtins
from sppfeat.machine import available_cores
from sppfeat.progress import Observer
from sppfeat.recipe import Recipe, RunOptions
from sppfeat.store import Store, StoreWriter, open_store, row_names

Outcome = tuple[str, str | None]  # a row's name, and why it failed


@dataclass
class Tally:
    """What has been done, in rows of this run; changed: those described again because their file changed."""

    described: int = 0
    failed: int = 0
    changed: int = 0
    stages: Stages = field(default_factory=Stages)


def fill_file(
    store: Store,
    job: Job,
    describer: Describer,
    options: RunOptions,
    tally: Tally,
    observer: Observer,
    stop: Callable[[], bool],
) -> None:
    """Describe the rows of a job in the file that holds them, on one device or several. Hold the store's lock."""
    readable = [todo for todo in job.todo if todo.item.problem is None]
    redo = set(job.redo).intersection(row for todo in readable for row in todo.rows)
    with StoreWriter(store) as writer:
        writer.reset(sorted(set(job.redo) - redo))
        for item, rows in job.todo:
            if item.problem is not None:
                for row, name in zip(rows, row_names(item), strict=True):
                    writer.fail(row, item.problem)
                    observer.row(name, item.problem)
                    tally.failed += 1
        for row in job.lost:
            writer.fail(row, "the file no longer exists")
        if len(devices := options.devices()) > 1:
            writer.flush()
            filled = fill_rows_with(devices, options, store, readable, sorted(redo), stop, tally.stages)
        else:
            filled = fill_rows(writer, describer, readable, sorted(redo), stop, tally.stages)
        changed = {
            name
            for item, rows in readable
            for row, name in zip(rows, row_names(item), strict=True)
            if row in job.changed
        }
        with contextlib.closing(filled):  # also if the observer raises: processes must not outlive the lock
            for name, error in filled:
                tally.described += error is None
                tally.failed += error is not None
                tally.changed += error is None and name in changed
                observer.row(name, error)


def fill_rows(
    writer: StoreWriter,
    describer: Describer,
    todo: list[Todo],
    redo: Sequence[int],
    stop: Callable[[], bool],
    work: Stages,
) -> Generator[Outcome, None, None]:
    """Describe items, and give each of their rows to the writer; adds the time taken to `work`.

    A row that is yielded is described, or has failed; it is on disk when the writer has flushed, soon, and when this
    ends. All windows of an image come together. redo: rows that were done or failed;
    they become pending when the first image is described, and not if no network can be run.
    """
    before, written = describer.times.copy(), writer.seconds
    try:
        for done in describer.describe((item for item, _ in todo), stop=stop):
            item, rows = todo[done.position]
            if redo:
                writer.reset(redo)
                redo = ()
            for at, (row, name) in enumerate(zip(rows, row_names(item), strict=True)):
                descriptor, error = done.row(at)
                if descriptor is None:
                    writer.fail(row, error or "", done.fingerprint)
                else:
                    writer.write(row, descriptor, done.image_size, done.fingerprint)
                yield name, error
        writer.flush()
    finally:
        now = describer.times
        work.follow(
            Stages(
                decode=now.decode - before.decode,
                forward=now.forward - before.forward,
                pool=now.pool - before.pool,
                write=writer.seconds - written,
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
    children: list[_Child] = []
    failure: SppFeatError | None = None
    together = Stages()
    try:
        for number, device in enumerate(devices):
            children.append(_Child(number, device, heard))
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
                together.add(Stages(**message))
        if failure is not None:
            raise failure
    finally:
        for child in children:
            child.end()
        work.follow(together)


def _told(todo: Todo) -> list[Any]:
    """An item and its rows for JSON; a root may contain bytes that are not UTF-8."""
    item, rows = todo
    windows = None if item.windows is None else item.windows.tolist()
    return [os.fsencode(item.root).hex(), item.name, windows, to_builtins(item.content), rows]


def _heard(told: list[Any]) -> Todo:
    root, name, windows, content, rows = told
    boxes = None if windows is None else np.array(windows, np.float64).reshape(-1, 4)
    return Todo(Item(os.fsdecode(bytes.fromhex(root)), name, boxes, content=from_builtins(content)), rows)


class _Child:
    """One process, and the thread that listens to it."""

    def __init__(self, number: int, device: str, heard: queue.Queue[tuple[int, Any]]) -> None:
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
        except BaseException:
            os.close(answers)
            raise
        finally:
            os.close(theirs)
        self._answers = os.fdopen(answers, encoding="utf-8")
        self._number, self._device = number, device
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
            if not line.endswith("\n"):  # killed while it wrote
                break
            last = json.loads(line)
            if isinstance(last, list):
                self._heard.put((self._number, last))
        if not isinstance(last, dict):
            reason = f"the process of device {self._device} ended early (exit code {self._process.wait()})"
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
