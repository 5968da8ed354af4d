"""Extraction on many machines, by Ray: a driver plans, and workers fill whole shards of a folder that all can reach.

Each worker has a network of its own, on one GPU or some cores. When it dies, another one takes over its shard and
describes the rows that are missing. Ray ends the workers of a driver that dies; whoever resumes the run waits for the
locks of their shards.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from sppfeat.errors import SppFeatError, StoreError, UsageError, one_line, require_extra
from sppfeat.extraction.pipeline import Describer
from sppfeat.extraction.plan import Job, Todo
from sppfeat.extraction.sharded import Writing
from sppfeat.extraction.stages import Stages
from sppfeat.extraction.workers import Tally, fill_file
from sppfeat.images import Fingerprint, is_url
from sppfeat.machine import limit_cores
from sppfeat.progress import Observer
from sppfeat.recipe import Recipe, RunOptions
from sppfeat.store import BucketFolder, RemoteShard, Status, Store, is_folder_store, lock_shard, open_file

# Cores of a worker without a GPU, unless `num_workers` says another number.
DEFAULT_CORES: Final = 4
# Workers that may be lost on one shard, and for each worker while it starts, before the run ends.
MAX_LOSSES: Final = 3
_POLL_SECONDS: Final = 0.25


@dataclass(frozen=True)
class _Task:
    """What a worker gets: a shard, by its path, and its job. remote: a shard that it publishes in a bucket itself."""

    folder: str
    source_root: str
    path: str
    job: Job
    remote: RemoteShard | None


class _Log(Observer):
    """Keeps what is described until the driver asks for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: list[tuple[str, str | None]] = []

    def row(self, name: str, error: str | None) -> None:
        with self._lock:
            self._rows.append((name, error))

    def taken(self) -> list[tuple[str, str | None]]:
        with self._lock:
            rows, self._rows = self._rows, []
        return rows


class Worker:
    """A process of the cluster; Ray calls `fill` in one thread, and the others in another."""

    def __init__(self, recipe: str, options: RunOptions, cores: int) -> None:
        limit_cores(cores)
        self._options = options
        self._recipe = Recipe.from_json(recipe)
        self._describer: Describer | None = None
        self._stop = threading.Event()
        self._log = _Log()

    def fill(self, task: _Task) -> tuple[dict[str, float], str] | SppFeatError:
        """Fill a shard: the times of the work, and the engine that did it; or why it could not be done."""
        try:
            self._check_reach(task)
            if self._describer is None:
                self._describer = Describer(self._recipe, self._options)
            with lock_shard(Path(task.path), self._stop.is_set) if task.remote is None else task.remote.here() as path:
                store, tally = open_file(path), Tally()
                job = _left(task.job, store)
                fill_file(store, job, self._describer, self._options, tally, self._log, self._stop.is_set)
                if task.remote is not None and not (store.status == Status.PENDING).any():
                    task.remote.put(path)
                return tally.stages.told(), self._describer.engine
        except SppFeatError as error:
            return error

    def take(self) -> list[tuple[str, str | None]]:
        """Names of the rows described since this was last asked, and why they failed."""
        return self._log.taken()

    def stop(self) -> None:
        """Finish the images in flight."""
        self._stop.set()

    def _check_reach(self, task: _Task) -> None:
        where = f"on {socket.gethostname()}"
        if task.remote is None and not is_folder_store(Path(task.folder)):
            raise StoreError(f"{task.folder}: expected a folder that all machines share, found no store {where}")
        root = task.source_root
        # Otherwise each of its images would fail as missing.
        if not is_url(root) and not os.path.isdir(root):
            raise StoreError(f"{root}: expected a folder of images that all machines share, found none {where}")


def _left(job: Job, store: Store) -> Job:
    """The rest of a job of which another worker may have done a part."""
    redo = set(job.redo)
    todo: list[Todo] = []
    for item, rows in job.todo:
        file = item.fingerprint() if redo.intersection(rows) else None
        keep = [at for at, row in enumerate(rows) if not _is_done(store, row, file if row in redo else None)]
        if keep:
            part = item if item.windows is None else replace(item, windows=item.windows[keep])
            todo.append(Todo(part, [rows[at] for at in keep]))
    lost = [row for row in job.lost if store.status[row] == Status.PENDING]
    left = redo.intersection(row for one in todo for row in one.rows)
    return job._replace(todo=todo, redo=sorted(row for row in left if store.status[row] != Status.PENDING), lost=lost)


