"""HTTPS in front of a server that speaks HTTP, with a certificate of an authority that only this test knows."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
import threading
from pathlib import Path


class Terminator:
    """Listens on a free port of localhost; ``authority`` is the file with the certificate to trust."""

    def __init__(self, upstream: int, folder: Path) -> None:
        folder.mkdir()
        self.authority = folder / "ca.pem"
        self._upstream = upstream
        (folder / "names").write_text("subjectAltName=DNS:localhost")
        new = ("-newkey", "rsa:2048", "-nodes")
        for arguments in (
            ("req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=an authority"),
            ("req", *new, "-keyout", "key.pem", "-out", "request.pem", "-subj", "/CN=localhost"),
            ("x509", "-req", "-in", "request.pem", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
             "-days", "2", "-extfile", "names", "-out", "cert.pem"),
        ):  # fmt: skip
            subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        listening = asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=context)
        self._server = asyncio.run_coroutine_threadsafe(listening, self._loop).result()
        self.url = f"https://localhost:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, near: asyncio.StreamReader, near_writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            far, far_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
            await asyncio.gather(_copy(near, far_writer), _copy(far, near_writer))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(1 << 16):
            target.write(data)
            await target.drain()
    target.close()
