"""The feed: what watchers are told, in which pieces, and what they cost whoever they watch."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from weightd.daemon.errors import TooManyWatchers
from weightd.daemon.node import feed as feed_module
from weightd.daemon.node.feed import MAX_EVENT_BYTES, Event, Feed, Row, Watcher

FAST = 0.001
"""Seconds between looks, where a test is not about them."""
Told = dict[tuple[str, str], Any]


class Things:
    """What a feed reads: kind and key → value. Counts how often it was looked at, and rendered."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], Any] = {}
        self.looks = 0
        self.rendered = 0
        self._looked = asyncio.Event()

    def read(self) -> Iterator[Row]:
        self.looks += 1
        self._looked.set()
        for (kind, key), value in self.values.items():
            yield Row(kind, key, value, lambda key=key, value=value: self._render(key, value))  # type: ignore[misc]

    def _render(self, key: str, value: Any) -> str:
        self.rendered += 1
        return json.dumps({"key": key, "value": value})

    async def looked_at(self, times: int) -> None:
        """Wait until it has been looked at so many times more."""
        for _ in range(times):
            self._looked.clear()
            async with asyncio.timeout(20):
                await self._looked.wait()


class Client:
    """A watcher that keeps what it is told, as the page does."""

    def __init__(self, watcher: Watcher) -> None:
        self.told: Told = {}
        self.events: list[Event] = []
        self._coming: Told | None = None
        self._stream = watcher.events()

    async def next(self) -> Event:
        async with asyncio.timeout(20):
            event = await anext(self._stream)
        self.events.append(event)
        message = json.loads(event.text)
        if event.name == "snapshot":
            target = {} if message["part"] == 0 or self._coming is None else self._coming
            self._coming = target if event.more else None
        else:
            target = self.told
        for kind in message.keys() - {"at", "part", "more", "gone"}:
            target.update({(kind, record["key"]): record["value"] for record in message[kind]})
        for kind, keys in message.get("gone", {}).items():
            for key in keys:
                target.pop((kind, key), None)
        if not event.more:
            self.told = target
        return event

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self.next()


@contextlib.asynccontextmanager
async def watching(feed: Feed) -> AsyncIterator[Client]:
    with feed.watcher() as watcher:
        yield Client(watcher)


def run(test: Callable[[], Any]) -> None:
    """Run it on an event loop, which has to have no tasks left afterwards."""

    async def whole() -> None:
        await test()
        if left := asyncio.all_tasks() - {asyncio.current_task()}:
            _, left = await asyncio.wait(left, timeout=10)
        assert not left

    asyncio.run(whole())


def test_a_watcher_is_told_all_there_is_and_then_only_what_changes() -> None:
    things = Things()
    things.values = {("stages", "a"): 1, ("stages", "b"): 1, ("leases", "x"): 1}
    feed = Feed(things.read, interval=FAST)

    async def test() -> None:
        async with watching(feed) as client:
            first = await client.next()
            assert (first.name, first.more) == ("snapshot", False)
            assert client.told == things.values
            things.values[("stages", "b")] = 2
            del things.values[("leases", "x")]
            await client.until(lambda: client.told == things.values)
        told = [json.loads(event.text) for event in client.events[1:]]
        assert {event.name for event in client.events[1:]} == {"changes"}
        assert [record["key"] for message in told for record in message.get("stages", [])] == ["b"]
        assert [message["gone"] for message in told if "gone" in message] == [{"leases": ["x"]}]
        assert [event.id for event in client.events] == sorted({event.id for event in client.events})

    run(test)


def test_many_changes_between_two_looks_are_one_event() -> None:
    things = Things()
    feed = Feed(things.read, interval=0.05)

    async def test() -> None:
        async with watching(feed) as client:
            await client.next()
            started, before = time.monotonic(), things.looks
            changer = asyncio.create_task(_change_always(things))
            for _ in range(6):
                await client.next()
            changer.cancel()
        # The first of the six may come at once.
        assert time.monotonic() - started >= 5 * 0.05
        assert things.looks - before >= 6

    run(test)


