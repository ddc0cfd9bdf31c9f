"""The keeper's decisions one at a time, in this process: messages, deaths, orders to stop, what it says of itself."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers import until
from weightd.daemon.keeper import control, supervisor
from weightd.daemon.keeper.control import NoKeeper, keeper_status, reload_daemon
from weightd.daemon.keeper.deposits import Deposits
from weightd.daemon.keeper.supervisor import FD_VARIABLE, Keeper, lock

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


class Time:
    """In place of ``time`` where it is only read."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def strftime(self, form: str, *_: object) -> str:
        return form

    def gmtime(self) -> None:
        return None


class Made(Keeper):
    """A keeper with a channel whose other end is a daemon's deposits."""

    def __init__(self, folder: Path, limit: int = 0, refuses: bool = False, command: str = "/nowhere/daemon") -> None:
        super().__init__([command], str(folder), limit=limit, window=60.0, refuses=refuses)
        self.deposits = Deposits()
        self.connect()

    def connect(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.setblocking(False)
        self.deposits = Deposits(theirs)
        self.theirs = theirs

    def take(self) -> None:
        """All that the daemon has said."""
        channel = self._channel
        assert channel is not None
        while self._receive_left(channel):
            pass

    def put(self, *names: str) -> None:
        for name in names:
            fd = os.memfd_create("test")
            self.deposits.put(name, fd)
            os.close(fd)
        self.take()

    @property
    def held(self) -> list[str]:
        return sorted(set(self._held) - {"lock"})

    @property
    def said(self) -> list[str]:
        return [data.decode() for data, _ in self._outbox]

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(Path(self._folder, "keeper.json").read_text())
        return found

    def dies(self, how: str = "exit code 1", end: str = "crashed") -> float:
        """Seconds until the next daemon is to start; -1 where none is."""
        self._start_at = None
        self._died(how, end)
        return -1.0 if self._start_at is None else round(self._start_at - supervisor.time.monotonic(), 6)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr(supervisor, "time", clock)
    return clock


@pytest.fixture
def make(tmp_path: Path, clock: Time) -> Iterator[Any]:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    made: list[Made] = []

    def make(**options: Any) -> Made:
        made.append(Made(tmp_path / f"run{len(made)}", **options))
        return made[-1]

    yield make
    signal.set_wakeup_fd(-1)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for keeper in made:
        for fd in keeper._held.values():
            os.close(fd)
        keeper._hang_up()
        keeper.theirs.close()


# ---------------------------------------------------------------------------- what a daemon says


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
        (b"put two", fds),
        (b"put none", []),
        (b"put ", fds[:1]),
        (b"drop ", []),
        (b"x" * 99, fds[:1]),
    ):
        socket.send_fds(keeper.theirs, [message], some)
    socket.send_fds(keeper.theirs, [b"queue name"], fds[:1])
    keeper.take()
    assert keeper.held == []
    assert len(os.listdir("/proc/self/fd")) == before
    err = capfd.readouterr().err
    assert err.count("cannot hold") == 3
    assert "cannot hold 'none': no descriptor is left" in err
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
    keeper._channel.send(b"hello")
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


# ---------------------------------------------------------------------------- an order to stop


def test_an_order_is_passed_on_and_may_be_agreed_to_or_refused(make: Any) -> None:
    keeper = make(refuses=True)
    keeper.put("st-1/record")
    keeper.deposits.agree_to_stop()
    keeper.take()
    assert not keeper._agreed, "nobody has asked"
    keeper._signalled(signal.SIGTERM)
    assert (keeper._stopping, keeper.deposits.listen(), keeper.deposits.stop_ordered) == (True, True, True)
    assert not keeper._may_end()
    keeper.deposits.refuse_stop()
    keeper.take()
    assert (keeper._stopping, keeper.deposits.stop_ordered) == (False, False)
    keeper._signalled(signal.SIGINT)
    keeper.deposits.agree_to_stop()
    keeper.take()
    assert keeper._may_end()


