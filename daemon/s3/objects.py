"""What clients of S3 find: objects as their origin has them, their bytes from what is resident. On the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import posixpath
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
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
from weightd.daemon.s3 import file_map, names
from weightd.daemon.s3.errors import S3Error
from weightd.daemon.s3.file_map import FileMap, Held, Lacking
from weightd.daemon.s3.listing import Page, Query, page
from weightd.daemon.s3.opened import Opened
from weightd.daemon.sources.base import ANSWERS, Object, SourceFile
from weightd.daemon.sources.buckets import Bucket, open_bucket
from weightd.daemon.sources.uris import Allow, open_source
from weightd.daemon.stages.request import StageRequest
from weightd.daemon.stages.source_threads import SourceThreads
from weightd.daemon.stages.stage import Lease, Stage
from weightd.ipc.errors import CudaError

log = logging.getLogger(__name__)

_GOOD_FOR = 2.0
"""Seconds for which the origin's word on an object is taken again: a file is read in many ranges."""
_REMEMBERED = 10_000
"""Objects of which the origin's last word is kept, for when it does not answer."""
_PATIENCE = 3.0
"""Seconds that the origin has to say what an object is of which a version is here."""
_AWAY = 5.0
"""Seconds for which an origin that has not answered is not asked about what is here."""
_MAX_HEADER = 128 << 20
_LATER = 60.0
"""Seconds until staging what could not be staged is tried again; until then it is passed on."""


@dataclass(frozen=True)
class Found:
    """An object, and where its bytes are."""

    uri: str
    object: Object
    stage: Stage | None = None
    """The stage that holds it, or will."""
    file: int = -1
    """Which of the stage's weights it is; -1: one of its configuration files."""


@dataclass
class Body:
    """The bytes of one answer, in order, and the lease under which they are read: ``Objects.end`` ends it."""

    uri: str
    parts: list[bytes | Held | Lacking | Path]
    first: int
    """Where in the object they begin."""
    nbytes: int
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


