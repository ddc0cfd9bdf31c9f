"""A feed: what there is as records, to any number of watchers, first all of it and then what changes.

Nothing is queued for anybody. The feed keeps the last text of each record, in the order in which they changed; a
watcher has a place in that order, and takes from there as fast as it reads. Whoever is slow skips what lies between.
Nothing is looked at while nobody watches.

On the event loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any, NamedTuple

from weightd.daemon.errors import TooManyWatchers
from weightd.daemon.lasting import lasting

log = logging.getLogger(__name__)

MAX_EVENT_BYTES = 64 << 10
"""Text of one event's records, but for a single record that is longer."""
_MAX_GONE = 4096
"""Records that are remembered as gone; a watcher that is further behind begins anew."""
_STUCK = 30.0
"""Seconds after which a watcher that takes nothing is hung up on."""
_SHARE = 20
"""The feed sleeps this many times as long as it has looked, so that very much to look at costs a twentieth at most."""
_RENDER_AT_ONCE = 32
"""Records rendered before others on the event loop have their turn."""


class Row(NamedTuple):
    """One record: its kind, its key among those of that kind, and how to render it as JSON, on one line.

    It is rendered only where ``mark`` differs from what it was.
    """

    kind: str
    key: str
    mark: Any
    render: Callable[[], str]


class Event(NamedTuple):
    """What a watcher is told: ``snapshot`` until it knows all there is, then ``changes``."""

    name: str
    id: int
    text: str
    """A JSON object: the records by kind, and the keys of those that are gone."""
    more: bool
    """Whether more follows at once."""


class _Entry(NamedTuple):
    version: int
    mark: Any
    text: str | None
    """None: it is gone."""


