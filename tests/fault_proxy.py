"""An HTTP proxy in front of an object store that breaks what it is told to break."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

Kind = Literal["reset", "stall", "truncate", "503", "403", "expired", "flip"]

REFUSALS: dict[str, tuple[str, str]] = {
    "503": ("503 Slow Down", "SlowDown"),
    "403": ("403 Forbidden", "AccessDenied"),
    "expired": ("400 Bad Request", "ExpiredToken"),
}
"""What an S3 server answers with: the status, and its code."""


@dataclass(frozen=True)
class Request:
    """One request as it passes: what a fault is chosen by. ``first`` and ``last`` are the Range's bytes."""

    number: int
    method: str
    path: str
    first: int | None
    last: int | None

    @property
    def nbytes(self) -> int:
        """Bytes that the range asks for; 0 without one."""
        return 0 if self.first is None or self.last is None else self.last - self.first + 1


@dataclass
class FaultProxy:
    """Forwards to ``target`` (http://host:port). ``fault(request)`` names what to do to each request, or None.

    ``seen`` and ``done`` keep what passed and what was broken. Runs in a thread between ``__enter__`` and ``__exit__``.
    """

    target: str
    fault: Callable[[Request], Kind | None] = lambda _: None
    seen: list[Request] = field(default_factory=list)
    done: list[tuple[Request, Kind]] = field(default_factory=list)

    def __enter__(self) -> FaultProxy:
        started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._upstream = urlsplit(self.target)
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(512, thread_name_prefix="fault")

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            self._server = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
            self._stopping = asyncio.Event()
            started.set()
            self._loop.run_until_complete(self._stopping.wait())
            self._server.close()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))

        self._thread = threading.Thread(target=run, name="fault-proxy", daemon=True)
        self._thread.start()
        started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(10)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of its own: asyncio's own one for the callback complains where it is cancelled.
        task = self._loop.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_writer: asyncio.StreamWriter | None = None
        with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
            assert self._upstream.hostname
            upstream, upstream_writer = await asyncio.open_connection(self._upstream.hostname, self._upstream.port)
            while await self._exchange(reader, writer, upstream, upstream_writer):
                pass
        for end in (writer, upstream_writer):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.close()

    async def _exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        upstream: asyncio.StreamReader,
        upstream_writer: asyncio.StreamWriter,
    ) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        method, path, _ = lines[0].split(" ", 2)
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)
        }
        first, last = None, None
        if headers.get("range", "").startswith("bytes="):
            low, _, high = headers["range"].removeprefix("bytes=").partition("-")
            first, last = int(low), int(high) if high else None
        request = Request(len(self.seen), method, path, first, last)
        self.seen.append(request)
        kind = await self._loop.run_in_executor(self._threads, self.fault, request)  # it may wait, and hold up nobody
        if kind:
            self.done.append((request, kind))
        if kind in REFUSALS:
            status, code = REFUSALS[kind]
            body = b"" if method == "HEAD" else f"<Error><Code>{code}</Code></Error>".encode()
            refusal = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            writer.write(refusal.encode() + body)
            await writer.drain()
            return False
        if kind == "reset" and request.nbytes == 0:  # there may be no body in whose midst to do it
            return False
        upstream_writer.write(head)
        left = int(headers.get("content-length", 0))
        while left:
            data = await reader.read(min(left, 1 << 16))
            upstream_writer.write(data)
            left -= len(data)
        await upstream_writer.drain()
        answer = await upstream.readuntil(b"\r\n\r\n")
        fields = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in answer.decode("latin-1").split("\r\n")[1:] if line)
        }
        writer.write(answer)
        if method == "HEAD" or answer.split(b" ", 2)[1] in (b"204", b"304"):
            return True
        if "chunked" in fields.get("transfer-encoding", ""):
            await self._chunks(upstream, writer)
            return True
        return await self._body(int(fields.get("content-length", 0)), kind, upstream, writer)

    async def _body(
        self, length: int, kind: Kind | None, upstream: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        passed = 0
        while passed < length:
            data = bytearray(await upstream.read(min(length - passed, 1 << 16)))
            if not data:
                return False
            middle = passed <= length // 2 < passed + len(data)
            if middle and kind == "flip":
                data[length // 2 - passed] ^= 0x10
            if middle and kind in ("reset", "stall", "truncate"):
                writer.write(bytes(data[: length // 2 - passed]))
                await writer.drain()
                if kind == "stall":
                    await self._stopping.wait()
                if kind == "reset":
                    raw = writer.get_extra_info("socket")
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return False
            writer.write(bytes(data))
            await writer.drain()
            passed += len(data)
        return True

    async def _chunks(self, upstream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            line = await upstream.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            writer.write(line + await upstream.readexactly(size + 2))
            await writer.drain()
            if not size:
                return
