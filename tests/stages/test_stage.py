"""A stage by itself: its states, who waits for them, and what it says of itself."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import pytest

from weightd.daemon.checkpoints.listing import Listing
from weightd.daemon.errors import SourceFailed
from weightd.daemon.sources.base import SourceFile
from weightd.daemon.stages import stage as stage_module
from weightd.daemon.stages.request import parse_request
from weightd.daemon.stages.stage import Stage, is_still, named

HEX = "ab" * 32


def listing(identity: str = "1d", *weights: SourceFile, uri: str = "file:///m") -> Listing:
    return Listing(uri, identity, weights or (SourceFile("m.safetensors", 7, "1-2"),), None, ())


def made(uri: str = "file:///m", **request: Any) -> Stage:
    return Stage(uri, ["cpu"], parse_request({"model": "/m", **request}), listing())


class Time:
    """In place of ``time``, for who only reads it."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1e9 + self.now


def test_seconds_are_those_of_each_state_and_the_last_one_counts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, clock = made(), Time()
    monkeypatch.setattr(stage_module, "time", clock)
    stage.entered = clock.now
    for state, seconds in (("planning", 1.0), ("queued", 2.0), ("loading", 4.0), ("queued", 8.0), ("ready", 16.0)):
        clock.now += seconds
        if state == "loading":
            assert stage.state_seconds() == {"queued": 5.0, "planning": 2.0}
        stage.enter(state)
    assert stage.seconds == {"queued": 5.0, "planning": 2.0, "loading": 8.0} | {"queued": 1.0 + 4.0 + 16.0}
    clock.now += 99
    assert stage.state_seconds() == stage.seconds
    assert (stage.ready_at, stage.entered) == (1e9 + 131.0, 131.0)


def test_a_state_that_is_an_end_is_left_only_by_what_is_ready() -> None:
    for end in ("failed", "cancelled", "evicted"):
        stage = made()
        stage.enter(end, SourceFailed("x"))
        stage.enter("loading")
        assert (stage.state, stage.finished, stage.planned.is_set()) == (end, True, True)
    ready = made()
    assert not ready.finished
    ready.enter("loading")
    assert (ready.finished, ready.planned.is_set(), ready.ready_at) == (False, False, None)
    ready.enter("verifying")
    assert ready.ready_at is None
    ready.enter("ready")
    assert ready.planned.is_set()
    ready.enter("evicted")
    assert (ready.state, ready.error) == ("evicted", None)


def test_what_happens_is_logged_with_what_belongs_to_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stage = made()
    stage.log_state()
    stage.bytes_total, stage.checkpoint_digest = 77, "xxh3:1"
    stage.enter("ready")
    failed = made()
    failed.enter("failed", SourceFailed("away"))
    queued, ready, ended = caplog.records
    assert queued.fields == {
        "event": "stage",
        "stage": stage.id,
        "state": "queued",
        "model": "file:///m",
        "device": "cpu",
    }  # type: ignore[attr-defined]
    assert (ready.fields["bytes"], ready.fields["digest"]) == (77, "xxh3:1")  # type: ignore[attr-defined]
    assert ready.getMessage().startswith("ready file:///m: 77 bytes in ")
    assert (ended.levelno, ready.levelno) == (logging.WARNING, logging.INFO)
    assert ended.getMessage() == "failed file:///m: away"
    assert ended.fields["code"] == "source_failed"  # type: ignore[attr-defined]
    assert "device" not in ended.fields  # type: ignore[attr-defined]


def test_who_waits_is_woken_by_the_end_or_by_the_clock() -> None:
    async def within() -> None:
        stage = made()
        assert await stage.wait(0.0) is False
        assert await stage.wait(0.001) is False
        assert await stage.changed(0.001) is False
        waiting = [asyncio.create_task(stage.wait(timeout)) for timeout in (None, 60.0)]
        change = asyncio.create_task(stage.changed())
        await asyncio.sleep(0)
        stage.enter("loading")
        assert await change is True
        assert not any(task.done() for task in waiting)
        stage.enter("failed")
        assert await asyncio.gather(*waiting) == [True, True]
        assert await stage.wait(0.0) is True

    asyncio.run(within())


def test_who_watches_sees_each_change_once_silence_as_such_and_the_end_last() -> None:
    async def within() -> None:
        stage = made()
        watch = stage.watch(interval=0.001, heartbeat=0.0)
        assert [await anext(watch), await anext(watch)] == [True, False]
        stage.enter("loading")
        assert await anext(watch) is True
        stage.bytes_read = 5
        assert await anext(watch) is True
        stage.enter("ready")
        assert [change async for change in watch] == [True]
        slow = stage.watch()
        assert [change async for change in slow] == [True]
        quiet = made()
        seen: list[bool] = []

        async def follow() -> None:
            seen.extend([change async for change in quiet.watch(interval=60.0, heartbeat=3600.0)])

        task = asyncio.create_task(follow())
        await asyncio.sleep(0)
        for state in ("planning", "ready"):
            quiet.enter(state)
            for _ in range(5):
                await asyncio.sleep(0)
        await task
        assert seen == [True, True, True]

    asyncio.run(within())


def test_what_came_from_peers_is_told_apart() -> None:
    stage = made()
    assert stage.bytes_by_source() == {"": 0, "peer": 0}
    stage.source_kind, stage.bytes_read, stage.peer_bytes = "s3", 100, 30
    assert stage.bytes_by_source() == {"s3": 70, "peer": 30}
    assert stage.bytes_done == 100
    stage.reserved = {"cpu": 5, "cuda:0": 7}
    assert stage.footprint == 12


def test_the_cache_knows_it_by_its_identity_and_by_digests() -> None:
    assert made().cached_as() == {"1d"}
    assert made(expect_digest=HEX).cached_as() == {"1d", f"sha256:{HEX}"}
    of_files = made(expect_digest={"a": HEX})
    of_files.satisfied = {"xxh3:1", f"b=sha256:{HEX}2"}
    assert of_files.cached_as() == {"1d", f"sha256:{HEX}", f"sha256:{HEX}2", "xxh3:1"}
    of_files.listing = None
    assert "1d" not in of_files.cached_as()


def test_peers_that_read_are_to_stop_as_long_as_anybody_waits_for_that() -> None:
    stage = made()
    assert not stage.dismissed
    stage.dismissals = 1
    assert stage.dismissed


def test_it_is_of_what_is_listed_where_its_identity_is_or_where_local_files_are_as_before_ctime_was_told() -> None:
    later = listing("other", SourceFile("m.safetensors", 7, "1-2-3"))
    another = listing("other", SourceFile("m.safetensors", 7, "1-9-3"))
    for uri, still in (("file:///m", True), ("hf://o/n", True), ("s3://b/m", False)):
        assert is_still(made(uri), listing())
        assert is_still(made(uri), later) is still
        assert not is_still(made(uri), another)


def test_devices_are_named_once_where_all_are_the_same() -> None:
    assert [named(devices) for devices in ([], ["cpu"], ["cpu", "cpu"], ["a", "b", "a"])] == ["", "cpu", "cpu", "a,b,a"]
    assert made().device == "cpu"


def test_it_counts_from_when_it_was_asked_for() -> None:
    asked = time.monotonic() - 50
    stage = Stage("file:///m", ["cpu"], parse_request({"model": "/m"}), None, asked)
    assert 49 < time.time() - stage.created_at < 60
    assert stage.listed_at == stage.created_at
    assert stage.clock.began == asked
    assert (stage.left_out, stage.state, len(stage.id)) == ((), "queued", 15)
