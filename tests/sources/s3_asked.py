"""An S3 server that passes all on to another and keeps how it was asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx

_KEPT = ("content-length", "content-range", "content-type", "etag", "last-modified")


class Asked(NamedTuple):
    """One request: its path with the query, and who signed it for which region; empty where nobody did."""

    method: str
    path: str
    host: str
    key: str
    region: str
    token: str
    agent: str

    @property
    def native(self) -> bool:
        """Whether the native streamer sent it, which says so, and not the one that lists."""
        return self.agent.startswith("CRTS3NativeClient")


@dataclass
class Front:
    """``refuses`` says of a request whether it is answered with 403 instead."""

    url: str
    asked: list[Asked] = field(default_factory=list)
    refuses: Callable[[Asked], bool] = lambda _: False


@contextmanager
def front(target: str) -> Iterator[Front]:
    """A server on a port of its own before ``target`` (http://host:port), which takes anybody's signature."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            signed = self.headers.get("Authorization", "")
            scope = signed.partition("Credential=")[2].partition(",")[0].split("/")
            key, region = (scope[0], scope[2]) if len(scope) > 2 else ("", "")
            _, _, path, query, _ = urlsplit(self.path)  # the native streamer sends whole URLs
            path += f"?{query}" if query else ""
            token = self.headers.get("x-amz-security-token", "")
            asked = Asked(
                self.command, path, self.headers["Host"], key, region, token, self.headers.get("User-Agent", "")
            )
            served.asked.append(asked)
            if served.refuses(asked):
                self.send_response(403)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            passed = {"Range": self.headers["Range"]} if self.headers.get("Range") else {}
            answer = client.request(self.command, target + path, headers={**passed, "Accept-Encoding": "identity"})
            self.send_response(answer.status_code)
            for name in _KEPT:
                if name in answer.headers:
                    self.send_header(name, answer.headers[name])
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.content)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            """It keeps them anyhow."""

    with httpx.Client(timeout=60) as client, ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        served = Front(f"http://127.0.0.1:{server.server_port}")
        Thread(target=server.serve_forever, daemon=True).start()
        yield served
        server.shutdown()
