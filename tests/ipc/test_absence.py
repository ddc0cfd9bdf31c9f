"""What is asked again of a daemon that went away, how long, and what is not: leases, renewals, requests, events."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.servers import until
from weightd.ipc import AttachTimeout, Client, DaemonUnavailable, absence, wire
from weightd.ipc.absence import RESTART_SECONDS, Absence
from weightd.ipc.lease import LeaseConnection

BROKE = ConnectionResetError("it broke")
TRIES = 5
"""How often something that breaks is asked until the daemon counts as gone, by ``clock``."""

Turn = Callable[[socket.socket], bool]
"""What comes of one connection; whether it stays open."""


class Clock:
    """In place of ``time``: each pause takes a third of the time that a restart may take."""

    def __init__(self) -> None:
        self.now = time.monotonic()
        self.pauses = 0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses += 1
        self.now += RESTART_SECONDS / 3


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(absence, "time", clock)
    return clock


class Fickle:
    """A daemon's socket where each connection takes the next of the turns, and all others the last of them."""

    def __init__(self, path: Path, turns: Sequence[Turn]) -> None:
        self.path = path
        self.served = 0
        self._turns = turns
        self._open: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                turn = self._turns[min(self.served, len(self._turns) - 1)]
                self.served += 1
                if turn(connection):
                    self._open.append(connection)
                else:
                    connection.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for each in (self._listener, *self._open):
            each.close()


Serve = Callable[..., Fickle]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """A daemon that is there for so many turns: ``serve("lease.sock", breaks, leases)``."""
    started: list[Fickle] = []

    def start(name: str, *turns: Turn) -> Fickle:
        started.append(Fickle(tmp_path / name, turns))
        return started[-1]

    yield start
    for server in started:
        server.close()


def breaks(connection: socket.socket) -> bool:
    return False


def leases(connection: socket.socket, *, stays: bool = True) -> bool:
    wire.receive(connection)
    wire.send(connection, {"type": "lease"})
    return stays


def leases_and_breaks(connection: socket.socket) -> bool:
    return leases(connection, stays=False)


def progresses_and_breaks(connection: socket.socket) -> bool:
    wire.receive(connection)
    wire.send(connection, {"type": "progress"})
    return False


def answers(connection: socket.socket) -> bool:
    connection.recv(1 << 16)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 14\r\nConnection: close\r\n\r\n" + b'{"stages": []}')
    return False


def tells(connection: socket.socket, last: bool = True) -> bool:
    connection.recv(1 << 16)
    event = f"data: {json.dumps({'last': last})}\n\n"
    chunks = f"{len(event):x}\r\n{event}\r\n" + ("0\r\n\r\n" if last else "")
    head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    connection.sendall((head + chunks).encode())
    return False


def tells_and_breaks(connection: socket.socket) -> bool:
    return tells(connection, last=False)


# ---------------------------------------------------------------------- the rules


def test_a_daemon_that_was_never_there_is_gone_at_once(clock: Clock) -> None:
    assert not Absence(met=False).may_end(BROKE)
    assert clock.pauses == 0


def test_a_daemon_that_was_stopped_is_gone_at_once(clock: Clock) -> None:
    assert not Absence(met=True).may_end(FileNotFoundError())
    assert clock.pauses == 0


def test_a_daemon_that_was_there_may_be_away_for_as_long_as_a_restart_takes(clock: Clock) -> None:
    away = Absence(met=True)
    assert away.end == clock.now + RESTART_SECONDS
    assert [away.may_end(BROKE) for _ in range(TRIES)] == [True] * (TRIES - 1) + [False]


def test_each_answer_begins_anew_and_only_the_first_connection_does(clock: Clock) -> None:
    away = Absence(met=False)
    away.connected()
    end = away.end
    assert away.may_end(BROKE)
    away.connected()
    assert away.end == end
    away.answered()
    assert away.end == clock.now + RESTART_SECONDS


# ---------------------------------------------------------------------- leases


def test_a_lease_is_asked_for_again_until_it_comes(serve: Serve) -> None:
    server = serve("lease.sock", breaks, breaks, leases)
    lease = LeaseConnection(server.path, {})
    assert lease.acquire(60) == ({"type": "lease"}, [])
    assert server.served == 3
    lease.close()


def test_a_lease_is_not_asked_for_for_ever(serve: Serve) -> None:
    server = serve("lease.sock", breaks)
    with pytest.raises(DaemonUnavailable, match="weightd serve"):
        LeaseConnection(server.path, {}).acquire(None)
    assert server.served == TRIES


