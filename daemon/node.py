"""The node: which stages there are, which of them a request means, and who may load when.

Everything here runs on the event loop; what blocks runs in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from weightd.daemon.cache import Cache
from weightd.daemon.checkpoint import Listing, list_checkpoint
from weightd.daemon.devices import Device
from weightd.daemon.errors import (
    Cancelled,
    DaemonError,
    InsufficientCapacity,
    InvalidRequest,
    SourceFailed,
    StageLeased,
    UnknownStage,
)
from weightd.daemon.fill import FillLimits
from weightd.daemon.manifests import manifest_fd, segment_manifest
from weightd.daemon.metrics import Metrics
from weightd.daemon.request import StageRequest
from weightd.daemon.sources import Allow, Source, canonical, open_source
from weightd.daemon.stage import Lease, Plan, Stage
from weightd.daemon.staging import Loading, allocated, make_plan
from weightd.daemon.turns import Turns

log = logging.getLogger(__name__)

MAX_ENDED = 200
"""Records of failed and cancelled stages that are kept for looking at."""

_RELIST_DEADLINE = 5.0
"""Seconds that a source may take to say whether what is resident is still what it holds."""
_PLAN_DEADLINE = 30.0
"""Seconds that a request waits for its plan; then it is answered with the stage as it is."""

T = TypeVar("T")


class Node:
    """All stages of this daemon. Make it on the event loop that it is used on."""

    def __init__(
        self,
        devices: dict[str, Device],
        *,
        allow: Allow,
        cache: Cache,
        limits: FillLimits,
        concurrent_loads: int,
        metrics: Metrics,
    ) -> None:
        self.devices = devices
        self.default_device = next(reversed(devices))
        self.stages: dict[str, Stage] = {}
        self.metrics = metrics
        self.started_at = time.time()
        self._allow = allow
        self._cache = cache
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        # Threads, not a bound on work: planning blocks on storage, loading on its own readers.
        self._threads = ThreadPoolExecutor(64, thread_name_prefix="stage")
        self._turns = Turns(concurrent_loads)
        self._listings: dict[str, asyncio.Task[tuple[Source, Listing]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loading: dict[str, Loading] = {}
        metrics.watch(self)

    # ------------------------------------------------------------------ asking for stages

    async def stage(self, request: StageRequest) -> tuple[Stage, bool]:
        """The stage that a request means, and whether it was there already. Returns once it is planned.

        A request for what is there, or on its way, joins it; otherwise a new stage starts. What is at the URI is
        listed anew every time, so that a replaced checkpoint is never taken for the one that is resident; where the
        source cannot be reached, what is resident counts.

        Raises InvalidRequest, NotAllowed, InsufficientCapacity. All else that goes wrong is in the stage's record.
        """
        uri = canonical(request.model)
        if not uri.startswith("file:"):
            self._allow.check(uri)  # a file is checked with its links resolved, by its source
        device = request.device or self.default_device
        if device not in self.devices:
            raise InvalidRequest(f"device {device!r} is not on this node, it has {', '.join(self.devices)}")
        listing: Listing | None
        try:
            resident = self._find(request, uri, device, None)
            if resident is not None and resident.state != "ready":
                resident = None
            source, listing = await asyncio.wait_for(self._list(uri), _RELIST_DEADLINE if resident else None)
        except InvalidRequest:
            raise
        except TimeoutError:
            assert resident is not None  # only then is there a deadline
            log.warning("%s: serving what is resident, its source does not answer", uri)
            return resident, True
        except DaemonError as error:
            if resident is not None and isinstance(error, SourceFailed):
                log.warning("%s: serving what is resident, its source cannot be asked: %s", uri, error)
                return resident, True
            if error.code == "not_allowed" and "setting" in error.details:
                raise
            return self._failed(Stage(uri, device, request, None), error), False
        found = self._find(request, uri, device, listing)
        created = found is None
        if found is None:
            found = Stage(uri, device, request, listing)
            found.source_kind = source.kind
            self._keep(found)
            self._spawn(self._run(found, source), found.id)
        else:
            found.priority = max(found.priority, request.priority)
            found.pin = found.pin or request.pin
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(found.planned.wait(), _PLAN_DEADLINE)
        if _refused(found):
            assert found.error is not None
            raise found.error
        found.announced = True
        return found, not created

    def find_rank(self, model: str, rank: int) -> Stage:
        """The live stage of a model that has a segment for a tensor-parallel rank, for callers who know no more.

        Raises UnknownStage where there is none, InvalidRequest where there are several.
        """
        uri = canonical(model)
        found = [
            stage
            for stage in self.stages.values()
            if stage.uri == uri
            and stage.state not in ("failed", "cancelled", "evicted")
            and stage.request.parallel is not None
            and rank in stage.request.ranks
        ]
        if not found:
            raise UnknownStage(f"no stage of {uri} has a segment for tp_rank {rank}: stage it, or say tp_size and map")
        if len(found) > 1:
            raise InvalidRequest(
                f"{len(found)} stages of {uri} have a segment for tp_rank {rank}: name one of "
                f"{', '.join(stage.id for stage in found)}"
            )
        return found[0]

    def get(self, stage_id: str) -> Stage:
        """A stage by its id. Raises UnknownStage."""
        try:
            return self.stages[stage_id]
        except KeyError:
            raise UnknownStage(f"no stage has the id {stage_id[:100]!r}") from None

    def used(self, device: str) -> int:
        """Bytes of a device's capacity that are taken or promised."""
        return sum(stage.footprint for stage in self.stages.values() if stage.device == device)

    def _find(self, request: StageRequest, uri: str, device: str, listing: Listing | None) -> Stage | None:
        """A stage whose bytes are, or will be, those that the request wants; ready ones first. None: any identity."""
        key = request.layout_key()
        joinable = [
            stage
            for stage in self.stages.values()
            if (stage.uri, stage.device, stage.request.layout_key()) == (uri, device, key)
            and stage.state not in ("failed", "cancelled", "evicted")
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

            task = asyncio.ensure_future(self._in_thread(listed))
            self._listings[uri] = task
            task.add_done_callback(lambda _: self._listings.pop(uri, None))
        return await asyncio.shield(task)

    def _keep(self, stage: Stage) -> None:
        self.stages[stage.id] = stage
        ended = [s for s in self.stages.values() if s.finished and s.state != "ready" and not s.footprint]
        for old in ended[: max(0, len(ended) - MAX_ENDED)]:
            del self.stages[old.id]

    def _failed(self, stage: Stage, error: DaemonError) -> Stage:
        self._keep(stage)
        self._end(stage, "failed", error)
        stage.released.set()
        return stage

    # ------------------------------------------------------------------ running a stage

    async def _run(self, stage: Stage, source: Source) -> None:
        loading: Loading | None = None
        turn = False
        try:
            stage.enter("planning")
            assert stage.listing is not None
            plan = await self._in_thread(make_plan, source, stage.listing, stage.request, self._cache)
            if stage.finished:
                return
            self._admit(stage, plan)
            stage.plan = plan
            stage.planned.set()
            if not self._turns.free:
                stage.enter("queued")
            await self._turns.take(lambda: stage.priority, stage.cancelled.is_set)
            turn = True
            if stage.finished:
                return
            stage.enter("loading")
            loading = Loading(source, plan, stage.request, self._cache, self._limits)
            manifests = await self._in_thread(self._load, stage, loading)
            if stage.finished:
                return
            stage.digests = loading.tensor_digests
            stage.leaves = loading.leaves
            stage.manifests = manifests
            stage.segment_digests = loading.segment_digests
            stage.checkpoint_digest = loading.checkpoint_digest
            stage.satisfied = loading.satisfied
            stage.verified = [list(range(len(recipe.entries))) for recipe in plan.recipes]
            self._end(stage, "ready", None)
        except Cancelled as error:
            self._end(stage, "cancelled", error)
        except DaemonError as error:
            self._end(stage, "failed", error)
        except Exception as error:
            log.exception("stage %s", stage.id)
            self._end(stage, "failed", DaemonError(f"{type(error).__name__}: {error}"))
        finally:
            self._loading.pop(stage.id, None)
            stage.settle()
            if turn:
                self._turns.give()
            if loading is not None:
                await self._in_thread(loading.close)
                loading = None
            if stage.state != "ready":
                self._release(stage)
            if _refused(stage):
                self.stages.pop(stage.id, None)  # the request is refused, as if it had never been

    def _admit(self, stage: Stage, plan: Plan) -> None:
        """Promise the stage its bytes, or raise InsufficientCapacity with the numbers."""
        device = self.devices[stage.device]
        needed = allocated(plan.recipes, device.footprint)
        used = self.used(stage.device)
        if used + needed > device.capacity:
            raise InsufficientCapacity(
                f"{stage.uri} needs {needed} bytes on {stage.device}; {used} of {device.capacity} are taken, "
                f"{used + needed - device.capacity} are missing: drop a stage, or raise WEIGHTD_CAPACITY",
                device=stage.device,
                needed_bytes=needed,
                used_bytes=used,
                capacity_bytes=device.capacity,
                missing_bytes=used + needed - device.capacity,
                resident=[
                    {"id": s.id, "model": s.uri, "bytes": s.footprint, "state": s.state, "leases": len(s.leases)}
                    for s in self.stages.values()
                    if s.device == stage.device and s.footprint
                ],
            )
        stage.footprint = needed

    def _load(self, stage: Stage, loading: Loading) -> list[int]:
        """In a thread: allocate, fill, verify, seal. Returns descriptors of the segments' manifests."""
        assert stage.plan is not None
        device = self.devices[stage.device]
        for recipe in stage.plan.recipes:
            if stage.cancelled.is_set():
                raise Cancelled("the stage was cancelled")
            label = f"{stage.id}/{recipe.rank}"
            stage.segments.append(device.allocate(recipe.nbytes, label))
        stage.verified = [[] for _ in stage.plan.recipes]

        def verified(segment: int, entries: list[int]) -> None:
            stage.verified[segment].extend(entries)
            self._on_loop(stage.notify)

        fill = loading.prepare(stage.segments, verified)
        stage.bytes_total = loading.bytes_total
        stage.fill = fill
        fill.count_with(self.metrics, stage.source_kind)
        self._loading[stage.id] = loading
        if stage.cancelled.is_set():
            loading.stop()
        self._on_loop(stage.notify)
        loading.run(lambda: self._on_loop(stage.enter, "verifying"))
        return [
            manifest_fd(
                segment_manifest(
                    stage,
                    index,
                    loading.tensor_digests[index],
                    loading.segment_digests[index],
                    loading.checkpoint_digest,
                )
            )
            for index in range(len(stage.segments))
        ]

    def _end(self, stage: Stage, state: str, error: DaemonError | None) -> None:
        if stage.finished:
            return
        if error is not None:
            # Frames of the traceback hold views of segments, which could then never be unmapped.
            error = error.with_traceback(None)
            error.__cause__ = error.__context__ = None
        stage.enter(state, error)
        self.metrics.finished.labels(state).inc()
        if state == "ready":
            seconds = time.time() - stage.created_at
            self.metrics.stage_seconds.observe(seconds)
            log.info("%s %s ready: %d bytes in %.2f s", stage.id, stage.uri, stage.bytes_total, seconds)
        else:
            if error is not None and state == "failed":
                self.metrics.errors.labels(error.code).inc()
            log.warning("%s %s %s: %s", stage.id, stage.uri, state, error)

    def _release(self, stage: Stage) -> None:
        for segment in stage.segments:
            segment.close()
        for fd in stage.manifests:
            os.close(fd)
        stage.segments, stage.manifests = [], []
        stage.footprint = 0
        stage.released.set()
        stage.notify()

    # ------------------------------------------------------------------ ending stages

    def cancel(self, stage: Stage, reason: str) -> None:
        """End a stage that is not ready. Its state says so at once; its memory goes when nothing writes to it."""
        if stage.finished:
            return
        stage.cancelled.set()
        if loading := self._loading.get(stage.id):
            loading.stop()
        self._turns.changed()
        self._end(stage, "cancelled", Cancelled(reason))

    def drop(self, stage_id: str) -> Stage:
        """Cancel a stage that is on its way; forget one that has ended; free one that is ready.

        Raises UnknownStage, and StageLeased where processes use it.
        """
        stage = self.get(stage_id)
        if stage.leases:
            raise StageLeased(
                f"stage {stage.id} has {len(stage.leases)} leases, held by "
                + ", ".join(f"pid {lease.pid} (uid {lease.uid})" for lease in list(stage.leases.values())[:10]),
                leases=[lease.__dict__ for lease in stage.leases.values()],
            )
        if not stage.finished:
            self.cancel(stage, "cancelled by request")
            return stage
        if stage.state == "ready":
            stage.enter("evicted")
            self._release(stage)
        if not stage.footprint:
            self.stages.pop(stage.id, None)
        return stage

    async def close(self) -> None:
        """Cancel what runs and free everything; waits for threads that may still write."""
        for stage in list(self.stages.values()):
            self.cancel(stage, "the daemon is stopping")
        if self._tasks:
            await asyncio.wait(self._tasks)
        for stage in self.stages.values():
            self._release(stage)
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------ leases

    def lease(self, stage: Stage, rank: int, *, uid: int, gid: int, pid: int) -> Lease:
        """Record a lease on one rank's segment. Raises InvalidRequest where the stage has no such rank."""
        if rank not in stage.request.ranks:
            raise InvalidRequest(f"stage {stage.id} has no tp_rank {rank}, it has {list(stage.request.ranks)}")
        lease = Lease("le-" + secrets.token_hex(6), stage.id, rank, uid, gid, pid, time.time())
        stage.leases[lease.id] = lease
        return lease

    def end_lease(self, lease: Lease) -> None:
        """Its connection is closed."""
        if stage := self.stages.get(lease.stage):
            stage.leases.pop(lease.id, None)

    def leases(self) -> Iterable[Lease]:
        """All leases there are."""
        return itertools.chain.from_iterable(stage.leases.values() for stage in self.stages.values())

    # ------------------------------------------------------------------ threads

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        return await self._loop.run_in_executor(self._threads, function, *arguments)

    def _on_loop(self, function: Callable[..., None], *arguments: object) -> None:
        """From a thread: the one way by which what happens there reaches what happens here."""
        self._loop.call_soon_threadsafe(function, *arguments)

    def _spawn(self, coroutine: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _refused(stage: Stage) -> bool:
    """Whether the plan showed that the request cannot be served, and nobody has been told of the stage."""
    return isinstance(stage.error, InsufficientCapacity | InvalidRequest) and not stage.plan and not stage.announced
