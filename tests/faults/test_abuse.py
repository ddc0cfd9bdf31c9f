"""Clients that ask too much, wrongly, or not at all: they are answered or dropped, and nobody else notices."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
from safetensors.numpy import save_file

from tests.fault_proxy import FaultProxy, Kind, Request
from tests.servers import Daemon, SeaweedFS, until
from weightd.ipc import RequestRefused, wire

Start = Callable[..., Daemon]
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    rng = numpy.random.default_rng(4)
    save_file({f"w{i}": rng.standard_normal((256, 1024), numpy.float32) for i in range(4)}, folder / "m.safetensors")
    return folder


@pytest.fixture
def connect() -> Iterator[Callable[..., socket.socket]]:
    """Connect to a daemon's socket by its name; all connections are closed at the end."""
    with contextlib.ExitStack() as stack:

        def to(daemon: Daemon, name: str = "api.sock") -> socket.socket:
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.settimeout(120)
            connection.connect(str(daemon.runtime_dir / name))
            return connection

        yield to


Connect = Callable[..., socket.socket]


def over(connection: socket.socket) -> http.client.HTTPConnection:
    """HTTP over a connection that is there already: requests go out at once, answers wait until they are asked for."""
    client = http.client.HTTPConnection("weightd")
    client.sock = connection
    return client


def post(connection: socket.socket, **request: Any) -> http.client.HTTPConnection:
    client = over(connection)
    client.request("POST", "/v1/stage", json.dumps(request), JSON)
    return client


def answer(client: http.client.HTTPConnection) -> tuple[int, dict[str, Any]]:
    found = client.getresponse()
    return found.status, json.loads(found.read())


def held_by(gate: threading.Event) -> Callable[[Request], Kind | None]:
    """What holds up requests for weights until the gate is open."""

    def fault(request: Request) -> None:
        if request.nbytes > 600_000:
            gate.wait(120)

    return fault


def alive(daemon: Daemon) -> bool:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(daemon.runtime_dir / "api.sock"))) as client:
        return client.get("http://weightd/livez", timeout=60).is_success


