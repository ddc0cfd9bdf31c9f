"""What origins say is there: remembered for a moment, and not waited for where what they would say of is here."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import TypeVar

from weightd.daemon.errors import CheckpointChanged, CheckpointNotFound, DaemonError, SourceFailed
from weightd.daemon.sources.base import ANSWERS, Object, SourceFile
from weightd.daemon.sources.buckets import Bucket, open_bucket
from weightd.daemon.sources.uris import Allow, open_source
from weightd.daemon.stages.source_threads import SourceThreads

T = TypeVar("T")

_GOOD_FOR = 2.0
"""Seconds for which the origin's word on an object is taken again: a file is read in many ranges."""
_REMEMBERED = 10_000
"""Objects of which the origin's last word is kept, for when it does not answer."""
_PATIENCE = 3.0
"""Seconds that the origin has to say what an object is of which a version is here."""
_AWAY = 5.0
"""Seconds for which an origin that has not answered is not asked about what is here."""


class Origins:
    """Asks origins, in threads. On the event loop only."""

    def __init__(self, allow: Allow) -> None:
        self._allow = allow
        self._threads = SourceThreads("s3")
        self._known: OrderedDict[str, tuple[float, Object]] = OrderedDict()
        """URI → when the origin said so (monotonic seconds), and what."""
        self._asking: dict[str, tuple[float, asyncio.Task[Object]]] = {}
        """URI → since when the origin is asked (monotonic seconds), and who asks."""
        self._away: dict[str, float] = {}
        """Origin → when it was asked last without an answer (monotonic seconds)."""

    async def run(self, uri: str, function: Callable[..., T], *arguments: object) -> T:
        """Run what asks the origin of ``uri``, or works on what it has said, in a thread."""
        return await self._threads.run(uri, function, *arguments)

    def known(self, uri: str) -> Object | None:
        """What the origin said last of an object, however long ago."""
        return self._known.get(uri, (0.0, None))[1]

    def forget(self, uri: str) -> None:
        """What was said of an object holds no more."""
        self._known.pop(uri, None)

    async def head(self, root: str, key: str, *, is_here: bool) -> Object:
        """What an object is now. ``is_here``: that a version of it is, so that not to know is better than to wait.

        Raises what asking the origin raises, SourceFailed where it takes too long.
        """
        uri = f"{root}/{key}"
        at, known = self._known.get(uri, (float("-inf"), None))
        if known is not None and time.monotonic() - at < _GOOD_FOR:
            return known

        def ask() -> Awaitable[Object]:
            if uri not in self._asking:
                task = asyncio.ensure_future(self.run(root, lambda: open_bucket(root, self._allow).head(key)))
                self._asking[uri] = time.monotonic(), task
                task.add_done_callback(lambda task: self._answered(root, uri, task))
            return asyncio.shield(self._asking[uri][1])

        since = self._asking[uri][0] if uri in self._asking else time.monotonic()
        try:
            return await self._patiently(root, ask, since, is_here=is_here)
        except ANSWERS:
            raise
        except DaemonError:
            if is_here:
                self._away[root] = time.monotonic()
            raise

    async def list(self, root: str, listed: Callable[[], T], *, is_here: bool) -> T:
        """A list of what is at an origin; raises as ``head``."""
        return await self._patiently(root, lambda: self.run(root, listed), time.monotonic(), is_here=is_here)

    async def _patiently(self, root: str, ask: Callable[[], Awaitable[T]], since: float, *, is_here: bool) -> T:
        if not is_here:
            return await ask()
        if time.monotonic() - self._away.get(root, float("-inf")) < _AWAY:
            raise SourceFailed(f"{root} did not answer when it was asked last")
        try:
            return await asyncio.wait_for(ask(), max(0.0, since + _PATIENCE - time.monotonic()))
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

    async def bucket(self, root: str) -> Bucket:
        """What is at an origin, for reading."""
        return await self.run(root, open_bucket, root, self._allow)

    async def look(self, uri: str, name: str) -> SourceFile:
        """What a file of a checkpoint is now. Raises CheckpointNotFound, and what asking the origin raises."""
        return await self.run(uri, lambda: open_source(uri, self._allow).stat(name))

    async def read(self, uri: str, bucket: Bucket, stored: Object, first: int, count: int) -> bytes:
        """Bytes of an object, which is at ``uri``. Raises CheckpointChanged, and what reading it raises."""
        try:
            return await self.run(uri, bucket.read, stored, first, count)
        except (CheckpointChanged, CheckpointNotFound):
            self.forget(uri)
            raise

    def close(self) -> None:
        """Ask nobody for anything any more."""
        self._threads.close()