class Feed:
    """What ``read`` returns, looked at every ``interval`` seconds, for up to ``most`` watchers at once."""

    def __init__(self, read: Callable[[], Iterable[Row]], *, interval: float = 0.25, most: int = 64) -> None:
        self._read = read
        self._interval = interval
        self._most = most
        self._version = 0
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        """In the order of their versions."""
        self._gone = 0
        """Entries of records that are gone."""
        self._forgotten = 0
        """Version of the last such entry that was dropped."""
        self._broken: set[tuple[str, str]] = set()
        """What could not be read or rendered, and was complained of."""
        self._watchers: set[Watcher] = set()
        self._looking: asyncio.Task[None] | None = None
        self._looked = asyncio.Event()
        """Whether the entries are of now."""
        self._changed = asyncio.Event()
        self._closed = False

    @contextlib.contextmanager
    def watcher(self, hang_up: Callable[[], None] = lambda: None) -> Iterator[Watcher]:
        """Somebody who watches, within the block. ``hang_up`` is called where it has long taken nothing.

        Raises TooManyWatchers.
        """
        if len(self._watchers) >= self._most:
            raise TooManyWatchers(
                f"{self._most} clients watch this node already, which is all that may: close some",
                retry_after_seconds=5,
            )
        watcher = Watcher(self, hang_up)
        self._watchers.add(watcher)
        if self._looking is None:
            self._looking = lasting(self._look_on(), "looking at what changes")
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)
            if not self._watchers:
                self._looking.cancel()
                self._looking = None
                self._entries.clear()
                if not self._closed:
                    self._looked.clear()
                self._gone = 0

    def close(self) -> None:
        """End all watching; what begins later ends at once."""
        self._closed = True
        self._looked.set()
        self._wake()

    # ------------------------------------------------------------------ looking

    async def _look_on(self) -> None:
        while True:
            spent = await self._look()
            self._looked.set()
            stuck = time.monotonic() - _STUCK
            for watcher in list(self._watchers):
                if watcher.offered is not None and watcher.offered < stuck:
                    log.info("a client that watches has read nothing for %.0f s: hanging up", _STUCK)
                    watcher.hang_up()
            await asyncio.sleep(max(self._interval, _SHARE * spent))

    async def _look(self) -> float:
        """Take note of what has changed; returns the seconds that it took to find that out."""
        started, before = time.perf_counter(), self._version
        seen: set[tuple[str, str]] = set()
        changed: list[Row] = []
        try:
            for row in self._read():
                seen.add((row.kind, row.key))
                entry = self._entries.get((row.kind, row.key))
                if entry is None or entry.text is None or entry.mark != row.mark:
                    changed.append(row)
            self._broken.discard(("", ""))
        except Exception:
            self._complain("", "", "what there is cannot be read")  # those who watch go on with what was there
            return time.perf_counter() - started
        gone = [key for key, entry in self._entries.items() if entry.text is not None and key not in seen]
        spent = time.perf_counter() - started
        for key in gone:
            self._put(key, None, None)
        for number, row in enumerate(changed, 1):
            key = row.kind, row.key
            try:
                text = row.render()
                self._broken.discard(key)
            except Exception:
                self._complain(*key, f"{row.kind} {row.key} cannot be rendered")
                continue
            entry = self._entries.get(key)
            if entry is not None and entry.text == text:
                self._entries[key] = entry._replace(mark=row.mark)
            else:
                self._put(key, row.mark, text)
            if not number % _RENDER_AT_ONCE:
                await asyncio.sleep(0)
        self._forget()
        if self._version != before:
            self._wake()
        return spent

    def _complain(self, kind: str, key: str, words: str) -> None:
        """Log the exception, once until it has gone well again."""
        if (kind, key) not in self._broken:
            log.exception(words)
        if len(self._broken) < _MAX_GONE:
            self._broken.add((kind, key))

    def _put(self, key: tuple[str, str], mark: Any, text: str | None) -> None:
        self._version += 1
        before = self._entries.get(key)
        self._gone += (text is None) - (before is not None and before.text is None)
        self._entries[key] = _Entry(self._version, mark, text)
        self._entries.move_to_end(key)

    def _forget(self) -> None:
        if self._gone <= _MAX_GONE:
            return
        dropped = [key for key, entry in self._entries.items() if entry.text is None][: self._gone - _MAX_GONE // 2]
        for key in dropped:
            self._forgotten = self._entries.pop(key).version
        self._gone -= len(dropped)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # ------------------------------------------------------------------ telling

    def _since(self, place: int) -> list[tuple[tuple[str, str], _Entry]]:
        """Entries later than a place, in order."""
        later: list[tuple[tuple[str, str], _Entry]] = []
        for key in reversed(self._entries):
            entry = self._entries[key]
            if entry.version <= place:
                break
            later.append((key, entry))
        return later[::-1]

    def _next(self, place: int, whole: bool) -> tuple[int, str, bool]:
        """What to tell from a place on: the place after it, the records' text, and whether there is more.

        ``whole``: to somebody who knows nothing yet.
        """
        records: dict[str, list[str]] = {}
        gone: dict[str, list[str]] = {}
        nbytes = 0
        for (kind, key), entry in self._since(place):
            if nbytes >= MAX_EVENT_BYTES:
                return place, _joined(records, gone), True
            place = entry.version
            if entry.text is not None:
                records.setdefault(kind, []).append(entry.text)
                nbytes += len(entry.text)
            elif not whole:
                gone.setdefault(kind, []).append(json.dumps(key))
                nbytes += len(key)
        return max(place, self._version), _joined(records, gone), False


class Watcher:
    """Somebody who watches a feed: its place in it."""

    def __init__(self, feed: Feed, hang_up: Callable[[], None]) -> None:
        self.hang_up = hang_up
        self.offered: float | None = None
        """Since when something is offered that has not been taken, in monotonic seconds."""
        self._feed = feed

    async def events(self) -> AsyncIterator[Event]:
        """All there is, in as many events as it takes, then what changes; ends when the feed is closed."""
        feed = self._feed
        place, since, part = 0, 0, 0
        """``since``: the version at which the snapshot began; ``part``: which of it, -1 once it is complete."""
        await feed._looked.wait()
        while not feed._closed:
            changed = feed._changed
            if place < feed._forgotten and since < feed._forgotten:
                place, part = 0, 0  # too far behind to be told what has gone
            if place == 0:
                since = feed._version
            before = place
            place, text, more = feed._next(place, whole=place == 0)
            if part >= 0 or place > before:
                name = "changes" if part < 0 else "snapshot"
                head = f'"at":{time.time():.3f},"part":{max(part, 0)},"more":{"true" if more else "false"}'
                self.offered = time.monotonic()
                yield Event(name, place, f"{{{head}{text}}}", more)
                self.offered = None
                part = part + 1 if part >= 0 and more else -1
            if not more:
                await changed.wait()


def _joined(records: dict[str, list[str]], gone: dict[str, list[str]]) -> str:
    """Members of a JSON object, each after a comma."""
    text = "".join(f',"{kind}":[{",".join(texts)}]' for kind, texts in records.items())
    if gone:
        text += ',"gone":{' + ",".join(f'"{kind}":[{",".join(keys)}]' for kind, keys in gone.items()) + "}"
    return text
