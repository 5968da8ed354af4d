"""What decodes images beside the network: threads, and where a GPU takes more than they can give, processes, too.

Threads of one process decode some thousand images per second, however many cores there are: a part of each image is
Python's own work. Processes write pixels into memory that they share with this one; see `sppfeat.images.decoder`. An
image that a process cannot decode, and those of one that was killed, are decoded by threads.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import numpy as np

from sppfeat.errors import DeviceError, SppFeatWarning, one_line
from sppfeat.extraction.shared_memory import SharedMemory, Taken
from sppfeat.extraction.stages import Stages
from sppfeat.images import (
    Decoded,
    Decoder,
    Item,
    Part,
    heard_answer,
    lend_decoding,
    regain_decoding,
    told_item,
)
from sppfeat.machine import available_memory

# A process takes a quarter of a second of a core to start, as long as 200 images.
IMAGES_BEFORE_PROCESSES: Final = 256
# Decoded images that wait for the network or run through it: two streams' batches, and rare shapes.
SHARED_BYTES: Final = 1 << 30
# While one image is decoded, the next one's line is there.
LINES_AHEAD: Final = 2
# With less for each, images of 10 megapixels would be left to the threads. A machine of 6 cores has more.
LEAST_DECODING_BYTES: Final = 64 << 20

Pin = Callable[[np.ndarray], None]


class _Image(NamedTuple):
    """An item, and what it will become."""

    item: Item
    future: Future[Decoded]


class Decoders:
    """Decodes items, in threads of this process until it allows others.

    most: bytes of the inputs of an ordinary image. times: what counts the seconds.
    """

    def __init__(self, decoder: Decoder, workers: int, most: int, times: Stages) -> None:
        self._decoder, self._workers, self._most, self._times = decoder, workers, most, times
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        self._processes: _Processes | None = None
        self._pins: Sequence[Pin] | None = None
        self._begun = 0

    def allow_processes(self, pins: Sequence[Pin]) -> None:
        """Decode in as many processes, too, if many images come from now on. pins: what is told of their memory."""
        self._pins, self._begun = pins, 0

    def submit(self, item: Item) -> Future[Decoded]:
        """Decode an item; the image's arrays may lie in memory that is used again when they are dropped."""
        self._begun += 1
        if self._begun > IMAGES_BEFORE_PROCESSES and self._pins is not None:
            if self._processes is None:
                self._processes = _Processes(
                    self._decoder, self._workers, self._most, self._times, pins=self._pins, leave=self._decode_for
                )
            if item.is_apart() and (future := self._processes.submit(item)) is not None:
                return future
        return self._pool().submit(self._decode, item)

    @property
    def ready(self) -> int:
        """How many processes take images."""
        return 0 if self._processes is None else self._processes.ready

    def end(self) -> None:
        """End all threads that are at rest, and the others when they are; and all processes, at once."""
        if self._processes is not None:
            self._processes.end()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self._workers, thread_name_prefix="decode")
            return self._threads

    def _decode(self, item: Item) -> Decoded:
        start = time.perf_counter()
        try:
            return self._decoder.decode(item)
        finally:
            self._times.spend("decode", time.perf_counter() - start)

    def _decode_for(self, image: _Image) -> None:
        """Decode an image that a process was to decode."""

        def decode() -> None:
            try:
                image.future.set_result(self._decode(image.item))
            except BaseException as error:  # whoever waits for it raises it
                image.future.set_exception(error)

        if image.future.running() or image.future.set_running_or_notify_cancel():
            try:
                self._pool().submit(decode)
            except RuntimeError as error:  # the interpreter ends
                image.future.set_exception(error)


