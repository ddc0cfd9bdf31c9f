"""Who takes what the S3 endpoint sends slowly, or not at all: how long that is borne."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.s3.conftest import MiB
from tests.s3.in_process import endpoint
from weightd.daemon.s3 import connection as module
from weightd.daemon.s3.sending import Gone, Outlet, Patience, Stalled

BUFFER = 16 << 10
"""Bytes that the kernel keeps for either end, or some more."""


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a TCP connection between which little is on its way."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as there:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        there.connect(listener.getsockname())
        here, _ = listener.accept()
        with here:
            here.setblocking(False)
            there.setblocking(False)
            yield here, there


@pytest.fixture
def file() -> Iterator[int]:
    with tempfile.TemporaryFile() as opened:
        opened.write(os.urandom(4 * MiB))
        opened.flush()
        yield opened.fileno()


async def taken(there: socket.socket, until_done: asyncio.Task[None], at_once: int, pause: float) -> int:
    """Take so many bytes after each pause until a sender is done, and all that is left; returns how many came."""
    count = 0
    while not until_done.done():
        await asyncio.wait({until_done}, timeout=pause)
        with contextlib.suppress(BlockingIOError):
            count += len(there.recv(at_once))
    with contextlib.suppress(BlockingIOError):
        while data := there.recv(MiB):
            count += len(data)
    return count


def test_who_takes_a_little_now_and_then_is_given_up(pair: tuple[socket.socket, socket.socket], file: int) -> None:
    here, there = pair

    async def sent() -> None:
        outlet = Outlet(here, Patience(1.0, MiB))
        sending = asyncio.create_task(outlet.send_file(file, 0, 4 * MiB, lambda: False))
        assert await taken(there, sending, 2000, 0.01) < MiB
        with pytest.raises(Stalled):
            await sending

    asyncio.run(asyncio.wait_for(sent(), 60))


def test_who_takes_enough_is_waited_for_however_long_it_takes(
    pair: tuple[socket.socket, socket.socket], file: int
) -> None:
    here, there = pair

    async def sent() -> None:
        loop = asyncio.get_running_loop()
        outlet = Outlet(here, Patience(2.0, BUFFER))
        began = loop.time()
        for _ in range(2):
            sending = asyncio.create_task(outlet.send_file(file, 0, MiB, lambda: False))
            assert await taken(there, sending, 4 * BUFFER, 0.05) > 0
            await sending
        assert loop.time() - began > 2.0, "nobody's patience was tried"

    asyncio.run(asyncio.wait_for(sent(), 120))


def test_what_goes_while_nobody_takes_it_ends_short_at_once(
    pair: tuple[socket.socket, socket.socket], file: int
) -> None:
    here, _ = pair

    async def sent() -> None:
        gone = asyncio.Event()
        sending = asyncio.create_task(Outlet(here, Patience(300, MiB)).send_file(file, 0, 4 * MiB, gone.is_set))
        await asyncio.wait({sending}, timeout=0.1)
        gone.set()
        with pytest.raises(Gone):
            await sending

    asyncio.run(asyncio.wait_for(sent(), 60))


def test_a_file_that_is_shorter_than_it_was_ends_short(pair: tuple[socket.socket, socket.socket], file: int) -> None:
    here, there = pair

    async def sent() -> None:
        sending = asyncio.create_task(Outlet(here, Patience(300, 1)).send_file(file, 4 * MiB - 9, 10, lambda: False))
        assert await taken(there, sending, MiB, 0.01) == 9
        with pytest.raises(Gone):
            await sending

    asyncio.run(asyncio.wait_for(sent(), 60))


async def holds(condition: Callable[[], bool], what: str) -> None:
    """Wait until something holds; fails after a minute."""
    deadline = asyncio.get_running_loop().time() + 60
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, what
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("at_once", [0, 100], ids=["nothing", "a little now and then"])
def test_who_takes_too_little_is_hung_up_on_and_holds_no_lease_any_more(at_once: int, tmp_path: Path) -> None:
    async def served() -> None:
        async with endpoint(tmp_path, BUFFER) as (node, stage, address):
            loop = asyncio.get_running_loop()
            with socket.socket() as slow:
                slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
                slow.setblocking(False)
                await loop.sock_connect(slow, address)
                asked = f"GET /weightd/{stage}/m.safetensors HTTP/1.1\r\nHost: localhost\r\n\r\n"
                await loop.sock_sendall(slow, asked.encode())
                await holds(lambda: bool(node.get(stage).leases), "it is sent under a lease")

                def has_gone() -> bool:
                    with contextlib.suppress(BlockingIOError, ConnectionResetError):
                        slow.recv(at_once)
                    return not node.get(stage).leases

                await holds(has_gone, "its lease is gone")

    with mock.patch.object(module, "_PATIENCE", Patience(1.0, MiB)):
        asyncio.run(asyncio.wait_for(served(), 120))