async def _change_always(things: Things) -> None:
    for number in range(10_000_000):
        things.values["stages", "a"] = number
        await asyncio.sleep(0)


def test_looking_costs_a_twentieth_of_the_time_at_most() -> None:
    looks: list[float] = []

    def slow() -> Iterator[Row]:
        began = time.perf_counter()
        while time.perf_counter() < began + 0.005:
            pass
        looks.append(began)
        yield Row("stages", "a", began, lambda: json.dumps({"key": "a", "value": began}))

    async def test() -> None:
        async with watching(Feed(slow, interval=0.0)) as client:
            await client.until(lambda: len(looks) >= 4)
        assert min(b - a for a, b in itertools.pairwise(looks)) >= 20 * 0.005

    run(test)


def test_who_reads_slowly_gets_the_latest_and_nothing_in_between() -> None:
    things = Things()
    things.values["stages", "a"] = 0
    feed = Feed(things.read, interval=FAST)

    async def test() -> None:
        async with watching(feed) as slow, watching(feed) as quick:
            await slow.next()
            await quick.next()
            for number in range(1, 101):
                things.values["stages", "a"] = number
                await quick.until(lambda number=number: quick.told["stages", "a"] == number)  # type: ignore[misc]
            await slow.next()
            assert slow.told["stages", "a"] == 100
            assert len(slow.events) == 2

    run(test)


def test_each_record_is_rendered_once_for_all_who_watch() -> None:
    things = Things()
    things.values = {("stages", str(number)): number for number in range(50)}
    feed = Feed(things.read, interval=FAST, most=40)

    async def test() -> None:
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(watching(feed)) for _ in range(40)]
            for client in clients:
                await client.next()
            things.values["stages", "7"] = -1
            for client in clients:
                await client.until(lambda client=client: client.told["stages", "7"] == -1)  # type: ignore[misc]
        assert things.rendered == 51

    run(test)


def test_a_large_snapshot_comes_in_pieces_that_are_bounded() -> None:
    things = Things()
    things.values = {("stages", str(number)): "x" * 1000 for number in range(1000)}
    feed = Feed(things.read, interval=FAST)

    async def test() -> None:
        async with watching(feed) as client:
            while (await client.next()).more:
                # What changes meanwhile belongs to it.
                things.values["stages", "3"] = "y"
                things.values.pop(("stages", "4"), None)
            await client.until(lambda: client.told == things.values)
        assert len(client.events) >= 1000 * 1000 // MAX_EVENT_BYTES
        assert max(len(event.text) for event in client.events) < MAX_EVENT_BYTES + 2000
        parts = [json.loads(event.text)["part"] for event in client.events if event.name == "snapshot"]
        assert parts == list(range(len(parts)))

    run(test)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_at_whatever_pace_a_watcher_ends_up_with_what_there_is(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "_MAX_GONE", 6)
    monkeypatch.setattr(feed_module, "MAX_EVENT_BYTES", 200)
    rng = random.Random(seed)
    things = Things()
    feed = Feed(things.read, interval=FAST)

    async def reader(client: Client, pause: float) -> None:
        while client.told.get(("stages", "last")) != "last":
            await client.next()
            await asyncio.sleep(pause * rng.random())

    async def test() -> None:
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(watching(feed)) for _ in range(4)]
            readers = [
                asyncio.create_task(reader(client, pause))
                for client, pause in zip(clients, (0.0, 2 * FAST, 20 * FAST, 60 * FAST), strict=True)
            ]
            for number in range(300):
                key = rng.choice(("stages", "leases", "peers")), str(rng.randrange(30))
                if rng.random() < 0.55:
                    things.values[key] = number
                else:
                    things.values.pop(key, None)
                if rng.random() < 0.3:
                    await asyncio.sleep(2 * FAST * rng.random())
            things.values["stages", "last"] = "last"
            await asyncio.gather(*readers)
            for client in clients:
                await client.until(lambda client=client: client.told == things.values)  # type: ignore[misc]

    run(test)


