"""Residency: what the devices hold, for whom, and what goes when there is no room.

A stage's memory is reserved, leased, evicted and freed here and nowhere else. On the event loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

from weightd.daemon.devices.base import Device, Segment
from weightd.daemon.errors import (
    InsufficientCapacity,
    UnknownStage,
)
from weightd.daemon.keeper.deposits import Deposits
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.stages import eviction, record
from weightd.daemon.stages.leases import Leases
from weightd.daemon.stages.left_behind import LeftBehind
from weightd.daemon.stages.stage import Stage

log = logging.getLogger(__name__)

_LATELY = 3600.0
"""Seconds for which what went to make room is remembered."""
_REMEMBERED = 10_000
_TURNS = 10
"""Of the event loop, in which a closed connection is seen and its lease ends, with some to spare."""
_UNMAPPED = 30.0
"""Seconds that are waited for it to be unmapped."""
MAX_ENDED = 200
"""Records of failed, cancelled and evicted stages that are kept for looking at."""


class Residency:
    """All stages of this daemon, and the memory that they have."""

    def __init__(
        self,
        devices: Mapping[str, Device],
        deposits: Deposits,
        metrics: Metrics,
        *,
        lease_grace: float,
        max_leases_per_user: int,
        peer_grace: float = 10.0,
    ) -> None:
        self.devices = devices
        self.stages: dict[str, Stage] = {}
        self._deposits = deposits
        self._metrics = metrics
        self._peer_grace = peer_grace
        self._changed = asyncio.Event()
        self.leases = Leases(
            self.stages, grace=lease_grace, most_per_user=max_leases_per_user, changed=self._changed.set
        )
        self.on_release: Callable[[Stage], Awaitable[None] | None] = lambda stage: None
        """Told of a stage whose memory is about to be freed; what it returns ends once nothing else maps that."""
        self._unmapping: set[asyncio.Future[None]] = set()
        self.unadopted: list[dict[str, Any]] = []
        """What the keeper holds and this version does not understand: name, nbytes, reason. Host memory."""
        self._made_room: dict[Hashable, float] = {}
        """What went to make room, and when."""
        self._left_behind = LeftBehind()

    def get(self, stage_id: str) -> Stage:
        """A stage by its id. Raises UnknownStage."""
        try:
            return self.stages[stage_id]
        except KeyError:
            raise UnknownStage(f"no stage has the id {stage_id[:100]!r}") from None

    def keep(self, stage: Stage) -> None:
        """Remember a stage; of those that have ended, the latest."""
        self.stages[stage.id] = stage
        ended = [s for s in self.stages.values() if s.finished and s.state != "ready" and not s.footprint]
        for old in sorted(ended, key=lambda s: s.entered)[: max(0, len(ended) - MAX_ENDED)]:
            del self.stages[old.id]

    def on(self, device: str) -> Iterator[Stage]:
        """Stages that have or are promised memory of a device."""
        return (stage for stage in self.stages.values() if stage.reserved.get(device))

    # ------------------------------------------------------------------ capacity

    def used(self, device: str) -> int:
        """Bytes of a device's capacity that are taken or promised."""
        left_alone = sum(left["nbytes"] for left in self.unadopted) if device == "cpu" else 0
        return sum(stage.reserved[device] for stage in self.on(device)) + left_alone

    def room(self, device: str) -> int:
        """Bytes that may still be promised: of its capacity, and of what others have left of the device itself."""
        free = self.devices[device].capacity - self.used(device)
        available = self.devices[device].available()
        if available is None:
            return free
        taken = sum(
            segment.footprint
            for stage in self.on(device)
            for segment in stage.segments
            if segment.device.name == device
        )
        promised = sum(stage.reserved[device] for stage in self.on(device)) - taken
        return min(free, available - max(0, promised))

    def victims(self, needed: Mapping[str, int]) -> list[Stage] | None:
        """What would go for so many bytes of each device; None where they do not fit whatever goes."""
        chosen: list[Stage] = []
        for device, nbytes in needed.items():
            missing = nbytes - self.room(device) - sum(stage.reserved.get(device, 0) for stage in chosen)
            if missing <= 0:
                continue
            left = [stage for stage in self.on(device) if stage not in chosen]
            more = eviction.victims(left, missing, eviction.now(), device)
            if more is None:
                return None
            chosen += more
        return chosen

    def make_room(self, uri: str, needed: Mapping[str, int]) -> None:
        """Evict what has to go for so many bytes of each device.

        Raises InsufficientCapacity with the numbers, evicting nothing.
        """
        chosen = self.victims(needed)
        if chosen is None:
            raise self.insufficient(uri, needed)
        for stage in chosen:
            log.info("%s %s goes, to make room for %s", stage.id, stage.uri, uri)
            self.evict(stage, "capacity")

    def insufficient(self, uri: str, needed: Mapping[str, int]) -> InsufficientCapacity:
        """The error that says what is missing of the first device that lacks it, and what is in the way."""
        # By now others may have let go of some: then it is the first one that is said.
        device = next((name for name in needed if self.victims({name: needed[name]}) is None), next(iter(needed)))
        held, at = list(self.on(device)), eviction.now()
        used, capacity = self.used(device), self.devices[device].capacity
        free = sum(stage.reserved[device] for stage in held if eviction.evictable(stage, at))
        missing = needed[device] - self.room(device) - free
        available = self.devices[device].available()
        others = ""
        if available is not None and available < capacity - used:
            others = f"; other processes leave {available} bytes of it, less the reserve (WEIGHTD_CUDA_RESERVE)"
        return InsufficientCapacity(
            f"{uri} needs {needed[device]} bytes on {device}; {used} of {capacity} are taken, of which {free} could be "
            f"evicted{others}: {missing} are missing: end leases, drop or unpin a stage, or raise WEIGHTD_CAPACITY",
            device=device,
            needed_bytes=needed[device],
            used_bytes=used,
            evictable_bytes=free,
            leased_bytes=sum(stage.reserved[device] for stage in held if stage.leases),
            capacity_bytes=capacity,
            available_bytes=available,
            missing_bytes=missing,
            resident=[summary(stage) for stage in held],
        )

    # ------------------------------------------------------------------ letting go

    def evict(self, stage: Stage, reason: str) -> None:
        """Free a ready stage, whoever leases it: the callers have seen to that."""
        stage.enter("evicted")
        self._metrics.evictions.labels(reason).inc()
        if reason == "capacity":
            self._made_room.pop(_what(stage), None)
            self._made_room[_what(stage)] = eviction.now()
            while len(self._made_room) > _REMEMBERED:
                del self._made_room[next(iter(self._made_room))]
        self.release(stage)
        self.keep(stage)

    def made_room(self, stage: Stage) -> bool:
        """Whether what a new stage is of went to make room lately: it may be loaded again and again."""
        went = self._made_room.pop(_what(stage), None)
        return went is not None and eviction.now() - went < _LATELY

    def release(self, stage: Stage) -> None:
        """Let go of all memory that is held for a stage, here and at the keeper, and of its bytes of capacity."""
        if (unmapping := self.on_release(stage)) is not None:
            future = asyncio.ensure_future(unmapping)
            self._unmapping.add(future)
            future.add_done_callback(self._unmapping.discard)
        self.free(stage)
        stage.reserved = {}
        stage.plan = None
        stage.notify()
        self._changed.set()

    async def unmapped(self) -> None:
        """Return once nothing of this daemon maps what was freed before now: only then it is there for others."""
        if self._unmapping:
            await asyncio.wait(self._unmapping, timeout=_UNMAPPED)

    def free(self, stage: Stage) -> None:
        """Let go of a stage's memory; its bytes of capacity stay promised to it. Callable from any thread."""
        record.withdraw(self._deposits, stage)
        for segment in stage.segments:
            self.left_behind(stage, segment)
            segment.close()
        for manifest in stage.manifests:
            manifest.close()
        if stage.ledger is not None:
            stage.ledger.close()
        stage.segments, stage.manifests, stage.ledger = [], [], None

    def left_behind(self, stage: Stage, segment: Segment) -> None:
        """A segment is about to be closed: remember it where somebody may still map it. Callable from any thread."""
        if stage.lent:
            self._left_behind.note(segment)

    def drop_unadopted(self) -> list[dict[str, Any]]:
        """Let the keeper forget what was not adopted, and say what that was."""
        dropped, self.unadopted = self.unadopted, []
        for left in dropped:
            self._deposits.drop(left["name"])
            log.warning("%s: dropped by request, with its %d bytes, not adopted", left["name"], left["nbytes"])
        self._changed.set()
        return dropped

    async def mapped_elsewhere(self) -> int:
        """Bytes of freed segments that other processes still map, as far as that can be seen from here."""
        return await self._left_behind.mapped_bytes()

    async def notice_hangups(self) -> None:
        """Return once leases whose connections were closed before now have ended."""
        for _ in range(_TURNS):
            await asyncio.sleep(0)

    def revoke(self, stage: Stage, grace: float) -> None:
        """Tell a ready stage's lessees to let go within ``grace`` seconds; ``revoked`` has to follow up.

        Once more for a shorter time; a longer one changes nothing.
        """
        if stage.revoked_until is not None and eviction.now() + grace >= stage.revoke_deadline:
            return
        stage.revoked_until, stage.revoke_deadline = time.time() + grace, eviction.now() + grace
        record.update(self._deposits, stage)
        stage.notify()

    async def revoked(self, stage: Stage) -> None:
        """Free a revoked stage once its lessees have let go, or their time is over."""
        while (
            stage.state == "ready"
            and self.leases.in_use(stage)
            and (left := stage.revoke_deadline - eviction.now()) > 0
        ):
            await stage.changed(left)
        await self.dismiss([stage])
        if stage.state == "ready":
            self.evict(stage, "revoked")

    async def dismiss(self, stages: Sequence[Stage]) -> None:
        """Tell peers to read these no more, and wait until they have stopped, or their time is over."""
        deadline = eviction.now() + self._peer_grace
        for stage in stages:
            stage.dismissals += 1
            stage.notify()
        try:
            for stage in stages:
                while stage.peer_leases and (left := deadline - eviction.now()) > 0:
                    await stage.changed(left)
        finally:
            for stage in stages:  # who is still there after all may be read again
                stage.dismissals -= 1

    async def dismiss_victims(self, needed: Mapping[str, int]) -> None:
        """Before ``make_room``: wait for the peers that read what would go for so many bytes of each device."""
        told: set[str] = set()
        # What would go may be others by the time that the first ones' peers have stopped.
        while read := [stage for stage in self.victims(needed) or () if stage.peer_leases and stage.id not in told]:
            told.update(stage.id for stage in read)
            await self.dismiss(read)

    def changed(self) -> None:
        """Something that ``expire`` goes by has changed."""
        self._changed.set()

    async def expire(self) -> None:
        """Evict stages whose time to live without a lease is over, until cancelled."""
        going: dict[str, asyncio.Task[None]] = {}
        """Stages whose time is over and whose peers are waited for, which holds up no other."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._changed.clear()  # before it is looked: what changes from here on is looked at again
                for stage_id in [stage_id for stage_id, task in going.items() if task.done()]:
                    del going[stage_id]
                at = eviction.now()
                due = [
                    (when, stage)
                    for stage in self.stages.values()
                    if stage.id not in going and (when := eviction.expires_at(stage)) is not None
                ]
                for when, stage in due:
                    if when <= at and stage.peer_leases:
                        going[stage.id] = group.create_task(self._expire(stage, when))
                    elif when <= at:
                        self._expired(stage)
                later = [when - at for when, _ in due if when > at]
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), min(later, default=None))

    async def _expire(self, stage: Stage, when: float) -> None:
        """Evict a stage whose time was over at ``when``, once its peers have stopped."""
        await self.dismiss([stage])
        if eviction.expires_at(stage) == when:  # else somebody has come for it meanwhile
            self._expired(stage)
        self._changed.set()

    def _expired(self, stage: Stage) -> None:
        log.info("%s %s goes, %g s without a lease", stage.id, stage.uri, stage.ttl_seconds)
        self.evict(stage, "ttl")


def _what(stage: Stage) -> Hashable:
    return stage.uri, stage.devices, stage.request.layout_key()


def summary(stage: Stage) -> dict[str, object]:
    """What somebody who looks for room wants to know of a stage."""
    return {
        "id": stage.id,
        "model": stage.uri,
        "state": stage.state,
        "bytes": stage.footprint,
        "leases": len(stage.leases),
        "pin": stage.pin,
        "priority": stage.priority,
    }
