"""Bytes to sockets: from descriptors without a copy in this process, and to nobody who takes them too slowly."""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import socket
import termios
from collections.abc import Callable
from dataclasses import dataclass

_AT_ONCE = 2 << 20
"""Bytes of one call of sendfile(2), so that a thread's other connections have their turn."""
_LOOK = 1.0
"""Seconds at most between looks at a client that takes nothing, and at whether what it is sent is still there."""


class Stalled(Exception):
    """A client has taken too little for too long."""


class Gone(Exception):
    """What was being sent is not there any more."""


@dataclass(frozen=True)
class Patience:
    """A client has to take ``least`` bytes in ``seconds`` that it is waited for."""

    seconds: float
    least: int


class Outlet:
    """What goes out on one connection, in the thread and loop that serve it. Its socket does not block."""

    def __init__(self, connection: socket.socket, patience: Patience) -> None:
        self._connection = connection
        self._fd = connection.fileno()
        self._patience = patience
        self._look = min(_LOOK, patience.seconds)
        self._sent = 0
        self._taken = 0
        """Bytes that the client had taken when it was seen last to take enough."""
        self._waited = 0.0
        """Seconds for which it was waited for since then."""
        self._at_once = 0
        """Bytes that went out since others had their turn."""

    async def send(self, data: bytes | memoryview, *, more: bool = False) -> None:
        """Send bytes. ``more``: others follow at once. Raises OSError, Stalled."""
        left = memoryview(data)
        flags = socket.MSG_MORE if more else 0
        await self._send(len(left), lambda done: self._connection.send(left[done:], flags), lambda: False)

    async def send_file(self, fd: int, offset: int, count: int, gone: Callable[[], bool]) -> None:
        """Send ``count`` bytes of a file from ``offset`` on.

        Raises OSError, Stalled, and Gone where the file ends before, or once ``gone`` says so.
        """

        def some(done: int) -> int:
            if gone():
                raise Gone
            sent = os.sendfile(self._fd, fd, offset + done, min(count - done, _AT_ONCE))
            if not sent:
                raise Gone
            return sent

        await self._send(count, some, gone)

    async def _send(self, count: int, some: Callable[[int], int], gone: Callable[[], bool]) -> None:
        """Have ``some`` send what is behind so many bytes, whenever the socket takes any, until ``count`` are sent."""
        if not count:
            return
        try:
            done = some(0)
        except BlockingIOError:
            done = 0
        self._sent += done
        self._at_once += done
        if done == count:
            if self._at_once >= _AT_ONCE:
                self._at_once = 0
                await asyncio.sleep(0)
            return
        self._at_once = 0
        loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = loop.create_future()
        since = loop.time()
        timer = loop.call_later(self._look, lambda: look())

        def end(error: BaseException | None) -> None:
            loop.remove_writer(self._fd)  # at once: it would be called again before who waits is
            if over.done():
                return
            if error is None:
                over.set_result(None)
            else:
                over.set_exception(error)

        def go_on() -> None:
            nonlocal done
            try:
                sent = some(done)
            except BlockingIOError:
                return
            except Exception as error:
                end(error)
                return
            done += sent
            self._sent += sent
            if done == count:
                end(None)

        def look() -> None:
            nonlocal since, timer
            since, passed = loop.time(), loop.time() - since
            if gone():
                end(Gone())
            elif self._is_stalled(passed):
                end(Stalled())
            else:
                timer = loop.call_later(self._look, look)

        loop.add_writer(self._fd, go_on)
        try:
            await over
        finally:
            loop.remove_writer(self._fd)
            timer.cancel()

    def _is_stalled(self, passed: float) -> bool:
        """Whether a client that was waited for for so many seconds more has taken too little meanwhile."""
        unsent = array.array("i", [0])
        fcntl.ioctl(self._fd, termios.TIOCOUTQ, unsent)  # what the kernel has taken the client may not have
        taken = self._sent - unsent[0]
        if taken - self._taken >= self._patience.least:
            self._taken, self._waited = taken, 0.0
            return False
        self._waited += passed
        return self._waited >= self._patience.seconds


async def hung_up(connection: socket.socket) -> None:
    """Return once the other end has closed; never, where it goes on to say something instead."""
    loop = asyncio.get_running_loop()
    closed = asyncio.Event()
    fd = connection.fileno()

    def look() -> None:
        try:
            if connection.recv(1, socket.MSG_PEEK):
                loop.remove_reader(fd)
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        closed.set()

    loop.add_reader(fd, look)
    try:
        await closed.wait()
    finally:
        loop.remove_reader(fd)
