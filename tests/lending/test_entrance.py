"""Who connects and says nothing, or half of it: on every socket they keep nobody out, and are hung up on."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import select
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
from safetensors.numpy import save_file

from tests.conftest import command
from tests.servers import Daemon, free_ports, until
from weightd.api.gate import rules
from weightd.api.uvicorn_server import Server
from weightd.daemon.lending import entrance as module
from weightd.daemon.lending.entrance import Entrance, reserve, share
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.peers.moving.movers import unavailable

Start = Callable[..., Daemon]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"w": numpy.arange(4096, dtype=numpy.float32)}, tmp_path / "m.safetensors")
    return tmp_path


def connected(stack: contextlib.ExitStack, address: str | tuple[str, int]) -> socket.socket:
    connection = stack.enter_context(socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET))
    connection.settimeout(60)
    connection.connect(address)
    return connection


def ended(connection: socket.socket) -> bool:
    """Whether the other end has hung up, whatever it said before."""
    connection.setblocking(False)
    try:
        while True:
            if not connection.recv(1 << 16):
                return True
    except BlockingIOError:
        return False
    except OSError:
        return True


# ---------------------------------------------------------------------- the daemon, attacked


POST = b"POST /v1/stage HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
SAID = {
    "nothing": (b"", b""),
    "half a request": (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nx-half: ", b"\x64\0"),
    "a request without its body": (POST, b"\x64\0\0\0{"),
}
"""To a socket that speaks HTTP, and to lease.sock."""


@pytest.mark.parametrize("said", SAID)
def test_hundreds_who_say_nothing_or_half_of_it_on_every_socket_keep_nobody_out(
    start_daemon: Start, opened: contextlib.ExitStack, folder: Path, said: str
) -> None:
    limit = 400
    api, health, metrics, peers = free_ports(4)
    has_peers = not unavailable()  # without NIXL there is no port for them
    daemon = start_daemon(
        "--listen", f"127.0.0.1:{api}", "--health-listen", f"127.0.0.1:{health}",
        "--metrics-listen", f"127.0.0.1:{metrics}", "--max-leases", "8",
        "--peer-listen", f"127.0.0.1:{peers}",
        command=[command("prlimit", "apt-get install util-linux"), f"--nofile={limit}:{limit}"],
    )  # fmt: skip
    daemon.stage(folder)
    sockets: list[str | tuple[str, int]] = [
        ("127.0.0.1", api), ("127.0.0.1", health), ("127.0.0.1", metrics),
        str(daemon.runtime_dir / "api.sock"), str(daemon.runtime_dir / "lease.sock"),
        *([("127.0.0.1", peers)] if has_peers else []),
    ]  # fmt: skip
    pid, silent = daemon.pid, []
    for address in sockets * 250:
        silent.append(connected(opened, address))
        with contextlib.suppress(OSError):  # hung up on already
            silent[-1].sendall(SAID[said][str(address).endswith("lease.sock")])

    asked = [(health, "/livez"), (metrics, "/metrics"), (api, "/v1/node")]
    for port, path in asked + ([(peers, "/peer/v1/stages")] if has_peers else []):
        assert httpx.get(f"http://127.0.0.1:{port}{path}", timeout=60).status_code == 200, path
    assert daemon.client.node()["pid"] == pid
    with daemon.attach(folder) as weights:
        assert len(weights) == 1
        taken = len(os.listdir(f"/proc/{pid}/fd"))
        assert taken <= limit - reserve(limit) + 2 * module.KEPT, "descriptors are left for files and segments"
        assert float(weights["w"][1]) == 1
    with httpx.Client(base_url=f"http://127.0.0.1:{metrics}", timeout=60) as client:
        found = client.get("/metrics").text
    for name in ("api", "api.sock", "health", "metrics", "lease.sock", *(["peers"] if has_peers else [])):
        line = f'weightd_connections_dropped_total{{listener="{name}",reason="room"}} '
        assert float(found.partition(line)[2].partition("\n")[0]) > 100, name
    until(lambda: all(map(ended, silent)), "all of them are hung up on in the end", 90)
    assert daemon.status["restarts"] == 0
    assert daemon.pid == pid


CROWD = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
crowd = []
for _ in range(100):
    crowd.append(socket.socket(socket.AF_UNIX))
    crowd[-1].connect(sys.argv[1])
print("there", flush=True)
sys.stdin.read()
"""


