"""The node: all that this daemon does for whoever asks, over HTTP or a lease connection.

Everything here runs on the event loop; what blocks runs in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from weightd.daemon.checkpoints.cache import Cache
from weightd.daemon.checkpoints.contents import Checkpoint
from weightd.daemon.devices.base import Device
from weightd.daemon.devices.quarantine import Quarantine
from weightd.daemon.errors import HOW_TO_CHANGE, Interrupted, NotMovable, ReadOnly
from weightd.daemon.keeper.deposits import Deposits
from weightd.daemon.limits import FillLimits, NodeLimits
from weightd.daemon.node.layouts import Layouts
from weightd.daemon.node.preload import Preload
from weightd.daemon.node.resolving import Joined, Resolver, Unlisted
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.observing.refusals import Refusals
from weightd.daemon.peers.finding.directory import Directory
from weightd.daemon.peers.finding.fleet import Fleet
from weightd.daemon.sources.uris import Allow, canonical
from weightd.daemon.stages import record
from weightd.daemon.stages.eviction import now
from weightd.daemon.stages.loading import Peers
from weightd.daemon.stages.moves import move_segments
from weightd.daemon.stages.planning import allocated
from weightd.daemon.stages.request import StageRequest
from weightd.daemon.stages.residency import Residency
from weightd.daemon.stages.scheduler import Scheduler, refused
from weightd.daemon.stages.segments import key_of
from weightd.daemon.stages.stage import Stage

log = logging.getLogger(__name__)

_DEATHS = 2
"""Daemons that may die under a stage before it is taken for the cause."""
_PLAN_DEADLINE = 30.0
"""Seconds that a request waits for its plan; then it is answered with the stage as it is."""


@dataclass(frozen=True)
class Fit:
    """Whether a request would fit, and what would go for it."""

    stage: Stage | None
    """The stage that is there already, or on its way."""
    needed: int
    """Bytes that it would take."""
    fits: bool
    evicts: list[Stage]


class Node:
    """What this daemon does for whoever asks. Make it on the event loop that it is used on."""

    def __init__(
        self,
        devices: dict[str, Device],
        *,
        residency: Residency,
        deposits: Deposits,
        allow: Allow,
        cache: Cache,
        fill_limits: FillLimits,
        limits: NodeLimits,
        metrics: Metrics,
        fleet: Fleet | None = None,
        directory: Directory | None = None,
        peers: Peers | None = None,
    ) -> None:
        """``peers``: whom stages load from besides their sources."""
        self.fleet = fleet
        """None where there are to be no peers."""
        self.directory = directory
        """Where peers are found; None where there are to be none."""
        self.devices = devices
        # One in quarantine is asked for and refused, rather than host memory taken for it.
        gpus = [device for device in devices.values() if device.uuid]
        self.default_device = min(gpus, key=lambda gpu: bool(gpu.quarantined)).name if gpus else "cpu"
        self.residency = residency
        self.metrics = metrics
        self.refusals = Refusals()
        self.started_at = time.time()
        self.preload = Preload()
        """What is to be staged by itself."""
        self._moves: set[asyncio.Future[None]] = set()
        self._deposits = deposits
        self.cache = cache
        self._fill_limits = fill_limits
        self._limits = limits
        self._scheduler = Scheduler(devices, residency, deposits, cache, metrics, fill_limits, limits, peers)
        self.layouts = Layouts(cache, residency.stages, self._scheduler.in_thread, self._scheduler.trim_cache)
        """Engines' own layouts."""
        self._resolver = Resolver(
            residency.stages,
            devices,
            self.default_device,
            allow=allow,
            fleet=fleet,
            trust_peers=limits.trust_peers,
            in_thread=self._scheduler.in_thread,
            listing=self._scheduler.listing,
        )

    # ------------------------------------------------------------------ asking for stages

    async def stage(self, request: StageRequest, *, guest: bool = False) -> tuple[Stage, bool]:
        """The stage that a request means, and whether it was there already. Returns once it is planned.

        A request for what is there, or on its way, joins it; otherwise a new stage starts. What is at the URI is
        listed anew every time, so that a replaced checkpoint is never taken for the one that is resident; where the
        source does not answer, what is resident counts.

        A ``guest`` changes nothing for others: what is there stays as it is, and nothing goes for what is new.

        Raises InvalidRequest, NotAllowed, InsufficientCapacity, QueueFull, ReadOnly. All else is in the stage's record.
        """
        asked = time.monotonic()
        if guest and (request.pin or request.priority > 0):
            raise ReadOnly(f"pin, and a priority above 0, are at others' expense: {HOW_TO_CHANGE}")
        meant = await self._resolver.resolve(request)
        if isinstance(meant, Unlisted):
            return self._failed(request, meant, asked), False
        if isinstance(meant, Joined):
            found = meant.stage
            self._join(meant, request, guest=guest)
        else:
            found = Stage(meant.uri, meant.devices, request, meant.listing, asked)
            found.guest = guest
            self._scheduler.start(found, meant.source)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(found.planned.wait(), _PLAN_DEADLINE)
        if refused(found):
            assert found.error is not None
            raise found.error
        found.announced = True
        return found, isinstance(meant, Joined)

    def _join(self, joined: Joined, request: StageRequest, *, guest: bool) -> None:
        """Keep a stage as long, and load it as soon, as everybody who asked for it wants, but for guests."""
        stage, listing = joined.stage, joined.listing
        if joined.unanswered is not None:
            self.metrics.errors.labels(joined.unanswered.code).inc()
            self.refusals.note(joined.unanswered)
        before = stage.ttl_seconds, stage.listing
        if listing is not None and stage.listing is not None:
            stage.listed_at = time.time()
            if stage.listing.identity != listing.identity:  # a record of an earlier version, told by less
                stage.listing = replace(listing, weight_map=None)
                stage.left_out = stage.left_out or listing.left_out
        if not guest:
            stage.asked_at = now()
        if stage.ttl_seconds is not None and not guest:
            mine = request.ttl_seconds
            stage.ttl_seconds = None if mine is None else max(stage.ttl_seconds, mine)
        if before != (stage.ttl_seconds, stage.listing):
            record.update(self._deposits, stage)
        self.residency.changed()
        if guest:
            return
        self.change(stage, priority=max(stage.priority, request.priority), pin=stage.pin or request.pin)

    async def would_fit(self, request: StageRequest) -> Fit:
        """What ``stage`` would do, changing nothing. Raises what planning raises."""
        meant = await self._resolver.resolve(request)
        if isinstance(meant, Unlisted):
            raise meant.error from None
        if isinstance(meant, Joined):
            return Fit(meant.stage, meant.stage.footprint, True, [])
        plan = await self._scheduler.planner.plan(meant.uri, request, meant.source, meant.listing)
        devices = [self.devices[name] for name in meant.devices]
        for device in set(devices):
            await self._scheduler.in_thread(device.open)
        needed = allocated(plan.recipes, devices)
        evicts = self.residency.victims(needed)
        return Fit(None, sum(needed.values()), evicts is not None, evicts or [])

    async def checkpoint(self, request: StageRequest) -> tuple[Checkpoint, str | None]:
        """The headers of the checkpoint that a request means, and the folder with its configuration files, where the
        disk keeps one. Raises what planning raises."""
        uri = canonical(request.model)
        source, listing = await self._resolver.find_listing(uri, request.files, self.cache)
        return await self._scheduler.planner.headers(uri, source, listing)

    def find_rank(self, request: StageRequest, rank: int) -> Stage:
        """As ``Resolver.find_rank``."""
        return self._resolver.find_rank(request, rank)

    def stages(self) -> Iterable[Stage]:
        """All stages, oldest first, with those that ended lately."""
        return self.residency.stages.values()

    def get(self, stage_id: str) -> Stage:
        """A stage by its id. Raises UnknownStage."""
        return self.residency.get(stage_id)

    def _failed(self, request: StageRequest, unlisted: Unlisted, asked: float) -> Stage:
        stage = Stage(unlisted.uri, unlisted.devices, request, None, asked)
        stage.source_kind = stage.clock.origin = unlisted.uri.partition(":")[0]
        self.residency.keep(stage)
        self._scheduler.end(stage, "failed", unlisted.error)
        return stage

    # ------------------------------------------------------------------ adopting

    def adopt(self, held: dict[str, int], quarantine: Quarantine) -> None:
        """Take over what the daemon before this one has deposited; owns the descriptors. Tells ``quarantine``.

        Ready stages are ready at once; others go on loading. What cannot be understood stays with the keeper as it is.
        """
        by_stage: dict[str, dict[str, int]] = {}
        for name, fd in held.items():
            stage_id, _, part = name.partition("/")
            by_stage.setdefault(stage_id, {})[part] = fd
        for stage_id, parts in by_stage.items():
            if "record" not in parts:
                self._deposits.drop(stage_id)  # its daemon died before it was complete
            else:
                try:
                    stage = record.restore(parts, self.devices, quarantine)
                    for name in record.leftovers(stage, parts):
                        self._deposits.drop(name)
                    self._adopted(stage)
                except Exception as error:
                    # Whatever is wrong with one, the others are adopted.
                    nbytes = sum(os.fstat(fd).st_size for part, fd in parts.items() if part.startswith("segment"))
                    log.error("%s: its %d bytes of host memory, and what it has on GPUs, are left alone: %s",
                              stage_id, nbytes, error)  # fmt: skip
                    self.residency.unadopted.append({"name": stage_id, "nbytes": nbytes, "reason": str(error)})
            for fd in parts.values():
                os.close(fd)
        if self.residency.stages:
            log.info("adopted %d stages", len(self.residency.stages))

    async def tidy_cache(self) -> None:
        """Once all is adopted: rid the cache of what the daemon before has left unfinished, and keep it in bounds."""
        await self._scheduler.in_thread(self.cache.clean)
        await self._scheduler.trim_cache()

    def _adopted(self, stage: Stage) -> None:
        self.residency.keep(stage)
        self.metrics.adopted(stage.state if stage.finished else "interrupted", stage.footprint)
        if stage.state == "failed":
            self._deposits.drop(stage.id)
            return
        self.residency.leases.await_holders(stage)
        if stage.state == "ready" and self.fleet is not None:
            stage.key = key_of(stage)
        if stage.state != "ready":
            record.update(self._deposits, stage)  # before anything that may kill this daemon too
            if stage.deaths >= _DEATHS:
                self._scheduler.end(stage, "failed", Interrupted(
                    f"{stage.deaths} daemons died while {stage.id} was on its way: it is not taken up again, lest it "
                    "was what killed them"
                ))  # fmt: skip
                self.residency.release(stage)
                return
            resumed = self._scheduler.resume(stage, self._resolver.list, self._resolver.reopen)
            self._scheduler.spawn(resumed, stage.id)
        elif stage.revoked_until is not None:
            self._scheduler.spawn(self.residency.revoked(stage), stage.id)

    def hand_over(self) -> None:
        """Make room for the next daemon: what is on its way is to go on there, and did not end this one."""
        for stage in self.stages():
            if not stage.finished:
                stage.handed_over = True
                record.update(self._deposits, stage)

    # ------------------------------------------------------------------ ending and moving stages

    def drop(self, stage_id: str, *, force: bool = False, grace: float | None = None) -> Stage:
        """Cancel a stage that is on its way; forget one that has ended; free one that is ready.

        Where processes use it, ``force`` tells them to let go within ``grace`` seconds, and frees it then. Raises
        UnknownStage, NotMovable while it is being moved, and StageLeased without ``force``.
        """
        stage = self.get(stage_id)
        if stage.moving:
            raise NotMovable(f"stage {stage.id} is being moved to {stage.moving}: wait for its end")
        if not force:
            self.residency.leases.check_none(stage)
        if not stage.finished:
            self._scheduler.cancel(stage, "cancelled by request")
        elif stage.state == "ready" and (stage.leases or stage.peer_leases):
            first = stage.revoked_until is None
            usual = self._limits.revoke_grace if stage.leases else 0.0  # peers have a time of their own
            self.residency.revoke(stage, usual if grace is None else grace)
            if first:
                self._scheduler.spawn(self.residency.revoked(stage), stage.id)
        else:
            if stage.state == "ready":
                self.residency.evict(stage, "request")
            if not stage.footprint:
                self.residency.stages.pop(stage.id, None)
        return stage

    def change(self, stage: Stage, *, priority: int | None = None, pin: bool | None = None) -> None:
        """Change what decides whether it stays; None: as it is."""
        before = stage.priority, stage.pin
        stage.priority = stage.priority if priority is None else priority
        stage.pin = stage.pin if pin is None else pin
        if before != (stage.priority, stage.pin):
            record.update(self._deposits, stage)
            self.residency.changed()
            stage.notify()

    async def move(self, stage_id: str, device: str) -> Stage:
        """Move a ready stage that nobody leases to another device, without its source.

        Raises UnknownStage, InvalidRequest, StageLeased, NotMovable, InsufficientCapacity.
        """
        stage = self.get(stage_id)
        await self.residency.notice_hangups()
        target = self._resolver.device(device)
        move = asyncio.ensure_future(
            move_segments(self.residency, self._deposits, stage, target, self._fill_limits, self._scheduler.in_thread)
        )
        self._moves.add(move)
        move.add_done_callback(self._moves.discard)
        await asyncio.shield(move)  # whoever asked may go: what has begun ends by itself
        return stage

    async def close(self) -> None:
        """Cancel what runs and free everything; waits for threads that may still write."""
        for stage in list(self.stages()):
            self._scheduler.cancel(stage, "the daemon is stopping")
        if self._moves:
            await asyncio.wait(self._moves)
        await self._scheduler.close()
        for stage in self.stages():
            self.residency.release(stage)
        for device in self.devices.values():
            device.close()
