"""The node: which stages there are, which of them a request means, and who may load when.

Everything here runs on the event loop; what blocks runs in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass

from weightd.daemon.checkpoints.cache import Cache
from weightd.daemon.checkpoints.listing import Listing, list_checkpoint
from weightd.daemon.devices.base import Device
from weightd.daemon.errors import (
    DaemonError,
    InvalidRequest,
    NotMovable,
    SourceFailed,
    UnknownStage,
)
from weightd.daemon.keeper.deposits import Deposits
from weightd.daemon.limits import FillLimits, NodeLimits
from weightd.daemon.node.preload import Preload
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.observing.refusals import Refusals
from weightd.daemon.peers.finding.directory import Directory
from weightd.daemon.peers.finding.fleet import Fleet
from weightd.daemon.peers.pulling.source import open_source as open_peer_source
from weightd.daemon.sources.base import Source
from weightd.daemon.sources.uris import Allow, canonical, open_source
from weightd.daemon.stages import record
from weightd.daemon.stages.loading import Peers
from weightd.daemon.stages.moves import move_segments
from weightd.daemon.stages.planning import allocated, make_plan
from weightd.daemon.stages.request import StageRequest
from weightd.daemon.stages.residency import Residency
from weightd.daemon.stages.scheduler import Scheduler, refused
from weightd.daemon.stages.segments import key_of
from weightd.daemon.stages.stage import Stage

log = logging.getLogger(__name__)

_RELIST_DEADLINE = 5.0
"""Seconds that a source may take to say whether what is resident is still what it holds."""
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
        self.default_device = next((name for name, device in devices.items() if device.uuid), "cpu")
        self.residency = residency
        self.metrics = metrics
        self.refusals = Refusals()
        self.started_at = time.time()
        self.preload = Preload()
        """What is to be staged by itself."""
        self._deposits = deposits
        self._allow = allow
        self.cache = cache
        self._fill_limits = fill_limits
        self._limits = limits
        self._scheduler = Scheduler(devices, residency, deposits, cache, metrics, fill_limits, limits, peers)
        self._listings: dict[str, asyncio.Task[tuple[Source, Listing]]] = {}

    # ------------------------------------------------------------------ asking for stages

    async def stage(self, request: StageRequest) -> tuple[Stage, bool]:
        """The stage that a request means, and whether it was there already. Returns once it is planned.

        A request for what is there, or on its way, joins it; otherwise a new stage starts. What is at the URI is
        listed anew every time, so that a replaced checkpoint is never taken for the one that is resident; where the
        source cannot be reached, what is resident counts.

        Raises InvalidRequest, NotAllowed, InsufficientCapacity, QueueFull. All else is in the stage's record.
        """
        asked = time.monotonic()
        try:
            found, source, listing = await self._resolve(request)
        except _Unlisted as unlisted:
            return self._failed(unlisted, asked), False
        if found is not None:
            self.change(found, priority=max(found.priority, request.priority), pin=found.pin or request.pin)
            created = False
        else:
            assert source is not None
            found = Stage(canonical(request.model), self.placed(request), request, listing, asked)
            self._scheduler.start(found, source)
            created = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(found.planned.wait(), _PLAN_DEADLINE)
        if refused(found):
            assert found.error is not None
            raise found.error
        found.announced = True
        return found, not created

    async def would_fit(self, request: StageRequest) -> Fit:
        """What ``stage`` would do, changing nothing. Raises what planning raises."""
        try:
            found, source, listing = await self._resolve(request)
        except _Unlisted as unlisted:
            raise unlisted.error from None
        if found is not None:
            return Fit(found, found.footprint, True, [])
        assert source is not None
        plan = await self._scheduler.in_thread(make_plan, source, listing, request, self.cache)
        devices = [self.devices[name] for name in self.placed(request)]
        for device in set(devices):
            await self._scheduler.in_thread(device.open)
        needed = allocated(plan.recipes, devices)
        evicts = self.residency.victims(needed)
        return Fit(None, sum(needed.values()), evicts is not None, evicts or [])

    async def _resolve(self, request: StageRequest) -> tuple[Stage | None, Source | None, Listing]:
        """The stage that a request means, or else what is at its URI.

        Raises InvalidRequest, NotAllowed, and _Unlisted where the URI cannot be listed.
        """
        uri = canonical(request.model)
        if not uri.startswith("file:"):
            self._allow.check(uri)  # a file is checked with its links resolved, by its source
        devices = self.placed(request)
        resident = self._find(request, uri, devices, None)
        if resident is not None and resident.state != "ready":
            resident = None
        try:
            source, listing = await asyncio.wait_for(self._list(uri), _RELIST_DEADLINE if resident else None)
        except InvalidRequest:
            raise
        except (TimeoutError, SourceFailed) as error:
            if resident is None and self._trusts_peers(uri, request):
                assert self.fleet is not None
                log.warning("%s: its origin cannot be asked (%s), peers are", uri, error)
                try:
                    source = await self._scheduler.in_thread(open_peer_source, uri, self.fleet)
                    listing = await self._scheduler.in_thread(list_checkpoint, uri, source)
                except DaemonError as failure:
                    raise _Unlisted(uri, devices, request, SourceFailed(f"{error}; {failure}")) from None
                return self._find(request, uri, devices, listing), source, listing
            if resident is None:  # no deadline then, so that the source has failed
                raise _Unlisted(uri, devices, request, SourceFailed(str(error))) from None
            assert resident.listing is not None
            log.warning("%s: serving what is resident, its source cannot be asked: %s", uri, error or "no answer")
            return resident, None, resident.listing
        except DaemonError as error:
            if error.code == "not_allowed" and "setting" in error.details:
                raise
            raise _Unlisted(uri, devices, request, error) from None
        return self._find(request, uri, devices, listing), source, listing

    def _trusts_peers(self, uri: str, request: StageRequest) -> bool:
        """Whether peers may say what a checkpoint is: where they were declared trusted, or its digest tells."""
        told = self._limits.trust_peers or str(request.expect_digest).startswith("xxh3:")
        return self.fleet is not None and "peer" in request.sources and told and not uri.startswith("file:")

    def find_rank(self, request: StageRequest, rank: int) -> Stage:
        """The live stage of a model that has a segment for a tensor-parallel rank, for callers who know no more.

        Where they say a device, it is that segment's.

        Raises UnknownStage where there is none, InvalidRequest where there are several.
        """
        uri = canonical(request.model)
        where = self.device(request.device).name if isinstance(request.device, str) else None
        found = [
            stage
            for stage in self.stages()
            if (stage.uri, stage.request.handle) == (uri, request.handle)
            and _live(stage)
            and stage.request.parallel is not None
            and rank in stage.request.ranks
            and where in (None, stage.devices[stage.request.ranks.index(rank)])
        ]
        if not found:
            place = f" on {where}" if where else ""
            raise UnknownStage(
                f"no stage of {uri} has a segment for tp_rank {rank}{place}: stage it, or say tp_size and map"
            )
        if len(found) > 1:
            raise InvalidRequest(
                f"{len(found)} stages of {uri} have a segment for tp_rank {rank}: name one of "
                f"{', '.join(stage.id for stage in found)}"
            )
        return found[0]

    def stages(self) -> Iterable[Stage]:
        """All stages, oldest first, with those that ended lately."""
        return self.residency.stages.values()

    def get(self, stage_id: str) -> Stage:
        """A stage by its id. Raises UnknownStage."""
        return self.residency.get(stage_id)

    def placed(self, request: StageRequest) -> tuple[str, ...]:
        """Name of each segment's device. Raises InvalidRequest."""
        wanted = request.device or self.default_device
        names = wanted if isinstance(wanted, list) else [wanted] * len(request.ranks)
        devices = [self.device(name) for name in names]
        if len({device.uuid is None for device in devices}) > 1:
            raise InvalidRequest("device: one stage is in host memory or on GPUs, not in both")
        for device in devices:
            if request.handle not in device.handles:
                raise InvalidRequest(
                    f"handle: {device.name} has no segments with handle {request.handle!r}, it has "
                    f"{', '.join(device.handles)}"
                )
        return tuple(device.name for device in devices)

    def device(self, name: str) -> Device:
        """A device by its name here, or by its UUID, which all processes agree on. Raises InvalidRequest."""
        if found := self.devices.get(name):
            return found
        for device in self.devices.values():
            if device.uuid and device.uuid.lower() == name.lower():
                return device
        here = ", ".join(f"{d.name} ({d.uuid})" if d.uuid else d.name for d in self.devices.values())
        raise InvalidRequest(f"device {name!r} is not on this node, it has {here}")

    def _find(self, request: StageRequest, uri: str, devices: tuple[str, ...], listing: Listing | None) -> Stage | None:
        """A stage whose bytes are, or will be, those that the request wants; ready ones first. None: any identity."""
        key = request.layout_key()
        joinable = [
            stage
            for stage in self.stages()
            if stage.uri == uri  # what costs least, first: there may be very many
            and stage.devices == devices
            and stage.request.layout_key() == key
            and _live(stage)
            and stage.listing is not None
            and (listing is None or stage.listing.identity == listing.identity)
            and self._meets(stage, request)
        ]
        return max(joinable, key=lambda stage: (stage.state == "ready", stage.created_at), default=None)

    def _meets(self, stage: Stage, request: StageRequest) -> bool:
        expected = request.expect_digest
        if expected is None or expected == stage.request.expect_digest:
            return True
        if isinstance(expected, dict):
            wanted = {f"{name}={digest}" for name, digest in expected.items()}
        else:
            assert stage.listing is not None
            wanted = {expected if expected.startswith("xxh3:") else f"{stage.listing.weights[0].name}={expected}"}
        return wanted <= stage.satisfied

    async def _list(self, uri: str) -> tuple[Source, Listing]:
        """List a URI; requests that come while it is being listed share the answer."""
        task = self._listings.get(uri)
        if task is None:

            def listed() -> tuple[Source, Listing]:
                source = open_source(uri, self._allow)
                return source, list_checkpoint(uri, source)

            task = asyncio.ensure_future(self._scheduler.in_thread(listed))
            self._listings[uri] = task
            task.add_done_callback(lambda _: self._listings.pop(uri, None))
        return await asyncio.shield(task)

    def _failed(self, unlisted: _Unlisted, asked: float) -> Stage:
        stage = Stage(unlisted.uri, unlisted.devices, unlisted.request, None, asked)
        stage.source_kind = stage.clock.origin = unlisted.uri.partition(":")[0]
        self.residency.keep(stage)
        self._scheduler.end(stage, "failed", unlisted.error)
        return stage

    # ------------------------------------------------------------------ adopting

    def adopt(self, held: dict[str, int]) -> None:
        """Take over what the daemon before this one has deposited; owns the descriptors.

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
                    self._adopted(record.restore(parts, self.devices))
                except (ValueError, OSError) as error:
                    nbytes = sum(os.fstat(fd).st_size for part, fd in parts.items() if part.startswith("segment/"))
                    log.error("%s: its %d bytes of host memory, and what it has on GPUs, are left alone: %s",
                              stage_id, nbytes, error)  # fmt: skip
                    self.residency.unadopted.append({"name": stage_id, "nbytes": nbytes, "reason": str(error)})
            for fd in parts.values():
                os.close(fd)
        if self.residency.stages:
            log.info("adopted %d stages", len(self.residency.stages))

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
            self._scheduler.spawn(self._scheduler.resume(stage, self._list(stage.uri)), stage.id)
        elif stage.revoked_until is not None:
            self._scheduler.spawn(self.residency.revoked(stage), stage.id)

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
        await move_segments(
            self.residency, self._deposits, stage, self.device(device), self._fill_limits, self._scheduler.in_thread
        )
        return stage

    async def close(self) -> None:
        """Cancel what runs and free everything; waits for threads that may still write."""
        for stage in list(self.stages()):
            self._scheduler.cancel(stage, "the daemon is stopping")
        await self._scheduler.close()
        for stage in self.stages():
            self.residency.release(stage)
        for device in self.devices.values():
            device.close()


class _Unlisted(Exception):
    """What is at a URI cannot be told: the request becomes the record of a stage that failed."""

    def __init__(self, uri: str, devices: tuple[str, ...], request: StageRequest, error: DaemonError) -> None:
        self.uri, self.devices, self.request, self.error = uri, devices, request, error


def _live(stage: Stage) -> bool:
    """Whether a request may join it."""
    return stage.state not in ("failed", "cancelled", "evicted") and stage.revoked_until is None
