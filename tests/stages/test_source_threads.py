"""Turns at a place: who has one, and until when."""

from __future__ import annotations

import asyncio
import contextlib
import threading

from weightd.daemon.stages.source_threads import SourceThreads

TURNS = 16


def test_a_call_that_hangs_keeps_its_turn_though_its_waiter_was_cancelled() -> None:
    """Otherwise requests that give up one after the other would hang every thread that there is."""

    async def scenario() -> None:
        threads = SourceThreads("test")
        over, began = threading.Event(), threading.Semaphore(0)

        def hang() -> None:
            began.release()
            over.wait(60)

        try:
            waiters = [asyncio.create_task(threads.run("s3://silent/m", hang)) for _ in range(TURNS + 1)]
            for _ in range(TURNS):
                assert await asyncio.to_thread(began.acquire, True, 60)
            for waiter in waiters[:TURNS]:
                waiter.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await waiter
            late = asyncio.create_task(threads.run("s3://silent/m", began.release))
            assert await threads.run("s3://other/m", lambda: "nobody else waits") == "nobody else waits"
            assert not began.acquire(blocking=False), "one has begun past those that hang"
            over.set()
            await asyncio.wait_for(late, 60)
            await asyncio.wait_for(waiters[TURNS], 60)
        finally:
            over.set()
            threads.close()

    asyncio.run(scenario())


def test_who_is_cancelled_before_its_turn_takes_none() -> None:
    async def scenario() -> None:
        threads = SourceThreads("test")
        over = threading.Event()
        try:
            waiters = [asyncio.create_task(threads.run("s3://silent/m", over.wait, 60)) for _ in range(2 * TURNS)]
            await threads.run("s3://other/m", int)
            for waiter in waiters[TURNS:]:
                waiter.cancel()
            over.set()
            assert await asyncio.gather(*waiters[:TURNS]) == [True] * TURNS
            assert await asyncio.wait_for(threads.run("s3://silent/m", lambda: "a turn"), 60) == "a turn"
        finally:
            over.set()
            threads.close()

    asyncio.run(scenario())
