"""What this daemon lets its peers read: segments that are ready, and what has come already of those that load.

On the event loop. A peer reads by itself, through a mover process that has the segments mapped; what it is told here is
where they are, which of their leaves are there, and with what digests. Listening to that is its lease.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import xxhash

from weightd.daemon.devices import Segment
from weightd.daemon.errors import DaemonError, UnknownStage
from weightd.daemon.manifests import segment_leaves, segment_manifest
from weightd.daemon.peers.mover import Mover, MoverFailed, Offered
from weightd.daemon.residency import Residency
from weightd.daemon.stage import Stage
from weightd.ipc.manifest import Manifest

log = logging.getLogger(__name__)

_LOOK = 0.05
"""Seconds between looks at what has come of a stage that loads."""
_HEARTBEAT = 1.0
_MAX_LEAVES = 4096
"""Leaf digests in one event."""


class Serving:
    """Lends segments to peers, and says what there is."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._mover: Mover | None = None
        self._offers: dict[str, tuple[Mover, list[Offered], int]] = {}
        """Stage → what is offered of it, by which process, and how many peers listen."""
        self._lock = asyncio.Lock()

    def stages(self) -> dict[str, float]:
        """Stage key → how much of it there is, 0 to 1."""
        return {stage.key: _share(stage) for stage in self._residency.stages.values() if _servable(stage)}

    async def lend(self, key: str) -> AsyncIterator[dict[str, Any]]:
        """Events for one peer, as long as it listens: ``segments``, ``leaves``, ``complete``; ``gone`` is the last one.

        Raises UnknownStage where no stage has the key.
        """
        stage = next((s for s in self._residency.stages.values() if s.key == key and _servable(s)), None)
        if stage is None:
            raise UnknownStage(f"no stage has the key {key[:80]!r}")
        lease = self._residency.lease(stage, stage.request.ranks[0], uid=None, gid=None, pid=None)
        try:
            mover, offers = await self._offer(stage)
            try:
                yield {
                    "type": "segments",
                    "ready": stage.state == "ready",
                    "segments": [
                        {"address": offer.address, "metadata": base64.b64encode(offer.metadata).decode()}
                        for offer in offers
                    ],
                }
                told = Told()
                spoke = time.monotonic()
                while _servable(stage) and mover.alive and stage.revoked_until is None:
                    batch = await asyncio.to_thread(told.news, stage)
                    for event in batch:
                        yield event
                    if stage.state == "ready" and not batch and not told.complete:
                        told.complete = True
                        yield {"type": "complete"}
                    if batch:
                        spoke = time.monotonic()
                    elif time.monotonic() - spoke >= _HEARTBEAT:
                        spoke = time.monotonic()
                        yield {"type": "alive"}
                    await stage.changed(_HEARTBEAT if told.complete else _LOOK)
                yield {"type": "gone"}
            finally:
                await self._withdraw(stage)
        except (MoverFailed, OSError) as error:
            raise DaemonError(f"stage {stage.id} cannot be lent to peers: {error}") from None
        finally:
            self._residency.end_lease(lease)

    async def _offer(self, stage: Stage) -> tuple[Mover, list[Offered]]:
        async with self._lock:
            found = self._offers.get(stage.id)
            if found is None or not found[0].alive:
                if self._mover is None or not self._mover.alive:
                    self._mover = await asyncio.to_thread(Mover)
                mover = self._mover
                offers = await asyncio.to_thread(lambda: [_offered(mover, segment) for segment in stage.segments])
                found = (mover, offers, 0)
            self._offers[stage.id] = (found[0], found[1], found[2] + 1)
            return found[0], found[1]

    async def _withdraw(self, stage: Stage) -> None:
        async with self._lock:
            mover, offers, listening = self._offers[stage.id]
            if listening > 1:
                self._offers[stage.id] = (mover, offers, listening - 1)
                return
            del self._offers[stage.id]
        for offer in offers:
            try:
                await asyncio.to_thread(mover.close_region, offer.region)
            except MoverFailed as error:
                log.warning("%s: %s", stage.id, error)

    async def close(self) -> None:
        """End the process that peers read from."""
        if self._mover is not None:
            await asyncio.to_thread(self._mover.kill)


