"""The keeper's decisions one at a time, in this process: deaths, orders to stop, what it waits for."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.keeper.made import Time
from tests.servers import until

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


def test_with_no_daemon_and_nothing_to_lose_an_order_to_stop_ends_it_well(make: Any) -> None:
    keeper = make(refuses=True)
    keeper._hang_up()
    keeper._start_at = 2000.0
    os.kill(os.getpid(), signal.SIGTERM)
    assert keeper.run() == 0


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


@pytest.mark.parametrize("late", [0.0, 3.0])
def test_one_that_makes_no_room_within_ten_seconds_is_killed(
    make: Any, tmp_path: Path, clock: Time, capfd: pytest.CaptureFixture[str], late: float
) -> None:
    daemon, stays = tmp_path / "daemon", tmp_path / "stays"
    daemon.write_text(f"#!/bin/sh\n[ -e {stays} ] && exit 5\ntrap '' TERM\n: > {stays}\nwhile :; do sleep 0.1; done\n")
    daemon.chmod(0o755)
    keeper = make(command=str(daemon))
    keeper._hang_up()
    keeper._start()
    until(stays.exists, "it no longer ends when it is told to")
    keeper._signalled(signal.SIGHUP)
    assert (keeper._kill_at, keeper._replacing) == (1010.0, True)
    clock.now = 1010.0 + late
    assert keeper.run() == 5, "the next one is started at once, and ends by itself"
    assert "does not make room: killing it" in capfd.readouterr().err
    assert (keeper._ends["replaced"], keeper._kill_at) == (1, None)


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
        ("exit 0", 0, "exit code 0", "crashed"),
        ("exit 3", 3, "exit code 3", "crashed"),
        ("kill -1 $$", 129, "killed by SIGHUP", "crashed"),
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


@pytest.mark.parametrize("code", [0, 4])
def test_of_a_daemon_that_never_served_and_ends_by_itself_nothing_is_counted(make: Any, code: int) -> None:
    keeper = make()
    child = subprocess.Popen(["/bin/sh", "-c", f"exit {code}"])
    keeper._pid = child.pid
    until(lambda: keeper._reap() is not None, "it has ended")
    child.returncode = 0
    assert (keeper._restarts, keeper._last_exit) == (0, "")


def test_it_waits_for_what_is_due_first_and_not_for_what_was_due_before(make: Any) -> None:
    keeper = make()
    keeper._start_at, keeper._kill_at = 1000.05, 1090.0
    began = time.monotonic()
    assert keeper._wait() == b""
    assert 0.05 <= time.monotonic() - began < 60, "a daemon that could be written to is nothing to do"
    keeper._start_at, began = 900.0, time.monotonic()
    assert keeper._wait() == b""
    assert time.monotonic() - began < 1.0
