"""Times to live: what is asked for while an eviction waits for peers is seen, and nobody's wait holds up another's."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from unittest import mock

import pytest

from weightd.daemon.devices.cpu import CpuDevice
from weightd.daemon.filling.ledger import Ledger
from weightd.daemon.keeper.deposits import Deposits
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.stages import eviction
from weightd.daemon.stages.request import StageRequest
from weightd.daemon.stages.residency import Residency
from weightd.daemon.stages.stage import Stage

PAGE = mmap.PAGESIZE


@dataclass
class House:
    """A residency whose clock only a test moves."""

    residency: Residency
    device: CpuDevice
    clock: float = 1000.0
    made: list[Stage] = field(default_factory=list)

    def stage(self, ttl: float | None = None, *, pages: int = 1) -> Stage:
        """A ready stage that has been used just now."""
        stage = Stage(f"file:///m{len(self.made)}", ["cpu"], StageRequest(model="/m", ttl_seconds=ttl), None)
        self.residency.keep(stage)
        stage.reserved = {"cpu": pages * PAGE}
        stage.segments = [self.device.allocate(pages * PAGE, stage.id)]
        stage.ledger = Ledger.new(0, 0, bytes(16))
        stage.enter("ready")
        self.residency.leases.note(stage)
        self.made.append(stage)
        return stage

    def now(self) -> float:
        return self.clock

    async def rest(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    @contextlib.asynccontextmanager
    async def expiring(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.residency.expire())
        await self.rest()
        try:
            yield
            assert not task.done()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def pass_time(self, seconds: float) -> None:
        self.clock += seconds
        self.residency.changed()  # as the clock's own wait would end
        await self.rest()


@pytest.fixture
def run() -> Callable[[Callable[[House], Awaitable[None]]], None]:
    """Run a test's coroutine function in a house of its own."""

    def run(test: Callable[[House], Awaitable[None]]) -> None:
        async def within() -> None:
            device = CpuDevice("cpu", 4 * PAGE)
            residency = Residency(
                {"cpu": device}, Deposits(), Metrics(), lease_grace=30, max_leases_per_user=9, peer_grace=3600
            )
            house = House(residency, device)
            with mock.patch.object(eviction, "now", house.now):
                try:
                    await test(house)
                finally:
                    for stage in house.made:
                        residency.release(stage)

        asyncio.run(within())

    return run


Run = Callable[[Callable[[House], Awaitable[None]]], None]


def test_a_time_to_live_is_over_in_time_while_another_ones_peers_are_waited_for(run: Run) -> None:
    async def test(house: House) -> None:
        read, other, late = house.stage(10), house.stage(20), house.stage()
        house.residency.leases.begin_for_peer(read, "")
        async with house.expiring():
            await house.pass_time(11)
            assert (read.state, read.dismissed) == ("ready", True)
            late.ttl_seconds = 5.0  # it is asked for anew meanwhile
            house.residency.changed()
            await house.pass_time(10)
            assert (other.state, late.state) == ("evicted", "evicted")
            assert read.state == "ready"

    run(test)


def test_a_lease_that_ends_while_peers_of_another_are_waited_for_starts_its_time_to_live(run: Run) -> None:
    async def test(house: House) -> None:
        read, leased = house.stage(10), house.stage(10)
        lease = house.residency.leases.begin(leased, 0, uid=1, gid=1, pid=1)
        peer = house.residency.leases.begin_for_peer(read, "")
        async with house.expiring():
            await house.pass_time(11)
            house.residency.leases.end(lease)
            await house.rest()
            house.residency.leases.end_for_peer(peer)
            await house.rest()
            assert (read.state, leased.state) == ("evicted", "ready")
            await house.pass_time(11)
            assert leased.state == "evicted"

    run(test)


def test_what_is_asked_for_again_or_leased_while_its_peers_are_waited_for_stays(run: Run) -> None:
    async def test(house: House) -> None:
        asked, leased = house.stage(10), house.stage(10)
        peers = [house.residency.leases.begin_for_peer(stage, "") for stage in (asked, leased)]
        async with house.expiring():
            await house.pass_time(11)
            asked.asked_at = house.clock
            lease = house.residency.leases.begin(leased, 0, uid=1, gid=1, pid=1)
            for peer in peers:
                house.residency.leases.end_for_peer(peer)
            await house.rest()
            assert (asked.state, leased.state) == ("ready", "ready")
            assert not asked.dismissed, "peers may read it again"
            house.residency.leases.end(lease)
            await house.pass_time(11)
            assert (asked.state, leased.state) == ("evicted", "evicted")

    run(test)


def test_who_waits_for_peers_does_not_let_them_come_back_while_another_waits(run: Run) -> None:
    async def test(house: House) -> None:
        stage = house.stage()
        peer = house.residency.leases.begin_for_peer(stage, "")
        first = asyncio.create_task(house.residency.dismiss([stage]))
        second = asyncio.create_task(house.residency.dismiss([stage]))
        await house.rest()
        first.cancel()
        await house.rest()
        assert stage.dismissed
        house.residency.leases.end_for_peer(peer)
        await second
        assert not stage.dismissed

    run(test)


def test_room_waits_for_the_peers_of_all_that_goes_also_where_it_is_another_by_then(run: Run) -> None:
    async def test(house: House) -> None:
        first, second = house.stage(), house.stage()
        first.last_used -= 1
        peers = {stage.id: house.residency.leases.begin_for_peer(stage, "") for stage in (first, second)}
        room = asyncio.create_task(house.residency.dismiss_victims({"cpu": 3 * PAGE}))
        await house.rest()
        assert (first.dismissed, second.dismissed) == (True, False)
        lease = house.residency.leases.begin(first, 0, uid=1, gid=1, pid=1)
        house.residency.leases.end_for_peer(peers[first.id])
        await house.rest()
        assert second.dismissed
        assert not room.done()
        house.residency.leases.end_for_peer(peers[second.id])
        await room
        house.residency.make_room("/new", {"cpu": 3 * PAGE})
        assert (first.state, second.state) == ("ready", "evicted")
        house.residency.leases.end(lease)

    run(test)
