"""What a request means: a stage that is there or on its way, or else what is at its URI."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from weightd.daemon.checkpoints.cache import Cache
from weightd.daemon.checkpoints.kept import kept_listing
from weightd.daemon.checkpoints.listing import Listing, list_checkpoint
from weightd.daemon.devices.base import Device
from weightd.daemon.errors import DaemonError, InvalidRequest, NotAllowed, QueueFull, SourceFailed, UnknownStage
from weightd.daemon.peers.finding.fleet import Fleet
from weightd.daemon.peers.pulling.source import open_source as open_peer_source
from weightd.daemon.sources.base import ANSWERS, Source
from weightd.daemon.sources.uris import Allow, canonical, open_source
from weightd.daemon.stages.request import StageRequest
from weightd.daemon.stages.source_threads import SourceThreads, place_of
from weightd.daemon.stages.stage import Stage, is_still

log = logging.getLogger(__name__)

_RELIST_DEADLINE = 5.0
"""Seconds that a source may take to say whether what is resident is still what it holds."""
_LISTINGS_AT_A_PLACE = 64
"""Requests that may wait for one bucket, say, to be listed."""
_LISTINGS_OF_A_KIND = 256
"""Requests that may wait for one kind of source."""


@dataclass(frozen=True)
class Joined:
    """There is a stage of what the request wants, ready or on its way."""

    stage: Stage
    listing: Listing | None
    """What is at the URI; None where that cannot be told."""
    unanswered: DaemonError | None = None
    """Why it cannot."""


@dataclass(frozen=True)
class Listed:
    """There is none, and this is at the URI."""

    uri: str
    devices: tuple[str, ...]
    """Name of each segment's device."""
    source: Source
    listing: Listing


@dataclass(frozen=True)
class Unlisted:
    """There is none, and what is at the URI cannot be told."""

    uri: str
    devices: tuple[str, ...]
    error: DaemonError


