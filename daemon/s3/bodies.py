"""The bytes of objects: from what is resident, under a lease, or staged for it, or passed on. On the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import posixpath
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary

from weightd.daemon.errors import (
    AmbiguousCheckpoint,
    Cancelled,
    CheckpointChanged,
    CheckpointNotFound,
    DaemonError,
    InvalidCheckpoint,
    SourceFailed,
    UnknownStage,
)
from weightd.daemon.node.service import Node
from weightd.daemon.s3 import file_map
from weightd.daemon.s3.answers import Range
from weightd.daemon.s3.errors import S3Error
from weightd.daemon.s3.file_map import Held, Lacking
from weightd.daemon.s3.holders import Holder, folder
from weightd.daemon.s3.maps import Maps
from weightd.daemon.s3.objects import Found, Objects
from weightd.daemon.s3.opened import Opened
from weightd.daemon.s3.origins import Origins
from weightd.daemon.sources.base import ANSWERS, Object
from weightd.daemon.sources.buckets import Bucket
from weightd.daemon.stages.request import StageRequest
from weightd.daemon.stages.stage import Lease, Stage
from weightd.ipc.errors import CudaError

log = logging.getLogger(__name__)

_FEW = 1000
"""Parts of an answer that are counted up on the event loop: a few hundred microseconds."""
_LATER = 60.0
"""Seconds until staging what could not be staged is tried again; until then it is passed on."""


@dataclass
class Body:
    """The bytes of one answer, in order, and the lease under which they are read: ``Bodies.end`` ends it."""

    uri: str = ""
    parts: Sequence[bytes | memoryview | Held | Lacking | Path] = ()
    first: int = 0
    """Where in the object they begin."""
    nbytes: int = 0
    stage: Stage | None = None
    lease: Lease | None = None
    opened: Opened | None = None
    """The stage's segments."""
    by_leaf: bool = False
    origin: tuple[Bucket, Object] | None = None
    """Where parts that are lacking are read; None where there are none."""
    file: int = -1
    """Which of the stage's weights it is."""
    over: bool = False
    """Whether nobody wants it any more."""

    @property
    def gone(self) -> bool:
        """Whether the stage it is read from is not there any more. Callable from any thread."""
        return self.stage is not None and self.stage.state in ("failed", "cancelled", "evicted")