def bytes_read(daemon: Daemon) -> float:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(daemon.runtime_dir / "api.sock"))) as client:
        text = client.get("http://weightd/metrics", timeout=60).text
    lines = [line for line in text.splitlines() if line.startswith("weightd_source_read_bytes_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_a_thousand_parallel_requests_for_one_model_are_one_stage_that_loads_once(
    start_daemon: Start, connect: Connect, folder: Path
) -> None:
    daemon = start_daemon()
    clients = [post(connect(daemon), model=str(folder)) for _ in range(1000)]
    answers = [answer(client) for client in clients]
    assert {status for status, _ in answers} <= {200, 202}
    assert len({record["id"] for _, record in answers}) == 1
    record = daemon.stage(folder)
    assert record["state"] == "ready"
    assert [found["id"] for found in daemon.client.stages()] == [record["id"]]
    assert bytes_read(daemon) == record["bytes_total"] == record["bytes_done"]
    assert daemon.used_bytes == record["footprint_bytes"]
    assert daemon.status["restarts"] == 0


def test_two_hundred_models_at_once_are_all_ready_in_the_end_or_refused_until_later(
    start_daemon: Start, connect: Connect, tmp_path: Path
) -> None:
    models = []
    for number in range(200):
        models.append(tmp_path / f"m{number}")
        models[-1].mkdir()
        save_file({"w": numpy.full(2048, number, numpy.float32)}, models[-1] / "m.safetensors")
    daemon = start_daemon("--max-queued", "40")
    clients = [post(connect(daemon), model=str(model)) for model in models]
    outcomes: Counter[int] = Counter()
    refused = []
    for number, client in enumerate(clients):
        if number % 20 == 0:
            assert alive(daemon)
        status, record = answer(client)
        outcomes[status] += 1
        if status == 429:
            assert record["code"] == "queue_full"
            assert record["retry_after_seconds"] > 0
            refused.append(models[number])
    assert outcomes.keys() <= {202, 429}, outcomes
    assert outcomes[202] >= 40
    for model in refused:
        assert daemon.stage(model)["state"] == "ready"
    until(lambda: all(found["state"] == "ready" for found in daemon.client.stages()), "all are ready", 120)
    assert len(daemon.client.stages()) == 200
    assert len({found["checkpoint_digest"] for found in daemon.client.stages()}) == 200
    assert daemon.status["restarts"] == 0


def test_who_asks_for_events_and_never_reads_them_hinders_nobody(
    start_daemon: Start, s3: SeaweedFS, connect: Connect, folder: Path
) -> None:
    uri = s3.upload(folder, "slow-reader")
    gate = threading.Event()
    # A record that repeats this is larger than what a socket holds: its writer has to wait for the reader.
    long = {"exclude": [f"{number:04}-{'x' * 400}" for number in range(5000)]}
    with FaultProxy(s3.url, held_by(gate)) as proxy:
        daemon = start_daemon(env={**s3.env, "AWS_ENDPOINT_URL": proxy.url})
        try:
            record = daemon.client.stage(uri, tensors=long)
            for _ in range(20):
                over(connect(daemon)).request("GET", f"/v1/stage/{record['id']}/events")
                over(connect(daemon)).request("GET", "/v1/stage")
            assert alive(daemon)
            assert daemon.stage(folder)["state"] == "ready"
            with daemon.attach(folder) as weights:
                assert len(weights) == 4
        finally:
            gate.set()
        *_, last = daemon.client.events(record["id"])
        assert last["state"] == "ready"
    assert daemon.client.remove(record["id"])["state"] == "evicted"
    assert daemon.status["restarts"] == 0


CHUNK = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
POST = b"POST /v1/stage HTTP/1.1\r\nHost: weightd\r\nContent-Type: application/json\r\n"
GET = b"GET /v1/node HTTP/1.1\r\nHost: weightd\r\n"
FLOODS = {
    "a body that says it is endless": (POST + b"Content-Length: 1000000000000000000\r\n\r\n", b" " * (1 << 20), 64),
    "a body in chunks without end": (POST + b"Transfer-Encoding: chunked\r\n\r\n", CHUNK, 64),
    "a hundred thousand headers": (GET, b"".join(b"x-%d: y\r\n" % i for i in range(100_000)) + b"\r\n", 1),
    "headers without end": (GET, b"x: y\r\n" * 10_000, 100),
    "one header of a MiB": (GET + b"x: ", b"y" * (1 << 20), 1),
    "a header line without end": (GET, b"z" * (1 << 20), 64),
    "a path of a MiB": (b"GET /" + b"a" * (1 << 20), b" HTTP/1.1\r\nHost: weightd\r\n\r\n", 1),
    "a query of 60 KB": (b"POST /v1/stage?wait=" + b"9" * 60_000, b" HTTP/1.1\r\nHost: weightd\r\n\r\n", 1),
    "no HTTP at all": (bytes(range(256)), b"\r\n\r\n", 1),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", bytes(500), 1),
    "two lengths": (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n", b"{}", 1),
    "a negative length": (POST + b"Content-Length: -1\r\n\r\n", b"{}", 1),
    "a length that is none": (POST + b"Content-Length: 0x2\r\n\r\n", b"{}", 1),
    "a chunk length that is none": (POST + b"Transfer-Encoding: chunked\r\n\r\n", b"zz\r\n{}\r\n0\r\n\r\n", 1),
    "no host": (b"GET /v1/node HTTP/1.1\r\n\r\n", b"", 1),
    "a null byte in a header": (GET + b"x: a\0b\r\n\r\n", b"", 1),
    "a body that is not asked for": (GET + b"Content-Length: 40000000\r\n\r\n", b"x" * (1 << 20), 38),
}


@pytest.mark.parametrize("name", FLOODS)
def test_floods_and_what_is_no_http_are_answered_with_an_error(daemon: Daemon, connect: Connect, name: str) -> None:
    head, more, times = FLOODS[name]
    connection = connect(daemon)
    found = b""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(head)
        for _ in range(times):
            connection.sendall(more)
    while b"\r\n" not in found:  # it is there to be read even where the daemon has hung up
        part = connection.recv(1 << 16)
        assert part, "the connection ended without a word"
        found += part
    status = found.split(b"\r\n")[0]
    expected = b"HTTP/1.1 200" if name == "a body that is not asked for" else b"HTTP/1.1 4"
    assert status.startswith(expected), status
    assert alive(daemon)
    assert daemon.status["restarts"] == 0


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"5", b'"x"', b"[[]]", b"\xff\xfe", b'{"model": "/x"', b'{"model": "/x"}}', b"{'model': 1}",
        b'{"model": "/x", "\\ud800": 1}', b'{"model": "/\\ud800"}', b'{"model": "/x", "device": "\\udfff"}',
        b'{"model": "/x", "expect_digest": {"\\ud800": "x"}}', b'{"model": "\\u0000"}', b'{"model": NaN}',
        b'{"model": "/x", "ttl_seconds": NaN}', b'{"model": "/x", "ttl_seconds": 1e999}',
        b'{"model": "/x", "priority": ' + b"9" * 5000 + b"}", b'{"model": "/x", "priority": 1.5}',
        b'{"model": ' * 50_000, b'{"model": "/x", "tensors": {"include": [' + b'"a",' * 20_000 + b'"b"]}}',
        b'{"model": "' + b"/x" * 4000 + b'"}', json.dumps({f"field {i}": i for i in range(50_000)}).encode(),
    ],
    ids=lambda body: repr(body[:50]),
)  # fmt: skip
def test_bodies_that_are_no_request_are_problems(daemon: Daemon, connect: Connect, body: bytes) -> None:
    client = over(connect(daemon))
    client.request("POST", "/v1/stage", body, JSON)
    found = client.getresponse()
    assert 400 <= found.status < 500
    assert found.headers["Content-Type"] == "application/problem+json"
    problem = found.read()
    assert len(problem) < 1 << 16, "an answer as long as the question"
    assert json.loads(problem)["status"] == found.status
    assert daemon.status["restarts"] == 0


