"""Work on a few threads: who waits, who is refused, and what is not done for nobody."""

from __future__ import annotations

import asyncio
import threading

import pytest

from sppfeat.serve.pool import BusyError, Pool


def test_work_that_nobody_waits_for_is_not_begun() -> None:
    done: list[str] = []

    async def main() -> None:
        pool, free = Pool(1, 8, 20.0, "test"), threading.Event()
        first = asyncio.create_task(pool.run(lambda: free.wait(20)))
        left = False

        async def gone() -> bool:
            return left

        second = asyncio.create_task(pool.run(lambda: done.append("second"), gone))
        third = asyncio.create_task(pool.run(lambda: done.append("third")))
        await asyncio.sleep(0.1)
        left = True
        with pytest.raises(BusyError, match="too many requests were before it"):
            await second
        free.set()
        assert await first
        await third
        pool.close()

    asyncio.run(main())
    assert done == ["third"]


def test_too_many_and_too_slow() -> None:
    async def main() -> None:
        pool, free = Pool(1, 1, 0.2, "test"), threading.Event()
        slow = asyncio.create_task(pool.run(lambda: free.wait(20)))
        waiting = asyncio.create_task(pool.run(lambda: 1))
        await asyncio.sleep(0.05)
        with pytest.raises(BusyError, match="too many requests wait"):
            await pool.run(lambda: 2)
        with pytest.raises(BusyError, match="took more than 0.2 s"):
            await slow
        with pytest.raises(BusyError, match="too many requests were before it"):
            await waiting
        free.set()
        await asyncio.sleep(0.1)
        assert await pool.run(lambda: 3) == 3
        with pytest.raises(ZeroDivisionError):
            await pool.run(lambda: 1 // 0)
        pool.close()

    asyncio.run(main())
