"""kill -9 as routine: of the daemon, of engines, of the keeper, at moments that a seed decides.

``make test`` runs a few rounds; ``make soak ROUNDS=200`` as many as one likes, with ``SEED=...`` the same ones again.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from tests.servers import Daemon, until
from weightd.ipc import DaemonUnavailable, RequestRefused, attach

ROUNDS = int(os.environ.get("ROUNDS", "8"))
SEED = int(os.environ.get("SEED", "0")) or random.SystemRandom().randrange(1, 1 << 31)
MiB = 1 << 20
CAPACITY = 110 * MiB
"""Room for the model that is always there and two of the three others."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four models of 33 MiB; the first one is to stay."""
    rng = numpy.random.default_rng(0)
    folders = []
    for number in range(4):
        folder = tmp_path_factory.mktemp(f"model{number}")
        tensors = {f"w{i}": rng.integers(0, 256, 4 * MiB + 1000 * i, numpy.uint8) for i in range(8)}
        tensors |= {f"small{i}": rng.integers(0, 256, 1000 + i, numpy.uint8) for i in range(50)}
        save_file(tensors, folder / "model.safetensors")
        folders.append(folder)
    return folders


@pytest.fixture
def daemon(start_daemon: Callable[..., Daemon]) -> Daemon:
    return start_daemon(
        "--capacity", f"cpu={CAPACITY}", "--restart-limit", "0", "--restart-window", "1", "--read-threads", "1",
        "--extent", "1MiB", "--lease-grace", "2", "--revoke-grace", "1",
    )  # fmt: skip


@pytest.fixture
def rng() -> random.Random:
    print(f"SEED={SEED} ROUNDS={ROUNDS}")
    return random.Random(SEED)