def test_a_full_queue_refuses_and_says_when_to_come_back_and_a_cancel_makes_room_at_once(
    start_daemon: Start, connect: Connect, s3: SeaweedFS, tmp_path: Path
) -> None:
    uris = []
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
        save_file({"w": numpy.ones(1 << 20, numpy.float32)}, tmp_path / name / "m.safetensors")
        uris.append(s3.upload(tmp_path / name, f"queue/{name}"))
    gate = threading.Event()
    with FaultProxy(s3.url, held_by(gate)) as proxy:
        limits = {"WEIGHTD_MAX_QUEUED": "1", "WEIGHTD_CONCURRENT_LOADS": "1"}
        daemon = start_daemon(env={**s3.env, "AWS_ENDPOINT_URL": proxy.url, **limits})
        try:
            first = daemon.client.stage(uris[0])
            until(lambda: daemon.client.show(first["id"])["state"] == "loading", "the first one loads")
            second = daemon.client.stage(uris[1])
            assert second["state"] == "queued"
            assert daemon.client.stage(uris[1])["id"] == second["id"], "joining needs no place in the queue"
            refused = post(connect(daemon), model=uris[2]).getresponse()
            assert refused.status == 429
            assert int(refused.headers["Retry-After"]) > 0
            assert "WEIGHTD_MAX_QUEUED" in json.loads(refused.read())["detail"]
            with pytest.raises(RequestRefused, match="WEIGHTD_MAX_QUEUED"):
                daemon.attach(uris[2])
            assert daemon.client.remove(second["id"])["state"] == "cancelled"
            until(lambda: daemon.client.show(second["id"])["footprint_bytes"] == 0, "nothing is held for it")
            assert not gate.is_set()
            third = daemon.client.stage(uris[2])
            assert third["state"] == "queued"
        finally:
            gate.set()
        assert daemon.stage(uris[0])["state"] == daemon.stage(uris[2])["state"] == "ready"