class _Process:
    """A process that decodes, and the images that it was told of, with their parts of the memory."""

    def __init__(self, memory: int, first_line: str) -> None:
        self.images: dict[int, tuple[_Image, Taken]] = {}
        answers, theirs = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from sppfeat.images.decoder import main; main()", str(theirs), str(memory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs, memory],
                # Ctrl-C signals all processes of a terminal: this one ends them.
                start_new_session=True,
            )
        except BaseException:
            os.close(answers)
            raise
        finally:
            os.close(theirs)
        self.answers = answers
        self._unfinished = b""
        self.send(first_line)

    def send(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            os.write(self._process.stdin.fileno(), line.encode() + b"\n")
        except OSError:
            return  # it ended, which is heard

    def hear(self) -> list[Any] | None:
        """The next answers, at least a part of one; None when it ended."""
        found = os.read(self.answers, 1 << 16)
        *lines, self._unfinished = (self._unfinished + found).split(b"\n")
        return [json.loads(line) for line in lines] if found else None

    def kill(self) -> int:
        """Kill it, unless it ended by itself; the exit code. Nothing writes to its parts of the memory then."""
        self._process.kill()
        return self._process.wait()

    def end(self) -> str:
        """Kill it and let go of it; says how it ended."""
        code = self.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        os.close(self.answers)
        return f"signal {-code}" if code < 0 else f"exit code {code}"


class _Processes:
    """The processes, and the thread that starts them and listens to all of them.

    pins: what is told of the shared memory. leave: what decodes an image in this process.
    """

    def __init__(
        self,
        decoder: Decoder,
        workers: int,
        most: int,
        times: Stages,
        *,
        pins: Sequence[Pin],
        leave: Callable[[_Image], None],
    ) -> None:
        self._decoder, self._workers, self._most, self._times = decoder, workers, most, times
        self._pins, self._leave = pins, leave
        self._lock = threading.Lock()
        self._memory: SharedMemory | None = None
        self._running: list[_Process] = []
        self._ready: set[_Process] = set()
        self._room: deque[_Process] = deque()  # each as often as it takes another image
        self._waiting: deque[_Image] = deque()
        self._numbers = itertools.count()
        self._complaints: deque[str] = deque()
        self._ended = False
        self._listener = threading.Thread(target=self._run, name="decoders", daemon=True)
        self._listener.start()

    @property
    def ready(self) -> int:
        return len(self._ready)

    def submit(self, item: Item) -> Future[Decoded] | None:
        """What a process will make of the item; None as long as none is ready."""
        while self._complaints:
            warnings.warn(self._complaints.popleft(), SppFeatWarning, stacklevel=2)
        with self._lock:
            if not self._ready:
                return None
            image = _Image(item, Future())
            self._waiting.append(image)
            self._send()
            return image.future

    def end(self) -> None:
        """Kill all processes; what they have not decoded is cancelled."""
        self._ended = True
        for process in list(self._running):
            process.kill()
        # Garbage is collected by any thread.
        if threading.current_thread() is not self._listener:
            self._listener.join()

    def _run(self) -> None:
        lent = lend_decoding(self._workers)
        try:
            if lent < LEAST_DECODING_BYTES:
                return
            with selectors.DefaultSelector() as selector:
                self._start(selector, lent)
                while self._running:
                    for key, _ in selector.select():
                        if not self._hear(key.data):
                            selector.unregister(key.fd)
                            how = self._lose(key.data)
                            self._complaints.append(
                                f"a process that decoded images ended early ({how}); its images are decoded again"
                            )
        except Exception as error:  # whatever it is, no image is lost
            self._complaints.append(f"no processes decode images ({one_line(error)}); falling back to threads")
        finally:
            for process in list(self._running):
                self._lose(process)
            regain_decoding(self._workers * lent)

    def _start(self, selector: selectors.BaseSelector, lent: int) -> None:
        self._memory = SharedMemory(min(SHARED_BYTES, available_memory() // 8))
        with contextlib.closing(self._memory):  # the processes have it open
            for pin in self._pins:
                try:
                    pin(self._memory.whole)
                except DeviceError as error:
                    self._complaints.append(f"{error}; images are copied once more")
            first_line = json.dumps(self._decoder.told(lent))
            for _ in range(self._workers):
                process = _Process(self._memory.descriptor, first_line)
                self._running.append(process)
                selector.register(process.answers, selectors.EVENT_READ, process)
                if self._ended:  # before it was among them
                    process.kill()

    def _hear(self, process: _Process) -> bool:
        """Take the answers that are there; false if the process ended."""
        answers = process.hear()
        for line in answers or ():
            if line:
                self._take(process, line)
            else:
                with self._lock:
                    self._ready.add(process)
                    self._room.extend([process] * LINES_AHEAD)
                    self._send()
        return answers is not None

    def _take(self, process: _Process, line: list[Any]) -> None:
        image, taken = process.images[line[0]]
        answer = heard_answer(line, taken.array())
        with self._lock:
            del process.images[line[0]]
            taken.keep(answer.used)
            self._room.append(process)
            self._send()
        self._times.spend("decode", answer.seconds)
        if answer.decoded is None:
            self._leave(image)
        else:
            image.future.set_result(answer.decoded)

    def _send(self) -> None:
        """Give images to processes that have room. Hold the lock."""
        assert self._memory is not None
        while self._waiting and self._room:
            image = self._waiting.popleft()
            if not image.future.set_running_or_notify_cancel():
                continue
            taken = self._memory.take(self._most)
            if taken is None:  # the network is behind
                self._leave(image)
                continue
            process, number = self._room.popleft(), next(self._numbers)
            process.images[number] = image, taken
            process.send(json.dumps(told_item(number, image.item, Part(taken.begin, taken.end))))

    def _lose(self, process: _Process) -> str:
        """Give the images of a process to the threads, and those that wait for the last one; says how it ended."""
        how = process.end()
        with self._lock:
            self._running.remove(process)
            self._ready.discard(process)
            self._room = deque(each for each in self._room if each is not process)
            images = [image for image, _ in process.images.values()]
            process.images.clear()
            if not self._ready:
                images += self._waiting
                self._waiting.clear()
        for image in images:
            if not self._ended:
                self._leave(image)
            elif not image.future.cancel():
                image.future.set_exception(CancelledError())
        return how
