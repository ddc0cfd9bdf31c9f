"""Threads that wait for sources: which of them wait for the same, and how many at once."""

from __future__ import annotations

import asyncio
import contextvars
import threading

import pytest

from tests.servers import until
from weightd.daemon.stages.source_threads import SourceThreads, place_of


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


def test_what_waits_for_a_thread_when_it_is_over_never_runs() -> None:
    async def within() -> None:
        threads, over, running = SourceThreads("test"), threading.Event(), list[int]()

        def block(number: int) -> None:
            running.append(number)
            assert over.wait(60)

        tasks = [asyncio.create_task(threads.run(f"s3://b{i % 3}/x", block, i)) for i in range(33)]
        await asyncio.to_thread(until, lambda: len(running) == 32, "a kind's 32 threads are at work")
        threads.close()
        over.set()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert (len(running), sum(isinstance(end, asyncio.CancelledError) for end in ends)) == (32, 1)

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
