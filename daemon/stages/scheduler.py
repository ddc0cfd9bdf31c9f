"""Running stages: one after another and side by side, from a listing to sealed segments, or to their end.

On the event loop; what blocks runs in threads, and what happens there comes back in one place.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

from weightd.daemon.checkpoints.cache import Cache
from weightd.daemon.devices.base import Device, Segment
from weightd.daemon.devices.copying import copy_segment
from weightd.daemon.errors import (
    HOW_TO_CHANGE,
    Cancelled,
    DaemonError,
    DeviceFailed,
    InsufficientCapacity,
    InvalidRequest,
    QueueFull,
    ReadOnly,
)
from weightd.daemon.filling.ledger import Ledger
from weightd.daemon.keeper.deposits import Deposits
from weightd.daemon.limits import FillLimits, NodeLimits
from weightd.daemon.observing.logs import about
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.sources.base import Source
from weightd.daemon.stages import record
from weightd.daemon.stages.loading import Loading, Peers
from weightd.daemon.stages.manifests import SealedManifest
from weightd.daemon.stages.planner import Planner, Relist, Reopen
from weightd.daemon.stages.planning import Plan, allocated
from weightd.daemon.stages.priority_semaphore import PrioritySemaphore
from weightd.daemon.stages.residency import Residency
from weightd.daemon.stages.resident import KIND, ResidentSource, candidates, held, is_lendable
from weightd.daemon.stages.segments import entry_files, key_of, segment_manifest
from weightd.daemon.stages.source_threads import SourceThreads
from weightd.daemon.stages.stage import Lease, Stage
from weightd.ipc.errors import CudaError

log = logging.getLogger(__name__)

T = TypeVar("T")


class Scheduler:
    """Runs stages: ``start`` new ones, ``resume`` those of the daemon before, ``cancel`` either."""

    def __init__(
        self,
        devices: Mapping[str, Device],
        residency: Residency,
        deposits: Deposits,
        cache: Cache,
        metrics: Metrics,
        fill_limits: FillLimits,
        limits: NodeLimits,
        peers: Peers | None,
    ) -> None:
        self._peers = peers
        self._devices = devices
        self._residency = residency
        self._deposits = deposits
        self._cache = cache
        self._metrics = metrics
        self._fill_limits = fill_limits
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self.listing = SourceThreads("listing")
        # Threads, not a bound on work: how much loads at once is decided by turns.
        self._threads = ThreadPoolExecutor(64, thread_name_prefix="stage")
        self.planner = Planner(cache, fill_limits.retry_deadline, self.in_thread)
        self._turns: dict[tuple[str, str], PrioritySemaphore] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loading: dict[str, Loading] = {}

    def start(self, stage: Stage, source: Source) -> None:
        """Take up a new stage. Raises QueueFull."""
        waiting = sum(other.state in ("queued", "planning") for other in self._residency.stages.values())
        # Guests leave half of it to others.
        if waiting >= (max(1, self._limits.max_queued // 2) if stage.guest else self._limits.max_queued):
            raise QueueFull(
                f"{waiting} stages wait for their turn, which is all that WEIGHTD_MAX_QUEUED allows: try again later",
                retry_after_seconds=10,
            )
        stage.source_kind = stage.clock.origin = source.kind
        if self._residency.made_room(stage):
            self._metrics.restaged.inc()
        self._residency.keep(stage)
        stage.log_state()
        self.spawn(self._run(stage, source), stage.id)

    async def resume(
        self,
        stage: Stage,
        relist: Relist,
        reopen: Reopen,
    ) -> None:
        """Go on with a stage whose daemon died while it was on its way; ``relist(uri, weights)`` says what its
        source holds now.

        What lacks bytes waits for its source as long as a failing read is tried again. What lacks none is finished
        without it where it does not answer: ``reopen(uri)`` is the source, without a word to it.
        """
        found: tuple[Source, Plan] | None = None
        try:
            found = await self.planner.plan_again(stage, relist, reopen)
        except DaemonError as error:
            self.end(stage, "failed", error)
        except Exception as error:
            log.exception("it fails, and is not known to")
            self.end(stage, "failed", DaemonError(f"{type(error).__name__}: {error}"))
        if found is None or stage.finished:
            self._residency.release(stage)
            return
        source, plan = found
        stage.listing = plan.checkpoint.listing
        stage.source_kind = stage.clock.origin = source.kind
        await self._run(stage, source, plan)

    def cancel(self, stage: Stage, reason: str) -> None:
        """End a stage that is not ready. Its state says so at once; its memory goes when nothing writes to it."""
        if stage.finished:
            return
        stage.cancelled.set()
        if loading := self._loading.get(stage.id):
            loading.stop()
        for turns in self._turns.values():
            turns.changed()
        self.end(stage, "cancelled", Cancelled(reason))

    async def close(self) -> None:
        """Wait for everything that runs, which has been cancelled, and for threads that may still write."""
        if self._tasks:
            await asyncio.wait(self._tasks)
        self.listing.close()
        self.planner.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, stage: Stage, source: Source, plan: Plan | None = None) -> None:
        loading: Loading | None = None
        turns: list[PrioritySemaphore] = []
        lease: Lease | None = None
        try:
            stage.enter("planning")
            assert stage.listing is not None
            if plan is None:
                plan = await self.planner.plan_stage(stage, source, stage.listing)
            stage.clock.enter("other")
            if stage.finished:
                return
            devices = [self._devices[name] for name in stage.devices]
            for device in set(devices):
                await self.in_thread(device.open)
            if stage.finished:
                return
            stage.clock.enter("queued")
            await self._admit(stage, allocated(plan.recipes, devices))
            stage.clock.enter("other")
            if stage.finished:
                return
            source, lease = await self._from_memory(stage, source, plan)
            stage.plan, stage.infos, stage.metadata = plan, plan.infos, plan.metadata
            stage.left_out = tuple(dict.fromkeys((*stage.listing.left_out, *plan.left_out)))
            reads_peers = self._peers is not None and not self._peers.off
            if reads_peers or self._deposits.kept:  # for peers without a way to the origin, and for the next daemon
                await self.in_thread(self._cache.keep_headers, plan.checkpoint)
            if reads_peers:
                stage.key = await self.in_thread(key_of, stage)
            stage.clock.enter("queued")
            # One for each device, always in the same order, so that nobody waits for each other.
            for name in sorted(set(stage.devices)):
                own = self._turns.setdefault(
                    (stage.source_kind, name), PrioritySemaphore(self._limits.concurrent_loads)
                )
                if not own.free:
                    stage.planned.set()
                    stage.enter("queued")
                await own.acquire(lambda: stage.priority, stage.cancelled.is_set)
                turns.append(own)
            if stage.finished:
                return
            stage.enter("loading")
            loading = Loading(
                source,
                plan,
                stage.request,
                devices,
                self._cache,
                self._fill_limits,
                self._peers,
                stage.key,
                stage.clock,
            )
            manifests = await self.in_thread(self._load, stage, loading)
            if stage.finished:
                for manifest in manifests:
                    manifest.close()
                return
            stage.manifests = manifests
            stage.segment_digests = loading.segment_digests
            stage.checkpoint_digest = loading.checkpoint_digest
            stage.satisfied = loading.satisfied
            # From here on its manifests say what the plan said, in a fraction of the memory.
            stage.plan, stage.listing = None, replace(stage.listing, weight_map=None)
            stage.settle()
            self.end(stage, "ready", None)
            self._residency.leases.note(stage)
            record.deposit(self._deposits, stage)
        except Cancelled as error:
            self.end(stage, "cancelled", error)
        except DaemonError as error:
            self.end(stage, "failed", error)
        except CudaError as error:
            self.end(stage, "failed", DeviceFailed(str(error), **error.details))
        except Exception as error:
            log.exception("it fails, and is not known to")
            self.end(stage, "failed", DaemonError(f"{type(error).__name__}: {error}"))
        finally:
            self._loading.pop(stage.id, None)
            stage.settle()
            for taken in turns:
                taken.release()
            if loading is not None:
                try:
                    await self.in_thread(loading.close)
                except Exception:
                    log.exception("not everything that loaded it could be closed")
                loading = None
            if lease is not None:
                assert isinstance(source, ResidentSource)
                source.close()
                self._residency.leases.end(lease)
            if stage.state != "ready":
                await self._residency.dismiss([stage])
                self._residency.release(stage)
            if refused(stage):
                self._residency.stages.pop(stage.id, None)  # the request is refused, as if it had never been
            await self.trim_cache()

    async def trim_cache(self) -> None:
        """Keep the cache within its bound, without what is of stages that are here."""
        here = [stage for stage in self._residency.stages.values() if stage.state == "ready" or not stage.finished]
        await self.in_thread(self._cache.trim, set().union(*(stage.cached_as() for stage in here)))

    async def _from_memory(self, stage: Stage, source: Source, plan: Plan) -> tuple[Source, Lease | None]:
        """The source of a stage, or where all that it wants is in memory already, that, with a lease on it."""
        others = candidates(self._residency.stages.values(), stage)
        if not others or "origin" not in stage.request.sources:
            return source, None
        whole = stage.request.expect_digest is not None
        found = await self.in_thread(partial(held, others, plan, whole=whole))
        if found is None or stage.finished or not is_lendable(found[0]):
            return source, None
        other, files = found
        stage.source_kind = stage.clock.origin = KIND
        return ResidentSource(source, other, files), self._residency.leases.begin_reading(other, stage.id)

    async def _admit(self, stage: Stage, needed: dict[str, int]) -> None:
        """Promise the stage its bytes, evicting what may go. Raises InsufficientCapacity, ReadOnly."""
        if needed != stage.reserved:  # an adopted stage has its bytes already
            stage.reserved = {}
            if stage.guest and (going := self._residency.victims(needed)):
                raise ReadOnly(
                    f"{stage.uri} needs {sum(needed.values())} bytes, for which {', '.join(one.id for one in going)} "
                    f"would have to go: {HOW_TO_CHANGE}"
                )
            await self._residency.dismiss_victims(needed)
            self._residency.make_room(stage.uri, needed)
            stage.reserved = needed
            await self._residency.unmapped()

    def _load(self, stage: Stage, loading: Loading) -> list[SealedManifest]:
        """In a thread: allocate, fill, verify, seal. Returns the segments' manifests."""
        stage.clock.enter("other")
        plan = stage.plan
        assert plan is not None
        recipes = plan.recipes
        stage.verified = [[] for _ in recipes]
        loading.lay_out()
        stage.bytes_total = loading.bytes_total
        if stage.ledger is not None and not self._goes_on(stage, stage.ledger, loading):
            self._residency.free(stage)
        if stage.ledger is None:
            for recipe, device in zip(recipes, loading.devices, strict=True):
                if stage.cancelled.is_set():
                    raise Cancelled("the stage was cancelled")
                label = f"{stage.id}/{recipe.rank}"
                stage.segments.append(device.allocate(recipe.nbytes, label, stage.request.handle))
            stage.ledger = self._ledger(stage, loading)
        self._on_loop(stage.planned.set)
        record.deposit(self._deposits, stage)

        def verified(segment: int, entries: list[int]) -> None:
            stage.verified[segment].extend(entries)
            self._on_loop(stage.notify)

        fill = loading.prepare(stage.segments, stage.ledger, verified)
        stage.fill = fill
        fill.count_with(self._metrics, stage.source_kind)
        fill.account.take_back = lambda entries: asyncio.run_coroutine_threadsafe(
            self._take_back(stage, entries), self._loop
        ).result()
        self._loading[stage.id] = loading
        if stage.cancelled.is_set():
            loading.stop()
        self._on_loop(stage.notify)
        loading.run(lambda: self._on_loop(stage.enter, "verifying"))
        return [
            SealedManifest.seal(
                segment_manifest(
                    stage,
                    plan,
                    index,
                    loading.tensor_digests[index],
                    loading.segment_digests[index],
                    loading.checkpoint_digest,
                ),
                entry_files(plan, index),
            )
            for index in range(len(stage.segments))
        ]

    async def _take_back(self, stage: Stage, entries: set[tuple[int, int]]) -> bool:
        """These are not verified after all; False where somebody may have been told that they are."""
        told = {(segment, entry) for segment, of in enumerate(stage.verified) for entry in of}
        if stage.leases and told & entries:
            return False
        for segment, of in enumerate(stage.verified):
            stage.verified[segment] = [entry for entry in of if (segment, entry) not in entries]
        return True

    def _ledger(self, stage: Stage, loading: Loading) -> Ledger:
        try:
            return loading.ledger()
        except OSError as error:
            raise InsufficientCapacity(f"the system refused {stage.id} a ledger: {error.strerror}") from None

    def _goes_on(self, stage: Stage, ledger: Ledger, loading: Loading) -> bool:
        """Whether a load goes on in the memory that the daemon before has left, which can be written to then."""
        if not loading.goes_on(ledger):
            log.info("it begins anew: what the daemon before has left is of another plan")
            return False
        if all(ledger.landed):
            return True
        more: dict[str, int] = {}
        for segment in stage.segments:
            if not segment.writable:
                more[segment.device.name] = more.get(segment.device.name, 0) + segment.footprint
        if not more:
            return True
        if not asyncio.run_coroutine_threadsafe(self._reserve_more(stage, more), self._loop).result():
            log.info("it begins anew: what was lent while it loaded cannot be written to, and there is no room to copy")
            return False
        try:
            stage.segments = [self._writable(stage, segment) for segment in stage.segments]
        finally:
            self._on_loop(self._reserve_less, stage, more)
        return True

    async def _reserve_more(self, stage: Stage, more: Mapping[str, int]) -> bool:
        """Promise a stage so many bytes of each device on top of its own; False where they are not to be had."""
        try:
            await self._residency.dismiss_victims(more)
            self._residency.make_room(stage.uri, more)
        except InsufficientCapacity:
            return False
        stage.reserved = {name: nbytes + more.get(name, 0) for name, nbytes in stage.reserved.items()}
        await self._residency.unmapped()
        return True

    def _reserve_less(self, stage: Stage, less: Mapping[str, int]) -> None:
        stage.reserved = {name: nbytes - less.get(name, 0) for name, nbytes in stage.reserved.items()}
        self._residency.changed()

    def _writable(self, stage: Stage, segment: Segment) -> Segment:
        """The segment, or a copy where it cannot be written to any more because it was lent while it loaded."""
        if segment.writable:
            return segment
        fresh = segment.device.allocate(segment.nbytes, f"{stage.id}/again")
        copy_segment(segment, fresh, self._fill_limits)
        self._residency.left_behind(stage, segment)
        segment.close()
        return fresh

    def end(self, stage: Stage, state: str, error: DaemonError | None) -> None:
        """Enter a terminal state, or ready, and say so. A stage that has ended stays as it is."""
        if stage.finished:
            return
        if error is not None:
            # Frames of the traceback hold views of segments, which could then never be unmapped.
            error = error.with_traceback(None)
            error.__cause__ = error.__context__ = None
        stage.enter(state, error)
        self._metrics.ended(state, stage.source_kind, stage.clock, error, refused=refused(stage))

    # ------------------------------------------------------------------ threads

    async def in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        """Run what blocks in one of the scheduler's threads."""
        context = contextvars.copy_context()  # so that what is logged there is known to be of the stage
        return await self._loop.run_in_executor(self._threads, partial(context.run, function, *arguments))

    def _on_loop(self, function: Callable[..., None], *arguments: object) -> None:
        """From a thread: the one way by which what happens there reaches what happens here."""
        self._loop.call_soon_threadsafe(function, *arguments)

    def spawn(self, coroutine: Coroutine[None, None, None], name: str) -> None:
        """Run it as a task that ``close`` waits for; ``name`` is the id of the stage that it is about."""
        with about(name):
            task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def refused(stage: Stage) -> bool:
    """Whether it turned out that the request cannot be served before anybody was told of the stage."""
    return isinstance(stage.error, InsufficientCapacity | InvalidRequest | ReadOnly) and not stage.announced
