"""What a daemon says to its keeper and hears from it, one message at a time, in this process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from weightd.daemon.keeper.deposits import Deposits
from weightd.daemon.keeper.supervisor import FD_VARIABLE


def test_what_is_put_is_held_until_it_is_dropped_with_all_below_it(make: Any) -> None:
    keeper = make()
    keeper.put("st-1/segment/0", "st-1/record", "st-10/record", "listen:tcp")
    first = keeper._held["st-1/record"]
    inode = os.fstat(first).st_ino
    assert not os.get_inheritable(first)
    keeper.put("st-1/record")
    assert os.fstat(keeper._held["st-1/record"]).st_ino != inode, "the last one counts"
    keeper.deposits.drop("st-1")
    keeper.deposits.drop("nothing")
    keeper.take()
    assert keeper.held == ["listen:tcp", "st-10/record"]
    keeper.put("lock")
    keeper.deposits.drop("lock")
    keeper.take()
    assert "lock" in keeper._held, "its own is not the daemon's"


def test_what_means_nothing_is_said_so_and_closes_what_came_with_it(
    make: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    keeper = make()
    fds = [os.memfd_create("test") for _ in range(2)]
    before = len(os.listdir("/proc/self/fd"))
    for message, some in (
        (b"put " + b"t" * 99, fds),
        (b"put none", []),
        (b"put ", fds[:1]),
        (b"drop ", []),
        (b"x" * 99, fds[:1]),
    ):
        socket.send_fds(keeper.theirs, [message], some)
    socket.send_fds(keeper.theirs, [b"queue " + b"n" * 99], fds[:1])
    keeper.take()
    assert keeper.held == []
    assert len(os.listdir("/proc/self/fd")) == before
    err = capfd.readouterr().err
    assert err.count("cannot hold") == 3
    assert "cannot hold 'none': no descriptor is left" in err
    assert f"cannot hold '{'t' * 80}': no" in err
    assert f"a message that means nothing here: 'queue' '{'n' * 80}' with 1 descriptors" in err
    assert f"a message that means nothing here: '{'x' * 20}' '' with 1 descriptors" in err
    wanted = "a message that means nothing here: 'drop' '' with 0 descriptors"
    assert wanted in err
    for fd in fds:
        os.close(fd)


def test_a_list_is_answered_with_all_that_is_held_and_an_end(make: Any) -> None:
    keeper = make()
    keeper.put("a", "b")
    keeper._outbox.append((b"stop", -1))
    keeper.deposits._send("list", [])
    keeper.take()
    assert keeper.said == ["stop", "held lock", "held a", "held b", "end"]
    keeper._send(keeper._channel)
    assert keeper.said == []
    held = keeper.deposits.collect()
    assert list(held) == ["lock", "a", "b"]
    assert keeper.deposits.stop_ordered, "an order that was on its way is not lost"
    assert [os.fstat(held[name]).st_ino for name in "ab"] == [os.fstat(keeper._held[name]).st_ino for name in "ab"]
    assert not any(os.get_inheritable(fd) for fd in held.values())
    for fd in held.values():
        os.close(fd)


def test_a_daemon_that_reads_nothing_holds_nobody_up(make: Any, tmp_path: Path) -> None:
    daemon = tmp_path / "daemon"
    daemon.write_text("#!/bin/sh\nexec sleep 60\n")
    daemon.chmod(0o755)
    keeper = make(command=str(daemon))
    keeper._hang_up()
    keeper._start()
    try:
        assert keeper._receive(keeper._channel), "it says nothing, and is there"
        keeper._outbox.extend((b"x" * 4000, -1) for _ in range(10_000))
        keeper._send(keeper._channel)
        assert 0 < len(keeper._outbox) < 10_000, "the rest goes once there is room"
    finally:
        os.kill(keeper._pid, signal.SIGKILL)
        os.waitpid(keeper._pid, 0)


def test_where_nobody_keeps_nothing_is_held_and_nothing_fails() -> None:
    deposits = Deposits()
    assert (deposits.kept, deposits.collect()) == (False, {})
    deposits.put("a", 0)
    deposits.drop("a")
    deposits.up()


def test_a_keeper_that_has_died_is_no_error_and_is_heard_no_more(make: Any) -> None:
    keeper = make()
    assert keeper.deposits.kept
    assert keeper.deposits.listen(), "it says nothing"
    for message in (b"hello", b"stops"):
        keeper._channel.send(message)
        assert keeper.deposits.listen()
        assert not keeper.deposits.stop_ordered
    keeper._channel.send(b"stop")
    assert keeper.deposits.listen()
    assert keeper.deposits.stop_ordered
    keeper._channel.send(b"hello")
    assert keeper.deposits.listen()
    assert keeper.deposits.stop_ordered, "it is, until it is refused"
    assert keeper.deposits.fileno() == keeper.theirs.fileno()
    keeper._hang_up()
    assert not keeper.deposits.listen()
    keeper.theirs.close()
    assert not keeper.deposits.listen(), "a channel that is broken is one that is gone"
    keeper.connect()
    keeper._hang_up()
    keeper.deposits.drop("a")
    keeper.deposits.put("a", 0)


def test_a_held_name_that_comes_without_its_descriptor_says_what_is_short(make: Any) -> None:
    keeper = make()
    keeper._channel.send(b"held a")
    with pytest.raises(OSError, match="no descriptor left for a: raise the hard limit"):
        keeper.deposits.collect()


def test_a_daemon_finds_its_channel_by_its_number_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = make()
    number = os.dup(keeper.theirs.fileno())
    os.set_inheritable(number, True)
    script = (
        "import os\nfrom weightd.daemon.keeper.deposits import Deposits\n"
        "found = Deposits.inherited()\nassert found.kept\nassert not os.get_inheritable(found.fileno())\n"
        f"assert {FD_VARIABLE!r} not in os.environ\nfound.dying('x' * 2000)\n"
        "assert not Deposits.inherited().kept\n"
    )
    env = {**os.environ, FD_VARIABLE: str(number)}
    subprocess.run([sys.executable, "-c", script], env=env, pass_fds=[number], check=True)
    os.close(number)
    keeper.take()
    assert keeper._reason == "x" * 1000


@pytest.mark.parametrize("after", [1, 1 << 20])
def test_a_daemon_whose_keeper_died_before_it_could_be_told_dies_as_well(make: Any, after: int) -> None:
    number = os.dup(make().theirs.fileno())
    script = (
        f"import os\nparents = [5000, {after}]\nos.getppid = lambda: parents.pop(0)\n"
        "from weightd.daemon.keeper.deposits import Deposits\nDeposits.inherited()\n"
    )
    env = {**os.environ, FD_VARIABLE: str(number)}
    done = subprocess.run([sys.executable, "-c", script], env=env, pass_fds=[number], check=False)
    os.close(number)
    assert done.returncode == -signal.SIGKILL
