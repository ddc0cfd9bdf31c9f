"""Residency through a real daemon: what goes and what stays, revoking, moving, dry runs."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
import torch
from safetensors.numpy import save_file

from tests.servers import Daemon, until
from weightd.ipc import RequestRefused, wire

MiB = 1 << 20


@pytest.fixture
def models(tmp_path: Path) -> Callable[[str], Path]:
    """Make checkpoints of 1 MiB by name."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        rng = numpy.random.default_rng(len(name) + ord(name[-1]))
        save_file({f"w{i}": rng.standard_normal((64, 1024), numpy.float32) for i in range(4)}, folder / "m.safetensors")
        return folder

    return make


@pytest.fixture
def http() -> Callable[..., httpx.Response]:
    """``http(daemon, method, path, **options)`` over its Unix socket."""

    def call(daemon: Daemon, method: str, path: str, **options: Any) -> httpx.Response:
        transport = httpx.HTTPTransport(uds=str(daemon.runtime_dir / "api.sock"))
        with httpx.Client(transport=transport, base_url="http://weightd", timeout=120) as client:
            return client.request(method, path, **options)

    return call


Http = Callable[..., httpx.Response]
Models = Callable[[str], Path]
Start = Callable[..., Daemon]


def states(daemon: Daemon) -> dict[str, str]:
    """State of each stage that there is, by the name of its model's folder."""
    return {record["model"].rpartition("/")[2]: record["state"] for record in daemon.client.stages()}


def used(daemon: Daemon, device: str) -> int:
    return next(int(found["used_bytes"]) for found in daemon.client.node()["devices"] if found["name"] == device)


def mapped_elsewhere(daemon: Daemon) -> int:
    return int(daemon.client.node()["mapped_elsewhere_bytes"])


def evicted(daemon: Daemon, stage: str) -> bool:
    return bool(daemon.client.show(stage)["state"] == "evicted")


def lease_and_end(daemon: Daemon, model: Path) -> None:
    daemon.attach(model).close()
    until(lambda: not daemon.client.leases(), "the closed lease is gone")


def mappings(stage: str) -> int:
    """How often this process maps a stage's memory."""
    return Path("/proc/self/maps").read_text().count(f"memfd:weightd:{stage}")


def test_the_lowest_priority_goes_first_then_what_was_leased_longest_ago_as_a_dry_run_says(
    start_daemon: Start, models: Models, http: Http
) -> None:
    daemon = start_daemon("--capacity", "cpu=4MiB")
    ids = {name: daemon.stage(models(name), priority=5 * (name == "a"))["id"] for name in "abcd"}
    lease_and_end(daemon, Path(daemon.client.show(ids["b"])["model"].removeprefix("file://")))
    for newcomer, goes in (("e", "c"), ("f", "d"), ("g", "b")):
        folder, before = models(newcomer), states(daemon)
        dry = http(daemon, "POST", "/v1/stage?dry_run=true", json={"model": str(folder), "priority": 9}).json()
        assert dry["fits"]
        assert [victim["id"] for victim in dry["evicts"]] == [ids[goes]]
        assert states(daemon) == before, "a dry run changed something"
        assert daemon.stage(folder, priority=9)["state"] == "ready"
        assert states(daemon) == {**before, goes: "evicted", newcomer: "ready"}
    assert daemon.used_bytes == 4 * MiB


def test_a_dry_run_tells_what_is_there_what_does_not_fit_and_what_cannot_be(
    start_daemon: Start, models: Models, http: Http
) -> None:
    daemon = start_daemon("--capacity", "cpu=1536KiB")
    record = daemon.stage(models("a"), pin=True)

    def ask(model: Path | str) -> httpx.Response:
        return http(daemon, "POST", "/v1/stage?dry_run=true", json={"model": str(model)})

    there = {"fits": True, "needed_bytes": MiB, "stage": record["id"], "evicts": []}
    assert ask(record["model"]).json() == there
    assert ask(models("b")).json() == {"fits": False, "needed_bytes": MiB, "stage": None, "evicts": []}
    assert ask("/nowhere").json()["code"] == "checkpoint_not_found"
    assert states(daemon) == {"a": "ready"}