class Objects:
    """The objects of all buckets. ``absent`` says what a GET of weights does that are not resident."""

    def __init__(
        self, node: Node, allow: Allow, *, absent: Literal["stage", "pass", "refuse"], device: str | None
    ) -> None:
        self._node = node
        self._allow = allow
        self._absent = absent
        self._device = device
        self._threads = SourceThreads("s3")
        self._buckets: dict[str, Bucket] = {}
        self._known: OrderedDict[str, tuple[float, Object]] = OrderedDict()
        """URI → when the origin said so (monotonic seconds), and what."""
        self._asking: dict[str, tuple[float, asyncio.Task[Object]]] = {}
        """URI → since when the origin is asked (monotonic seconds), and who asks."""
        self._away: dict[str, float] = {}
        """Origin → when it was asked last without an answer (monotonic seconds)."""
        self._staging: dict[str, asyncio.Task[Stage | None]] = {}
        self._failed: dict[str, float] = {}
        """URI of a checkpoint → when staging it was refused last."""
        self._opened: dict[str, Opened] = {}
        """Stage → its segments, while any of it is being sent."""
        self._looks: WeakKeyDictionary[Stage, dict[int, _Looks]] = WeakKeyDictionary()
        self._maps: WeakKeyDictionary[Stage, dict[tuple[int, bool], asyncio.Task[FileMap]]] = WeakKeyDictionary()

    # ------------------------------------------------------------------ which objects there are

    def buckets(self) -> list[str]:
        """Buckets of what is here."""
        found = {names.bucket_of(stage.uri) for stage in self._node.stages() if stage.listing is not None}
        return sorted({names.STAGES, *(bucket for bucket in found if bucket)})

    async def check_bucket(self, bucket: str) -> None:
        """Raises S3Error, DaemonError where there is no such bucket, or not for this daemon to see."""
        if bucket != names.STAGES and bucket not in self.buckets():
            await self.list_page(bucket, Query(most=1, delimiter="/"))

    async def list_page(self, bucket: str, query: Query) -> Page:
        """One page of a bucket's list. Where the origin does not answer: of what is resident.

        Raises S3Error, and what asking the origin raises.
        """
        if bucket == names.STAGES:
            return page(self._of_stages(), query)
        root = names.root_of(bucket)
        if not self._allow.leads_to(f"{root}/{query.prefix}"):
            self._allow.check(f"{root}/{query.prefix}")

        def may_be_seen(stored: Object) -> bool:
            uri = f"{root}/{stored.key}"
            return self._allow.leads_to(uri) if uri.endswith("/") else self._allow.permits(uri)

        def listed() -> Page:
            there = self._bucket(root)
            if query.delimiter == "/":
                objects: Iterator[Object] = iter(there.level(query.prefix[: query.prefix.rfind("/") + 1]))
            else:
                objects = there.objects(query.prefix, query.after)
            return page(filter(may_be_seen, objects), query)

        here = sorted(filter(may_be_seen, self._resident_below(root)))
        try:
            return await self._listed(root, listed, _PATIENCE if here else None)
        except ANSWERS as error:
            if not isinstance(error, CheckpointNotFound):
                raise
            if error.details.get("missing") == "bucket":
                raise S3Error("NoSuchBucket", "The specified bucket does not exist", {"BucketName": bucket}) from None
            return Page()
        except DaemonError as error:
            if not here:
                raise
            log.warning("%s: listing what is resident, its origin cannot be asked: %s", root, error)
            return page(iter(here), query)

    async def _listed(self, root: str, listed: Callable[[], Page], patience: float | None) -> Page:
        if patience is not None and time.monotonic() - self._away.get(root, float("-inf")) < _AWAY:
            raise SourceFailed(f"{root} did not answer when it was asked last")
        try:
            return await asyncio.wait_for(self._threads.run(root, listed), patience)
        except TimeoutError:
            self._away[root] = time.monotonic()
            raise SourceFailed(f"{root} has not answered for {patience:g} s") from None

    def _of_stages(self) -> list[Object]:
        return sorted(
            Object(f"{stage.id}/{file.name}", file.size, file.version, stage.created_at)
            for stage in self._node.stages()
            if stage.state == "ready" and stage.listing is not None
            for file in (*stage.listing.weights, *stage.listing.metadata)
        )

    def _resident_below(self, root: str) -> Iterable[Object]:
        """What ``find`` finds where the origin does not answer."""
        found: dict[str, Object] = {}
        for stage in sorted(self._node.stages(), key=lambda stage: stage.listed_at):
            if stage.state != "ready" or stage.listing is None or not _folder(stage).startswith(f"{root}/"):
                continue
            for name, size, version in _files(stage):
                uri = f"{_folder(stage)}{name}"
                _, known = self._known.get(uri, (0.0, None))
                if known.version == version if known is not None else not _is_of_a_revision(stage):
                    key = uri[len(root) + 1 :]
                    found[key] = Object(key, size, version, known.modified if known else stage.created_at)
        return found.values()

    async def find(self, bucket: str, key: str) -> Found:
        """An object as its origin has it now, or had it last where that does not answer.

        Raises S3Error, and what asking the origin raises.
        """
        names.check_key(key)
        if bucket == names.STAGES:
            return self._of_stage(key)
        uri = f"{names.root_of(bucket)}/{key}"
        self._allow.check(uri)
        try:
            stored = await self._current(names.root_of(bucket), key, uri)
        except ANSWERS:
            raise
        except DaemonError as error:
            for stage, file in self._seen_last(uri):
                listed = _files(stage)[file]
                _, known = self._known.get(uri, (0.0, None))
                modified = known.modified if known is not None else stage.created_at
                log.warning("%s: serving what is here, its origin cannot be asked: %s", uri, error)
                return Found(uri, Object(key, listed.size, listed.version, modified), stage, _weight(stage, file))
            raise
        for stage, file in self._holders(uri):
            if _files(stage)[file].version == stored.version:
                return Found(uri, stored, stage, _weight(stage, file))
        return Found(uri, stored)

    def _of_stage(self, key: str) -> Found:
        stage_id, _, name = key.partition("/")
        stage = self._node.get(stage_id)
        if stage.state != "ready":
            raise UnknownStage(f"stage {stage_id} is {stage.state}")
        for file, listed in enumerate(_files(stage)):
            if listed.name == name:
                stored = Object(key, listed.size, listed.version, stage.created_at)
                return Found(f"{_folder(stage)}{name}", stored, stage, _weight(stage, file))
        raise S3Error("NoSuchKey", "The specified key does not exist.", {"Key": key})

    def _holders(self, uri: str) -> list[tuple[Stage, int]]:
        """Stages that hold the file at a URI, or will, with its place among their files; the best first."""
        found = []
        for stage in self._node.stages():
            if stage.finished and stage.state != "ready":
                continue
            if stage.revoked_until is None and stage.listing is not None and uri.startswith(_folder(stage)):
                name = uri[len(_folder(stage)) :]
                found += [(stage, file) for file, listed in enumerate(_files(stage)) if listed.name == name]

        def worth(holder: tuple[Stage, int]) -> tuple[bool, bool, int]:
            stage, _ = holder
            return stage.state == "ready", stage.device.startswith("cpu"), sum(info.tensors for info in stage.infos)

        return sorted(found, key=worth, reverse=True)

    def _seen_last(self, uri: str) -> list[tuple[Stage, int]]:
        """Of the stages that hold the file at a URI those that have what the origin had there last; the best first."""
        _, known = self._known.get(uri, (0.0, None))
        holders = self._holders(uri)
        if known is not None:
            return [(stage, file) for stage, file in holders if _files(stage)[file].version == known.version]
        holders = [(stage, file) for stage, file in holders if not _is_of_a_revision(stage)]
        return sorted(holders, key=lambda holder: holder[0].listed_at, reverse=True)

    def _bucket(self, root: str) -> Bucket:
        return open_bucket(root, self._allow)

    async def _current(self, root: str, key: str, uri: str) -> Object:
        at, known = self._known.get(uri, (float("-inf"), None))
        if known is not None and time.monotonic() - at < _GOOD_FOR:
            return known
        patience = _PATIENCE if self._holders(uri) else None
        if patience is not None and time.monotonic() - self._away.get(root, float("-inf")) < _AWAY:
            raise SourceFailed(f"{root} did not answer when it was asked last")
        if uri not in self._asking:
            task = asyncio.ensure_future(self._threads.run(root, lambda: self._bucket(root).head(key)))
            self._asking[uri] = time.monotonic(), task
            task.add_done_callback(lambda task: self._answered(root, uri, task))
        since, task = self._asking[uri]
        try:
            left = None if patience is None else max(0.0, since + patience - time.monotonic())
            return await asyncio.wait_for(asyncio.shield(task), left)
        except TimeoutError:
            self._away[root] = time.monotonic()
            raise SourceFailed(f"{root} has not answered for {_PATIENCE:g} s") from None

    def _answered(self, root: str, uri: str, task: asyncio.Task[Object]) -> None:
        del self._asking[uri]
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._known[uri] = time.monotonic(), task.result()
            self._known.move_to_end(uri)
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        if error is None or isinstance(error, ANSWERS):
            self._away.pop(root, None)
        elif self._holders(uri):
            self._away[root] = time.monotonic()

    # ------------------------------------------------------------------ their bytes

    async def open(self, found: Found, body: Body, client: str) -> None:
        """Find the bytes that a body is to have, under a lease of ``client``'s (its address).

        What is not resident is staged, passed on or refused. Raises S3Error, and what asking the origin raises;
        whatever comes of it, the body is to be ended.
        """
        try:
            await self._open(found, body, client)
        except CheckpointChanged as error:
            self._known.pop(found.uri, None)
            raise S3Error("ServiceUnavailable", f"{error}: ask again") from None

    async def _open(self, found: Found, body: Body, client: str) -> None:
        if found.stage is None and found.object.key.endswith(".safetensors"):
            if self._absent == "refuse":
                raise S3Error(
                    "AccessDenied",
                    f"{found.uri} is not resident, and nothing is passed on (WEIGHTD_S3_ABSENT=refuse): stage it first "
                    "(weightd stage)",
                )
            if self._absent == "stage" and (stage := await self._staged(found)) is not None:
                held = [file for holder, file in self._holders(found.uri) if holder is stage]
                if held and _files(stage)[held[0]].version == found.object.version:
                    found = Found(found.uri, found.object, stage, _weight(stage, held[0]))
        if found.stage is not None:
            with contextlib.suppress(UnknownStage, SourceFailed, InvalidCheckpoint, CudaError, OSError):
                await self._held(found, found.stage, body, client)
        if not body.parts:
            body.parts = [Lacking(body.first, body.nbytes)]
        if any(isinstance(part, Lacking) for part in body.parts):
            root, key = _origin(found)
            bucket = await self._threads.run(root, open_bucket, root, self._allow)
            body.origin = bucket, found.object._replace(key=key)

    async def _held(self, found: Found, stage: Stage, body: Body, client: str) -> None:
        """Say what of a body the stage holds.

        Raises UnknownStage, SourceFailed, InvalidCheckpoint, CudaError, OSError.
        """
        if found.file < 0:
            name = posixpath.normpath(found.uri[len(_folder(stage)) :])
            path = Path(stage.metadata) / name if stage.metadata else None
            if path is not None and path.is_file() and path.stat().st_size == found.object.size:
                body.parts = [path]
            return
        if stage.request.handle != "fd":
            return  # its memory goes with what holds it, and cannot be kept for as long as it is sent
        laid_out = await self._map(stage, found.file)
        if laid_out is not None and stage.state != "ready":
            await self._check_unchanged(stage, found.file)
        # From here on nothing is waited for, so that it is there and leased, or is not.
        if laid_out is None or stage.revoked_until is not None or (stage.finished and stage.state != "ready"):
            return
        if body.over:  # who asked has hung up, and nobody would end what is begun here
            raise Cancelled("nobody wants it any more")
        if (opened := self._opened.get(stage.id)) is None:
            opened = self._opened[stage.id] = Opened(stage)
        opened.users += 1
        body.parts = list(laid_out.parts(body.first, body.nbytes))
        body.stage, body.opened, body.file = stage, opened, found.file
        body.by_leaf = self._node.fleet is None or "peer" not in stage.request.sources
        body.lease = self._node.residency.leases.begin_reading(stage, client)

    async def _map(self, stage: Stage, file: int) -> FileMap | None:
        while not stage.finished and stage.fill is None:  # until then it may begin anew, in other memory
            await stage.changed(1.0)
        ready = stage.state == "ready"
        if stage.finished and not ready:
            return None
        maps = self._maps.setdefault(stage, {})
        if (task := maps.get((file, ready))) is None:
            task = maps[file, ready] = asyncio.ensure_future(self._drawn(stage, file, ready))
            task.add_done_callback(lambda task: maps.pop((file, ready)) if _has_failed(task) else None)
        laid_out = await asyncio.shield(task)
        return None if stage.finished and stage.state != "ready" else laid_out

    async def _drawn(self, stage: Stage, file: int, ready: bool) -> FileMap:
        plan, listing = stage.plan, stage.listing
        assert listing is not None
        if not ready and plan is not None:
            return await self._threads.run(stage.uri, file_map.of_plan, plan, file)
        name = listing.weights[file].name
        prefix = self._node.cache.kept_bytes(listing.identity, name, 0, _MAX_HEADER)
        if prefix is None:
            prefix = await self._threads.run(stage.uri, self._read_prefix, stage, file)
        return await self._threads.run(stage.uri, file_map.of_manifests, stage, file, prefix)

    def _read_prefix(self, stage: Stage, file: int) -> bytes:
        assert stage.listing is not None
        source, (name, size, version) = open_source(stage.uri, self._allow), stage.listing.weights[file]
        if source.stat(name).version != version:
            raise CheckpointChanged(f"{stage.uri}: {name} has changed")
        length = int.from_bytes(source.read(name, 0, 8), "little")
        return source.read(name, 0, min(8 + length, size, _MAX_HEADER))

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
                        self._known.pop(body.uri, None)
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
                found = await self._threads.run(stage.uri, self._look, stage.uri, planned.name)
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

    def _look(self, uri: str, name: str) -> SourceFile:
        return open_source(uri, self._allow).stat(name)

    async def read(self, body: Body, first: int, count: int) -> bytes:
        """Bytes of an object from its origin. Raises CheckpointChanged, and what reading it raises."""
        assert body.origin is not None
        bucket, stored = body.origin
        try:
            return await self._threads.run(body.uri, bucket.read, stored, first, count)
        except CheckpointChanged:
            self._known.pop(body.uri, None)
            raise

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

    def close(self) -> None:
        """Ask nobody for anything any more."""
        self._threads.close()


