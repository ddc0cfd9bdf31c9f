"""The bytes of one answer on their way: out of segments as they are verified, out of files, or from the origin."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

from weightd.daemon.errors import DaemonError, UnknownStage
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.s3.bodies import Bodies, Body
from weightd.daemon.s3.file_map import Held, Lacking
from weightd.daemon.s3.lanes import Home
from weightd.daemon.s3.opened import Opened
from weightd.daemon.s3.sending import Gone, Outlet, hung_up

log = logging.getLogger(__name__)

T = TypeVar("T")

_CHUNK = 8 << 20
"""Bytes that are read at once of what is passed on, where few ask for it."""
_PIECE = 1 << 20
"""Bytes that are copied at once from a GPU: they wait in memory for who takes them slowly."""
_PASSING = 128 << 20
"""Bytes that all answers together that are passed on may have in memory, but for the least that each needs."""
_LEAST = 256 << 10
_SOON = 0.02
"""Seconds after which a client that waits is watched, lest it hang up: nearly all answers come before."""


class Passing:
    """Connections to which something is passed on at the moment."""

    def __init__(self) -> None:
        self._to: set[int] = set()
        """Their Python ids."""

    @contextlib.contextmanager
    def to(self, who: object) -> Iterator[Callable[[], int]]:
        """While something is passed on to ``who``: says how many bytes to read of it at once. From any thread."""
        self._to.add(id(who))
        try:
            yield lambda: max(_LEAST, min(_CHUNK, _PASSING // 2 // max(1, len(self._to))))
        finally:
            self._to.discard(id(who))


class Delivery:
    """Sends bodies on one connection."""

    def __init__(
        self, connection: socket.socket, outlet: Outlet, bodies: Bodies, passing: Passing, home: Home, metrics: Metrics
    ) -> None:
        self._connection = connection
        self._outlet = outlet
        self._bodies = bodies
        self._passing = passing
        self._home = home
        self._metrics = metrics

    async def send(self, body: Body) -> None:
        """Send all of a body. Raises OSError, Stalled, and Gone where it ends short."""
        for part in body.parts:
            if isinstance(part, Held):
                await self._send_held(body, part)
            elif isinstance(part, Lacking):
                await self._pass_on(body, part)
            elif isinstance(part, Path):
                with part.open("rb") as file:
                    await self._outlet.send_file(file.fileno(), body.first, body.nbytes, lambda: body.gone)
                self._count("resident", body.nbytes)
            else:
                await self._outlet.send(part, more=True)
                self._count("resident", len(part))

    async def _send_held(self, body: Body, held: Held) -> None:
        """From a segment, as its bytes are verified."""
        opened = body.opened
        assert opened is not None
        while held.nbytes:
            count, waited = held.nbytes, False
            if body.stage is not None and body.stage.state != "ready":
                try:
                    count = await self.unless_gone(self._home.ask(self._bodies.available(body, held)))
                except UnknownStage:
                    raise Gone from None
                waited = True
            if opened.is_on_gpu(held.segment):
                count = min(count, _PIECE)
                await self._outlet.send(await asyncio.to_thread(_copied, opened, held, count))
            else:
                await self._outlet.send_file(opened.fd(held.segment), held.offset, count, lambda: body.gone)
            self._count("waited" if waited else "resident", count)
            held = held._replace(at=held.at + count, offset=held.offset + count, nbytes=held.nbytes - count)

    async def _pass_on(self, body: Body, part: Lacking) -> None:
        """From the origin, a piece ahead of what is being sent."""
        start, end = part.start, part.start + part.nbytes

        def read(start: int, count: int) -> asyncio.Future[bytes]:
            return asyncio.ensure_future(self._home.ask(self._bodies.read(body, start, count)))

        with self._passing.to(self) as most:
            coming = read(start, min(most(), end - start))
            try:
                while start < end:
                    try:
                        data = await self.unless_gone(coming)
                    except DaemonError as error:
                        log.warning(
                            "S3: %s ends short, it is passed on and its origin does not answer: %s", body.uri, error
                        )
                        raise Gone from None
                    start += len(data)
                    if start < end:
                        coming = read(start, min(most(), end - start))
                    await self._outlet.send(data)
                    self._count("passed", len(data))
            finally:
                if not coming.cancel() and not coming.cancelled():
                    coming.exception()  # heard, where the client has gone before it came

    async def unless_gone(self, what: Awaitable[T]) -> T:
        """What is waited for, unless the client hangs up meanwhile: then OSError."""
        task = asyncio.ensure_future(what)
        watch: asyncio.Future[None] | None = None
        try:
            await asyncio.wait({task}, timeout=_SOON)
            if not task.done():
                watch = asyncio.ensure_future(hung_up(self._connection))
                await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise OSError(errno.ECONNRESET, "the client has hung up")
            return task.result()
        finally:
            task.cancel()
            if watch is not None:
                watch.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watch

    def _count(self, outcome: str, nbytes: int) -> None:
        self._metrics.s3_bytes.labels(outcome).inc(nbytes)


def _copied(opened: Opened, held: Held, count: int) -> bytes:
    """Bytes of a GPU's segment: pinned memory is for copying, and nobody's to hold who takes them slowly. Blocks."""
    with opened.copied(held.segment, held.offset, count, _CHUNK) as view:
        return bytes(view)