class Engine:
    """A process that attaches and checks until it is told to stop."""

    def __init__(self, daemon: Daemon, models: list[Path], seed: int) -> None:
        command = [sys.executable, "-m", "tests.faults.engine", str(daemon.runtime_dir), str(seed), *map(str, models)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def check(self) -> None:
        if self.process.poll() is not None:
            raise AssertionError(f"the engine ended with {self.process.returncode}: {self.process.communicate()[0]}")

    def stop(self) -> None:
        out, _ = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, out


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    found: list[Engine] = []
    yield found
    for engine in found:
        engine.kill()


def memfds(pid: int) -> dict[int, tuple[str, int]]:
    """The memfds that a process holds: inode → (name, bytes)."""
    found = {}
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            name = re.match(r"/memfd:weightd:(\S+)", os.readlink(fd))
            if name:
                status = fd.stat()
                found[status.st_ino] = (name[1], status.st_size)
        except FileNotFoundError:
            continue
    return found


def assert_nothing_is_left_over(daemon: Daemon) -> None:
    """What keeper and daemon hold is what the stages say, to the byte and to the descriptor."""
    status = daemon.status
    until(lambda: not moving(daemon), "everything is at rest", deadline=60)
    found: list[Any] = []

    def accounts_agree() -> bool:
        found[:] = disagreements(daemon, status["pid"], status["daemon_pid"])
        return not found

    try:
        until(accounts_agree, "accounts agree")
    except AssertionError:
        raise AssertionError(f"accounts disagree: {found}") from None


def moving(daemon: Daemon) -> list[dict[str, Any]]:
    """Stages that are on their way."""
    return [s for s in daemon.client.stages() if s["state"] in ("queued", "planning", "loading", "verifying")]


def disagreements(daemon: Daemon, keeper_pid: int, daemon_pid: int) -> list[Any]:
    """Where what is held differs from what the stages say: [what, held, said]."""
    stages = daemon.client.stages()
    ready = [stage["id"] for stage in stages if stage["state"] == "ready"]
    nbytes = sum(stage["footprint_bytes"] for stage in stages)
    pairs: list[tuple[str, Any, Any]] = [("used bytes", daemon.used_bytes, nbytes)]
    for who, pid, kinds in (
        ("keeper", keeper_pid, ("ledger", "manifest", "record")),
        ("daemon", daemon_pid, ("ledger", "manifest")),
    ):
        held = list(memfds(pid).values())
        segments = [(name.partition("/")[0], size) for name, size in held if name.startswith("st-")]
        pairs.append((f"{who}: segments", sorted(name for name, _ in segments), sorted(ready)))
        pairs.append((f"{who}: bytes of segments", sum(size for _, size in segments), nbytes))
        others = sorted(name for name, _ in held if not name.startswith("st-"))
        pairs.append((f"{who}: others", others, sorted(kinds * len(ready))))
    return [list(pair) for pair in pairs if pair[1] != pair[2]]


def kill_daemon(daemon: Daemon) -> None:
    pid = daemon.status["daemon_pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: daemon.status["daemon_pid"] not in (0, pid), "another daemon is there")


def disturb(daemon: Daemon, models: list[Path], rng: random.Random) -> None:
    """One thing that somebody might ask for; it may be refused."""
    model = rng.choice(models[1:])
    try:
        match rng.randrange(5):
            case 0 | 1:
                daemon.client.stage(str(model), priority=rng.randrange(3))
            case 2:
                daemon.client.stage(str(model), wait=rng.random() / 5)
            case 3:
                for stage in daemon.client.stages():
                    if not stage["pin"]:
                        daemon.client.remove(stage["id"])
                        break
            case 4:
                daemon.client.stage(str(model), dry_run=True)
    except (RequestRefused, DaemonUnavailable):
        pass


def test_a_daemon_killed_at_any_moment_loses_nothing_and_leaves_nothing(
    daemon: Daemon, models: list[Path], engines: list[Engine], rng: random.Random
) -> None:
    kept = daemon.stage(models[0], pin=True)
    engines += [Engine(daemon, models, rng.randrange(1 << 30)) for _ in range(2)]
    with daemon.attach(models[0]) as weights:
        for round_number in range(ROUNDS):
            for _ in range(rng.randrange(4)):
                disturb(daemon, models, rng)
            end = time.monotonic() + rng.random() * 0.2
            while time.monotonic() < end:
                disturb(daemon, models, rng)
            kill_daemon(daemon)
            now = daemon.client.show(kept["id"])
            assert (now["state"], now["ready_at"]) == ("ready", kept["ready_at"]), f"round {round_number}"
            until(lambda: weights.lease in {lease["id"] for lease in daemon.client.leases()}, "our lease is back")
            for engine in engines:
                engine.check()
        for engine in engines:
            engine.stop()
        until(lambda: len(daemon.client.leases()) == 1, "their leases are gone")
        assert_nothing_is_left_over(daemon)


def interrupt(daemon: Daemon, model: Path, enough: float) -> tuple[dict[str, Any], float]:
    """Kill the daemon once so many bytes of a new stage have landed; returns the stage once it is ready, and the bytes
    that the next daemon has read for it."""
    stage = daemon.client.stage(str(model))["id"]

    def far_enough() -> bool:
        seen = daemon.client.show(stage)
        return bool(seen["state"] == "ready" or seen["bytes_done"] > enough)

    until(far_enough, "it has come so far")
    kill_daemon(daemon)
    until(lambda: daemon.client.show(stage)["state"] == "ready", "it is ready")
    read = re.search(r'source_read_bytes_total\{source="file"\} (\S+)', daemon.get("/metrics"))
    return daemon.client.show(stage), float(read[1]) if read else 0.0


def test_an_interrupted_stage_goes_on_where_it_was(daemon: Daemon, models: list[Path], rng: random.Random) -> None:
    digest = daemon.stage(models[1])["checkpoint_digest"]
    daemon.client.remove(daemon.stage(models[1])["id"])
    saved = 0.0
    for _ in range(ROUNDS):
        stage, read = interrupt(daemon, models[1], rng.random() * 30 * MiB)
        assert stage["checkpoint_digest"] == digest
        saved += stage["bytes_total"] - read
        with daemon.attach(stage=stage["id"]) as weights:
            assert weights.digest == digest
        until(lambda: not daemon.client.leases(), "the lease is gone")
        assert daemon.client.remove(stage["id"])["state"] == "evicted"
    assert saved > 0, "nothing of what had landed was used"
    assert_nothing_is_left_over(daemon)


def test_engines_killed_at_any_moment_leave_nothing(
    daemon: Daemon, models: list[Path], engines: list[Engine], rng: random.Random
) -> None:
    kept = daemon.stage(models[0], pin=True)
    engines += [Engine(daemon, models, rng.randrange(1 << 30)) for _ in range(3)]
    for _ in range(ROUNDS):
        victim = rng.randrange(3)
        end = time.monotonic() + rng.random()
        while time.monotonic() < end:
            disturb(daemon, models, rng)
        if rng.random() < 0.3:
            for stage in daemon.client.stages():
                if not stage["pin"] and stage["state"] == "ready":
                    daemon.client.remove(stage["id"], force=True, grace=0.2)
        engines[victim].kill()
        engines[victim] = Engine(daemon, models, rng.randrange(1 << 30))
    for engine in engines:
        engine.check()
        engine.stop()
    until(lambda: not daemon.client.leases(), "no lease is left")
    assert daemon.client.show(kept["id"])["state"] == "ready"
    assert daemon.status["restarts"] == 0
    assert_nothing_is_left_over(daemon)


def test_a_killed_keeper_takes_its_daemon_along_and_engines_keep_their_mappings(
    daemon: Daemon, models: list[Path]
) -> None:
    with daemon.attach(models[0]) as weights:
        before = bytes(weights.raw("w3"))
        child = daemon.pid
        os.kill(daemon.keeper_pid, signal.SIGKILL)
        until(lambda: not os.path.exists(f"/proc/{child}"), "the daemon is gone as well")
        assert bytes(weights.raw("w3")) == before
        daemon.stop()
        daemon.start()
        assert daemon.client.stages() == []
        with attach(models[0], socket=daemon.runtime_dir, timeout=120) as again:
            assert bytes(again.raw("w3")) == before
        assert bytes(weights.raw("w3")) == before
