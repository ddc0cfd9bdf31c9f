"""Planning stages: new ones by their source, those of the daemon before again, where need be from what is cached."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeAlias

from weightd.daemon.checkpoints.cache import Cache
from weightd.daemon.checkpoints.contents import Checkpoint
from weightd.daemon.checkpoints.kept import KeptSource, kept_listing
from weightd.daemon.checkpoints.listing import Listing
from weightd.daemon.errors import CheckpointChanged, DaemonError, InvalidRequest, SourceFailed
from weightd.daemon.filling.fill import retry_pause
from weightd.daemon.sources.base import ANSWERS, Source
from weightd.daemon.stages.planning import Plan, expected_sha256, make_plan, read_headers
from weightd.daemon.stages.request import StageRequest
from weightd.daemon.stages.source_threads import SourceThreads
from weightd.daemon.stages.stage import Stage, is_still

log = logging.getLogger(__name__)

Relist: TypeAlias = Callable[[str, tuple[str, ...]], Awaitable[tuple[Source, Listing]]]
"""What is at a URI now, of which these weights are wanted."""
Reopen: TypeAlias = Callable[[str], Source]
"""The source at a URI, without a word to it."""

_ASKED = 5.0
"""Seconds that the source of a stage of the daemon before may take to answer, where the stage does not need it."""


class Planner:
    """Plans in threads of its own, those of each source apart. On the event loop.

    ``in_thread`` runs what asks no source; ``retry_deadline`` is in seconds.
    """

    def __init__(self, cache: Cache, retry_deadline: float, in_thread: Callable[..., Awaitable[Any]]) -> None:
        self._cache = cache
        self._retry_deadline = retry_deadline
        self._in_thread = in_thread
        self._threads = SourceThreads("planning")

    async def plan_again(
        self,
        stage: Stage,
        relist: Relist,
        reopen: Reopen,
    ) -> tuple[Source, Plan] | None:
        """The source of a stage of the daemon before, and its plan; None where it ends meanwhile."""
        began = time.monotonic()
        whole = stage.ledger is not None and all(stage.ledger.landed)
        for attempt in itertools.count(1):
            spent = time.monotonic() - began
            left = self._retry_deadline - spent
            try:
                return await asyncio.wait_for(self._planned(stage, relist), _ASKED if whole else max(_ASKED, left))
            except (*ANSWERS, InvalidRequest):
                raise
            except TimeoutError:
                error: DaemonError = SourceFailed(f"{stage.uri}: its source does not answer")
            except DaemonError as failure:
                error = failure
            if stage.finished:
                return None
            if whole and (found := await self._planned_from_cache(stage, reopen)):
                log.warning("its source does not answer: every byte is here, it is finished without: %s", error)
                return found
            whole = False
            if left <= 0:
                raise SourceFailed(
                    f"{error}; given up after {attempt} tries in {spent:.1f} s (WEIGHTD_RETRY_DEADLINE)",
                    attempts=attempt,
                )
            if attempt == 1:
                log.warning("its source does not answer, it goes on once that does: %s", error)
            ends = time.monotonic() + retry_pause(attempt)
            while not stage.finished and (pause := ends - time.monotonic()) > 0:
                await stage.changed(pause)
        return None

    async def _planned(self, stage: Stage, relist: Relist) -> tuple[Source, Plan]:
        source, listing = await relist(stage.uri, stage.request.files)
        if not is_still(stage, listing):
            raise CheckpointChanged(f"{stage.uri} changed while no daemon was there: stage it again")
        return source, await self.plan_stage(stage, source, listing)

    async def plan_stage(self, stage: Stage, source: Source, listing: Listing) -> Plan:
        """The plan of a stage, as its source has it: apart from whoever waits for other sources."""
        return await self._threads.run(
            stage.uri, make_plan, source, listing, stage.request, self._cache, stage.clock, stage.cancelled.is_set
        )

    async def plan(self, uri: str, request: StageRequest, source: Source, listing: Listing) -> Plan:
        """What the plan of a request would be. Raises as ``make_plan``."""
        return await self._threads.run(uri, make_plan, source, listing, request, self._cache)

    async def headers(self, uri: str, source: Source, listing: Listing) -> tuple[Checkpoint, str | None]:
        """As ``read_headers``."""
        return await self._threads.run(uri, read_headers, source, listing, self._cache)

    async def _planned_from_cache(self, stage: Stage, reopen: Reopen) -> tuple[Source, Plan] | None:
        """The plan of a stage that has all its bytes, from what the cache keeps; None where that is not all."""
        assert stage.listing is not None
        listing = kept_listing(self._cache, stage.listing.identity)
        if listing is None:
            return None
        listing = replace(listing, rule=stage.listing.rule, left_out=stage.listing.left_out)
        try:
            origin = await asyncio.wait_for(self._threads.run(stage.uri, reopen, stage.uri), _ASKED)
            source = KeptSource(origin, self._cache, listing)
            plan = await self._in_thread(
                make_plan, source, listing, stage.request, self._cache, stage.clock, stage.cancelled.is_set
            )
        except (DaemonError, TimeoutError) as error:
            log.info("it cannot be planned without its source: %s", error)
            return None
        # What is known of a file's SHA-256 is gone with the process that computed it.
        return None if expected_sha256(plan.checkpoint, stage.request) else (source, plan)

    def close(self) -> None:
        """Plan nothing more."""
        self._threads.close()
