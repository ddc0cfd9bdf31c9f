"""The keeper alone, with a child that is no daemon: what it holds, whom it starts again, when it ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import lacking
from tests.node.adopting import dead
from tests.servers import until

CHILD = """
import os, signal, socket, sys, time
from pathlib import Path
from weightd.daemon.keeper.deposits import Deposits
folder = Path(sys.argv[1])
deposits = Deposits.inherited()
held = deposits.collect()
for name in held:
    print(os.getpid(), "held", name, os.pread(held[name], 100, 0).decode(), flush=True)
exec((folder / "child.py").read_text())
"""
SERVE = """
deposits.up()
(folder / "child.pid").write_text(str(os.getpid()))
while deposits.listen() and not deposits.stop_ordered:
    time.sleep(0.01)
sys.exit(int((folder / "code").read_text()))
"""
ELSEWHERE = """
import sys
from weightd.daemon import control_groups
from weightd.daemon.keeper import supervisor
control_groups.PROC = sys.argv.pop(1)
sys.exit(supervisor.main())
"""
LEASED = """
def leased():
    (folder / "asked").touch()
    deposits.refuse_stop()
deposits.up()
(folder / "child.pid").write_text(str(os.getpid()))
while deposits.listen():
    if deposits.stop_ordered:
        leased()
    time.sleep(0.01)
"""
PUT = """
def put(name, text):
    fd = os.memfd_create("test")
    os.write(fd, text.encode())
    deposits.put(name, fd)
    os.close(fd)
"""


class Kept:
    """A keeper whose daemon is a script, ``child.py`` in its folder."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        (folder / "code").write_text("0")
        self.script(SERVE)
        self.environment = environment
        self.process: subprocess.Popen[str] | None = None
        self.proc: Path | None = None
        """What stands for the keeper's own folder of /proc."""

    def script(self, text: str) -> None:
        (self.folder / "child.py").write_text(text)

    def start(self, *prefix: str) -> None:
        keeper = ["-m", "weightd.daemon.keeper"] if self.proc is None else ["-c", ELSEWHERE, str(self.proc)]
        self.process = subprocess.Popen(
            [*prefix, sys.executable, *keeper, sys.executable, "-c", CHILD, str(self.folder)],
            env={**os.environ, "WEIGHTD_RUNTIME_DIR": str(self.folder / "run"), **self.environment},
            stdout=(self.folder / "out").open("w"),
            stderr=(self.folder / "err").open("w"),
            text=True,
        )

    def status(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.folder / "run" / "keeper.json").read_text()))
        except OSError:
            return {}

    def child(self, *, other_than: int = 0) -> int:
        """The pid of a daemon that serves."""

        def serving() -> int:
            try:
                pid = int((self.folder / "child.pid").read_text())
            except (OSError, ValueError):
                return 0
            return pid if pid != other_than and pid == self.status().get("daemon_pid") else 0

        return int(until(serving, "a daemon serves"))

    def out(self) -> str:
        return (self.folder / "out").read_text()

    def err(self) -> str:
        return (self.folder / "err").read_text()

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(30)


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    keeper = Kept(tmp_path, WEIGHTD_RESTART_LIMIT="4", WEIGHTD_RESTART_WINDOW="300")
    yield keeper
    if keeper.process is not None and keeper.process.poll() is None:
        keeper.process.kill()
        keeper.process.wait()


def test_what_a_killed_daemon_has_deposited_is_given_to_the_next_one(kept: Kept) -> None:
    kept.script(PUT + 'if not held.keys() - {"lock"}: put("a/b", "first"); put("c", "old"); put("c", "new")\n' + SERVE)
    kept.start()
    first = kept.child()
    os.kill(first, signal.SIGKILL)
    second = kept.child(other_than=first)
    assert f"{second} held a/b first" in kept.out()
    assert f"{second} held c new" in kept.out()
    assert kept.status()["restarts"] == 1
    assert "SIGKILL" in kept.status()["last_exit"]


def test_what_was_dropped_is_held_no_more_with_all_below_it(kept: Kept) -> None:
    drop = 'deposits.drop("a"); deposits.drop("unknown")\n'
    kept.script(PUT + 'put("a/1", "x"); put("a/2/3", "x"); put("ab", "x"); put("a", "x")\n' + drop + SERVE)
    kept.start()
    first = kept.child()
    kept.script(SERVE)
    os.kill(first, signal.SIGKILL)
    second = kept.child(other_than=first)
    names = {line.split()[2] for line in kept.out().splitlines() if line.startswith(f"{second} ")}
    assert names == {"lock", "ab"}


def test_what_a_dying_daemon_said_last_counts(kept: Kept) -> None:
    kept.script(PUT + SERVE)
    kept.environment["WEIGHTD_RESTART_LIMIT"] = "0"
    kept.start()
    first = kept.child()
    kept.script(PUT + 'deposits.up(); [put(f"n{i}", str(i)) for i in range(500)]; os.kill(os.getpid(), 9)')
    os.kill(first, signal.SIGKILL)
    until(lambda: kept.status().get("restarts", 0) >= 2, "it has died again")
    kept.script(SERVE)
    last = kept.child(other_than=first)
    assert {f"{last} held n{i} {i}" for i in range(500)} <= set(kept.out().splitlines())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_ordered_stop_ends_it_with_the_daemons_exit_code(kept: Kept, number: int) -> None:
    (kept.folder / "code").write_text("7")
    kept.start()
    child = kept.child()
    kept.signal(number)
    assert kept.wait() == 7
    assert not os.path.exists(f"/proc/{child}")
    assert kept.status() == {}


