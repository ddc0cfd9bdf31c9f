"""What the next daemon makes of what the last one has left: stages, leases, loads that were under way."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import load_file, save_file

from tests.fault_proxy import FaultProxy, Kind, Request
from tests.lending.test_leases import Child, leases
from tests.node.adopting import (
    Start,
    bytes_read,
    dead,
    ended,
    everything,
    half_loaded,
    removed,
    replaced,
    same,
    serving,
)
from tests.servers import SeaweedFS, until
from weightd.ipc import RequestRefused

WEIGHTD = str(Path(sys.executable).parent / "weightd")
MiB = 1 << 20

either_way = pytest.mark.usefixtures("host_fill")
"""For what depends on how host memory is filled."""


def half(name: str, tensor: Any, rank: int) -> Any:
    return numpy.split(tensor, 2, axis=0 if name in ("w0", "w1") else 1)[rank]


# ---------------------------------------------------------------------- what is ready


@either_way
def test_ready_stages_come_back_as_they_were_without_a_byte_from_their_source(
    start_daemon: Start, folder: Path
) -> None:
    daemon = start_daemon()
    truth = load_file(folder / "m.safetensors")
    whole = daemon.stage(folder, pin=True, priority=3)
    sha256 = "sha256:" + hashlib.sha256((folder / "m.safetensors").read_bytes()).hexdigest()
    parts = daemon.stage(folder, tensors={"include": ["w1"]}, ttl_seconds=3600, expect_digest=sha256)
    ranks = daemon.stage(folder, parallel={"tp_size": 2, "tp_rank": "all", "map": {"w[01]": 0, "*": 1}})
    before, used = everything(daemon), daemon.used_bytes
    assert {stage["state"] for stage, _ in before.values()} == {"ready"}
    shutil.rmtree(folder)
    for _ in range(2):  # what was adopted can be adopted again
        replaced(daemon)
        assert everything(daemon) == before
        assert daemon.used_bytes == used
        assert bytes_read(daemon) == 0
        with daemon.attach(stage=whole["id"]) as weights:
            assert same(weights, truth)
        with daemon.attach(stage=parts["id"]) as weights:
            assert same(weights, {"w1": truth["w1"]})
        for rank in range(2):
            with daemon.attach(stage=ranks["id"], tp_rank=rank) as weights:
                assert same(weights, {name: half(name, tensor, rank) for name, tensor in truth.items()})
        until(lambda: not daemon.client.leases(), "the closed leases are gone")
    assert daemon.get("/metrics").count('weightd_stages_adopted_total{state="ready"} 3') == 1


def test_a_living_lease_comes_back_with_its_id_and_what_is_dropped_then_does_not(
    start_daemon: Start, folder: Path
) -> None:
    daemon = start_daemon("--lease-grace", "3")
    with daemon.attach(folder) as weights:
        lease = daemon.client.leases()[0]
        assert lease["id"] == weights.lease
        replaced(daemon)
        until(lambda: weights.lease in leases(daemon), "the lease is back")
        again = daemon.client.leases()[0]
        assert {**again, "since": 0} == {**lease, "since": 0}
        with pytest.raises(RequestRefused, match=str(os.getpid())) as refused:
            daemon.client.remove(lease["stage"])
        assert refused.value.code == "stage_leased"
        assert same(weights, load_file(folder / "m.safetensors"))
    until(lambda: not daemon.client.leases(), "the closed lease is gone")
    until(lambda: removed(daemon, lease["stage"]), "it can be dropped")
    assert daemon.used_bytes == 0
    replaced(daemon)
    assert daemon.client.stages() == []


def test_a_lessee_that_came_back_and_closed_is_waited_for_no_longer(start_daemon: Start, folder: Path) -> None:
    daemon = start_daemon("--lease-grace", "600")
    with daemon.attach(folder) as weights:
        replaced(daemon)
        until(lambda: weights.lease in leases(daemon), "the lease is back")
    until(lambda: not daemon.client.leases(), "the closed lease is gone")
    assert removed(daemon, weights.manifest.stage)


def halt(process: subprocess.Popen[str]) -> None:
    """Stop a process, and wait until none of its threads runs any more."""
    process.send_signal(signal.SIGSTOP)
    tasks = Path(f"/proc/{process.pid}/task")
    until(lambda: all(") T " in (task / "stat").read_text() for task in tasks.iterdir()), "it is stopped")


def test_a_lessee_that_is_not_back_yet_is_waited_for_and_has_its_lease_once_it_is(
    start_daemon: Start, folder: Path
) -> None:
    daemon = start_daemon("--lease-grace", "600")
    stage = daemon.stage(folder)["id"]
    with Child(daemon, folder) as engine:
        halt(engine.process)
        for _ in range(2):  # who has not come back to one daemon may come back to the next
            replaced(daemon)
            assert daemon.client.leases() == []
            with pytest.raises(RequestRefused, match="left to come back") as refused:
                daemon.client.remove(stage)
            assert refused.value.code == "stage_leased"
        engine.process.send_signal(signal.SIGCONT)
        until(lambda: leases(daemon).keys() == {engine.lease}, "the lease is back")
        assert engine.run("assert weights['w3'].sum() != 0")
        with pytest.raises(RequestRefused, match=str(engine.process.pid)):
            daemon.client.remove(stage)
    until(lambda: not daemon.client.leases(), "the lease of a dead process is gone")


def test_a_lessee_that_does_not_come_back_in_time_is_waited_for_no_longer_and_keeps_what_it_has_mapped(
    start_daemon: Start, folder: Path
) -> None:
    daemon = start_daemon("--lease-grace", "3")
    stage = daemon.stage(folder)["id"]
    with Child(daemon, folder) as engine:
        halt(engine.process)
        replaced(daemon)
        until(lambda: removed(daemon, stage), "it can be dropped after the grace")
        engine.process.send_signal(signal.SIGCONT)
        assert engine.run("assert weights['w3'].sum() != 0")
        assert daemon.client.leases() == []


# ---------------------------------------------------------------------- what was under way


@either_way
def test_a_stage_with_an_expected_sha256_begins_anew(start_daemon: Start, s3: SeaweedFS, folder: Path) -> None:
    uri = s3.upload(folder, "begins-anew")
    sha256 = "sha256:" + hashlib.sha256((folder / "m.safetensors").read_bytes()).hexdigest()
    with half_loaded(start_daemon, s3, uri, expect_digest=sha256) as (daemon, _, gate, stage):
        replaced(daemon)
        gate.opened.set()
        record = ended(daemon, stage)
        assert record["state"] == "ready", record["error"]
        assert bytes_read(daemon) == record["bytes_total"]
        with daemon.attach(stage=stage) as weights:
            assert same(weights, load_file(folder / "m.safetensors"))
        assert daemon.used_bytes == record["footprint_bytes"]


def test_a_source_that_changed_while_no_daemon_was_there_fails_what_was_under_way(
    start_daemon: Start, s3: SeaweedFS, folder: Path
) -> None:
    uri = s3.upload(folder, "changes")
    with half_loaded(start_daemon, s3, uri) as (daemon, _, gate, stage):
        pid = daemon.pid
        os.kill(daemon.keeper_pid, signal.SIGSTOP)
        try:
            os.kill(pid, signal.SIGKILL)
            until(lambda: dead(pid), "the daemon is dead")
            gate.opened.set()
            truth = {name: tensor + 1 for name, tensor in load_file(folder / "m.safetensors").items()}
            save_file(truth, folder / "m.safetensors")
            s3.upload(folder, "changes")
        finally:
            os.kill(daemon.keeper_pid, signal.SIGCONT)
        serving(daemon, pid)
        record = ended(daemon, stage)
        assert record["state"] == "failed"
        assert record["error"]["code"] == "checkpoint_changed"
        until(lambda: daemon.used_bytes == 0, "its memory is free again")
        with daemon.attach(uri) as weights:
            assert same(weights, truth)


def away(request: Request) -> Kind:
    return "reset"


def test_a_load_waits_for_an_origin_that_is_away_as_the_daemon_starts_and_keeps_what_has_landed(
    start_daemon: Start, s3: SeaweedFS, folder: Path
) -> None:
    uri = s3.upload(folder, "away-for-a-while")
    with half_loaded(start_daemon, s3, uri) as (daemon, proxy, gate, stage):
        landed = daemon.client.show(stage)["bytes_done"]
        proxy.fault = away
        replaced(daemon)
        until(lambda: "it goes on once that does" in daemon.log.read_text(), "the origin was asked for nothing", 90)
        assert daemon.client.show(stage)["state"] == "queued"
        assert daemon.client.stage(uri)["id"] == stage, "who asks meanwhile waits with it"
        gate.opened.set()
        proxy.fault = lambda _: None
        record = ended(daemon, stage)
        assert record["state"] == "ready", record["error"]
        assert bytes_read(daemon) <= record["bytes_total"] - landed
        with daemon.attach(stage=stage) as weights:
            assert same(weights, load_file(folder / "m.safetensors"))


def test_an_origin_that_stays_away_fails_what_lacks_bytes_at_the_deadline(
    start_daemon: Start, s3: SeaweedFS, folder: Path
) -> None:
    uri = s3.upload(folder, "away-for-good")
    with half_loaded(start_daemon, s3, uri, "--retry-deadline", "10") as (daemon, proxy, _, stage):
        proxy.fault = away
        replaced(daemon)
        record = ended(daemon, stage)
        assert (record["state"], record["error"]["code"]) == ("failed", "source_failed")
        assert "WEIGHTD_RETRY_DEADLINE" in record["error"]["message"]
        until(lambda: daemon.used_bytes == 0, "its memory is free again")


@either_way
def test_what_lacks_no_byte_is_finished_without_its_origin(start_daemon: Start, s3: SeaweedFS, folder: Path) -> None:
    uri = s3.upload(folder, "nothing-lacks")
    over = threading.Event()

    def asked_last(request: Request) -> None:
        """Hold back the question whether anything has changed while it was read."""
        if request.method == "HEAD":
            over.wait(120)

    with FaultProxy(s3.url, asked_last) as proxy:  # type: ignore[arg-type]
        daemon = start_daemon("--extent", "1MiB", env={**s3.env, "AWS_ENDPOINT_URL": proxy.url})
        try:
            stage = daemon.client.stage(uri)["id"]
            until(lambda: any(seen.method == "HEAD" for seen in proxy.seen), "all of it has landed", 90)
            proxy.fault = away
            replaced(daemon)
            record = ended(daemon, stage)
        finally:
            over.set()
        assert record["state"] == "ready", record["error"]
        assert bytes_read(daemon) == 0
        with daemon.attach(uri) as weights:
            assert same(weights, load_file(folder / "m.safetensors"))
            assert (Path(record["metadata"]) / "config.json").read_text() == "{}"


@either_way
def test_what_was_lent_while_it_loaded_begins_anew_where_there_is_no_room_for_a_copy(
    start_daemon: Start, s3: SeaweedFS, folder: Path
) -> None:
    truth = load_file(folder / "m.safetensors")
    uri = s3.upload(folder, "no-room-for-a-copy")
    capacity = 16 * MiB  # of which it takes twelve and a bit
    with half_loaded(start_daemon, s3, uri, "--capacity", f"cpu={capacity}") as (daemon, _, gate, stage):
        with daemon.attach(stage=stage, wait=False) as weights:
            name, _ = next(weights.stream(timeout=120))
            replaced(daemon)
            until(lambda: "no room to copy" in daemon.log.read_text(), "it begins anew", 60)
            assert daemon.used_bytes <= capacity
            gate.opened.set()
            record = ended(daemon, stage)
            assert record["state"] == "ready", record["error"]
            assert bytes_read(daemon) == record["bytes_total"]
            assert daemon.used_bytes == record["footprint_bytes"]
            assert bytes(weights.raw(name)) == truth[name].tobytes()
        with daemon.attach(stage=stage) as again:
            assert same(again, truth)


@either_way
def test_a_stream_goes_on_to_the_end_with_the_next_daemon(start_daemon: Start, s3: SeaweedFS, folder: Path) -> None:
    truth = load_file(folder / "m.safetensors")
    uri = s3.upload(folder, "streamed")
    with (
        half_loaded(start_daemon, s3, uri) as (daemon, _, gate, stage),
        daemon.attach(stage=stage, wait=False) as weights,
    ):
        streamed = weights.stream(timeout=120)
        name, tensor = next(streamed)
        found = {name: tensor}
        assert not weights.ready
        replaced(daemon)
        gate.opened.set()
        for name, tensor in streamed:
            assert name not in found, "a tensor came twice"
            found[name] = tensor
        assert weights.ready
        assert found.keys() == truth.keys()
        for name, tensor in found.items():
            assert numpy.array_equal(tensor.numpy(), truth[name]), name
        assert same(weights, truth)
        assert weights.digest == daemon.client.show(stage)["checkpoint_digest"]
        assert leases(daemon).keys() == {weights.lease}