def test_a_user_that_is_not_admitted_takes_no_place_and_is_told_so(folder: Path) -> None:
    if os.getuid():
        pytest.skip("needs root, to become another user")
    with tempfile.TemporaryDirectory() as base, Daemon(Path(base) / "d", "--max-leases", "8") as daemon:
        for path in (Path(base), Path(base) / "d", daemon.runtime_dir):
            path.chmod(0o755)
        lease = daemon.runtime_dir / "lease.sock"
        lease.chmod(0o666)
        with daemon.attach(folder):
            crowd = subprocess.Popen(
                [sys.executable, "-c", CROWD, str(lease)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            try:
                assert crowd.stdout is not None
                assert crowd.stdout.readline() == b"there\n"
                held = [daemon.attach(folder) for _ in range(6)]  # with the one there already, all that root may have
                assert 'weightd_connections{listener="lease.sock"} 7.0' in daemon.get("/metrics")
                for weights in held:
                    weights.close()
            finally:
                crowd.communicate(timeout=60)
        found = daemon.get("/metrics")
        assert 'weightd_connections_dropped_total{listener="lease.sock",reason="not_admitted"} 100.0' in found
        assert 'weightd_connections_dropped_total{listener="lease.sock",reason="room"} 0.0' in found


# ---------------------------------------------------------------------- HTTP behind it


async def app(scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
    """Answers at once; /large with more than sockets hold, /stream until its client hangs up."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"transfer-encoding", b"chunked")]})
    if scope["path"] == "/stream":
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        return
    await send({"type": "http.response.body", "body": b"done" if scope["path"] != "/large" else bytes(32 << 20)})


@contextlib.contextmanager
def serving(
    most: int, *, tls: dict[str, Path] | None = None, keep_alive: int = 600, **options: Any
) -> Iterator[tuple[tuple[str, int], Metrics]]:
    """A server of that app; yields its address, and what it counts."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    metrics, up = Metrics(), threading.Event()
    ends: list[Callable[[], object]] = []

    async def run() -> None:
        entrance, own = Entrance(metrics, **options), rules(metrics, most, secured=tls is not None)
        deadlines = {"timeout_graceful_shutdown": 1, "timeout_keep_alive": keep_alive}
        server = Server(app, entrance, "api", own, **deadlines, **(tls or {}))
        loop = asyncio.get_running_loop()
        ends.append(lambda: loop.call_soon_threadsafe(server.end))
        loop.call_soon(up.set)
        await server.serve(sockets=[listener])

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    address = listener.getsockname()
    thread.start()
    try:
        assert up.wait(60)
        yield address, metrics
    finally:
        ends[0]()
        thread.join(60)


def value(metrics: Metrics, reason: str) -> float:
    labels = {"listener": "api", "reason": reason}
    return metrics.registry.get_sample_value("weightd_connections_dropped_total", labels) or 0.0


def test_headers_that_come_a_byte_at_a_time_are_not_waited_for(opened: contextlib.ExitStack) -> None:
    with serving(10, head_seconds=0.5) as (address, metrics):
        first = connected(opened, address)
        first.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: select.select([first], [], [], 0)[0], "it is answered")
        for connection in (connected(opened, address), first):  # a first request, and a second one
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nx-slow: ")

            def dribbles(connection: socket.socket = connection) -> bool:
                with contextlib.suppress(OSError):
                    connection.setblocking(True)
                    connection.send(b"x")
                return ended(connection)

            until(dribbles, "it is hung up on")
        assert value(metrics, "silent") == 2


def test_an_answer_that_goes_on_is_not_idle_and_a_connection_kept_alive_is(opened: contextlib.ExitStack) -> None:
    with serving(8, head_seconds=600) as (address, metrics):
        stream = http.client.HTTPConnection(*address, timeout=60)
        stream.request("GET", "/stream")
        answer = stream.getresponse()
        assert answer.read1(5) == b"begun"
        kept = http.client.HTTPConnection(*address, timeout=60)
        kept.request("GET", "/")
        assert kept.getresponse().read() == b"done"
        for _ in range(50):
            connected(opened, address)
        assert httpx.get(f"http://{address[0]}:{address[1]}/", timeout=60).text == "done"
        assert kept.sock is not None
        until(lambda: kept.sock is not None and ended(kept.sock), "the one that was kept alive made room")
        assert value(metrics, "room") >= 40
        assert stream.sock is not None
        assert not ended(stream.sock)
        stream.close()


def test_an_event_stream_outlasts_the_deadline_of_the_silent(opened: contextlib.ExitStack) -> None:
    with serving(8, head_seconds=0.2) as (address, metrics):
        stream = http.client.HTTPConnection(*address, timeout=60)
        stream.request("GET", "/stream")
        assert stream.getresponse().read1(5) == b"begun"
        silent = connected(opened, address)
        until(lambda: ended(silent), "who says nothing is hung up on")
        assert value(metrics, "silent") == 1
        assert stream.sock is not None
        assert not ended(stream.sock)
        stream.close()


@pytest.mark.parametrize("more", [b"", b"Connection: close\r\n"])
def test_who_takes_nothing_of_an_answer_is_hung_up_on(opened: contextlib.ExitStack, more: bytes) -> None:
    with serving(10, head_seconds=0.3) as (address, metrics):
        connected(opened, address).sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n" + more + b"\r\n")
        until(lambda: value(metrics, "silent") == 1, "it is hung up on")
        labels = {"listener": "api"}
        assert metrics.registry.get_sample_value("weightd_connections", labels) == 0


def test_who_never_agrees_on_tls_is_not_waited_for(opened: contextlib.ExitStack, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            command("openssl", "apt-get install openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes",
            "-days", "2", "-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate),
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    with serving(4, tls={"ssl_keyfile": key, "ssl_certfile": certificate}, head_seconds=600) as (address, metrics):
        silent = [connected(opened, address) for _ in range(20)]
        answer = httpx.get(f"https://{address[0]}:{address[1]}/", timeout=60, verify=False)
        assert answer.text == "done"
        assert value(metrics, "room") >= 17
        until(lambda: sum(map(ended, silent)) >= 17, "who was in the way is hung up on")
    with serving(4, tls={"ssl_keyfile": key, "ssl_certfile": certificate}, head_seconds=0.3) as (address, metrics):
        half = connected(opened, address)
        half.sendall(b"\x16\x03\x01")
        until(lambda: ended(half), "it is hung up on")
        assert value(metrics, "silent") == 1
        connected(opened, address).sendall(b"GET / HTTP/1.1\r\n\r\n")  # no TLS at all
        until(
            lambda: metrics.registry.get_sample_value("weightd_connections", {"listener": "api"}) == 0, "all are gone"
        )


def test_who_finds_every_place_taken_is_answered_and_told_to_come_back(opened: contextlib.ExitStack) -> None:
    with serving(4, head_seconds=600) as (address, metrics):
        for _ in range(share(4)):
            stream = connected(opened, address)
            stream.sendall(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
            assert stream.recv(100)
        answer = httpx.get(f"http://{address[0]}:{address[1]}/", timeout=60)
        assert answer.status_code == 503
        assert answer.json()["code"] == "too_many_connections"
        assert "this machine has 3 of the 4 connections to api" in answer.json()["detail"]
        assert answer.headers["Retry-After"] == "1"
        assert value(metrics, "full") == 1


# ---------------------------------------------------------------------- what has to last


CRASHES = {
    "the expiry": """
        from weightd.daemon.stages.residency import Residency
        async def expire(self):
            raise RuntimeError("nobody expected it")
        Residency.expire = expire
    """,
    "an accept loop": """
        from weightd.daemon.lending.entrance import Entrance
        def let_in(self, *_):
            raise RuntimeError("nobody expected it")
        Entrance._let_in = let_in
    """,
}


@pytest.mark.parametrize("what", CRASHES)
def test_a_daemon_without_what_has_to_last_ends_rather_than_look_alive(tmp_path: Path, what: str) -> None:
    code = textwrap.dedent(CRASHES[what]) + "import runpy; runpy.run_module('weightd.api', run_name='__main__')"
    env = {
        **os.environ, "WEIGHTD_RUNTIME_DIR": str(tmp_path), "WEIGHTD_CACHE_DIR": str(tmp_path / "cache"),
        "WEIGHTD_LISTEN": "", "WEIGHTD_LOG_FORMAT": "text",
    }  # fmt: skip
    daemon = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True)
    try:

        def over() -> bool:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(tmp_path / "api.sock"))
            return daemon.poll() is not None

        until(over, "it ends", 90)
    finally:
        daemon.kill()
        _, said = daemon.communicate(timeout=60)
    assert daemon.returncode == 70, said
    assert "RuntimeError: nobody expected it" in said