def test_a_daemon_that_never_served_ends_it_with_its_exit_code(kept: Kept) -> None:
    kept.script("sys.exit(3)")
    kept.start()
    assert kept.wait() == 3


def test_a_first_daemon_killed_before_it_served_is_started_again(kept: Kept) -> None:
    kept.script('if not (folder / "once").exists(): (folder / "once").touch(); os.kill(os.getpid(), 9)\n' + SERVE)
    kept.start()
    kept.child()
    assert kept.status()["restarts"] == 1


def test_a_refused_stop_leaves_everything_as_it_was(kept: Kept) -> None:
    kept.script("""
deposits.up()
(folder / "child.pid").write_text(str(os.getpid()))
while deposits.listen():
    if deposits.stop_ordered:
        deposits.refuse_stop()
        (folder / "refused").touch()
    time.sleep(0.01)
""")
    kept.start()
    first = kept.child()
    kept.signal(signal.SIGTERM)
    until((kept.folder / "refused").exists, "it was refused")
    kept.script(SERVE)
    os.kill(first, signal.SIGKILL)
    kept.child(other_than=first)  # which a keeper that still wants to stop would not start


def test_a_crash_loop_ends_in_holding_and_a_reload_tries_again(kept: Kept) -> None:
    kept.script(PUT + 'put("a", "kept")\n' + SERVE)
    kept.start()
    first = kept.child()
    kept.script("sys.exit(1)")
    os.kill(first, signal.SIGSEGV)
    until(lambda: kept.status().get("state") == "crash loop", "it has given up")
    assert "WEIGHTD_RESTART_LIMIT" in kept.err()
    assert kept.status()["held"] == 2
    kept.script(SERVE)
    kept.signal(signal.SIGHUP)
    again = kept.child(other_than=first)
    assert f"{again} held a kept" in kept.out()


def test_a_reload_replaces_the_daemon_and_counts_as_no_crash(kept: Kept) -> None:
    kept.start()
    pid = kept.child()
    for _ in range(6):  # more than the limit
        kept.signal(signal.SIGHUP)
        pid = kept.child(other_than=pid)
    assert kept.status()["state"] == "running"
    assert "does not make room" not in kept.err()


def test_a_daemon_dies_with_its_keeper_whatever_it_does(kept: Kept) -> None:
    kept.script(SERVE.replace("deposits.listen() and not deposits.stop_ordered", "True"))
    kept.start()
    child = kept.child()
    kept.signal(signal.SIGKILL)
    kept.wait()
    try:
        until(lambda: dead(child), "the daemon is gone as well")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_a_second_keeper_is_refused_with_the_holders_pid_and_one_after_it_is_not(kept: Kept) -> None:
    kept.start()
    kept.child()
    assert kept.process is not None
    first = kept.process
    kept.start()
    assert kept.wait() == 1
    assert f"pid {first.pid}" in kept.err()
    first.kill()
    first.wait()
    kept.start()
    kept.child()


def test_it_reaps_orphans_as_pid_1_has_to(kept: Kept) -> None:
    if os.geteuid() or not shutil.which("unshare"):
        lacking("root and unshare (util-linux), to be PID 1 of something")
    kept.script("""
for _ in range(5):
    if not os.fork():
        if not os.fork():
            os._exit(0)  # its parent is gone: it is PID 1's
        os._exit(0)
    os.wait()
""" + SERVE)  # fmt: skip
    kept.start("unshare", "--pid", "--fork", "--kill-child")
    until(lambda: kept.status().get("serving"), "the daemon serves")
    assert kept.process is not None
    (keeper,) = Path(f"/proc/{kept.process.pid}/task/{kept.process.pid}/children").read_text().split()
    children = Path(f"/proc/{keeper}/task/{keeper}/children")
    until(lambda: len(children.read_text().split()) == 1, "only the daemon is left")


def test_it_is_small_and_of_the_standard_library(kept: Kept) -> None:
    kept.start()
    kept.child()
    assert kept.process is not None
    status = Path(f"/proc/{kept.process.pid}/status").read_text()
    rss = int(status.split("VmRSS:")[1].split()[0])
    assert rss < 15 << 10
    assert "\nThreads:\t1\n" in status
    maps = Path(f"/proc/{kept.process.pid}/maps").read_text()
    assert "site-packages" not in maps


def test_crashes_of_long_ago_count_no_more(kept: Kept) -> None:
    window = 1.0
    kept = Kept(kept.folder, WEIGHTD_RESTART_LIMIT="2", WEIGHTD_RESTART_WINDOW=str(window))
    kept.start()
    try:
        pid = kept.child()
        for _ in range(3):
            began = time.monotonic()
            os.kill(pid, signal.SIGSEGV)
            pid = kept.child(other_than=pid)
            until(lambda began=began: time.monotonic() > began + 2 * window, "the crash is past")  # type: ignore[misc]
        assert kept.status()["state"] == "running"
        assert kept.status()["restarts"] == 3
    finally:
        kept.signal(signal.SIGKILL)
        kept.wait()


def test_who_connects_in_a_crash_loop_is_refused_and_does_not_wait(kept: Kept) -> None:
    kept.script(
        """
if not any(name.startswith("listen:") for name in held):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "lease.sock"))
    listener.listen()
    deposits.put("listen:lease", listener.fileno())
"""
        + SERVE
    )
    kept.start()
    first = kept.child()

    def connect() -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(str(kept.folder / "lease.sock"))

    connect()
    kept.script("sys.exit(1)")
    os.kill(first, signal.SIGSEGV)
    until(lambda: kept.status().get("state") == "crash loop", "it has given up")
    with pytest.raises(ConnectionRefusedError):
        connect()
