"""Running stages on a loop of a test's own: their turns, their memory, and every way in which they end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.filling.fills import LIMITS, MiB, Stored, store, tensor
from tests.servers import until
from weightd.daemon.checkpoints.cache import Cache
from weightd.daemon.devices.cpu import CpuDevice
from weightd.daemon.errors import (
    CheckpointChanged,
    CheckpointNotFound,
    DeviceFailed,
    InsufficientCapacity,
    InvalidRequest,
    QueueFull,
    SourceFailed,
)
from weightd.daemon.filling.account import ledger_for
from weightd.daemon.filling.ledger import Ledger
from weightd.daemon.filling.sink import Sink
from weightd.daemon.keeper.deposits import Deposits
from weightd.daemon.layouts.checkpoint import checkpoint_layout
from weightd.daemon.layouts.digests import leaf_digest
from weightd.daemon.layouts.extents import Demands, plan_extents
from weightd.daemon.limits import NodeLimits
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.sources.file import FileSource
from weightd.daemon.sources.uris import Allow
from weightd.daemon.stages.request import parse_request
from weightd.daemon.stages.residency import Residency
from weightd.daemon.stages.scheduler import Scheduler, refused
from weightd.daemon.stages.stage import Stage
from weightd.ipc.errors import CudaError

ONE = MiB + 4096 - MiB % 4096
"""Bytes that a segment of the checkpoint takes."""


@dataclass
class House:
    """A scheduler and all that it needs; readers wait while ``held``."""

    stored: Stored
    scheduler: Scheduler
    residency: Residency
    metrics: Metrics
    device: CpuDevice
    held: threading.Event = field(default_factory=threading.Event)
    reads: list[str] = field(default_factory=list)
    fails: list[BaseException] = field(default_factory=list)

    def stage(self, **request: Any) -> Stage:
        listing = self.stored.checkpoint.listing
        return Stage(listing.uri, ["cpu"], parse_request({"model": "/m", **request}), listing)

    def start(self, **request: Any) -> Stage:
        stage = self.stage(**request)
        self.scheduler.start(stage, self.source(stage))
        return stage

    def source(self, stage: Stage) -> Any:
        house, files = self, self.stored.checkpoint.listing.weights

        class Held(FileSource):
            def reader(self, _: Any, *, native: bool = False) -> Any:
                inner = house.stored.source.reader(files)

                class Reader:
                    def run(self, sink: Sink) -> None:
                        house.reads.append(stage.id)
                        assert house.held.wait(60)
                        if house.fails:
                            raise house.fails.pop()
                        inner.run(sink)

                    def close(self) -> None:
                        inner.close()

                return Reader()

        folder = Path(self.stored.checkpoint.listing.uri.removeprefix("file://"))
        return Held(folder, Allow())

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    async def until(self, condition: Callable[[], object]) -> None:
        await asyncio.to_thread(until, condition, "it has come to that", 60)


@contextlib.asynccontextmanager
async def house(
    stored: Stored, folder: Path, *, capacity: int = 1 << 30, loads: int = 1, queued: int = 9
) -> AsyncIterator[House]:
    device, metrics, deposits = CpuDevice("cpu", capacity), Metrics(), Deposits()
    residency = Residency({"cpu": device}, deposits, metrics, lease_grace=1.0, max_leases_per_user=9, peer_grace=0.0)
    limits = NodeLimits(concurrent_loads=loads, max_queued=queued, revoke_grace=1.0, trust_peers=False)
    scheduler = Scheduler({"cpu": device}, residency, deposits, Cache(folder / "cache"), metrics, LIMITS, limits, None)
    made = House(stored, scheduler, residency, metrics, device)
    try:
        yield made
    finally:
        made.held.set()
        for stage in list(residency.stages.values()):
            scheduler.cancel(stage, "it is over")
        await scheduler.close()
        for stage in list(residency.stages.values()):
            residency.release(stage)


Run = Callable[..., None]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    stored = store(tmp_path / "m", {"a": tensor("U8", (MiB,), 1), "b": tensor("U8", (100,), 2)})

    def run(test: Callable[[House], Coroutine[Any, Any, None]], **options: Any) -> None:
        async def within() -> None:
            async with house(stored, tmp_path, **options) as made:
                await test(made)

        asyncio.run(within())

    return run


def test_a_stage_goes_through_its_states_to_sealed_segments(run: Run) -> None:
    async def test(house: House) -> None:
        stage = house.start()
        seen = [stage.state]
        watch = asyncio.create_task(collect(stage, seen))
        await house.until(lambda: house.reads)
        assert (stage.state, house.residency.used("cpu")) == ("loading", ONE)
        assert stage.planned.is_set(), "whoever waits to stream is told"
        house.held.set()
        assert await stage.wait(60)
        await watch
        assert (stage.state, stage.error) == ("ready", None)
        assert seen[-1] == "ready"
        assert (stage.plan, stage.fill, stage.bytes_total, stage.bytes_read) == (None, None, MiB + 100, MiB + 100)
        manifest, files = stage.manifests[0].read()
        assert (manifest.names, files, manifest.digest) == (["a", "b"], [0, 0], stage.checkpoint_digest)
        assert stage.satisfied == {stage.checkpoint_digest}
        assert not stage.segments[0].writable
        assert stage.ledger is not None
        assert stage.ledger.last_used == stage.last_used
        assert house.count("weightd_stages_finished_total", state="ready") == 1
        assert {"planning", "loading", "verifying"} <= stage.seconds.keys()
        assert sorted(stage.verified[0]) == [0, 1]

    run(test)


async def collect(stage: Stage, seen: list[str]) -> None:
    while not stage.finished:
        await stage.changed(60)
        seen.append(stage.state)


def test_a_device_is_opened_before_anything_is_promised_of_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(house: House) -> None:
        promised: list[int] = []
        monkeypatch.setattr(house.device, "open", lambda: promised.append(house.residency.used("cpu")), raising=True)
        house.held.set()
        assert await house.start().wait(60)
        assert promised == [0]

    run(test)


def test_the_cache_is_trimmed_to_what_is_of_stages_that_are_here(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(house: House) -> None:
        kept: list[set[str]] = []
        monkeypatch.setattr(house.scheduler._cache, "trim", kept.append)
        ready, loading, evicted, failed = (house.stage(expect_digest=f"xxh3:{n:032}") for n in range(4))
        for stage, state in ((ready, "ready"), (loading, "loading"), (evicted, "evicted"), (failed, "failed")):
            stage.listing = None
            stage.enter(state)
            house.residency.keep(stage)
        await house.scheduler.trim_cache()
        assert kept == [{f"xxh3:{0:032}", f"xxh3:{1:032}"}]

    run(test)


def test_of_more_stages_than_may_load_at_once_the_others_wait_by_priority(run: Run) -> None:
    async def test(house: House) -> None:
        first = house.start()
        await house.until(lambda: house.reads)
        low, high = house.start(), house.start(priority=5)
        await house.until(
            lambda: [low.state, high.state] == ["queued", "queued"] and low.planned.is_set() and high.planned.is_set()
        )
        assert house.reads == [first.id]
        house.held.set()
        for stage in (first, low, high):
            assert await stage.wait(60)
        assert house.reads == [first.id, high.id, low.id]

    run(test)


def test_side_by_side_go_as_many_as_may(run: Run) -> None:
    async def test(house: House) -> None:
        stages = [house.start() for _ in range(3)]
        await house.until(lambda: len(house.reads) == 2)
        assert [stage.state for stage in stages].count("loading") == 2

    run(test, loads=2)


def test_so_many_may_wait_and_no_more(run: Run) -> None:
    async def test(house: House) -> None:
        house.start()
        house.start()
        with pytest.raises(QueueFull, match="2 stages wait for their turn") as error:
            house.start()
        assert error.value.details == {"retry_after_seconds": 10}
        assert len(house.residency.stages) == 2
        await house.until(lambda: house.reads)
        house.start()

    run(test, queued=2)


def test_a_stage_that_is_cancelled_ends_at_once_and_its_memory_goes_when_nothing_writes_to_it(run: Run) -> None:
    async def test(house: House) -> None:
        stage = house.start()
        await house.until(lambda: house.reads)
        waiting = house.start()
        await house.until(lambda: waiting.planned.is_set() and waiting.state == "queued")
        house.scheduler.cancel(waiting, "not wanted")
        assert (waiting.state, str(waiting.error)) == ("cancelled", "not wanted")
        await house.until(lambda: house.residency.used("cpu") == ONE)
        house.scheduler.cancel(stage, "nor this")
        assert (stage.state, house.residency.used("cpu")) == ("cancelled", ONE), "its reader may still write"
        house.scheduler.cancel(stage, "again")
        assert str(stage.error) == "nor this"
        house.held.set()
        await house.until(lambda: not house.residency.used("cpu"))
        assert (stage.segments, stage.ledger) == ([], None)
        assert house.count("weightd_stages_finished_total", state="cancelled") == 2

    run(test)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (SourceFailed("away"), SourceFailed, "away"),
        (CudaError("illegal address", 700), DeviceFailed, "illegal address"),
        (ZeroDivisionError("by zero"), Exception, "ZeroDivisionError: by zero"),
    ],
)
def test_what_fails_a_load_is_the_stages_error_and_frees_it(
    error: BaseException, kind: type[Exception], message: str, run: Run
) -> None:
    async def test(house: House) -> None:
        house.fails.append(error)
        house.held.set()
        stage = house.start()
        assert await stage.wait(60)
        assert (stage.state, str(stage.error)) == ("failed", message)
        assert isinstance(stage.error, kind)
        assert stage.error.__traceback__ is None
        await house.until(lambda: not house.residency.used("cpu"))
        assert stage.id in house.residency.stages, "it is there to be looked at"
        again = house.start()
        assert await again.wait(60)
        assert again.state == "ready", "its turn was given back"

    run(test)


@pytest.mark.parametrize("announced", [False, True])
def test_what_cannot_be_served_is_refused_and_only_who_was_told_of_it_finds_it(announced: bool, run: Run) -> None:
    async def test(house: House) -> None:
        for request, kind in ({}, InsufficientCapacity), ({"tensors": {"include": ["x"]}}, InvalidRequest):
            stage = house.start(**request)
            stage.announced = announced
            await stage.wait(60)
            assert isinstance(stage.error, kind)
            assert refused(stage) is not announced
            await house.until(lambda stage=stage: (stage.id in house.residency.stages) is announced)
        assert house.count("weightd_stages_finished_total", state="failed") == (2 if announced else 0)

    run(test, capacity=ONE - 1)


def test_what_makes_room_is_counted_when_it_is_staged_again(run: Run) -> None:
    async def test(house: House) -> None:
        house.held.set()
        first = house.start()
        assert await first.wait(60)
        other = house.start(tensors={"include": ["a"]})
        assert await other.wait(60)
        assert (first.state, other.state) == ("evicted", "ready")
        assert house.count("weightd_stages_restaged_total") == 0
        assert await house.start().wait(60)
        assert (house.count("weightd_stages_restaged_total"), other.state) == (1, "evicted")

    run(test, capacity=ONE + 4096)


# ---------------------------------------------------------------------------- going on


async def interrupted(house: House) -> Stage:
    """A stage whose daemon died after the first of its extents had landed."""
    stage = house.stage()
    loading = house.start()
    house.held.set()
    assert await loading.wait(60)
    stage.segments, loading.segments = [house.device.allocate(loading.segments[0].nbytes, "test")], loading.segments
    stage.infos = loading.infos
    stage.reserved = {"cpu": stage.segments[0].footprint}
    stage.announced = True
    house.residency.keep(stage)
    house.residency.release(loading)
    del house.residency.stages[loading.id]
    house.reads.clear()
    return stage


async def resume(house: House, stage: Stage, answer: Any) -> None:
    async def relist(uri: str, files: tuple[str, ...]) -> tuple[Any, Any]:
        if isinstance(answer, BaseException):
            raise answer
        return house.source(stage), answer

    async with asyncio.timeout(60):
        await house.scheduler.resume(stage, relist, lambda uri: house.source(stage))


@pytest.mark.parametrize("lent", [False, True], ids=["", "lent while it loaded"])
def test_a_load_goes_on_from_what_the_daemon_before_has_left(lent: bool, run: Run) -> None:
    async def test(house: House) -> None:
        stage = await interrupted(house)
        source, tensors = house.stored.source, house.stored.checkpoint.tensors
        recipes = checkpoint_layout(tensors)
        extents = plan_extents(
            tensors, recipes, Demands(min(MiB, source.max_extent), source.max_runs, source.min_range)
        )
        stage.ledger = ledger_for(tensors, recipes, extents)
        segment = stage.segments[0]
        segment.view[:MiB] = house.stored.data["a"]
        stage.ledger.leaves([1])[0][0] = leaf_digest(house.stored.data["a"])
        stage.ledger.landed[0] = 1
        if lent:
            os.close(segment.lend())
            segment = house.device.adopt(os.dup(segment.fd), segment.nbytes)
            stage.segments[0].close()
            stage.segments[0] = segment
            assert not segment.writable
        await resume(house, stage, house.stored.checkpoint.listing)
        assert (stage.state, stage.error) == ("ready", None)
        assert house.reads == [stage.id]
        assert (stage.segments[0] is segment) is not lent, (
            "what was lent is copied, as it cannot be written to any more"
        )
        assert house.residency.used("cpu") == ONE
        assert os.pread(stage.segments[0].fd, 1 << 21, 0)[: MiB + 100] == b"".join(house.stored.data.values())

    run(test)


def test_a_load_of_another_plan_begins_anew(run: Run) -> None:
    async def test(house: House) -> None:
        stage = await interrupted(house)
        before, stage.ledger = stage.segments[0], Ledger.new(1, 2, bytes(16))
        await resume(house, stage, house.stored.checkpoint.listing)
        assert stage.state == "ready"
        assert stage.segments[0] is not before
        assert house.residency.used("cpu") == ONE

    run(test)


def test_a_source_that_says_otherwise_ends_it_and_one_that_says_nothing_is_asked_again(run: Run) -> None:
    async def test(house: House) -> None:
        another = replace(house.stored.checkpoint.listing, identity="another", weights=())
        for answer, kind in (
            (CheckpointNotFound("gone"), CheckpointNotFound),
            (another, CheckpointChanged),
            (InvalidRequest("no"), InvalidRequest),
            (ZeroDivisionError("x"), Exception),
        ):
            stage = await interrupted(house)
            await resume(house, stage, answer)
            assert stage.state == "failed"
            assert isinstance(stage.error, kind)
            assert (house.residency.used("cpu"), house.reads) == (0, [])

    run(test)


# ---------------------------------------------------------------------------- in parts


def test_entries_are_taken_back_unless_somebody_leases_what_was_told(run: Run) -> None:
    async def test(house: House) -> None:
        stage = house.stage()
        stage.verified = [[0, 1], [0]]
        assert await house.scheduler._take_back(stage, {(0, 1), (1, 5)})
        assert stage.verified == [[0], [0]]
        stage.leases["le-1"] = None  # type: ignore[assignment]
        assert await house.scheduler._take_back(stage, {(0, 1)}), "of that nobody was told"
        assert not await house.scheduler._take_back(stage, {(1, 0)})
        assert stage.verified == [[0], [0]]

    run(test)


def test_more_is_promised_for_a_copy_and_given_back(run: Run) -> None:
    async def test(house: House) -> None:
        stage = house.stage()
        stage.reserved = {"cpu": 100, "cpu:1": 5}
        house.residency.keep(stage)
        assert await house.scheduler._reserve_more(stage, {"cpu": 50})
        assert stage.reserved == {"cpu": 150, "cpu:1": 5}
        assert not await house.scheduler._reserve_more(stage, {"cpu": 51})
        assert stage.reserved == {"cpu": 150, "cpu:1": 5}
        house.scheduler._reserve_less(stage, {"cpu": 50})
        assert stage.reserved == {"cpu": 100, "cpu:1": 5}

    run(test, capacity=200)
