"""Listening sockets: who may connect, what is there already, and what the next daemon finds at the keeper's."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import free_ports
from weightd.daemon.keeper.deposits import Deposits
from weightd.daemon.lending.listeners import Listeners


class Keeping:
    """What a keeper hears of deposits."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self.deposits, self._theirs = Deposits(theirs), theirs

    def heard(self) -> list[tuple[str, int | None]]:
        """Each message, with the inode of what came with it."""
        found: list[tuple[str, int | None]] = []
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._ours, 4096, 4)
            except BlockingIOError:
                return found
            found.append((data.decode(), os.fstat(fds[0]).st_ino if fds else None))
            for fd in fds:
                os.close(fd)

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()


@pytest.fixture
def keeping() -> Iterator[Keeping]:
    found = Keeping()
    yield found
    found.close()


def inode(listener: socket.socket) -> int:
    return os.fstat(listener.fileno()).st_ino


def answers(listener: socket.socket) -> bool:
    """Whether one who connects is let in."""
    with socket.socket(listener.family) as client:
        client.settimeout(60)
        client.connect(listener.getsockname())
        listener.settimeout(60)
        connection, _ = listener.accept()
        connection.close()
        return True


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_a_unix_socket_is_for_its_user_and_group_at_any_moment_whatever_the_umask(
    tmp_path: Path, keeping: Keeping, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chmod, modes = os.chmod, []

    def noted(path: Path, mode: int) -> None:
        modes.append(stat.S_IMODE(os.stat(path).st_mode))
        chmod(path, mode)

    monkeypatch.setattr(os, "chmod", noted)
    listeners = Listeners(tmp_path, keeping.deposits, {})
    before = os.umask(umask)
    try:
        listener = listeners.unix("x.sock")
        assert os.umask(umask) == umask, "it is as it was"
    finally:
        os.umask(before)
    with listener:
        assert modes == [0o660]
        assert stat.S_IMODE((tmp_path / "x.sock").stat().st_mode) == 0o660
        assert not listener.get_inheritable()
        assert answers(listener)
        assert keeping.heard() == [("put listen:x.sock", inode(listener))]
        listeners.close()
        assert not (tmp_path / "x.sock").exists()
        listeners.close()


def test_what_a_dead_daemon_has_left_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "x.sock"))
    with Listeners(tmp_path, Deposits(), {}).unix("x.sock") as listener:
        assert answers(listener)


def test_a_path_that_is_too_long_is_told_with_how_long_one_may_be(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd")), os.umask(0o022)
    with pytest.raises(OSError, match=r"a socket's path has at most 107 bytes\): '.*/x{200}'"):
        Listeners(tmp_path, Deposits(), {}).unix("x" * 200)
    assert (len(os.listdir("/proc/self/fd")), os.umask(before[1])) == (before[0], 0o022)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_a_tcp_socket_sends_at_once_and_an_address_that_is_taken_is_told(host: str, keeping: Keeping) -> None:
    (port,) = free_ports(1)
    listeners = Listeners(Path("/nowhere"), keeping.deposits, {})
    with listeners.tcp(f"{host}:{port}") as listener:
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert listener.getsockname()[:2] == (host.strip("[]"), port)
        assert answers(listener)
        assert keeping.heard() == [(f"put listen:{host}:{port}", inode(listener))]
        with pytest.raises(OSError, match=r"cannot listen on .*: Address already in use"):
            listeners.tcp(f"{host}:{port}")
    listeners.close()


def test_what_the_daemon_before_had_goes_on_and_what_nobody_asks_for_is_closed(
    tmp_path: Path, keeping: Keeping
) -> None:
    before = Listeners(tmp_path, Deposits(), {})
    (port,) = free_ports(1)
    ones = [before.unix("x.sock"), before.tcp(f"127.0.0.1:{port}"), before.unix("y.sock")]
    names = ["listen:x.sock", f"listen:127.0.0.1:{port}", "listen:y.sock"]
    held = {name: os.dup(one.fileno()) for name, one in zip(names, ones, strict=True)}
    other, descriptors = held["listen:y.sock"], len(os.listdir("/proc/self/fd"))
    after = Listeners(tmp_path, keeping.deposits, held)
    with after.unix("x.sock") as unix, after.tcp(f"127.0.0.1:{port}") as tcp:
        assert [inode(unix), inode(tcp)] == [inode(one) for one in ones[:2]]
        assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert answers(unix)
        assert answers(tcp)
        assert keeping.heard() == [], "the keeper has them"
        after.drop_others()
        assert keeping.heard() == [("drop listen:y.sock", None)]
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(other)
        assert len(os.listdir("/proc/self/fd")) == descriptors - 1
    after.close()
    assert [path.name for path in tmp_path.iterdir()] == ["y.sock"]
    for one in ones:
        one.close()