def test_who_is_too_far_behind_to_be_told_what_has_gone_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "_MAX_GONE", 4)
    monkeypatch.setattr(feed_module, "MAX_EVENT_BYTES", 60)
    things = Things()
    things.values = {("stages", f"old{number}"): number for number in range(5)}
    feed = Feed(things.read, interval=FAST)

    async def test() -> None:
        async with watching(feed) as slow, watching(feed) as quick:
            await slow.until(lambda: slow.told == things.values)
            parts = len(slow.events)
            for number in range(12):
                things.values["stages", "short-lived"] = things.values["leases", f"x{number}"] = number
                await quick.until(lambda: quick.told == things.values)
                del things.values["stages", "short-lived"], things.values["leases", f"x{number}"]
                await quick.until(lambda: quick.told == things.values)
            assert [event.name for event in quick.events].count("snapshot") == parts
            await slow.next()
            await slow.until(lambda: slow.told == things.values)
            assert "snapshot" in {event.name for event in slow.events[parts:]}
            async with watching(feed) as late:  # whom none of that concerns
                await late.until(lambda: late.told == things.values)
                assert [event.name for event in late.events].count("snapshot") == len(late.events)

    run(test)


def test_nothing_is_looked_at_while_nobody_watches() -> None:
    things = Things()
    feed = Feed(things.read, interval=FAST)

    async def test() -> None:
        async with watching(feed) as client:
            await client.next()
        looks = things.looks
        things.values["stages", "a"] = 1
        for _ in range(20):
            await asyncio.sleep(FAST)
        assert things.looks == looks
        async with watching(feed) as client:
            await client.next()
            assert client.told == {("stages", "a"): 1}  # nor is anything of before told

    run(test)


def test_there_is_room_for_so_many_watchers_and_again_when_one_has_gone() -> None:
    feed = Feed(Things().read, interval=FAST, most=2)

    async def test() -> None:
        with feed.watcher():
            with feed.watcher(), pytest.raises(TooManyWatchers, match="2 clients"), feed.watcher():
                pass
            with feed.watcher():
                pass

    run(test)


def test_who_takes_nothing_for_long_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "_STUCK", 0.0)
    things = Things()
    hung_up: list[str] = []

    async def test() -> None:
        feed = Feed(things.read, interval=FAST)
        with (
            feed.watcher(lambda: hung_up.append("stuck")) as stuck,
            feed.watcher(lambda: hung_up.append("idle")) as idle,
        ):
            await anext(stuck.events())
            waiting = asyncio.ensure_future(Client(idle).until(lambda: False))
            await things.looked_at(3)
            assert "stuck" in hung_up
            waiting.cancel()

    run(test)
    assert "idle" not in hung_up


def test_what_cannot_be_read_or_rendered_is_left_out_until_it_can() -> None:
    things = Things()
    things.values["stages", "good"] = 1
    broken = {"read": False}

    def read() -> Iterator[Row]:
        yield from things.read()
        yield Row("stages", "bad", 1, lambda: str(1 // 0))
        if broken["read"]:
            raise RuntimeError("changed while it was read")

    async def test() -> None:
        async with watching(Feed(read, interval=FAST)) as client:
            await client.next()
            assert client.told == {("stages", "good"): 1}
            broken["read"] = True
            things.values["stages", "good"] = 2
            await things.looked_at(3)
            broken["read"] = False
            await client.until(lambda: client.told == {("stages", "good"): 2})

    run(test)


def test_closing_ends_those_who_watch_and_those_who_come() -> None:
    feed = Feed(Things().read, interval=FAST)

    async def test() -> None:
        async with watching(feed) as client:
            await client.next()
            feed.close()
            with pytest.raises(StopAsyncIteration):
                await client.next()
        async with watching(feed) as client:
            with pytest.raises(StopAsyncIteration):
                await client.next()

    run(test)