def test_one_user_may_hold_so_many_leases(start_daemon: Start, folder: Path) -> None:
    daemon = start_daemon("--max-leases-per-user", "2")
    held = [daemon.attach(folder) for _ in range(2)]
    with pytest.raises(RequestRefused, match="WEIGHTD_MAX_LEASES_PER_USER") as error:
        daemon.attach(folder)
    assert error.value.code == "lease_limit"
    held.pop().close()
    until(lambda: len(daemon.client.leases()) == 1, "the closed lease is gone")
    daemon.attach(folder).close()
    held.pop().close()


def test_lease_clients_that_never_send_or_never_read_hinder_nobody(
    start_daemon: Start, connect: Connect, folder: Path
) -> None:
    daemon = start_daemon()
    stage = daemon.stage(folder)["id"]
    asking = wire.encode({"op": "lease", "stage": stage})
    for _ in range(50):
        connect(daemon, "lease.sock")
        connect(daemon, "lease.sock").sendall(wire.LENGTH.pack(wire.MAX_REQUEST_BYTES) + b"{")
        connect(daemon, "lease.sock").sendall(asking)
    until(lambda: len(daemon.client.leases()) == 50, "those that never read have their leases")
    with daemon.attach(folder) as weights:
        assert len(weights) == 4
    until(lambda: len(daemon.client.leases()) == 50, "the closed lease is gone")
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(daemon.runtime_dir / "api.sock"))) as client:
        assert client.delete(f"http://weightd/v1/stage/{stage}?force=true&grace=0.1", timeout=60).is_success
    until(lambda: daemon.used_bytes == 0, "it is taken away from those who do not listen")
    until(lambda: not daemon.client.leases(), "their leases are gone")
    assert daemon.stage(folder)["state"] == "ready"
    assert daemon.status["restarts"] == 0


def test_a_lease_client_that_never_reads_does_not_hold_up_the_loading_of_what_it_streams(
    start_daemon: Start, connect: Connect, tmp_path: Path
) -> None:
    tensors = {f"{'long-name-' * 20}{i}": numpy.zeros(16, numpy.float32) for i in range(20_000)}
    save_file(tensors, tmp_path / "m.safetensors")
    daemon = start_daemon()
    asking = wire.encode({"op": "lease", "request": {"model": str(tmp_path)}, "stream": True})
    for _ in range(20):
        connect(daemon, "lease.sock").sendall(asking)
    record = daemon.stage(tmp_path)
    assert record["state"] == "ready"
    with daemon.attach(tmp_path) as weights:
        assert len(weights) == len(tensors)
    assert bytes_read(daemon) == record["bytes_total"]
    assert daemon.status["restarts"] == 0


def test_connections_that_come_and_go_leave_nothing_behind(start_daemon: Start, connect: Connect, folder: Path) -> None:
    daemon = start_daemon()
    record = daemon.stage(folder)

    def fds() -> int:
        return len(os.listdir(f"/proc/{daemon.pid}/fd"))

    before = fds()
    events = f"GET /v1/stage/{record['id']}/events HTTP/1.1\r\nHost: weightd\r\n\r\n".encode()
    waiting = wire.encode({"op": "lease", "request": {"model": str(folder)}})
    for number in range(300):
        for name, words in (("api.sock", events), ("api.sock", POST), ("lease.sock", waiting)):
            connection = connect(daemon, name)
            connection.sendall(words[: len(words) - number % 3])
            connection.close()
    until(lambda: fds() <= before, "no descriptor is left over")
    until(lambda: not daemon.client.leases(), "no lease is left over")
    assert alive(daemon)
    assert daemon.status["restarts"] == 0