class _Looks:
    """When it was looked last whether a file that is being loaded is still what it was; one look at a time."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.began = float("-inf")
        """Monotonic seconds, of the last look that found it unchanged."""


class Bodies:
    """Finds bytes of objects. ``absent`` says what a GET of weights does that are not resident."""

    def __init__(
        self,
        node: Node,
        objects: Objects,
        origins: Origins,
        maps: Maps,
        *,
        absent: Literal["stage", "pass", "refuse"],
        device: str | None,
    ) -> None:
        self._node = node
        self._objects = objects
        self._origins = origins
        self._maps = maps
        self._absent = absent
        self._device = device
        self._staging: dict[str, asyncio.Task[Stage | None]] = {}
        self._failed: dict[str, float] = {}
        """URI of a checkpoint → when staging it was refused last."""
        self._opened: dict[str, Opened] = {}
        """Stage → its segments, while any of it is being sent."""
        self._looks: WeakKeyDictionary[Stage, dict[int, _Looks]] = WeakKeyDictionary()

    async def open(self, found: Found, part: Range, body: Body, client: str) -> None:
        """Find the bytes that a body is to have, under a lease of ``client``'s (its address).

        What is not resident is staged, passed on or refused. Raises S3Error, and what asking the origin raises;
        whatever comes of it, the body is to be ended.
        """
        body.uri, body.first, body.nbytes = found.uri, part.first, part.nbytes
        try:
            await self._open(found, body, client)
        except CheckpointChanged as error:
            self._origins.forget(found.uri)
            raise S3Error("ServiceUnavailable", f"{error}: ask again") from None

    async def _open(self, found: Found, body: Body, client: str) -> None:
        holder = found.holder
        if holder is None and found.object.key.endswith(".safetensors"):
            if self._absent == "refuse":
                raise S3Error(
                    "AccessDenied",
                    f"{found.uri} is not resident, and nothing is passed on (WEIGHTD_S3_ABSENT=refuse): stage it first "
                    "(weightd stage)",
                )
            if self._absent == "stage" and await self._staged(found) is not None:
                holder = self._objects.holder(found.uri, found.object)
        if holder is not None:
            with contextlib.suppress(UnknownStage, SourceFailed, InvalidCheckpoint, CudaError, OSError):
                await self._hold(found, holder, body, client)
        if not body.parts:
            body.parts = [Lacking(body.first, body.nbytes)]
        if any(isinstance(part, Lacking) for part in body.parts):
            root, key = _origin(found.uri, holder)
            body.origin = await self._origins.bucket(root), found.object._replace(key=key)

    async def _hold(self, found: Found, holder: Holder, body: Body, client: str) -> None:
        """Say what of a body the stage holds.

        Raises UnknownStage, SourceFailed, InvalidCheckpoint, CudaError, OSError.
        """
        stage = holder.stage
        if holder.weight < 0:
            path = Path(stage.metadata) / posixpath.normpath(holder.file.name) if stage.metadata else None
            if path is not None and path.is_file() and path.stat().st_size == found.object.size:
                body.parts = [path]
            return
        if stage.request.handle != "fd":
            return  # its memory goes with what holds it, and cannot be kept for as long as it is sent
        laid_out = await self._maps.of(stage, holder.weight)
        if laid_out is None:
            return
        wanted = body.first, body.nbytes
        if laid_out.count(*wanted) > _FEW:
            parts = await asyncio.to_thread(lambda: list(laid_out.parts(*wanted)))
        else:
            parts = list(laid_out.parts(*wanted))
        if stage.state != "ready":
            await self._check_unchanged(stage, holder.weight)
        # From here on nothing is waited for, so that it is there and leased, or is not.
        if stage.revoked_until is not None or (stage.finished and stage.state != "ready"):
            return
        if body.over:  # who asked has hung up, and nobody would end what is begun here
            raise Cancelled("nobody wants it any more")
        if (opened := self._opened.get(stage.id)) is None:
            opened = self._opened[stage.id] = Opened(stage)
        opened.users += 1
        body.parts = parts
        body.stage, body.opened, body.file = stage, opened, holder.weight
        body.by_leaf = self._node.fleet is None or "peer" not in stage.request.sources
        body.lease = self._node.residency.leases.begin_reading(stage, client)

    async def _staged(self, found: Found) -> Stage | None:
        """The stage that brings an object; None where it cannot be staged, so that it is passed on."""
        folder, _, name = found.uri.rpartition("/")
        if time.monotonic() - self._failed.get(found.uri, float("-inf")) < _LATER:
            return None
        task = self._staging.get(found.uri)
        if task is None:
            task = self._staging[found.uri] = asyncio.ensure_future(self._stage(found, folder, name))
            task.add_done_callback(lambda _: self._staging.pop(found.uri))
        return await asyncio.shield(task)

    async def _stage(self, found: Found, folder: str, name: str) -> Stage | None:
        """By the rule for the folder it is in; by its own name where that takes other files."""
        for weights in (None, name):
            request = StageRequest(model=folder, weights=weights, device=self._device)
            try:
                stage, _ = await self._node.stage(request)
            except DaemonError as error:
                log.warning("%s is passed on, it cannot be staged: %s", found.uri, error)
                break
            taken = [file.name for file in stage.listing.weights] if stage.listing else []
            if name in taken and not (stage.finished and stage.state != "ready"):
                return stage
            if stage.error is not None and not isinstance(stage.error, AmbiguousCheckpoint | InvalidCheckpoint):
                log.warning("%s is passed on, it cannot be staged: %s", found.uri, stage.error)
                break
        now = time.monotonic()
        self._failed = {uri: at for uri, at in self._failed.items() if now - at < _LATER} | {found.uri: now}
        return None

    async def available(self, body: Body, held: Held) -> int:
        """Wait until bytes of a part are there and verified: how many, from its first on. Raises UnknownStage."""
        stage = body.stage
        assert stage is not None
        while True:
            if body.gone:
                raise UnknownStage(f"stage {stage.id} is {stage.state}")
            if count := file_map.verified(stage, held, by_leaf=body.by_leaf):
                if stage.state != "ready":
                    try:
                        await self._check_unchanged(stage, body.file)
                    except CheckpointChanged as error:
                        self._origins.forget(body.uri)
                        raise UnknownStage(str(error)) from None
                    if body.gone:
                        continue
                return count
            await stage.changed(0.05 if stage.fill is not None else 1.0)

    async def _check_unchanged(self, stage: Stage, file: int) -> None:
        """Raise CheckpointChanged where a file that is being loaded is another one at its origin by now.

        What has come until now may be of that one, and only in the end this is seen by who loads it. Where the origin
        does not say it is taken for unchanged, as it is then.
        """
        assert stage.listing is not None
        planned = stage.listing.weights[file]
        looks = self._looks.setdefault(stage, {}).setdefault(file, _Looks())
        came = time.monotonic()
        async with looks.turn:
            if looks.began >= came:
                return  # somebody has looked meanwhile
            began = time.monotonic()
            try:
                found = await self._origins.look(stage.uri, planned.name)
            except CheckpointNotFound:
                raise CheckpointChanged(f"{planned.name} was removed while it was read") from None
            except DaemonError as error:
                if isinstance(error, ANSWERS):
                    raise
                log.warning("whether %s has changed meanwhile cannot be told: %s", planned.name, error)
                return
            if found != planned:
                raise CheckpointChanged(f"{planned.name} has changed while it was read")
            looks.began = began

    async def read(self, body: Body, first: int, count: int) -> bytes:
        """Bytes of an object from its origin. Raises CheckpointChanged, and what reading it raises."""
        assert body.origin is not None
        bucket, stored = body.origin
        return await self._origins.read(body.uri, bucket, stored, first, count)

    def end(self, body: Body) -> None:
        """It was sent, or nobody wants it any more: perhaps before it was even opened."""
        body.over = True
        if body.lease is None or body.stage is None or body.opened is None:
            return
        self._node.residency.leases.end(body.lease)
        body.lease = None
        body.opened.users -= 1
        if not body.opened.users:
            body.opened.close()
            del self._opened[body.stage.id]


def _origin(uri: str, holder: Holder | None) -> tuple[str, str]:
    """The bucket that an object is in, at its origin, and its key there."""
    scheme, _, path = uri.partition("://")
    if scheme == "file":
        assert holder is not None
        below = folder(holder.stage)
        return below.rstrip("/"), uri[len(below) :]
    parts = path.split("/")
    count = 2 if scheme == "hf" else 1
    return f"{scheme}://{'/'.join(parts[:count])}", "/".join(parts[count:])