def _is_done(store: Store, row: int, file: Fingerprint | None) -> bool:
    """Whether a row is as a job wants it; file: what a row that was done or failed before is to be described from."""
    if store.status[row] == Status.PENDING:
        return False
    found = (store.file_size[row], store.file_mtime_ns[row])
    return file is None or (store.status[row] == Status.DONE and file == found)


def _why(error: Any) -> str:
    """What Ray says of a worker that was lost, in one line."""
    return one_line(getattr(error, "cause", None) or error)


@dataclass
class _Running:
    """A task that a worker has."""

    task: _Task
    store: Store
    actor: Any
    taking: Any = None


@dataclass
class RayCluster:
    """Workers on a Ray cluster; use it as a context.

    address: `local` starts a cluster of this machine alone; `auto` joins the one that runs here; else the address of
    its head. Raises MissingExtraError, UsageError for a cluster that cannot be joined or has no room for a worker.
    """

    address: str
    recipe: Recipe
    options: RunOptions
    workers: int = 0
    device: str = ""
    engine: str = ""
    _ray: Any = None
    _actor: Any = None
    _cores: int = DEFAULT_CORES
    _losses: dict[str, int] = field(default_factory=dict)
    _started: bool = False

    def __enter__(self) -> RayCluster:
        if self.options.device not in ("auto", "cpu", "cuda"):
            raise UsageError(
                f"device: expected auto, cpu or cuda on a cluster, which gives each worker its GPU, "
                f"found {self.options.device}"
            )
        # No usage statistics: nobody asked for a connection.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._ray = ray = require_extra("ray", "cluster", "--cluster")
        if not ray.is_initialized():
            # Told to be local, Ray does not look for a cluster that runs on this machine, or was killed on it.
            where: dict[str, Any] = {"address": self.address}
            if self.address == "local":
                where["include_dashboard"] = False
            try:
                ray.init(**where, log_to_driver=False, logging_level="error")
            except (ConnectionError, ValueError, RuntimeError, OSError) as error:
                reason = str(error).strip().splitlines()[0]
                raise UsageError(f"--cluster {self.address}: expected a Ray cluster, found: {reason}") from None
            self._started = True
        found = ray.cluster_resources()
        gpus = int(found.get("GPU", 0)) if self.options.device != "cpu" else 0
        self._cores = self.options.num_workers or DEFAULT_CORES
        if not gpus:
            most = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
            self._cores = max(1, min(self._cores, int(most)))
        nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
        self.workers = gpus or sum(int(cpus // self._cores) for cpus in nodes)
        if not self.workers:
            raise UsageError(f"--cluster {self.address}: expected a GPU or a core for a worker, found {found}")
        needs = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": self._cores}
        self._actor = ray.remote(max_concurrency=2, max_restarts=0, **needs)(Worker)
        self.device = "cuda" if gpus else "cpu"
        return self

    def __exit__(self, *error: object) -> None:
        if self._started:
            self._ray.shutdown()

    def run(self, jobs: Iterable[Job], writing: Writing) -> None:
        """Do the jobs, until the writing has to stop. Raises what a worker raised, if no other could do its job."""
        ray = self._ray
        source = iter(jobs)
        again: deque[tuple[_Task, Store]] = deque()
        # A worker that replaces one on a lost node may have to wait for another node.
        joining = dict(self._new_worker() for _ in range(self.workers))
        idle: list[Any] = []
        running: dict[Any, _Running] = {}
        exhausted = stopping = False
        unstarted = 0  # workers that died while they started, since one did start
        failure: SppFeatError | None = None

        def lose(one: _Running, error: SppFeatError | None, reason: str) -> None:
            nonlocal failure
            if self._received(one, writing):
                self._count(one, writing)
                writing.end(one.store)
                joining.update([self._new_worker()])
                return
            failure = failure or self._lost(one.task, reason, error)
            again.append((one.task, one.store))
            joining.update([self._new_worker()])

        while running or not (stopping or (exhausted and not again)):
            if not stopping and (failure is not None or writing.must_stop()):
                stopping = True
                for one in running.values():
                    one.actor.stop.remote()
            while idle and not stopping:
                if again:
                    task, store = again.popleft()
                elif exhausted or (job := next(source, None)) is None:
                    exhausted = True
                    break
                else:
                    writing.tell()
                    store = writing.begin(job)
                    folder = writing.folder
                    root = folder.manifest.source_root
                    remote = folder.remote(store) if isinstance(folder, BucketFolder) else None
                    task = _Task(str(folder.path.absolute()), root, str(store.path.absolute()), job, remote)
                actor = idle.pop()
                running[actor.fill.remote(task)] = _Running(task, store, actor)
            if not running and not joining:
                continue  # nothing was to be done
            done, _ = ray.wait([*running, *joining], num_returns=1, timeout=_POLL_SECONDS)
            self._listen(running.values(), writing)
            for reference in done:
                if reference in joining:
                    actor = joining.pop(reference)
                    try:
                        ray.get(reference)
                    except ray.exceptions.RayError as error:
                        unstarted += 1
                        # One that raised would do so again; one that died may have been on a node that was lost.
                        died = isinstance(error, ray.exceptions.RayActorError) and not error.actor_init_failed
                        if not died or unstarted >= MAX_LOSSES * self.workers:
                            raise StoreError(f"a worker could not be started: {_why(error)}") from None
                        joining.update([self._new_worker()])
                        continue
                    unstarted = 0
                    idle.append(actor)
                    continue
                one = running.pop(reference)
                try:
                    outcome = ray.get(reference)
                except ray.exceptions.RayError as error:
                    lose(one, None, _why(error))
                    continue
                self._hear_out(one, writing)
                if isinstance(outcome, SppFeatError):
                    # It may be this machine's disk or GPU: another worker takes over, here or elsewhere.
                    ray.kill(one.actor)
                    lose(one, outcome, str(outcome))
                    continue
                stages, self.engine = outcome
                writing.tally.stages.add(Stages(**stages))
                if one.task.remote is None or self._received(one, writing):
                    self._count(one, writing)
                    writing.end(one.store)
                idle.append(one.actor)
        for actor in (*idle, *joining.values()):
            ray.kill(actor)
        for task, store in again:
            if task.remote is None:  # else nothing of it was kept
                self._count(_Running(task, store, None), writing)
        if failure is not None:
            raise failure

    def _new_worker(self) -> tuple[Any, Any]:
        """A worker, after what is known once it runs."""
        actor = self._actor.remote(self.recipe.to_json(), self.options, self._cores)
        return actor.take.remote(), actor

    def _lost(self, task: _Task, reason: str, error: SppFeatError | None = None) -> SppFeatError | None:
        """Count a loss; the failure of the run if the shard has cost too many workers."""
        self._losses[task.path] = self._losses.get(task.path, 0) + 1
        if self._losses[task.path] < MAX_LOSSES:
            return None
        return error or StoreError(f"{task.path}: {MAX_LOSSES} workers were lost on it; the last: {reason}")

    def _listen(self, running: Iterable[_Running], writing: Writing) -> None:
        """Tell the observer what workers have described."""
        for one in running:
            if one.taking is None:
                one.taking = one.actor.take.remote()
            elif self._ray.wait([one.taking], timeout=0)[0]:
                self._hear(one, writing)

    def _hear(self, one: _Running, writing: Writing) -> None:
        reference, one.taking = one.taking, None
        with contextlib.suppress(self._ray.exceptions.RayError):  # `fill` tells why
            for name, error in self._ray.get(reference):
                writing.observer.row(name, error)

    def _hear_out(self, one: _Running, writing: Writing) -> None:
        """Tell the observer the last that a worker has described."""
        if one.taking is not None:
            self._hear(one, writing)
        one.taking = one.actor.take.remote()
        self._hear(one, writing)

    @staticmethod
    def _received(one: _Running, writing: Writing) -> bool:
        """Whether a worker has put its shard into a bucket, which is then the one under work here."""
        if one.task.remote is None or not isinstance(writing.folder, BucketFolder):
            return False
        shard = writing.folder.receive(one.task.remote)
        one.store = shard or one.store
        return shard is not None

    @staticmethod
    def _count(one: _Running, writing: Writing) -> None:
        """Count the rows of a task from the shard itself: what a worker said last may be lost with it."""
        status = one.store.status
        rows = [row for item in one.task.job.todo for row in item.rows]
        writing.tally.described += int((status[rows] == Status.DONE).sum())
        writing.tally.failed += int((status[rows] == Status.FAILED).sum())
        writing.tally.changed += sum(bool(status[row] == Status.DONE) for row in one.task.job.changed)