class Told:
    """What one peer has been told of a stage's leaves."""

    def __init__(self) -> None:
        self.complete = False
        self._there: list[bytearray] | None = None
        self._all = False

    def news(self, stage: Stage) -> list[dict[str, Any]]:
        """Events about leaves that are there and that it has not been told of."""
        fill = stage.fill
        if fill is not None:
            if self._there is None:
                self._there = [bytearray(len(flags)) for flags in fill.there]
            events: list[dict[str, Any]] = []
            for segment, (told, flags) in enumerate(zip(self._there, fill.there, strict=True)):
                fresh = bytes(flags)
                starts = fill.leaf_starts(segment)
                for entry, leaves in enumerate(fill.leaves[segment]):
                    first = starts[entry]
                    events += _runs(segment, entry, told, fresh, first, leaves)
                told[:] = fresh
            return events
        if stage.state != "ready" or self._all:
            return []
        self._all = True
        return [
            {"type": "leaves", "segment": segment, "entry": entry, "first": first, "digests": _hex(leaves, first)}
            for segment in range(len(stage.segments))
            for entry, leaves in enumerate(segment_leaves(stage, segment))
            for first in range(0, len(leaves), _MAX_LEAVES)
        ]


def _runs(
    segment: int, entry: int, told: bytearray, fresh: bytes, start: int, leaves: memoryview
) -> Iterator[dict[str, Any]]:
    count = len(leaves)
    leaf = 0
    while leaf < count:
        leaf = fresh.find(1, start + leaf, start + count) - start
        if leaf < 0:
            return
        end = leaf
        while end < count and fresh[start + end] and end - leaf < _MAX_LEAVES:
            end += 1
        if not all(told[start + leaf : start + end]):
            digests = "".join(f"{leaves[i]:016x}" for i in range(leaf, end))
            yield {"type": "leaves", "segment": segment, "entry": entry, "first": leaf, "digests": digests}
        leaf = end


def _hex(leaves: memoryview, first: int) -> str:
    return "".join(f"{leaf:016x}" for leaf in leaves[first : first + _MAX_LEAVES])


def _offered(mover: Mover, segment: Segment) -> Offered:
    # Opened for reading only: a mapping through it never could be made writable, so that the segment can be sealed.
    fd = os.open(f"/proc/self/fd/{segment.fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return mover.offer(fd, segment.footprint)
    finally:
        os.close(fd)


def _servable(stage: Stage) -> bool:
    """Whether peers can read of it: in host memory, ready or loading."""
    on_host = bool(stage.segments) and all(segment.device.uuid is None for segment in stage.segments)
    return bool(stage.key) and on_host and (stage.state == "ready" or stage.fill is not None)


def _share(stage: Stage) -> float:
    if stage.state == "ready" or not stage.bytes_total:
        return 1.0 if stage.state == "ready" else 0.0
    return min(stage.bytes_done / stage.bytes_total, 0.99)


def stage_key(identity: str, manifests: list[Manifest]) -> str:
    """Equal for stages with the same bytes in the same places: the checkpoint's identity, and all segments' layouts."""
    state = xxhash.xxh3_128(identity.encode())
    for manifest in manifests:
        for name, dtype, shape, offset in zip(
            manifest.names, manifest.dtypes, manifest.shapes, manifest.offsets, strict=True
        ):
            state.update(f"\0{name}\0{dtype}{tuple(shape)}{offset}".encode())
        state.update(b"\n")
    return str(state.hexdigest())


def key_of(stage: Stage) -> str:
    """A planned or ready stage's key."""
    assert stage.listing is not None
    if stage.manifests:
        manifests = [manifest.read()[0] for manifest in stage.manifests]
    else:
        assert stage.plan is not None
        manifests = [segment_manifest(stage, stage.plan, index) for index in range(len(stage.plan.recipes))]
    return stage_key(stage.listing.identity, manifests)
