"""Daemons that know each other, and what tests want to know of them."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
from safetensors.numpy import load_file

from tests.fault_proxy import FaultProxy
from tests.servers import Daemon, SeaweedFS, free_ports

Start = Callable[..., Daemon]


def weight_bytes(proxy: FaultProxy) -> int:
    """Bytes of weights that were asked of the origin: large ranges; headers are small."""
    return sum(request.nbytes for request in proxy.seen if request.nbytes > 300_000)


class Fleet:
    """Daemons that know each other by a static list."""

    def __init__(self, start: Start, proxy: FaultProxy, s3: SeaweedFS, count: int) -> None:
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
        self._start = start
        self._env = {**s3.env, "AWS_ENDPOINT_URL": proxy.url, "UCX_TLS": "tcp", "WEIGHTD_EXTENT": "1MiB"}
        self.daemons: list[Daemon] = []

    def start(self, **env: str) -> Daemon:
        """The next one."""
        address = self.addresses[len(self.daemons)]
        own = {"WEIGHTD_PEER_LISTEN": address, "WEIGHTD_PEERS": "static:" + ",".join(self.addresses)}
        self.daemons.append(self._start(env={**self._env, **own, "WEIGHTD_PEER_TOKEN": "fleet", **env}))
        return self.daemons[-1]


def same(daemon: Daemon, stage: str, folder: Path) -> bool:
    truth: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        truth |= load_file(file)
    with daemon.attach(stage=stage) as weights:
        return set(weights) == set(truth) and all(
            numpy.frombuffer(weights.raw(name), numpy.uint8).tobytes() == truth[name].tobytes()  # type: ignore[arg-type]
            for name in truth
        )


def from_peers(daemon: Daemon) -> int:
    lines = daemon.get("/metrics").splitlines()
    return sum(int(float(line.split()[1])) for line in lines if line.startswith("weightd_peer_read_bytes_total"))


def movers_of(daemon: Daemon) -> list[int]:
    """Processes of a daemon that move bytes."""
    pid = daemon.status["daemon_pid"]
    found = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            found.update(int(child) for child in task.read_text().split() if is_mover(int(child)))
    return sorted(found)


def movers_at_work(daemon: Daemon) -> list[int]:
    """Those of them that have memory of it mapped, to be read from or to be read into."""
    return [mover for mover in movers_of(daemon) if "/memfd:weightd:" in maps_of(mover)]


def maps_of(pid: int) -> str:
    """What it has mapped; nothing where it has ended."""
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


def is_mover(pid: int) -> bool:
    """Whether it has become one: until then a new process is a copy of its parent, environment and all."""
    try:
        return b"weightd.daemon.peers.moving.mover" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def serve_events(answer: Callable[[str], Iterator[bytes]]) -> http.server.ThreadingHTTPServer:
    """A server that answers every GET with whatever ``answer(path)`` yields, as an event stream."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            try:
                for part in answer(self.path):
                    self.wfile.write(part)
            except OSError:
                pass  # whoever asked has heard enough

        def log_message(self, *_: object) -> None:
            """Not on stderr."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
