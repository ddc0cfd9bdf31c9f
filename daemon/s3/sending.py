"""Bytes from descriptors to sockets, without a copy of them in this process."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable

_AT_ONCE = 1 << 20
"""Bytes of one call of sendfile(2), so that a thread's other connections have their turn."""
_LOOK = 1.0
"""Seconds between looks whether what is sent is still there, where a client takes nothing."""


class Stalled(Exception):
    """A client has taken nothing for too long."""


class Gone(Exception):
    """What was being sent is not there any more."""


async def send_file(
    connection: socket.socket, fd: int, offset: int, count: int, *, patience: float, gone: Callable[[], bool]
) -> None:
    """Send ``count`` bytes of a file from ``offset`` on.

    Raises OSError, Stalled where nothing was taken for ``patience`` seconds, Gone once ``gone`` says so.
    """
    while count:
        if gone():
            raise Gone
        try:
            sent = os.sendfile(connection.fileno(), fd, offset, min(count, _AT_ONCE))
        except BlockingIOError:
            await writable(connection, patience, gone)
            continue
        if not sent:
            raise Gone  # the file ends before
        offset, count = offset + sent, count - sent
        await asyncio.sleep(0)  # others have something to send too


async def writable(connection: socket.socket, patience: float, gone: Callable[[], bool]) -> None:
    """Wait until a socket takes something. Raises as ``send_file``."""
    loop = asyncio.get_running_loop()
    takes = asyncio.Event()
    fd = connection.fileno()
    loop.add_writer(fd, takes.set)
    try:
        waited = 0.0
        while not takes.is_set():
            if gone():
                raise Gone
            if waited >= patience:
                raise Stalled
            try:
                await asyncio.wait_for(takes.wait(), _LOOK)
            except TimeoutError:
                waited += _LOOK
    finally:
        loop.remove_writer(fd)


async def send(connection: socket.socket, data: bytes | memoryview, *, patience: float, more: bool = False) -> None:
    """Send bytes. ``more``: others follow at once. Raises OSError, Stalled."""
    left = memoryview(data)
    while left:
        try:
            sent = connection.send(left, socket.MSG_MORE if more else 0)
        except BlockingIOError:
            await writable(connection, patience, lambda: False)
            continue
        left = left[sent:]


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