def test_what_is_pinned_or_leased_stays_and_the_refusal_names_it(
    start_daemon: Start, models: Models, http: Http
) -> None:
    daemon = start_daemon("--capacity", "cpu=3MiB")
    pinned = daemon.stage(models("pinned"), pin=True)
    idle = daemon.stage(models("idle"))
    with daemon.attach(models("leased")) as weights:
        assert daemon.stage(models("takes its place"))["state"] == "ready"
        assert evicted(daemon, idle["id"])
        other = models("too much")
        save_file({"x": numpy.zeros(2 * MiB, numpy.uint8)}, other / "m.safetensors")
        answer = http(daemon, "POST", "/v1/stage", json={"model": str(other), "priority": 100})
        assert answer.status_code == 507, answer.text
        problem = answer.json()
        assert problem["code"] == "insufficient_capacity"
        assert problem["needed_bytes"] == 2 * MiB
        assert problem["leased_bytes"] == problem["evictable_bytes"] == problem["missing_bytes"] == MiB
        found = {entry["model"].rpartition("/")[2]: entry for entry in problem["resident"]}
        assert found.keys() == {"pinned", "leased", "takes its place"}
        assert found["pinned"] == {
            "id": pinned["id"], "model": pinned["model"], "state": "ready", "bytes": MiB, "leases": 0, "pin": True,
            "priority": 0,
        }  # fmt: skip
        assert found["leased"]["leases"] == 1
        assert states(daemon)["takes its place"] == "ready", "evicted for what did not fit anyhow"
        assert weights["w0"].shape == (64, 1024)
    until(lambda: not daemon.client.leases(), "the closed lease is gone")
    assert daemon.stage(other)["state"] == "ready"
    assert daemon.client.show(pinned["id"])["state"] == "ready"


def test_the_time_to_live_counts_only_without_lease_and_without_pin(start_daemon: Start, models: Models) -> None:
    daemon = start_daemon("--capacity", "cpu=8MiB")
    pinned = daemon.stage(models("pinned"), ttl_seconds=1, pin=True)
    with socket.socket(socket.AF_UNIX) as lease:
        # Asked for by the lease itself, so that nothing can come between its being ready and its being leased.
        lease.connect(str(daemon.runtime_dir / "lease.sock"))
        wire.send(lease, {"op": "lease", "request": {"model": str(models("leased")), "ttl_seconds": 1}})
        reply, fds = wire.receive(lease)
        while reply["type"] == "progress":
            reply, fds = wire.receive(lease)
        wire.close_all(fds)
        idle = daemon.stage(models("idle"), ttl_seconds=1)
        until(lambda: evicted(daemon, idle["id"]), "the one that nobody leases has gone")
        assert daemon.client.show(reply["stage"])["state"] == "ready"
    until(lambda: evicted(daemon, reply["stage"]), "it has gone once its lease was over")
    assert states(daemon) == {"pinned": "ready", "leased": "evicted", "idle": "evicted"}
    assert daemon.used_bytes == pinned["footprint_bytes"]


def test_a_stage_lives_as_long_as_any_request_for_it_wants_also_after_a_restart(
    start_daemon: Start, models: Models
) -> None:
    daemon = start_daemon("--capacity", "cpu=8MiB")
    kept, longer, shorter = models("kept"), models("longer"), models("shorter")
    for folder, first, second in ((kept, 3600, None), (longer, 3600, 7200), (shorter, 3600, 1)):
        ids = {daemon.stage(folder, ttl_seconds=seconds)["id"] for seconds in (first, second)}
        assert len(ids) == 1

    def lives() -> dict[str, float | None]:
        return {found["model"].rpartition("/")[2]: found["ttl_seconds"] for found in daemon.client.stages()}

    assert lives() == {"kept": None, "longer": 7200, "shorter": 3600}
    assert daemon.stage(kept, ttl_seconds=1)["ttl_seconds"] is None, "who wants it kept has gone away with it"
    pid = daemon.pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: daemon.status["serving"] and daemon.status["daemon_pid"] != pid, "another daemon serves", 60)
    assert lives() == {"kept": None, "longer": 7200, "shorter": 3600}


def test_a_revoked_stage_is_freed_when_its_lessees_have_closed(start_daemon: Start, models: Models, http: Http) -> None:
    daemon = start_daemon("--capacity", "cpu=8MiB")
    folder = models("m")
    weights = daemon.attach(folder)
    stage = weights.manifest.stage
    told: queue.Queue[float] = queue.Queue()
    weights.on_revoke(told.put)
    refused = http(daemon, "DELETE", f"/v1/stage/{stage}")
    assert (refused.status_code, refused.json()["code"]) == (409, "stage_leased")
    answer = http(daemon, "DELETE", f"/v1/stage/{stage}?force=true&grace=3600")
    assert answer.is_success, answer.text
    assert answer.json()["state"] == "ready"
    assert answer.json()["revoked_until"] > time.time() + 3000
    assert 3000 < told.get(timeout=60) <= 3600
    with pytest.raises(RequestRefused, match=stage) as error:
        daemon.attach(stage=stage)
    assert error.value.code == "stage_revoked"
    again = daemon.stage(folder)
    assert again["state"] == "ready"
    assert again["id"] != stage, "a revoked stage was joined"
    assert daemon.used_bytes == 2 * MiB
    weights.close()
    until(lambda: evicted(daemon, stage), "it was freed once its lessee had let go")
    assert daemon.used_bytes == MiB


