"""Moving: whole whenever it is cut off, and never in the way of what comes after."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from weightd.daemon.checkpoints.listing import Listing
from weightd.daemon.devices.cpu import CpuDevice
from weightd.daemon.devices.quarantine import Quarantine
from weightd.daemon.filling.ledger import Ledger
from weightd.daemon.keeper.deposits import Deposits
from weightd.daemon.layouts.digests import leaf_digest
from weightd.daemon.limits import FillLimits
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.stages import record
from weightd.daemon.stages.manifests import SealedManifest
from weightd.daemon.stages.moves import move_segments
from weightd.daemon.stages.planning import SegmentInfo
from weightd.daemon.stages.request import StageRequest
from weightd.daemon.stages.residency import Residency
from weightd.daemon.stages.stage import Stage
from weightd.ipc.manifest import Manifest

PAGE = mmap.PAGESIZE
LIMITS = FillLimits(threads=1, in_flight_bytes=1 << 20, extent_bytes=1 << 20, bounce_buffers=2, retry_deadline=1.0)


class Kept(Deposits):
    """What a keeper holds, of a daemon that is killed before its message number ``last``."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, int] = {}
        self.last = 1 << 30
        self.messages = 0

    @property
    def kept(self) -> bool:
        return True

    def _due(self) -> bool:
        self.messages += 1
        return self.messages <= self.last

    def put(self, name: str, fd: int) -> None:
        if self._due():
            self._let_go(name)
            self.held[name] = os.dup(fd)

    def drop(self, name: str) -> None:
        if self._due():
            for held in [held for held in self.held if held == name or held.startswith(name + "/")]:
                self._let_go(held)

    def _let_go(self, name: str) -> None:
        if name in self.held:
            os.close(self.held.pop(name))

    def close(self) -> None:
        for name in list(self.held):
            self._let_go(name)


class House:
    """Two devices, and a ready stage of two segments on the first one."""

    def __init__(self) -> None:
        self.deposits = Kept()
        self.devices = {name: CpuDevice(name, 8 * PAGE) for name in ("cpu:0", "cpu:1")}
        self.residency = Residency(
            self.devices, self.deposits, Metrics(), lease_grace=30, max_leases_per_user=9, peer_grace=3600
        )
        request = StageRequest.model_validate(
            {"model": "/x", "parallel": {"tp_size": 2, "tp_rank": "all", "map": {"*": 0}}}
        )
        self.stage = stage = Stage("file:///x", ["cpu:0"] * 2, request, Listing("file:///x", "id", (), None, ()))
        self.residency.keep(stage)
        stage.reserved = {"cpu:0": 2 * PAGE}
        stage.ledger = Ledger.new(0, 2, bytes(16))
        for rank in range(2):
            segment = self.devices["cpu:0"].allocate(PAGE, stage.id)
            segment.view[:] = bytes([rank + 1]) * PAGE
            stage.ledger.leaves([2])[0][rank] = leaf_digest(segment.view)
            segment.seal()
            stage.segments.append(segment)
            manifest = Manifest(
                stage.id, stage.uri, "cpu:0", rank, 2, PAGE, None, None, None, ["w"], ["U8"], [[PAGE]], [0], None
            )
            stage.manifests.append(SealedManifest.seal(manifest, [0]))
        stage.infos = (SegmentInfo(0, PAGE, 1), SegmentInfo(1, PAGE, 1))
        stage.segment_digests = ["xxh3:0", "xxh3:1"]
        stage.enter("ready")
        record.deposit(self.deposits, stage)

    async def move(self, in_thread: Callable[..., Any] = asyncio.to_thread) -> None:
        await move_segments(self.residency, self.deposits, self.stage, self.devices["cpu:1"], LIMITS, in_thread)

    def close(self) -> None:
        self.residency.release(self.stage)
        self.deposits.close()


def restored(house: House) -> tuple[Stage, set[str]]:
    """What the next daemon makes of what is held; and what of that it drops."""
    parts = {name.partition("/")[2]: fd for name, fd in house.deposits.held.items()}
    stage = record.restore(parts, house.devices, Quarantine(Deposits(), {}))
    return stage, record.leftovers(stage, parts)


def test_a_move_that_a_kill_cuts_off_anywhere_leaves_a_stage_that_is_whole() -> None:
    cut, devices = 0, set()
    while True:
        house = House()
        with contextlib.closing(house):
            first = house.deposits.messages
            house.deposits.last = first + cut
            asyncio.run(house.move())
            done = house.deposits.messages == house.deposits.last
            stage, leftovers = restored(house)
            assert stage.state == "ready"
            devices.add(stage.device)
            for rank, (segment, manifest) in enumerate(zip(stage.segments, stage.manifests, strict=True)):
                assert os.pread(segment.fd, PAGE, 0) == bytes([rank + 1]) * PAGE
                assert manifest.read()[0].device == segment.device.name == stage.device
            house.deposits.last = 1 << 30
            for name in leftovers:
                house.deposits.drop(name)
            assert len(house.deposits.held) == 6, "something is held that belongs to nothing"
            for held in (*stage.segments, *stage.manifests, stage.ledger):
                assert held is not None
                held.close()
        if done:
            break
        cut += 1
    assert devices == {"cpu:0", "cpu:1"}
    assert cut >= 6


def test_a_move_that_is_cancelled_while_it_waits_for_peers_leaves_the_stage_as_it_was() -> None:
    async def run() -> None:
        with contextlib.closing(House()) as house:
            house.residency.leases.begin_for_peer(house.stage, "")
            moving = asyncio.create_task(house.move())
            for _ in range(10):
                await asyncio.sleep(0)
            assert house.stage.dismissed
            moving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await moving
            assert house.stage.moving is None
            assert not house.stage.dismissed
            assert house.stage.reserved == {"cpu:0": 2 * PAGE}
            for lease in list(house.stage.peer_leases):
                house.residency.leases.end_for_peer(lease)
            await house.move()
            assert house.stage.device == "cpu:1"

    asyncio.run(run())


def test_a_move_that_is_cancelled_while_it_copies_closes_nothing_before_the_copy_has_ended() -> None:
    async def run() -> None:
        begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

        def slowly(function: Callable[..., Any], *arguments: Any) -> None:
            begun.set()
            go_on.wait(60)
            function(*arguments)
            ended.set()

        async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
            return await asyncio.to_thread(*((slowly, function) if arguments else (function,)), *arguments)

        with contextlib.closing(House()) as house:
            moving = asyncio.create_task(house.move(in_thread))
            await asyncio.to_thread(begun.wait, 60)
            moving.cancel()
            for _ in range(10):
                await asyncio.sleep(0)
            assert not moving.done()
            assert house.residency.used("cpu:1") == 2 * PAGE
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await moving
            assert ended.is_set()
            assert (house.stage.device, house.stage.moving) == ("cpu:0", None)
            assert (house.residency.used("cpu:0"), house.residency.used("cpu:1")) == (2 * PAGE, 0)
            assert os.pread(house.stage.segments[1].fd, 1, 0) == b"\2"

    asyncio.run(run())