@pytest.mark.parametrize(
    ("refuses", "held", "may"),
    [
        (True, ["st-1/record"], False),
        (False, ["st-1/record"], True),
        (True, [], True),
        (True, ["listen:tcp", "own:x/y"], True),
        (True, ["st-1/a:b"], False),
    ],
)
def test_it_may_end_over_weights_only_where_a_daemon_has_agreed(
    make: Any, refuses: bool, held: list[str], may: bool
) -> None:
    keeper = make(refuses=refuses)
    keeper.put(*held)
    assert not keeper._may_end(), "nobody has ordered it"
    keeper._stopping = True
    assert keeper._may_end() is may


def test_between_two_daemons_the_next_one_decides_and_where_there_is_none_it_is_refused(
    make: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    keeper = make(refuses=True)
    keeper.put("st-1/record")
    keeper._hang_up()
    keeper._start_at = 2000.0
    keeper._signalled(signal.SIGTERM)
    assert (keeper._start_at, keeper._stopping) == (0.0, True)
    keeper._start_at = None
    keeper._signalled(signal.SIGTERM)
    assert not keeper._stopping
    err = capfd.readouterr().err
    assert "not stopping: 2 descriptors are held, and no daemon runs" in err
    assert f"kill -9 {os.getpid()} drops them all" in err
    loses_nothing = make(refuses=False)
    loses_nothing._hang_up()
    loses_nothing._start_at = 2000.0
    loses_nothing._signalled(signal.SIGTERM)
    assert loses_nothing._start_at is None


def test_a_reload_clears_the_deaths_and_starts_a_daemon_where_none_runs_but_not_while_it_stops(make: Any) -> None:
    keeper = make(limit=2)
    assert [keeper.dies(), keeper.dies()] == [0.1, -1.0]
    keeper._signalled(signal.SIGHUP)
    assert (keeper._start_at, list(keeper._deaths)) == (0.0, [])
    keeper._start_at, keeper._stopping = None, True
    keeper._signalled(signal.SIGHUP)
    assert keeper._start_at is None
    keeper._signalled(signal.SIGCHLD)
    assert keeper._start_at is None


# ---------------------------------------------------------------------------- deaths


def test_the_first_deaths_are_answered_at_once_and_more_of_them_later_and_later(make: Any) -> None:
    keeper = make()
    waits = []
    for _ in range(12):
        keeper._serving = True
        waits.append(keeper.dies())
    assert waits == [0.0, 0.0, 0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
    assert (keeper._restarts, keeper._ends["crashed"]) == (12, 12)


def test_daemons_that_never_served_are_started_later_and_later_from_the_first_on(make: Any) -> None:
    keeper = make()
    assert [keeper.dies() for _ in range(4)] == [0.1, 0.2, 0.4, 0.8]
    keeper._serving = True
    assert keeper.dies() == 0.2, "it served, and is the fifth within the window"
    assert not keeper._serving
    assert keeper.dies() == 0.4


def test_deaths_of_before_the_window_do_not_count(make: Any, clock: Time) -> None:
    keeper = make(limit=3)
    for seconds, wait in ((0.0, 0.0), (30.0, 0.0), (30.0, -1.0), (61.0, 0.0)):
        clock.now += seconds
        keeper._serving = True
        assert keeper.dies() == wait
    clock.now += 60.0
    keeper._serving = True
    keeper.dies()
    assert list(keeper._deaths) == [clock.now - 60.0, clock.now], "what is just as old as the window counts"


def test_a_crash_loop_closes_listening_sockets_and_holds_the_rest(make: Any, capfd: pytest.CaptureFixture[str]) -> None:
    keeper = make(limit=1)
    keeper.put("st-1/record", "listen:tcp", "listen:unix/x")
    keeper._stopping = keeper._refuses = True
    assert keeper.dies("killed by SIGKILL", "killed") == -1.0
    assert keeper.held == ["st-1/record"]
    assert not keeper._stopping
    err = capfd.readouterr().err
    assert "the daemon died (killed by SIGKILL), 1 times within 60 s: not starting it again" in err
    assert "4 descriptors stay held" in err
    assert keeper.status() == {
        "pid": os.getpid(), "daemon_pid": 0, "state": "crash loop", "serving": False, "restarts": 1,
        "ends": {"crashed": 0, "killed": 1, "out_of_memory": 0, "replaced": 0}, "last_exit": "killed by SIGKILL",
        "held": 2,
    }  # fmt: skip


def test_one_that_makes_room_counts_as_no_death(make: Any) -> None:
    keeper = make(limit=1)
    keeper._replacing = True
    assert keeper.dies("killed by SIGKILL", "killed") == 0.0
    assert keeper._ends == {"crashed": 0, "killed": 0, "out_of_memory": 0, "replaced": 1}
    assert (keeper._replacing, keeper._restarts, list(keeper._deaths)) == (False, 1, [])


def test_what_cannot_be_started_is_told_at_once_unless_a_daemon_served_before(make: Any) -> None:
    keeper = make()
    keeper._hang_up()
    with pytest.raises(SystemExit, match=r"weightd: /nowhere/daemon cannot be started: .*No such file"):
        keeper._start()
    keeper._served, keeper._start_at = True, 0.0
    keeper._start()
    assert (keeper._pid, keeper._channel) == (0, None)
    assert keeper._start_at == 1000.1
    assert keeper.status()["last_exit"].startswith("cannot be started: ")


@pytest.mark.parametrize(
    ("script", "code", "how", "end"),
    [
        ("exit 3", 3, "exit code 3", "crashed"),
        ("kill -9 $$", 137, "killed by SIGKILL", "killed"),
        ("kill -6 $$", 134, "killed by SIGABRT", "crashed"),
    ],
)
def test_the_daemons_end_is_told_with_what_it_said_last(make: Any, script: str, code: int, how: str, end: str) -> None:
    keeper = make()
    keeper._served = True
    child = subprocess.Popen(["/bin/sh", "-c", script])
    keeper._pid, keeper._kill_at = child.pid, 5.0
    keeper.deposits.dying("no memory")
    keeper.put("a")
    keeper.deposits.drop("a")
    found: list[int] = []
    until(lambda: (got := keeper._reap()) is not None and (found.append(got) or True), "it has ended")
    child.returncode = 0  # it was waited for
    assert found == [code]
    assert (keeper._last_exit, keeper._ends[end]) == (f"{how}: no memory", 1)
    assert (keeper._pid, keeper._kill_at, keeper._channel, keeper._reason, keeper.held) == (0, None, None, "", [])
    assert keeper._reap() is None


def test_of_a_daemon_that_never_served_and_ends_by_itself_nothing_is_counted(make: Any) -> None:
    keeper = make()
    child = subprocess.Popen(["/bin/sh", "-c", "exit 4"])
    keeper._pid = child.pid
    until(lambda: keeper._reap() is not None, "it has ended")
    child.returncode = 0
    assert (keeper._restarts, keeper._last_exit) == (0, "")


# ---------------------------------------------------------------------------- what it says of itself


def test_the_status_says_which_state_it_is_in_and_is_gone_with_it(make: Any) -> None:
    keeper = make()
    for pid, stopping, start_at, state in (
        (0, False, 5.0, "restarting"), (0, False, None, "crash loop"), (0, True, None, "stopping"),
        (7, True, None, "running"), (7, False, None, "running"),
    ):  # fmt: skip
        keeper._pid, keeper._stopping, keeper._start_at = pid, stopping, start_at
        keeper._write_status()
        assert (keeper.status()["state"], keeper.status()["daemon_pid"]) == (state, pid)
    keeper.deposits.up()
    keeper.take()
    assert (keeper.status()["serving"], keeper._served) == (True, True)
    keeper._clean()
    assert not Path(keeper._folder, "keeper.json").exists()
    keeper._clean()


def test_what_is_held_is_written_down_soon_but_not_each_time(make: Any, clock: Time) -> None:
    keeper = make()
    keeper._write_status()
    assert keeper._status_at is None
    keeper.put("a")
    assert keeper._status_at == 1000.5
    clock.now += 0.2
    keeper.put("b")
    assert keeper._status_at == 1000.5
    keeper._write_status()
    clock.now += 5
    keeper.deposits.drop("b")
    keeper.take()
    assert keeper._status_at == clock.now
    keeper._write_status()
    assert keeper.status()["held"] == 2


def test_where_the_status_cannot_be_written_that_is_said(make: Any, capfd: pytest.CaptureFixture[str]) -> None:
    keeper = make()
    keeper._folder = "/nowhere"
    keeper._write_status()
    assert "cannot say in /nowhere/keeper.json how things are" in capfd.readouterr().err


@pytest.mark.parametrize(("form", "text"), [("text", True), ("json", False), ("auto", False), (None, False)])
def test_it_logs_as_daemons_do(form: str | None, text: bool, monkeypatch: pytest.MonkeyPatch,
                               capfd: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.delenv("WEIGHTD_LOG_FORMAT", raising=False)
    if form:
        monkeypatch.setenv("WEIGHTD_LOG_FORMAT", form)
    monkeypatch.setattr(supervisor, "time", Time())
    supervisor.log("hello")
    err = capfd.readouterr().err
    if text:
        assert err == "%H:%M:%S     INFO    keeper: hello\n"
    else:
        assert json.loads(err) == {
            "time": "%Y-%m-%dT%H:%M:%SZ", "level": "info", "logger": "weightd.keeper", "message": "hello",
        }  # fmt: skip


def test_a_runtime_directory_is_locked_by_one_who_is_named_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    fd = lock(str(folder))
    assert (folder / "lock").read_text() == f"{os.getpid()}\n"
    assert folder.stat().st_mode & 0o777 == 0o750
    assert (folder / "lock").stat().st_mode & 0o777 == 0o640
    assert not os.get_inheritable(fd)
    with pytest.raises(SystemExit, match=f"in use by another weightd, pid {os.getpid()}: stop it"):
        lock(str(folder))
    (folder / "lock").write_text("")
    with pytest.raises(SystemExit, match="pid unknown"):
        lock(str(folder))
    os.close(fd)
    os.close(lock(str(folder)))
    with pytest.raises(SystemExit, match="cannot use the runtime directory /dev/null/x"):
        lock("/dev/null/x")


# ---------------------------------------------------------------------------- from outside


def test_there_is_a_keeper_only_where_somebody_holds_the_lock(tmp_path: Path) -> None:
    with pytest.raises(NoKeeper, match="No such file or directory: start one"):
        keeper_status(tmp_path)
    fd = lock(str(tmp_path))
    with pytest.raises(NoKeeper, match="does not say how it fares"):
        keeper_status(tmp_path)
    (tmp_path / "keeper.json").write_text('{"pid": 5}')
    before = len(os.listdir("/proc/self/fd"))
    assert keeper_status(tmp_path) == {"pid": 5}
    fcntl.flock(fd, fcntl.LOCK_UN)
    with pytest.raises(NoKeeper, match="start one"):
        keeper_status(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(fd)


def test_a_reload_waits_for_another_daemon_that_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [(5, True), (5, True), (5, False), (6, False), (6, True)]
    sent: list[tuple[int, int]] = []

    def status(folder: Path) -> dict[str, Any]:
        pid, serving = said.pop(0) if len(said) > 1 else said[0]
        return {"pid": 99, "daemon_pid": pid, "serving": serving, "state": "running", "last_exit": "exit code 1"}

    monkeypatch.setattr(control, "keeper_status", status)
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    assert reload_daemon(tmp_path, 60) == (5, 6)
    assert (sent, said) == ([(99, signal.SIGHUP)], [(6, True)])
    with pytest.raises(TimeoutError, match=r"does not serve after 0.01 s: running, exit code 1; see its log"):
        reload_daemon(tmp_path, 0.01)


def test_another_users_keeper_cannot_be_told_to_reload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(control, "keeper_status", lambda folder: {"pid": 99})
    monkeypatch.setattr(os, "kill", kill)
    with pytest.raises(NoKeeper, match="pid 99, is another user's"):
        reload_daemon(tmp_path, 1)
