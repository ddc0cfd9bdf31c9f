"""A daemon that dies often, and an order to stop that finds none: what the keeper then does, and says."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.keeper.test_keeper import LEASED, PUT, SERVE, Kept
from tests.servers import until

AGREE = """
deposits.up()
(folder / "child.pid").write_text(str(os.getpid()))
while deposits.listen() and not deposits.stop_ordered:
    time.sleep(0.01)
deposits.agree_to_stop()
sys.exit(0)
"""
HOLD = PUT + 'if "a" not in held: put("a", "weights")\n'
DIE_WHEN_ASKED = HOLD + LEASED.replace("deposits.refuse_stop()", "os.kill(os.getpid(), 9)")


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    keeper = Kept(tmp_path, WEIGHTD_RESTART_LIMIT="0", WEIGHTD_RESTART_WINDOW="300", WEIGHTD_ON_STOP="refuse")
    yield keeper
    if keeper.process is not None and keeper.process.poll() is None:
        keeper.process.kill()
        keeper.process.wait()


def kill(kept: Kept, pid: int) -> float:
    """Kill a daemon; returns the seconds until the next one serves."""
    os.kill(pid, signal.SIGKILL)
    start = time.monotonic()
    kept.child(other_than=pid)
    return time.monotonic() - start


def test_the_first_three_kills_are_answered_at_once_and_further_ones_later_and_later(kept: Kept) -> None:
    kept.start()
    for _ in range(3):
        kill(kept, kept.child())
    assert "starting it again in" not in kept.err()
    seconds = [kill(kept, kept.child()) for _ in range(4)]
    for delay, took in zip(("0.1", "0.2", "0.4", "0.8"), seconds, strict=True):
        assert f"(killed by SIGKILL): starting it again in {delay} s" in kept.err()
        assert took >= float(delay)
    assert kept.status()["ends"]["killed"] == 7


def test_kills_of_long_ago_delay_nothing(kept: Kept) -> None:
    kept.environment["WEIGHTD_RESTART_WINDOW"] = "0.001"
    kept.start()
    for _ in range(8):
        kill(kept, kept.child())
    assert "starting it again in" not in kept.err()


def test_a_daemon_that_is_killed_again_and_again_stays_down_as_one_that_crashes_does(kept: Kept) -> None:
    kept.environment["WEIGHTD_RESTART_LIMIT"] = "4"
    kept.script(HOLD + SERVE)
    kept.start()
    first = kept.child()
    kept.script("deposits.up(); os.kill(os.getpid(), 9)")
    os.kill(first, signal.SIGKILL)
    until(lambda: kept.status().get("state") == "crash loop", "it has given up")
    assert kept.status()["restarts"] == 4
    kept.script(SERVE)
    kept.signal(signal.SIGHUP)
    assert f"{kept.child(other_than=first)} held a weights" in kept.out()


def test_a_kill_for_lack_of_memory_is_told_from_others(kept: Kept, tmp_path: Path) -> None:
    group = tmp_path / "groups" / "pod"
    group.mkdir(parents=True)
    events = group / "memory.events"
    events.write_text("low 0\noom 3\noom_kill 3\noom_group_kill 0\n")
    kept.proc = tmp_path / "proc"
    kept.proc.mkdir()
    (kept.proc / "cgroup").write_text("0::/pod\n")
    (kept.proc / "mountinfo").write_text(f"30 24 0:26 / {group.parent} rw - cgroup2 cgroup2 rw\n")
    kept.start()
    kill(kept, kept.child())
    assert kept.status()["last_exit"] == "killed by SIGKILL"
    victim = kept.child()
    events.write_text("low 0\noom 4\noom_kill 4\noom_group_kill 0\n")
    kill(kept, victim)
    assert "no memory left" in kept.status()["last_exit"]
    assert "no memory left" in kept.err()
    kill(kept, kept.child())
    assert kept.status()["last_exit"] == "killed by SIGKILL"
    assert kept.status()["ends"] == {"crashed": 0, "killed": 2, "out_of_memory": 1, "replaced": 0}


def test_an_order_to_stop_between_two_daemons_is_for_the_next_one_to_refuse(kept: Kept) -> None:
    kept.script(HOLD + SERVE)
    kept.start()
    for _ in range(7):
        kill(kept, kept.child())
    last = kept.child()
    kept.script(HOLD + LEASED)
    os.kill(last, signal.SIGKILL)
    until(lambda: "in 1.6 s" in kept.err(), "the next one is to come later")
    kept.signal(signal.SIGTERM)
    until((kept.folder / "asked").exists, "the next one was asked")
    assert f"{kept.child(other_than=last)} held a weights" in kept.out()
    kill(kept, kept.child())  # and a keeper that still wants to stop would start none


def test_a_daemon_that_dies_over_an_order_to_stop_has_not_agreed_to_it(kept: Kept) -> None:
    kept.script(DIE_WHEN_ASKED)
    kept.start()
    first = kept.child()
    kept.signal(signal.SIGTERM)
    until((kept.folder / "asked").exists, "it was asked")
    kept.script(HOLD + LEASED)
    assert f"{kept.child(other_than=first)} held a weights" in kept.out()


def test_a_daemon_that_makes_room_has_not_agreed_to_stop(kept: Kept) -> None:
    kept.script(HOLD + "signal.signal(signal.SIGTERM, lambda *_: os._exit(0))\n" + LEASED)
    kept.start()
    first = kept.child()
    os.kill(first, signal.SIGSTOP)
    kept.signal(signal.SIGTERM)
    os.kill(first, signal.SIGTERM)  # as a service manager does that signals the whole control group
    os.kill(first, signal.SIGCONT)
    assert f"{kept.child(other_than=first)} held a weights" in kept.out()


def test_where_no_further_daemon_is_to_be_an_order_to_stop_is_refused_with_what_to_do(kept: Kept) -> None:
    kept.environment["WEIGHTD_RESTART_LIMIT"] = "2"
    kept.script(HOLD + SERVE)
    kept.start()
    first = kept.child()
    kept.script("sys.exit(1)")
    os.kill(first, signal.SIGSEGV)
    until(lambda: kept.status().get("state") == "crash loop", "it has given up")
    kept.signal(signal.SIGTERM)
    until(lambda: "not stopping" in kept.err(), "it is refused")
    assert "weightd reload" in kept.err()
    assert "WEIGHTD_ON_STOP=refuse" in kept.err()
    kept.script(AGREE)
    kept.signal(signal.SIGHUP)
    assert f"{kept.child(other_than=first)} held a weights" in kept.out()
    kept.signal(signal.SIGTERM)
    assert kept.wait() == 0


def test_a_daemon_in_a_crash_loop_over_the_order_ends_in_holding(kept: Kept) -> None:
    kept.environment["WEIGHTD_RESTART_LIMIT"] = "3"
    kept.script(DIE_WHEN_ASKED)
    kept.start()
    kept.child()
    kept.signal(signal.SIGTERM)
    until(lambda: kept.status().get("state") == "crash loop", "it has given up")
    until(lambda: "not stopping" in kept.err(), "the stop is refused")


@pytest.mark.parametrize("script", [SERVE, HOLD + SERVE], ids=["nothing held", "drop"])
def test_with_nothing_to_lose_or_the_order_to_drop_it_ends_between_two_daemons(kept: Kept, script: str) -> None:
    if "put(" in script:
        kept.environment["WEIGHTD_ON_STOP"] = "drop"
    kept.script(script)
    kept.start()
    for _ in range(7):
        kill(kept, kept.child())
    os.kill(kept.child(), signal.SIGKILL)
    until(lambda: "in 1.6 s" in kept.err(), "the next one is to come later")
    kept.signal(signal.SIGTERM)
    assert kept.wait() == 0


def test_the_status_says_what_is_held_now(kept: Kept) -> None:
    kept.script(PUT + """
deposits.up()
(folder / "child.pid").write_text(str(os.getpid()))
for i in range(20): put(f"n{i}", "x")
while not (folder / "go").exists(): time.sleep(0.01)
deposits.drop("n0")
while deposits.listen(): time.sleep(0.01)
""")  # fmt: skip
    kept.start()
    until(lambda: kept.status().get("held") == 21, "twenty and the lock")
    (kept.folder / "go").touch()
    until(lambda: kept.status()["held"] == 20, "one less")