def _origin(found: Found) -> tuple[str, str]:
    """The bucket that an object is in, at its origin, and its key there."""
    scheme, _, path = found.uri.partition("://")
    if scheme == "file":
        assert found.stage is not None
        folder = _folder(found.stage)
        return folder.rstrip("/"), found.uri[len(folder) :]
    parts = path.split("/")
    count = 2 if scheme == "hf" else 1
    return f"{scheme}://{'/'.join(parts[:count])}", "/".join(parts[count:])


def _folder(stage: Stage) -> str:
    """The URI, ending with a slash, below which a stage's files are called as its listing has them."""
    assert stage.listing is not None
    uri = stage.uri.partition("@")[0] if stage.uri.startswith("hf:") else stage.uri
    if [file.name for file in stage.listing.weights] == [posixpath.basename(uri)]:
        return uri.rpartition("/")[0] + "/"
    return uri.rstrip("/") + "/"


def _is_of_a_revision(stage: Stage) -> bool:
    """Whether it is of a revision of the Hugging Face Hub that was named, which the main one may not be."""
    return stage.uri.startswith("hf:") and "@" in stage.uri


def _files(stage: Stage) -> list[SourceFile]:
    assert stage.listing is not None
    return [*stage.listing.weights, *stage.listing.metadata]


def _weight(stage: Stage, file: int) -> int:
    assert stage.listing is not None
    return file if file < len(stage.listing.weights) else -1


def _has_failed(task: asyncio.Task[FileMap]) -> bool:
    return task.cancelled() or task.exception() is not None
