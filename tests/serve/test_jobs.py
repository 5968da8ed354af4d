"""Work that outlasts a request: one at a time, its result kept, and why it failed told to who asks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from sppfeat import UsageError
from sppfeat.serve.jobs import Jobs, Standing


def until_done(ask: Callable[[], Standing[str]]) -> Standing[str]:
    for _ in range(200):
        if (found := ask()).result is not None or found.failed is not None:
            return found
        time.sleep(0.01)
    raise AssertionError("expected an end")


def test_one_at_a_time_and_results_are_kept() -> None:
    jobs, go, begun = Jobs[str]("test"), threading.Event(), []

    def slow(tell: Callable[[float], None]) -> str:
        begun.append("slow")
        tell(0.5)
        go.wait(5)
        return "slow"

    def other(tell: Callable[[float], None]) -> str:
        begun.append("other")
        return "other"

    assert jobs.ask("a", slow) == Standing(0.0)
    while jobs.ask("a", slow).done < 0.5:
        time.sleep(0.01)
    assert jobs.ask("b", other) == Standing(0.5) and begun == ["slow"]
    go.set()
    assert until_done(lambda: jobs.ask("a", slow)).result == "slow"
    assert until_done(lambda: jobs.ask("b", other)).result == "other"
    assert jobs.ask("a", slow).result == "slow" and begun == ["slow", "other"]


def test_a_failure_is_told_once_however_late_it_comes() -> None:
    jobs, begun = Jobs[str]("test"), []

    def fails(tell: Callable[[float], None]) -> str:
        begun.append(1)
        time.sleep(0.05)
        raise UsageError("no store") if len(begun) == 1 else RuntimeError("a fault")

    assert until_done(lambda: jobs.ask("a", fails)).failed == "no store" and begun == [1]
    assert until_done(lambda: jobs.ask("a", fails)).failed == "failed: a fault" and begun == [1, 1]


def test_few_results_are_kept() -> None:
    jobs = Jobs[str]("test", kept=2)
    for key in range(5):
        assert until_done(lambda key=key: jobs.ask(key, lambda tell: str(key))).result == str(key)  # type: ignore[misc]
    assert len(jobs._standing) == 2


def test_the_end_does_not_wait_for_all_of_the_work() -> None:
    jobs, steps = Jobs[str]("test"), []

    def long(tell: Callable[[float], None]) -> str:
        for step in range(1000):
            steps.append(step)
            tell(step / 1000)
            time.sleep(0.01)
        return "done"

    jobs.ask("a", long)
    time.sleep(0.05)
    started = time.perf_counter()
    jobs.end()
    jobs.join(5)
    assert time.perf_counter() - started < 1 and len(steps) < 900
    assert jobs._thread is not None and not jobs._thread.is_alive()
