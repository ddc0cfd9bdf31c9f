"""What a peer that listens is told, in which order, and what is let go of when it hangs up; without any process."""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.filling.far import FarDevice
from tests.peers.serving.test_news import Loading, digests
from tests.peers.serving.test_offer import BASE, Mapping
from weightd.daemon.devices.cpu import CpuDevice
from weightd.daemon.errors import UnknownStage
from weightd.daemon.peers.finding.fleet import Fleet
from weightd.daemon.peers.finding.listening import FORMAT
from weightd.daemon.peers.moving.movers import MoverFailed
from weightd.daemon.peers.serving import server as server_module
from weightd.daemon.peers.serving.server import Serving
from weightd.daemon.stages.leases import Leases

Event = dict[str, Any]


class House:
    """A stage of two segments that loads, what serves it, and the movers that it takes."""

    def __init__(self, *, on_gpu: bool = False) -> None:
        self.load = Loading()
        self.stage = self.load.stage
        device = FarDevice() if on_gpu else CpuDevice("cpu", 1 << 40)
        self.segments = [device.allocate(4096, "test") for _ in range(2)]
        self.stage.segments = cast(Any, list(self.segments))
        self.stage.key = "k" * 32
        self.stage.enter("loading")
        stages = {self.stage.id: self.stage}
        leases = Leases(stages, grace=1.0, most_per_user=1, changed=lambda: None)
        self.fleet = Fleet("me:1", list, None, 1.0)
        self.taken: list[Any] = []
        self.fails = False
        self.serving = Serving(cast(Any, SimpleNamespace(stages=stages, leases=leases)), self.fleet, cast(Any, self))

    def take(self) -> Any:
        if self.fails:
            raise MoverFailed("none is to be had")
        mover = Mapping()
        mover.alive = True  # type: ignore[attr-defined]
        mover.kill = lambda: setattr(mover, "alive", False)  # type: ignore[attr-defined]
        self.taken.append(mover)
        return mover

    def ready(self) -> None:
        segments = self.stage.segments
        self.load.ready()
        self.stage.segments = segments

    def lend(self, by: str = "peer:1") -> AsyncIterator[Event]:
        return self.serving.lend(self.stage.key, by)

    async def close(self) -> None:
        await self.serving.close()
        for segment in self.segments:
            segment.close()


async def until(events: AsyncIterator[Event], *kinds: str) -> list[Event]:
    """What is said until there was something of each of these kinds, but for signs of life."""
    found: list[Event] = []
    missing = set(kinds)
    async with asyncio.timeout(60):
        async for event in events:
            if event["type"] != "alive":
                found.append(event)
            missing.discard(event["type"])
            if not missing:
                return found
    raise AssertionError(f"there is no {missing}")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(server_module, "_LOOK", 0.001)

    def run(test: Callable[[House], Awaitable[None]], **options: Any) -> None:
        async def within() -> None:
            house = House(**options)
            try:
                await test(house)
            finally:
                await house.close()

        asyncio.run(within())

    return run


def test_of_a_ready_stage_it_is_told_where_it_lies_all_leaves_and_that_these_are_all(run: Callable[..., None]) -> None:
    async def test(house: House) -> None:
        house.ready()
        listening = house.lend()
        hello, *events = await until(listening, "segments", "complete")
        epoch = hello["epoch"]
        assert hello == {"type": "hello", "format": FORMAT, "epoch": epoch, "ready": True}
        (segments,) = [event for event in events if event["type"] == "segments"]
        assert segments == {
            "type": "segments", "epoch": epoch, "reader": None,
            "segments": [
                {"address": BASE * region, "metadata": base64.b64encode(b"metadata").decode()} for region in (1, 2)
            ],
        }  # fmt: skip
        assert [event for event in events if event["type"] == "leaves"] == [
            {"type": "leaves", "epoch": epoch, "segment": s, "first": 0, "digests": digests(s, *range(5))}
            for s in (0, 1)
        ]
        stamped = {name for event in events if event["type"] == "readers" for name in event["stamps"]}
        assert stamped == {"me:1"}, "as long as it has it all nobody has to take its place"
        assert [lease.by for lease in house.stage.peer_leases] == ["peer:1"]
        assert house.fleet.gossip.followers(house.stage.key) == {"peer:1"}
        (mover,) = house.taken
        assert [inode for inode, _, _ in mover.mapped] == [os.fstat(segment.fd).st_ino for segment in house.segments]
        await cast(Any, listening).aclose()
        assert (house.stage.peer_leases, house.serving._offers, house.serving._readers) == (set(), {}, {})
        await asyncio.gather(*house.serving._tasks)
        assert mover.open == set(), "it is mapped no more"

    run(test)


