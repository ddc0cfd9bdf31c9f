"""Daemons that end because they are told to: reloads, signals, and stops that are refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from safetensors.numpy import load_file

from tests.lending.test_leases import leases
from tests.node.adopting import Start, everything, replaced, same
from tests.servers import until

WEIGHTD = str(Path(sys.executable).parent / "weightd")


def test_a_reload_replaces_the_daemon_and_nobody_notices(start_daemon: Start, folder: Path) -> None:
    daemon = start_daemon()
    stage = daemon.stage(folder)
    truth = load_file(folder / "m.safetensors")
    over = threading.Event()
    rounds: list[Exception | bool] = []

    def attach_again_and_again() -> None:
        while not over.is_set():
            try:
                with daemon.attach(folder) as weights:
                    rounds.append(same(weights, truth))
            except Exception as error:
                rounds.append(error)

    thread = threading.Thread(target=attach_again_and_again)
    thread.start()
    try:
        with daemon.attach(folder) as weights:
            for _ in range(3):
                pid, done = daemon.pid, len(rounds)
                result = subprocess.run(
                    [WEIGHTD, "reload", "--runtime-dir", str(daemon.runtime_dir), "--wait", "60"],
                    capture_output=True, text=True, check=False, timeout=120,
                )  # fmt: skip
                assert result.returncode == 0, result.stderr
                assert daemon.pid != pid
                assert result.stdout == f"daemon {pid} was replaced by {daemon.pid}\n"
                until(lambda done=done: len(rounds) > done + 3, "attaching goes on")  # type: ignore[misc]
                assert daemon.client.show(stage["id"])["ready_at"] == stage["ready_at"]
                until(lambda: weights.lease in leases(daemon), "the lease is back")
    finally:
        over.set()
        thread.join()
    assert set(rounds) == {True}
    assert [found["id"] for found in daemon.client.stages()] == [stage["id"]]


def test_a_signal_to_the_daemon_itself_is_a_restart_that_loses_nothing(start_daemon: Start, folder: Path) -> None:
    daemon = start_daemon()
    daemon.stage(folder)
    with daemon.attach(folder) as weights:
        for number in (signal.SIGTERM, signal.SIGINT):
            before = {stage: manifests for stage, (_, manifests) in everything(daemon).items()}
            replaced(daemon, number)
            assert {stage: manifests for stage, (_, manifests) in everything(daemon).items()} == before
            until(lambda: weights.lease in leases(daemon), "the lease is back")
    assert daemon.status["last_exit"] == "exit code 0"


def test_a_stop_is_refused_while_anybody_leases_and_done_when_asked_again(start_daemon: Start, folder: Path) -> None:
    daemon = start_daemon("--on-stop", "refuse")
    assert daemon.process
    with daemon.attach(folder):
        for _ in range(2):
            refusals = daemon.log.read_text().count(f"not stopping while weights are leased, by pids [{os.getpid()}]")
            daemon.process.send_signal(signal.SIGTERM)
            until(
                lambda refusals=refusals: daemon.log.read_text().count("not stopping") > refusals,  # type: ignore[misc]
                "it is refused",
            )
        assert daemon.client.stages()[0]["leases"] == 1
        replaced(daemon)  # which a keeper that still wants to stop would not do
        until(lambda: daemon.client.leases(), "the lease is back")
    until(lambda: not daemon.client.leases(), "the closed lease is gone")
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(60) == 0
    assert not list(daemon.runtime_dir.glob("*.sock"))
