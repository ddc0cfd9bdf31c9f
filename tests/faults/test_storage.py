"""Storage that misbehaves: every fault ends in correct bytes, or in a clear failure within the deadline."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from tests.checkpoint_files import write_index
from tests.fault_proxy import FaultProxy, Kind, Request
from tests.servers import Daemon, SeaweedFS, until

MiB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faulty")
    rng = numpy.random.default_rng(9)
    for shard in range(2):
        tensors = {f"large.{shard}": rng.standard_normal(5 * MiB, numpy.float32)}
        tensors |= {f"small.{shard}.{i}": rng.standard_normal(1000 + i, numpy.float32) for i in range(50)}
        save_file(tensors, folder / f"part-{shard}.safetensors")
    write_index(folder)
    return folder


@pytest.fixture(scope="module")
def uri(s3: SeaweedFS, folder: Path) -> str:
    return s3.upload(folder, "faulty")


def proxied(
    start_daemon: Callable[..., Daemon], s3: SeaweedFS, proxy: FaultProxy, *arguments: str, **env: str
) -> Daemon:
    return start_daemon("--extent", "2MiB", *arguments, env={**s3.env, "AWS_ENDPOINT_URL": proxy.url, **env})


@pytest.mark.parametrize("kind", ["reset", "truncate", "503", "stall"])
def test_faults_that_pass_end_in_correct_bytes(
    start_daemon: Callable[..., Daemon], s3: SeaweedFS, uri: str, folder: Path, daemon: Daemon, kind: Kind
) -> None:
    """A fifth of all requests breaks, chosen by a seed; a stalled one is noticed by the library, in its own time."""
    chance = random.Random(1234)
    stalls = 0

    def fault(request: Request) -> Kind | None:
        nonlocal stalls
        if kind == "stall":
            stalls += request.nbytes > 100_000
            return "stall" if request.nbytes > 100_000 and stalls == 3 else None
        return kind if chance.random() < 0.2 else None

    with FaultProxy(s3.url, fault) as proxy:
        record = proxied(start_daemon, s3, proxy).stage(uri, wait=300)
    assert proxy.done
    assert record["state"] == "ready", record["error"]
    assert record["checkpoint_digest"] == daemon.stage(folder)["checkpoint_digest"]


@pytest.mark.parametrize("kind", ["reset", "truncate", "503"])
def test_faults_that_do_not_pass_fail_the_stage_and_say_what_where_and_how_often(
    start_daemon: Callable[..., Daemon], s3: SeaweedFS, uri: str, kind: Kind
) -> None:
    # Headers pass, so that it is the weights that fail: they come in larger ranges.
    with FaultProxy(s3.url, lambda request: kind if request.nbytes > 300_000 else None) as proxy:
        daemon = proxied(start_daemon, s3, proxy, "--retry-deadline", "15")
        record = daemon.stage(uri, wait=300)
        assert record["state"] == "failed"
        assert record["error"]["code"] == "source_failed"
        message = record["error"]["message"]
        assert f"{uri}/part-" in message
        assert "tries in" in message
        assert "bytes" in message
        assert "WEIGHTD_RETRY_DEADLINE" in message
        until(lambda: daemon.used_bytes == 0, "its memory is free again", 120)
        assert daemon.status["restarts"] == 0


def test_a_source_that_stalls_for_good_fails_the_stage_within_the_deadline(
    start_daemon: Callable[..., Daemon], s3: SeaweedFS, uri: str
) -> None:
    with FaultProxy(s3.url, lambda request: "stall" if request.nbytes > 300_000 else None) as proxy:
        daemon = proxied(start_daemon, s3, proxy, "--retry-deadline", "3")
        started = time.monotonic()
        record = daemon.stage(uri, wait=300)
        assert record["state"] == "failed"
        assert "no byte of" in record["error"]["message"]
        assert time.monotonic() - started < 60
        assert record["footprint_bytes"] > 0, "memory that a stalled request may still write to is not given away"


@pytest.mark.parametrize("stalled", [False, True])
def test_a_cancel_takes_effect_at_once(
    start_daemon: Callable[..., Daemon], s3: SeaweedFS, uri: str, stalled: bool
) -> None:
    gate = threading.Event()

    def fault(request: Request) -> Kind | None:
        if request.nbytes > 300_000:
            if stalled:
                return "stall"
            gate.wait(60)
        return None

    with FaultProxy(s3.url, fault) as proxy:
        daemon = proxied(start_daemon, s3, proxy)
        record = daemon.client.stage(uri)
        until(lambda: proxy.done or gate.is_set() or len(proxy.seen) > 5, "it is loading")
        assert daemon.client.remove(record["id"])["state"] == "cancelled"
        assert daemon.client.show(record["id"])["error"]["code"] == "cancelled"
        gate.set()
        if not stalled:
            until(lambda: daemon.used_bytes == 0, "its memory is free again", 60)
        # The next one is not held up.
        proxy.fault = lambda _: None
        assert daemon.stage(uri)["state"] == "ready"


def test_a_queued_stage_is_cancelled_and_priorities_decide_who_is_next(
    start_daemon: Callable[..., Daemon], s3: SeaweedFS, uri: str, folder: Path
) -> None:
    gate = threading.Event()

    def fault(request: Request) -> None:
        if request.nbytes > 300_000:
            gate.wait(60)

    with FaultProxy(s3.url, fault) as proxy:  # type: ignore[arg-type]
        daemon = proxied(start_daemon, s3, proxy, "--concurrent-loads", "1")
        first = daemon.client.stage(uri)
        until(lambda: daemon.client.show(first["id"])["state"] == "loading", "the first one loads")
        waiting = daemon.client.stage(f"{uri}/part-0.safetensors")
        urgent = daemon.client.stage(f"{uri}/part-1.safetensors", priority=10)
        assert waiting["state"] == urgent["state"] == "queued"
        dropped = daemon.client.stage(uri, tensors={"include": ["small.*"]})
        assert daemon.client.remove(dropped["id"])["state"] == "cancelled"
        gate.set()
        urgent = daemon.client.stage(urgent["model"], wait=60)
        waiting = daemon.client.stage(waiting["model"], wait=60)
        assert urgent["ready_at"] < waiting["ready_at"]
        assert daemon.client.stage(uri, wait=60)["state"] == "ready"
    until(lambda: daemon.client.show(dropped["id"])["footprint_bytes"] == 0, "nothing is held for the cancelled one")


def test_a_file_that_changes_while_it_is_read_fails_the_stage(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    """One bit is rewritten in place behind the reader's back: only the file's mtime tells."""
    path = tmp_path / "model.safetensors"
    save_file({"w": numpy.zeros(64 * MiB, numpy.float32)}, path)
    daemon = start_daemon("--read-threads", "1")
    record = daemon.client.stage(str(tmp_path))
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"\x01")
    *_, record = daemon.client.events(record["id"])
    if record["state"] == "ready":
        pytest.skip("the machine was faster than the change")
    assert record["error"]["code"] == "checkpoint_changed"
    assert "model.safetensors" in record["error"]["message"]
    until(lambda: daemon.used_bytes == 0, "its memory is free again")


def test_a_file_that_goes_away_or_shrinks_fails_the_stage(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = start_daemon("--concurrent-loads", "1")
    # Something to wait for, so that the file can be cut between planning and reading.
    (tmp_path / "fifo-like").mkdir()
    save_file({"w": numpy.zeros(128 * MiB, numpy.float32)}, tmp_path / "fifo-like" / "model.safetensors")
    first = daemon.client.stage(str(tmp_path / "fifo-like"))
    (tmp_path / "cut").mkdir()
    save_file({"w": numpy.zeros(MiB, numpy.float32)}, tmp_path / "cut" / "model.safetensors")
    second = daemon.client.stage(str(tmp_path / "cut"))
    with (tmp_path / "cut" / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    *_, record = daemon.client.events(second["id"])
    daemon.client.remove(first["id"])
    assert record["state"] == "failed"
    assert record["error"]["code"] == "checkpoint_changed"
