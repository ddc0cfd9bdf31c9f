"""A GPU that ends the daemon which adopts from it: the others are served, and what it holds is kept."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.devices.cuda.fakes import EXPECTED, NewMachine, devices, killed
from tests.servers import Daemon, until
from weightd.daemon.devices.quarantine import Quarantine
from weightd.daemon.keeper.deposits import Deposits

WEIGHTD = str(Path(sys.executable).parent / "weightd")


def settled(daemon: Daemon, before: int) -> None:
    """Wait for a daemon that serves and is none of the two after ``before`` that died."""
    until(lambda: daemon.status["serving"] and daemon.status["daemon_pid"] != before, "a daemon serves", 120)


@pytest.mark.parametrize("way", [2, -2], ids=["its error", "an abort in the driver"])
def test_a_gpu_that_ends_daemons_in_adopting_is_left_alone_until_a_reload(
    machine: NewMachine, model: Path, way: int
) -> None:
    gpus = machine(devices=2, clean=False)
    daemon = gpus.daemon()
    kept = {name: daemon.stage(model, device=name) for name in ("cuda:0", "cuda:1", "cpu")}
    ill = kept.pop("cuda:1")
    before = daemon.status["daemon_pid"]
    gpus.fake.set(sticky_import=way)
    killed(daemon)
    settled(daemon, before)
    assert daemon.status["restarts"] == 2 + (way < 0), "one kill, and the deaths that it takes to be sure"
    for stage in kept.values():
        assert daemon.client.show(stage["id"])["state"] == "ready"
    assert gpus.attach(daemon, stage=kept["cuda:0"]["id"]).found["digests"] == EXPECTED
    assert daemon.stage(model, device="cuda:0", tensors={"include": ["q"]})["state"] == "ready"
    reason = devices(daemon)["cuda:1"]["quarantined"]
    assert ("CUDA_ERROR_ECC_UNCORRECTABLE" if way > 0 else "2 daemons died") in reason
    assert devices(daemon)["cuda:0"]["quarantined"] is None
    assert 'weightd_device_quarantined{device="cuda:1"} 1' in daemon.get("/metrics")
    assert 'weightd_device_quarantined{device="cuda:0"} 0' in daemon.get("/metrics")
    (left,) = daemon.client.node()["unadopted"]
    assert (left["name"], reason in left["reason"], "weightd reload" in left["reason"]) == (ill["id"], True, True)
    refused = daemon.stage(model, device="cuda:1")
    assert refused["error"]["code"] == "device_failed"
    assert "weightd reload" in refused["error"]["message"]
    found = doctor(daemon)
    assert (found["device cuda:1"]["level"], reason in found["device cuda:1"]["found"]) == ("error", True)
    killed(daemon)  # a death of something else changes nothing
    assert devices(daemon)["cuda:1"]["quarantined"] == reason
    assert gpus.fake.used(1) == ill["footprint_bytes"], "what it holds is kept"
    gpus.fake.set(sticky_import=0)
    command = [WEIGHTD, "reload", "--runtime-dir", str(daemon.runtime_dir), "--wait", "60"]
    subprocess.run(command, check=True, capture_output=True)
    assert devices(daemon)["cuda:1"]["quarantined"] is None
    assert daemon.client.node()["unadopted"] == []
    assert gpus.attach(daemon, stage=ill["id"]).found["digests"] == EXPECTED


def doctor(daemon: Daemon) -> dict[str, Any]:
    environment = {**os.environ, "WEIGHTD_RUNTIME_DIR": str(daemon.runtime_dir)}
    done = subprocess.run([WEIGHTD, "doctor", "--json"], env=environment, capture_output=True, text=True, check=False)
    return {finding["what"]: finding for finding in json.loads(done.stdout)}


def test_a_gpu_whose_errors_end_daemon_after_daemon_that_serves_is_left_alone_too(
    machine: NewMachine, model: Path
) -> None:
    gpus = machine(devices=2, clean=False)
    daemon = gpus.daemon()
    kept = daemon.stage(model, device="cpu")
    for name in ("wide", "q", "o"):
        assert devices(daemon)["cuda:1"]["quarantined"] is None
        before = daemon.status["daemon_pid"]
        gpus.fake.set(sticky_at=1)
        daemon.client.stage(str(model), device="cuda:1", tensors={"include": [name]})
        settled(daemon, before)
    assert "3 daemons" in devices(daemon)["cuda:1"]["quarantined"]
    assert daemon.client.show(kept["id"])["state"] == "ready"
    refused = daemon.stage(model, device="cuda:1")
    assert refused["error"]["code"] == "device_failed"
    assert daemon.stage(model)["device"] == "cuda:0"


def test_a_gpu_that_says_nothing_of_itself_is_left_out_and_what_it_holds_is_kept(
    machine: NewMachine, model: Path
) -> None:
    gpus = machine(devices=3, clean=False)
    daemon = gpus.daemon()
    ill, well = daemon.stage(model, device="cuda:1"), daemon.stage(model, device="cuda:2")
    gpus.fake.set(silent=2)
    killed(daemon)
    assert sorted(devices(daemon)) == ["cpu", "cuda:0", "cuda:2"]
    assert gpus.attach(daemon, stage=well["id"]).found["digests"] == EXPECTED
    (left,) = daemon.client.node()["unadopted"]
    assert left["name"] == ill["id"]
    gpus.fake.set(silent=0)
    killed(daemon)
    assert gpus.attach(daemon, stage=ill["id"]).found["digests"] == EXPECTED


def test_one_kill_amid_adopting_says_nothing_and_one_that_succeeded_in_between_neither() -> None:
    held: dict[str, int] = {}

    def next_daemon() -> Quarantine:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            quarantine = Quarantine(Deposits(ours), dict(held))
            ours.shutdown(socket.SHUT_WR)
            while (said := socket.recv_fds(theirs, 4096, 1))[0]:
                name = said[0].decode().split(" ")[1]
                held.pop(name, None)
                for fd in said[1]:
                    held[name] = fd
        return quarantine

    def note(**changes: Any) -> None:
        fd = os.memfd_create("weightd:test")
        os.write(fd, json.dumps({"reason": "", "adopting": False, "deaths": 0, "errors": []} | changes).encode())
        held["gpu:GPU-1"] = fd

    note(adopting=True)
    assert next_daemon().reason("GPU-1") == ""
    assert json.loads(os.pread(held["gpu:GPU-1"], 4096, 0))["deaths"] == 1
    assert next_daemon().reason("GPU-1") == "", "this one died of something else"
    note(adopting=True, deaths=1)
    assert next_daemon().reason("GPU-1") != ""
    assert next_daemon().reason("GPU-1") != ""
    note(unknown=True, errors=None)
    assert next_daemon().reason("GPU-1") == ""
    assert held == {}