def test_a_callback_that_fails_keeps_neither_the_others_from_being_told_nor_the_lease(
    start_daemon: Start, models: Models, http: Http
) -> None:
    daemon = start_daemon("--capacity", "cpu=8MiB")
    with daemon.attach(models("m")) as weights:
        told: queue.Queue[float] = queue.Queue()

        def fails(_: float) -> None:
            sys.exit("somebody else's code")

        weights.on_revoke(fails)
        weights.on_revoke(told.put)
        for grace in (3600, 1000):
            answer = http(daemon, "DELETE", f"/v1/stage/{weights.manifest.stage}?force=true&grace={grace}")
            assert answer.is_success, answer.text
            assert grace - 600 < told.get(timeout=60) <= grace


def test_a_revoked_stage_is_freed_at_its_deadline_and_what_is_mapped_keeps_its_values(
    start_daemon: Start, models: Models, http: Http
) -> None:
    daemon = start_daemon("--capacity", "cpu=8MiB")
    weights = daemon.attach(models("m"))
    stage = weights.manifest.stage
    told: queue.Queue[float] = queue.Queue()
    weights.on_revoke(told.put)
    kept = weights["w2"]
    expected = kept.clone()
    assert mapped_elsewhere(daemon) == 0
    assert http(daemon, "DELETE", f"/v1/stage/{stage}?force=true&grace=0.2").is_success
    assert told.get(timeout=60) <= 0.2
    until(lambda: evicted(daemon, stage), "it was freed at the deadline")
    assert daemon.used_bytes == 0
    until(lambda: not daemon.client.leases(), "the lease has ended")
    assert mapped_elsewhere(daemon) == MiB
    assert torch.equal(kept, expected)
    assert daemon.stage(models("next"))["state"] == "ready"
    assert torch.equal(kept, expected)
    weights.close()
    del weights, kept
    until(lambda: mapped_elsewhere(daemon) == 0, "nothing is mapped any more")
    assert daemon.status["restarts"] == 0


def test_a_stage_moves_between_devices_without_its_source(start_daemon: Start, models: Models, http: Http) -> None:
    daemon = start_daemon(env={"WEIGHTD_CAPACITY": "cpu:0=4MiB,cpu:1=1MiB"})
    folder = models("m")
    record = daemon.stage(folder, device="cpu:0")
    shutil.rmtree(folder)

    def move(device: str) -> httpx.Response:
        return http(daemon, "POST", f"/v1/stage/{record['id']}/move", json={"device": device})

    with daemon.attach(stage=record["id"]) as weights:
        expected = weights["w1"].clone()
        refused = move("cpu:1")
        assert (refused.status_code, refused.json()["code"]) == (409, "stage_leased")
    until(lambda: not daemon.client.leases(), "the closed lease is gone")
    assert move("cpu:7").json()["code"] == "invalid_request"
    for device, other in (("cpu:1", "cpu:0"), ("cpu:0", "cpu:1"), ("cpu:1", "cpu:0")):
        moved = move(device)
        assert moved.status_code == 200, moved.text
        assert moved.json()["device"] == device
        assert moved.json()["checkpoint_digest"] == record["checkpoint_digest"]
        assert (used(daemon, device), used(daemon, other)) == (MiB, 0)
        with daemon.attach(stage=record["id"]) as weights:
            assert weights.digest == record["checkpoint_digest"]
            assert weights.manifest.device == device
            assert torch.equal(weights["w1"], expected)
        until(lambda: not daemon.client.leases(), "the closed lease is gone")
    daemon.client.stage(str(models("pin")), device="cpu:0", wait=60)
    assert move("cpu:0").is_success
    pinned = daemon.stage(models("pinned"), device="cpu:1", pin=True)
    assert pinned["state"] == "ready"
    assert move("cpu:1").status_code == 507
    assert daemon.client.show(record["id"])["device"] == "cpu:0"


def test_attaching_the_same_stage_twice_in_one_process_is_one_mapping(daemon: Daemon, models: Models) -> None:
    folder = models("m")
    one, two = daemon.attach(folder), daemon.attach(folder)
    stage = one.manifest.stage
    assert one.lease != two.lease
    assert daemon.client.show(stage)["leases"] == 2
    assert one["w0"].data_ptr() == two["w0"].data_ptr()
    assert mappings(stage) == 1
    expected = two["w3"].clone()
    one.close()
    del one
    assert mappings(stage) == 1
    assert torch.equal(two["w3"], expected)
    two.close()
    del two
    assert mappings(stage) == 0
    until(lambda: not daemon.client.show(stage)["leases"], "both leases are gone")
    daemon.client.remove(stage)
