"""Threads that wait for sources: which of them wait for the same, and how many at once."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading

import pytest

from tests.servers import until
from weightd.daemon.stages.source_threads import SourceThreads, place_of

TURNS = 16


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("s3://bucket/a/b", "s3://bucket"),
        ("s3://bucket", "s3://bucket"),
        ("hf://org/name", "hf://org"),
        ("file:///mnt/models/a/b", "file:///mnt/models"),
        ("file:///mnt", "file:///mnt"),
    ],
)
def test_a_place_is_a_bucket_or_a_folder_that_may_be_a_mount(uri: str, place: str) -> None:
    assert place_of(uri) == place


def test_one_place_has_16_threads_and_others_of_its_kind_go_on_beside_it() -> None:
    async def within() -> None:
        threads, over, running = SourceThreads("test"), threading.Event(), list[str]()

        def block(name: str) -> str:
            running.append(name)
            assert over.wait(60)
            return name

        waiting = [asyncio.create_task(threads.run("s3://slow/x", block, f"slow{i}")) for i in range(18)]
        await asyncio.to_thread(until, lambda: len(running) == 16, "they run")
        assert await threads.run("s3://quick/x", threading.current_thread) is not threading.main_thread()
        assert len(running) == 16, "the others wait for their turn"
        over.set()
        assert await asyncio.gather(*waiting) == [f"slow{i}" for i in range(18)]
        assert (threads._waiting, threads._turns) == ({}, {}), "nothing is kept of places that nobody asks"
        threads.close()

    asyncio.run(within())


def test_what_runs_there_is_known_by_what_was_known_where_it_was_asked_for_and_its_error_comes_back() -> None:
    known = contextvars.ContextVar("known", default="")

    def say() -> tuple[str, str]:
        return known.get(), threading.current_thread().name

    async def within() -> None:
        threads = SourceThreads("listing")
        known.set("stage 1")
        what, name = await threads.run("s3://b/x", say)
        assert what == "stage 1"
        assert name.startswith("listing-s3")
        with pytest.raises(ZeroDivisionError):
            await threads.run("s3://b/x", divmod, 1, 0)
        threads.close()
        with pytest.raises(RuntimeError, match="shutdown"):
            await threads.run("s3://b/x", say)

    asyncio.run(within())


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
