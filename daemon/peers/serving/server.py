"""What this daemon lets its peers read: segments that are ready, and what has come already of those that load.

On the event loop. A peer reads by itself, through a mover process that has the segments mapped; what it is told here is
where they are, which of their leaves are there, and with what digests. Listening to that is its lease.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from weightd.daemon.errors import DeviceFailed, InvalidRequest, UnknownStage
from weightd.daemon.peers.finding.fleet import Fleet
from weightd.daemon.peers.finding.listening import FORMAT
from weightd.daemon.peers.moving.movers import Mover, MoverFailed, Movers
from weightd.daemon.peers.serving.news import News
from weightd.daemon.peers.serving.offer import Offer
from weightd.daemon.stages.residency import Residency
from weightd.daemon.stages.stage import Stage
from weightd.ipc.errors import CudaError

log = logging.getLogger(__name__)

T = TypeVar("T")

_LOOK = 0.05
"""Seconds between looks at what has come of a stage that loads."""
_HEARTBEAT = 1.0


class Serving:
    """Lends segments to peers, and says what there is."""

    def __init__(self, residency: Residency, fleet: Fleet, movers: Movers) -> None:
        self._residency = residency
        self._fleet = fleet
        self._movers = movers
        self._mover: Mover | None = None
        self._ending = False
        self._readers: dict[str, Offer] = {}
        """Who listens, by the name that it was given, and to what."""
        self._offers: dict[str, _Offering] = {}
        """Stage → what is offered of it."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._lock = asyncio.Lock()

    def stages(self) -> dict[str, float]:
        """Stage key → how much of it there is, 0 to 1."""
        return {stage.key: _share(stage) for stage in self._residency.stages.values() if _servable(stage)}

    def identity_of(self, uri: str) -> str | None:
        """Of what is at a URI, as the latest stage here that peers can read knows it."""
        found = [stage for stage in self._residency.stages.values() if stage.uri == uri and _servable(stage)]
        listing = found[-1].listing if found else None
        return listing.identity if listing else None

    def published(self) -> dict[str, float]:
        """The same in quarters, so that a directory is not told of every extent."""
        return {key: int(4 * share) / 4 for key, share in self.stages().items()}

    async def lend(self, key: str, by: str) -> AsyncIterator[dict[str, Any]]:
        """Events for one peer, as long as it listens; ``gone`` is the last one. ``by`` is its address, if it has one.

        ``hello``: whether it is ready; ``segments``: where they can be read, or, of what is on a GPU, the window that
        ``fetch`` puts it into; ``leaves``: these are there, with their digests; ``coming``: these are being read from
        the origin; ``complete``; ``readers``: who reads the origin, and when they said so last; ``alive``. What is said
        of leaves holds for the ``epoch`` of the segments. Raises UnknownStage.
        """
        stage = next((s for s in self._residency.stages.values() if s.key == key and _servable(s)), None)
        if stage is None:
            raise UnknownStage(f"no stage has the key {key[:80]!r}")
        if by:
            self._fleet.gossip.followed(key, by)
        lease = self._residency.leases.begin_for_peer(stage, by)
        offering = self._offered(stage)
        offering.listeners += 1
        reader = secrets.token_hex(16)
        try:
            yield {"type": "hello", "format": FORMAT, "epoch": offering.epoch, "ready": stage.state == "ready"}
            async for event in self._events(stage, offering, reader):
                yield event
            yield {"type": "gone"}
            # It hangs up once nothing of its reads is under way; unmapping what it reads would end our process.
            while offering.mapped and not offering.withdrawn and not self._ending:
                yield {"type": "alive"}
                await asyncio.sleep(_LOOK)
        except (MoverFailed, OSError) as error:
            log.warning("%s cannot be lent to peers: %s", stage.id, error)
        finally:
            # Nothing here waits: whoever hangs up cancels every wait.
            if (left := self._readers.pop(reader, None)) is not None:
                left.release(reader)
            self._residency.leases.end_for_peer(lease)
            offering.listeners -= 1
            if not offering.listeners:
                self._withdraw(stage, offering)

    async def _events(self, stage: Stage, offering: _Offering, reader: str) -> AsyncIterator[dict[str, Any]]:
        """What there is to say of a stage, as long as it can be read. Raises MoverFailed, OSError."""
        news = News(offering.epoch)
        mapped = False
        spoke = stamped = 0.0
        # Where it lies is known in a moment, once the process runs; working out what to say of leaves takes longer.
        await asyncio.wait([offering.made], timeout=_LOOK)
        while _servable(stage) and (not mapped or offering.mapped) and not self._ending:
            now = time.monotonic()
            batch: list[dict[str, Any]] = []
            if not mapped and offering.made.done():
                offer = self._readers[reader] = offering.made.result()
                mapped, spoke = True, now
                yield _segments(offer, reader, offering.epoch)
                await asyncio.sleep(0.001)  # sent before a thread begins with leaves, which holds the interpreter
            if now - stamped >= _HEARTBEAT and (stamps := self._stamps(stage)):
                stamped = now
                batch.append({"type": "readers", "stamps": stamps})
            if news.behind(stage):
                with contextlib.suppress(IndexError):  # it ends at this very moment: the next look says how
                    batch += await asyncio.to_thread(news.catch_up, stage)
            elif stage.state == "ready" and not news.complete:
                news.complete = True
                batch.append({"type": "complete"})
            elif not batch and now - spoke >= _HEARTBEAT:
                batch.append({"type": "alive"})
            for event in batch:
                spoke = now
                yield event
            if mapped or not offering.made.done():
                await stage.changed(_HEARTBEAT if news.complete else _LOOK)

    def _stamps(self, stage: Stage) -> dict[str, int]:
        """Who reads the origin: as long as this node has it all, nobody has to take its place."""
        if stage.state == "ready":
            return {self._fleet.me: time.time_ns() // 1_000_000} if self._fleet.me else {}
        return self._fleet.gossip.published(stage.key)

    def _offered(self, stage: Stage) -> _Offering:
        found = self._offers.get(stage.id)
        if found is None or found.broken:
            if self._mover is None or not self._mover.alive:
                self._mover = None
            found = self._offers[stage.id] = _Offering(self._spawn(self._make(stage)))
            found.made.add_done_callback(lambda _: stage.notify())
        return found

    async def _make(self, stage: Stage) -> Offer:
        return await asyncio.to_thread(Offer, await self.mover(), list(stage.segments))

    async def mover(self) -> Mover:
        """The process that peers read from, started if need be. Raises MoverFailed."""
        async with self._lock:
            if self._mover is None or not self._mover.alive:
                self._mover = await asyncio.to_thread(self._movers.take)
            return self._mover

    async def fetch(
        self, reader: str, given: Sequence[int], pieces: Sequence[tuple[int, int, int]], timeout: float
    ) -> int | None:
        """For a listening ``reader``: put pieces, each (segment, offset, bytes), where it can read them, and say where.

        ``given`` are such addresses that it has read. None: no room within so many seconds. Raises UnknownStage,
        InvalidRequest, DeviceFailed.
        """
        offer = self._readers.get(reader)
        if offer is None or offer.window is None:
            raise UnknownStage("nobody listens by that name, or not to what is on a GPU")
        offer.release(reader, given)
        if not pieces:
            return None
        try:
            return await asyncio.to_thread(offer.fetch, reader, pieces, timeout)
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        except CudaError as error:
            raise DeviceFailed(str(error), **error.details) from None

    def withdraw(self, stage: Stage) -> None:
        """Its memory is being freed: unmap it, whoever still reads it."""
        if offering := self._offers.get(stage.id):
            self._withdraw(stage, offering)

    def _withdraw(self, stage: Stage, offering: _Offering) -> None:
        if self._offers.get(stage.id) is offering:
            del self._offers[stage.id]
        if offering.withdrawn:
            return
        offering.withdrawn = True

        async def close() -> None:
            with contextlib.suppress(Exception):  # then there is nothing to close
                offer = await offering.made
                await asyncio.to_thread(offer.close)

        self._spawn(close())

    def _spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def end(self) -> None:
        """Tell all who listen that it is over."""
        self._ending = True
        for stage in self._residency.stages.values():
            stage.notify()

    async def close(self) -> None:
        """End the process that peers read from."""
        if self._mover is not None:
            await asyncio.to_thread(self._mover.kill)


class _Offering:
    """A stage's segments as one mover process has them, and how many peers listen."""

    def __init__(self, made: asyncio.Task[Offer]) -> None:
        self.made = made
        self.listeners = 0
        self.withdrawn = False
        self.epoch = secrets.token_hex(8)
        """Names this memory at these addresses: what is said of it is said of nothing else that comes to lie there."""

    @property
    def mapped(self) -> bool:
        """Whether peers can read it."""
        return self.made.done() and not self.broken

    @property
    def broken(self) -> bool:
        """Whether it cannot be had, or not any more."""
        if not self.made.done():
            return False
        return self.made.cancelled() or self.made.exception() is not None or not self.made.result().mover.alive


def _segments(offer: Offer, reader: str, epoch: str) -> dict[str, Any]:
    return {
        "type": "segments",
        "epoch": epoch,
        "reader": reader if offer.window else None,
        "segments": [
            {"address": offered.address, "metadata": base64.b64encode(offered.metadata).decode()}
            for offered in offer.offered
        ],
    }


def _servable(stage: Stage) -> bool:
    """Whether peers can read of it: ready or loading."""
    going = stage.dismissed or stage.revoked_until is not None or stage.moving
    return bool(stage.key and stage.segments) and not going and (stage.state == "ready" or stage.fill is not None)


def _share(stage: Stage) -> float:
    if stage.state == "ready" or not stage.bytes_total:
        return 1.0 if stage.state == "ready" else 0.0
    return min(stage.bytes_done / stage.bytes_total, 0.99)