def test_of_one_that_loads_it_is_told_as_leaves_come_and_at_the_end_the_rest(run: Callable[..., None]) -> None:
    async def test(house: House) -> None:
        listening = house.lend()
        assert (await until(listening, "segments"))[0]["ready"] is False
        house.load.there(0, 1)
        house.load.account.coming[1][2] = 1
        house.fleet.gossip.publish(house.stage.key, {"other:1": 5})
        found = await until(listening, "readers", "leaves", "coming")
        # Of a machine that is busy it may be said in between that it lives.
        assert {event["type"] for event in found} - {"alive"} == {"readers", "leaves", "coming"}
        assert next(event for event in found if event["type"] == "readers")["stamps"] == {"other:1": 5}
        house.ready()
        rest = await until(listening, "complete")
        assert [(event["segment"], event["first"]) for event in rest if event["type"] == "leaves"] == [(0, 0), (1, 0)]
        await cast(Any, listening).aclose()

    run(test)


def test_where_there_is_nothing_to_say_it_is_said_that_it_lives(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_HEARTBEAT", 0.0)

    async def test(house: House) -> None:
        listening = house.lend()
        async with asyncio.timeout(60):
            assert [await anext(listening) for _ in range(6)][-1] == {"type": "alive"}
        await cast(Any, listening).aclose()

    run(test)


class Time:
    """In place of ``time``; notes how often a look begins."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.looks = 0

    def monotonic(self) -> float:
        self.looks += 1
        return self.now

    def time_ns(self) -> int:
        return 5_000_000

    async def pass_looks(self, count: int) -> None:
        """Return when so many more have begun."""
        last = self.looks + count
        async with asyncio.timeout(60):
            while self.looks < last:  # noqa: ASYNC110 - of whoever looks
                await asyncio.sleep(0.001)


@pytest.mark.parametrize("what", ["alive", "readers"])
def test_that_it_lives_and_who_reads_is_said_once_a_second_and_not_more_often(
    what: str, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Time()
    monkeypatch.setattr(server_module, "time", clock)

    async def test(house: House) -> None:
        listening = house.lend()
        await until(listening, "segments")
        if what == "readers":
            house.fleet.gossip.publish(house.stage.key, {"other:1": 5})
            assert await anext(listening) == {"type": "readers", "stamps": {"other:1": 5}}
        for now in (1001.0, 1002.5):
            said = asyncio.ensure_future(anext(listening))  # type: ignore[arg-type]
            clock.now = now - 0.125 if now == 1001.0 else 1001.875
            await clock.pass_looks(5)
            assert not said.done()
            clock.now = now
            async with asyncio.timeout(60):
                assert (await said)["type"] == what
        await cast(Any, listening).aclose()

    run(test)


def test_that_these_are_all_is_said_once_and_not_before_it_is_ready(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Time()
    monkeypatch.setattr(server_module, "time", clock)
    monkeypatch.setattr(server_module, "_HEARTBEAT", 0.001)

    async def test(house: House) -> None:
        house.fleet.me = ""
        house.stage.enter("verifying")
        listening = house.lend()
        await until(listening, "segments")
        said = asyncio.ensure_future(anext(listening))  # type: ignore[arg-type]
        await clock.pass_looks(5)
        assert not said.done()
        house.ready()
        async with asyncio.timeout(60):
            found = [await said, *[await anext(listening) for _ in range(2)]]
        assert [event["type"] for event in found] == ["leaves", "leaves", "complete"]
        said = asyncio.ensure_future(anext(listening))  # type: ignore[arg-type]
        await clock.pass_looks(5)
        assert not said.done()
        said.cancel()
        await asyncio.gather(said, return_exceptions=True)

    run(test)


def test_a_stage_that_is_ready_is_stamped_with_the_time_of_now_and_by_who_has_an_address(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "time", Time())

    async def test(house: House) -> None:
        house.ready()
        assert house.serving._stamps(house.stage) == {"me:1": 5}
        assert type(house.serving._stamps(house.stage)["me:1"]) is int
        house.fleet.me = ""
        assert house.serving._stamps(house.stage) == {}

    run(test)


def test_peers_share_what_is_mapped_and_the_last_one_to_go_lets_go_of_it(run: Callable[..., None]) -> None:
    async def test(house: House) -> None:
        house.ready()
        one, two = house.lend("one:1"), house.lend("")
        epochs = {(await until(peer, "segments", "complete"))[0]["epoch"] for peer in (one, two)}
        assert (len(epochs), len(house.taken), len(house.taken[0].mapped)) == (1, 1, 2)
        assert house.fleet.gossip.followers(house.stage.key) == {"one:1"}, "who has no address cannot be followed"
        await cast(Any, one).aclose()
        await asyncio.gather(*house.serving._tasks)
        assert len(house.taken[0].open) == 2
        await cast(Any, two).aclose()
        await asyncio.gather(*house.serving._tasks)
        assert house.taken[0].open == set()
        again = house.lend()
        (hello, *_) = await until(again, "segments", "complete")
        assert hello["epoch"] not in epochs, "it is mapped anew, and may lie elsewhere"
        assert len(house.taken) == 1
        await cast(Any, again).aclose()

    run(test)


@pytest.mark.parametrize("why", ["dismissed", "revoked", "over"])
def test_when_it_goes_that_is_told_and_who_reads_is_waited_for(why: str, run: Callable[..., None]) -> None:
    async def test(house: House) -> None:
        house.ready()
        listening = house.lend()
        await until(listening, "segments", "complete")
        if why == "dismissed":
            house.stage.dismissals = 1
        elif why == "revoked":
            house.stage.revoked_until = 5.0
        else:
            house.serving.end()
        house.stage.notify()
        assert (await until(listening, "gone"))[-1] == {"type": "gone"}
        with pytest.raises(UnknownStage) if why != "over" else pytest.raises(StopAsyncIteration):
            await anext(house.lend() if why != "over" else listening)
        if why != "over":
            assert (await anext(listening)) == {"type": "alive"}
            house.serving.withdraw(house.stage)
            async with asyncio.timeout(60):
                assert {event["type"] async for event in listening} <= {"alive"}
        await cast(Any, listening).aclose()
        await asyncio.gather(*house.serving._tasks)
        assert house.taken[0].open == set()

    run(test)


def test_without_a_mover_nothing_is_lent_and_the_next_peer_has_another_try(run: Callable[..., None]) -> None:
    async def test(house: House) -> None:
        house.ready()
        house.fails = True
        async with asyncio.timeout(60):
            said = [event["type"] async for event in house.lend()]
        assert "segments" not in said
        assert (house.stage.peer_leases, house.serving._offers) == (set(), {})
        house.fails = False
        listening = house.lend()
        await until(listening, "segments", "complete")
        house.taken[0].alive = False
        assert (await until(listening, "gone"))[-1]["type"] == "gone"
        await cast(Any, listening).aclose()
        another = house.lend()
        await until(another, "segments", "complete")
        assert len(house.taken) == 2, "a mover that has died is replaced"
        await cast(Any, another).aclose()

    run(test)


def test_of_what_is_on_a_gpu_each_reader_has_a_name_to_ask_by(run: Callable[..., None]) -> None:
    async def test(house: House) -> None:
        house.ready()
        listening = house.lend()
        (segments,) = [event for event in await until(listening, "segments", "complete") if event["type"] == "segments"]
        assert len(segments["segments"]) == 1, "it is one window"
        reader = segments["reader"]
        house.segments[1].view[:5] = b"hello"
        address = await house.serving.fetch(reader, [], [(1, 0, 5)], 0.0)
        assert address is not None
        window = house.serving._readers[reader].window
        assert window is not None
        assert bytes(window.view[address - BASE : address - BASE + 5]) == b"hello"
        await cast(Any, listening).aclose()
        with pytest.raises(UnknownStage, match="nobody listens by that name"):
            await house.serving.fetch(reader, [address], [], 0.0)

    run(test, on_gpu=True)


def test_a_key_that_nothing_here_has_is_unknown(run: Callable[..., None]) -> None:
    async def test(house: House) -> None:
        with pytest.raises(UnknownStage, match=f"no stage has the key '{'x' * 80}'"):
            await anext(house.serving.lend("x" * 99, ""))

    run(test)