def test_a_lease_is_waited_for_as_long_as_daemons_say_how_far_they_are(serve: Serve) -> None:
    server = serve("lease.sock", *[progresses_and_breaks] * 3 * TRIES, leases)
    lease = LeaseConnection(server.path, {})
    assert lease.acquire(60) == ({"type": "lease"}, [])
    lease.close()


def test_a_daemon_that_does_not_come_back_before_the_callers_deadline_is_waited_for_no_longer(
    serve: Serve, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve("lease.sock", breaks)
    end = time.monotonic() + 1
    monkeypatch.setattr(clock, "sleep", lambda seconds: until(lambda: time.monotonic() > end, "it is over"))
    with pytest.raises(AttachTimeout, match="the daemon is away"):
        LeaseConnection(server.path, {}).acquire(0.9)


def test_a_lease_is_not_asked_for_where_no_daemon_was_or_where_it_was_stopped(
    serve: Serve, tmp_path: Path, clock: Clock
) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as dead:
        dead.bind(str(tmp_path / "dead.sock"))
        with pytest.raises(DaemonUnavailable):
            LeaseConnection(tmp_path / "dead.sock", {}).acquire(None)
    assert clock.pauses == 0

    def stops(connection: socket.socket) -> bool:
        (tmp_path / "lease.sock").unlink()
        return False

    server = serve("lease.sock", stops)
    with pytest.raises(DaemonUnavailable):
        LeaseConnection(server.path, {}).acquire(None)
    assert clock.pauses == 1


def watched(server: Fickle) -> LeaseConnection:
    lease = LeaseConnection(server.path, {})
    lease.acquire(60)
    lease.watch({"renews": {}}, lambda seconds: None)
    return lease


def test_a_lease_is_renewed_by_the_daemon_that_comes_back(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve("lease.sock", leases_and_breaks, breaks, breaks, leases_and_breaks, *[breaks] * (TRIES - 1), leases)
    lease = watched(server)
    until(lambda: server.served == TRIES + 4, "it is renewed twice, each time as late as it may be")
    lease.close()
    assert "lost" not in caplog.text


def test_a_lease_is_lost_where_no_daemon_comes_back(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve("lease.sock", leases_and_breaks, breaks)
    lease = watched(server)
    until(lambda: "the lease is lost, no daemon is back" in caplog.text, "it is given up")
    assert server.served == 1 + TRIES
    lease.close()


def test_a_lease_is_lost_at_once_where_the_daemon_was_stopped(
    serve: Serve, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    def leases_and_stops(connection: socket.socket) -> bool:
        server.path.unlink()
        return leases(connection, stays=False)

    server = serve("lease.sock", leases_and_stops)
    lease = watched(server)
    until(lambda: "the lease is lost, no daemon is back" in caplog.text, "it is given up")
    assert clock.pauses == 0
    lease.close()


# ---------------------------------------------------------------------- the API


def test_a_request_is_made_again_until_it_is_answered(serve: Serve, tmp_path: Path) -> None:
    server = serve("api.sock", breaks, breaks, answers)
    with Client(runtime_directory=tmp_path) as client:
        assert client.stages() == []
    assert server.served == 3


def test_a_request_is_not_made_for_ever(serve: Serve, tmp_path: Path) -> None:
    server = serve("api.sock", breaks)
    with Client(runtime_directory=tmp_path) as client, pytest.raises(DaemonUnavailable, match="weightd serve"):
        client.stages()
    assert server.served == TRIES


def test_a_stage_is_dropped_once(serve: Serve, tmp_path: Path) -> None:
    server = serve("api.sock", breaks)
    with Client(runtime_directory=tmp_path) as client, pytest.raises(DaemonUnavailable):
        client.remove("s")
    assert server.served == 1


@pytest.mark.parametrize("ask", [Client.stages, lambda client: list(client.events("s"))])
def test_nothing_is_asked_again_where_there_was_no_connection(
    ask: Callable[[Client], Any], tmp_path: Path, clock: Clock
) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as dead:
        dead.bind(str(tmp_path / "api.sock"))
        with Client(runtime_directory=tmp_path) as client, pytest.raises(DaemonUnavailable):
            ask(client)
    assert clock.pauses == 0


def test_events_go_on_as_long_as_daemons_come_back_with_some(serve: Serve, tmp_path: Path) -> None:
    serve("api.sock", *[tells_and_breaks] * 3 * TRIES, tells)
    with Client(runtime_directory=tmp_path) as client:
        assert [event["last"] for event in client.events("s")] == [False] * 3 * TRIES + [True]


def test_events_are_not_waited_for_for_ever(serve: Serve, tmp_path: Path) -> None:
    server = serve("api.sock", tells_and_breaks, breaks)
    with Client(runtime_directory=tmp_path) as client, pytest.raises(DaemonUnavailable):
        list(client.events("s"))
    assert server.served == TRIES