class Resolver:
    """Finds what requests mean among ``stages``, by id, and at their URIs. On the event loop only.

    ``in_thread`` runs what blocks, ``listing`` what asks a source. ``fleet`` is asked what a checkpoint is where its
    origin does not answer: ``trust_peers`` for every request, else for those whose digest tells.
    """

    def __init__(
        self,
        stages: Mapping[str, Stage],
        devices: Mapping[str, Device],
        default_device: str,
        *,
        allow: Allow,
        fleet: Fleet | None,
        trust_peers: bool,
        in_thread: Callable[..., Awaitable[Any]],
        listing: SourceThreads,
    ) -> None:
        self._stages = stages
        self._devices = devices
        self._default_device = default_device
        self._allow = allow
        self._fleet = fleet
        self._trust_peers = trust_peers
        self._in_thread = in_thread
        self._listing = listing
        self._listings: dict[tuple[str, tuple[str, ...]], asyncio.Task[tuple[Source, Listing]]] = {}

    async def resolve(self, request: StageRequest) -> Joined | Listed | Unlisted:
        """What the request means. Raises InvalidRequest, NotAllowed, QueueFull.

        What is at the URI is listed anew every time, so that a replaced checkpoint is never taken for the one that is
        resident. A source that says that nothing is there, or something that cannot be used, has answered; where it
        does not, whatever keeps it from that, what is here of what it said last counts.
        """
        uri = canonical(request.model)
        if not uri.startswith("file:"):
            self._allow.check(uri)  # a file is checked with its links resolved, by its source
        devices = self.placed(request)
        here = self._find(request, uri, devices, None)
        is_ready = here is not None and here.state == "ready"
        try:
            if not is_ready:  # what is ready waits for a while only
                self._check_listings(uri)
            source, listing = await asyncio.wait_for(
                self.list(uri, request.files), _RELIST_DEADLINE if is_ready else None
            )
        except Exception as error:
            if here is not None and not isinstance(error, ANSWERS):
                unanswered = _as_answer(uri, error)
                log.warning("%s: serving what is here, its source cannot be asked: %s", uri, unanswered)
                return Joined(here, None, unanswered)
            if not isinstance(error, DaemonError) or isinstance(error, InvalidRequest | QueueFull):
                raise
            if isinstance(error, NotAllowed) and "setting" in error.details:
                raise
            if not isinstance(error, SourceFailed) or not self._may_ask_peers(uri, request):
                return Unlisted(uri, devices, error)
            log.warning("%s: its origin cannot be asked (%s), peers are", uri, error)
            try:
                source, listing = await self._in_thread(self._list_at_peers, uri, request.files)
            except DaemonError as failure:
                return Unlisted(uri, devices, SourceFailed(f"{error}; {failure}"))
        found = self._find(request, uri, devices, listing)
        return Joined(found, listing) if found else Listed(uri, devices, source, listing)

    async def find_listing(self, uri: str, weights: tuple[str, ...], cache: Cache) -> tuple[Source, Listing]:
        """What is at a canonical URI; where its source does not answer, what it held when a stage that is here was
        listed. Raises as ``resolve``, and what the source says."""
        if not uri.startswith("file:"):
            self._allow.check(uri)
        self._check_listings(uri)
        try:
            return await self.list(uri, weights)
        except Exception as error:
            if isinstance(error, (*ANSWERS, InvalidRequest, QueueFull)):
                raise
            here = [
                stage
                for stage in self._stages.values()
                if (stage.uri, stage.request.files) == (uri, weights) and _live(stage) and stage.listing
            ]
            for stage in sorted(here, key=lambda stage: stage.listed_at, reverse=True):
                assert stage.listing is not None
                if listing := await self._in_thread(kept_listing, cache, stage.listing.identity):
                    log.warning("%s: its source cannot be asked, what %s is of counts: %s", uri, stage.id, error)
                    return await self._in_thread(self.reopen, uri), listing
            raise

    def reopen(self, uri: str) -> Source:
        """The source at a canonical URI, which is asked nothing. Blocks. Raises what opening it raises."""
        return open_source(uri, self._allow)

    def _check_listings(self, uri: str) -> None:
        """Raises QueueFull where so many wait for the same place, or kind of source, that it does not answer."""
        waiting_for = [listed for listed, _ in self._listings]
        if uri in waiting_for:
            return
        for what, same, limit in (
            (place_of(uri), place_of, _LISTINGS_AT_A_PLACE),
            (uri.partition(":")[0], lambda other: other.partition(":")[0], _LISTINGS_OF_A_KIND),
        ):
            if (waiting := sum(same(other) == what for other in waiting_for)) >= limit:
                raise QueueFull(
                    f"{waiting} requests wait for {what} to say what it holds, which is all that may: see whether it "
                    "answers from this node (weightd doctor), and try again later",
                    retry_after_seconds=10,
                )

    async def list(self, uri: str, weights: tuple[str, ...]) -> tuple[Source, Listing]:
        """List a canonical URI, of which ``weights`` are wanted (none: by the rule).

        Requests that come while it is being listed share the answer.
        """
        task = self._listings.get((uri, weights))
        if task is None:

            def listed() -> tuple[Source, Listing]:
                source = self.reopen(uri)
                return source, list_checkpoint(uri, source, weights)

            task = asyncio.ensure_future(self._listing.run(uri, listed))
            self._listings[uri, weights] = task
            task.add_done_callback(lambda _: self._listings.pop((uri, weights), None))
        return await asyncio.shield(task)

    def _may_ask_peers(self, uri: str, request: StageRequest) -> bool:
        """Whether peers may say what a checkpoint is: where they were declared trusted, or its digest tells."""
        told = self._trust_peers or str(request.expect_digest).startswith("xxh3:")
        return self._fleet is not None and "peer" in request.sources and told and not uri.startswith("file:")

    def _list_at_peers(self, uri: str, weights: tuple[str, ...]) -> tuple[Source, Listing]:
        assert self._fleet is not None
        source = open_peer_source(uri, weights, self._fleet)
        return source, list_checkpoint(uri, source, weights)

    def _find(self, request: StageRequest, uri: str, devices: tuple[str, ...], listing: Listing | None) -> Stage | None:
        """A stage whose bytes are, or will be, those that the request wants; ready ones first. Without a listing: those
        that the source was last seen to hold."""
        kept = [
            stage
            for stage in self._stages.values()
            if stage.uri == uri and stage.request.files == request.files and stage.listing is not None
        ]
        if listing is None and kept:
            listing = max(kept, key=lambda stage: stage.listed_at).listing
        key = request.layout_key()
        joinable = [
            stage
            for stage in kept
            if stage.devices == devices  # what costs least, first: there may be very many
            and stage.request.layout_key() == key
            and _live(stage)
            and listing is not None
            and is_still(stage, listing)
            and self._meets(stage, request)
        ]
        return max(joinable, key=lambda stage: (stage.state == "ready", stage.created_at), default=None)

    def _meets(self, stage: Stage, request: StageRequest) -> bool:
        if "peer" not in request.sources and self._may_be_of_peers(stage):
            return False
        expected = request.expect_digest
        if expected is None or expected == stage.request.expect_digest:
            return True
        if isinstance(expected, dict):
            wanted = {f"{name}={digest}" for name, digest in expected.items()}
        else:
            assert stage.listing is not None
            wanted = {expected if expected.startswith("xxh3:") else f"{stage.listing.weights[0].name}={expected}"}
        return wanted <= stage.satisfied

    def _may_be_of_peers(self, stage: Stage) -> bool:
        """Whether bytes of it came from peers, or may still."""
        may_come = self._fleet is not None and not stage.finished and "peer" in stage.request.sources
        return may_come or stage.source_kind == "peer" or stage.bytes_by_source()["peer"] > 0

    def find_rank(self, request: StageRequest, rank: int) -> Stage:
        """The live stage of a model that has a segment for a tensor-parallel rank, for callers who know no more.

        Where they say a device, it is that segment's.

        Raises UnknownStage where there is none, InvalidRequest where there are several.
        """
        uri = canonical(request.model)
        where = self.device(request.device).name if isinstance(request.device, str) else None
        found = [
            stage
            for stage in self._stages.values()
            if (stage.uri, stage.request.handle) == (uri, request.handle)
            and _live(stage)
            and request.files in ((), stage.request.files)
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

    def placed(self, request: StageRequest) -> tuple[str, ...]:
        """Name of each segment's device. Raises InvalidRequest."""
        wanted = request.device or self._default_device
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
        if found := self._devices.get(name):
            return found
        for device in self._devices.values():
            if device.uuid and device.uuid.lower() == name.lower():
                return device
        here = ", ".join(f"{d.name} ({d.uuid})" if d.uuid else d.name for d in self._devices.values())
        raise InvalidRequest(f"device {name!r} is not on this node, it has {here}")


def _as_answer(uri: str, error: Exception) -> DaemonError:
    if isinstance(error, DaemonError):
        return error
    if isinstance(error, TimeoutError):
        return SourceFailed(f"{uri}: no answer within {_RELIST_DEADLINE:g} s")
    return SourceFailed(f"{uri}: {type(error).__name__}: {error}")


def _live(stage: Stage) -> bool:
    """Whether a request may join it."""
    return stage.state not in ("failed", "cancelled", "evicted") and stage.revoked_until is None
