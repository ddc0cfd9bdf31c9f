"""Room on GPUs, moves between them and the host, and what is said of them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.devices.cuda.fakes import EXPECTED, WEIGHTD, MiB, NewMachine, devices
from tests.servers import Daemon, until
from weightd.ipc import RequestRefused

# ---------------------------------------------------------------------- room


def test_memory_that_others_use_is_not_promised(machine: NewMachine, model: Path) -> None:
    gpus = machine(memory=64 * MiB)
    daemon = gpus.daemon(WEIGHTD_CUDA_RESERVE=str(8 * MiB))
    first = daemon.stage(model)
    found = devices(daemon)["cuda:0"]
    assert found["used_share"] == first["footprint_bytes"] / (64 * MiB)
    assert found["available_bytes"] == found["free_bytes"] == 56 * MiB - first["footprint_bytes"]
    gpus.fake.control.others_use[0] = 52 * MiB
    with pytest.raises(RequestRefused) as refused:
        daemon.stage(model, tensors={"include": ["q", "o", "wide"]}, pin=True)
    assert (refused.value.code, refused.value.details["status"]) == ("insufficient_capacity", 507)
    assert refused.value.details["evictable_bytes"] == first["footprint_bytes"]
    gpus.fake.control.others_use[0] = 46 * MiB
    assert daemon.client.stage(str(model), dry_run=True, tensors={"include": ["q", "o", "wide"]})["evicts"]
    assert daemon.stage(model, tensors={"include": ["q", "o", "wide"]})["state"] == "ready"
    assert daemon.client.show(first["id"])["state"] == "evicted"


@pytest.mark.parametrize("handle", ["fd", "cuda_ipc"])
def test_an_allocation_that_fails_is_507_and_nothing_else_suffers(
    handle: str, machine: NewMachine, model: Path
) -> None:
    gpus = machine(devices=2)
    daemon = gpus.daemon()
    pid = daemon.status["daemon_pid"]
    daemon.stage(model, tensors={"include": ["norm"]})
    daemon.stage(model, tensors={"include": ["norm"]}, device="cuda:1")
    used = [gpus.fake.used(i) for i in range(2)]
    gpus.fake.set(fail_allocation=2)
    parallel = {"tp_size": 2, "tp_rank": "all", "map": {"*": "replicate"}}
    with pytest.raises(RequestRefused) as refused:
        daemon.stage(model, handle=handle, device=["cuda:0", "cuda:1"], parallel=parallel)
    assert (refused.value.code, refused.value.details["status"]) == ("insufficient_capacity", 507)
    until(lambda: [gpus.fake.used(i) for i in range(2)] == used, "the first rank's memory is free again")
    assert daemon.status["daemon_pid"] == pid
    assert daemon.stage(model, handle=handle)["state"] == "ready"


def test_a_gpu_without_descriptors_lends_by_legacy_handles_only(machine: NewMachine, model: Path) -> None:
    gpus = machine()
    gpus.fake.set(no_posix_fd=1)
    daemon = gpus.daemon()
    with pytest.raises(RequestRefused, match="cuda:0 has no segments with handle 'fd', it has cuda_ipc"):
        daemon.stage(model)
    assert daemon.stage(model, handle="cuda_ipc")["state"] == "ready"


def test_fabric_handles_are_left_out_where_the_container_may_not(machine: NewMachine, model: Path) -> None:
    gpus = machine()
    gpus.fake.set(no_fabric=0)  # the attribute says yes; the fake refuses, as without an IMEX channel
    assert gpus.attach(gpus.daemon(), model).found["digests"] == EXPECTED


# ---------------------------------------------------------------------- moving


@pytest.mark.parametrize("fail_register", [0, 1])
def test_stages_move_between_host_and_gpus_and_back(fail_register: int, machine: NewMachine, model: Path) -> None:
    gpus = machine(devices=2)
    gpus.fake.set(fail_register=fail_register)
    daemon = gpus.daemon()
    record = daemon.stage(model)
    for device in ("cpu", "cuda:1", "cuda:0", "cpu", gpus.fake.uuid(1)):
        moved = daemon.client.move(record["id"], device)
        assert moved["state"] == "ready"
        assert gpus.attach(daemon, stage=record["id"]).found["digests"] == EXPECTED
        gpus.readers[-1].end()
        until(lambda: not daemon.client.leases(), "the lease has ended")
    assert moved["device"] == "cuda:1"
    assert (gpus.fake.used(0), gpus.fake.used(1)) == (0, moved["footprint_bytes"])
    assert daemon.used_bytes == moved["footprint_bytes"]


def test_a_bit_that_flips_on_the_way_to_a_gpu_stops_the_move(machine: NewMachine, model: Path) -> None:
    gpus = machine()
    daemon = gpus.daemon()
    record = daemon.stage(model, device="cpu")
    daemon.stage(model, tensors={"include": ["norm"]})  # the self-test is over
    gpus.fake.set(flip_at=1)
    with pytest.raises(RequestRefused, match="changed while it was moved"):
        daemon.client.move(record["id"], "cuda:0")
    assert daemon.client.show(record["id"])["device"] == "cpu"
    assert gpus.attach(daemon, stage=record["id"]).found["digests"] == EXPECTED


def test_a_move_makes_room_without_evicting_what_it_moves(machine: NewMachine, model: Path) -> None:
    gpus = machine(devices=2, memory=20 * MiB)
    daemon = gpus.daemon()
    parallel = {"tp_size": 2, "tp_rank": "all", "map": {"*": "replicate"}}
    record = daemon.stage(model, device=["cuda:0", "cuda:1"], parallel=parallel)
    size = record["footprint_bytes"] // 2
    assert size < 20 * MiB < 3 * size
    with pytest.raises(RequestRefused) as refused:
        daemon.client.move(record["id"], "cuda:0")
    assert refused.value.code == "insufficient_capacity"
    assert daemon.client.show(record["id"])["state"] == "ready"
    assert daemon.used_bytes == 2 * size
    assert daemon.client.move(record["id"], "cpu")["device"] == "cpu"
    assert [gpus.fake.used(i) for i in range(2)] == [0, 0]
    assert devices(daemon)["cuda:0"]["used_bytes"] == devices(daemon)["cuda:1"]["used_bytes"] == 0


# ---------------------------------------------------------------------- saying how it is


def test_the_doctor_looks_at_every_gpu(machine: NewMachine) -> None:
    gpus = machine(devices=2)
    gpus.fake.set(no_rdma=1, corrupt_streamer=1)

    def findings() -> dict[str, Any]:
        done = subprocess.run(
            [WEIGHTD, "doctor", "--json"],
            env={**os.environ, **gpus.fake.env},
            capture_output=True,
            text=True,
            check=False,
        )
        return {found["what"]: found for found in json.loads(done.stdout)}

    found = findings()
    assert found["CUDA driver"]["found"].startswith("13.0")
    assert gpus.fake.uuid(1) in found["cuda:1"]["found"]
    assert (found["cuda:0 handles"]["level"], found["cuda:0 RDMA"]["level"]) == ("ok", "warning")
    assert (found["cuda:0 fill path"]["level"], bool(found["cuda:0 fill path"]["remedy"])) == ("warning", True)
    assert "cuda_ipc" in found
    gpus.fake.set(no_vmm=1, corrupt_streamer=0)
    found = findings()
    assert found["cuda:0 handles"]["level"] == "error"
    assert found["cuda:0 fill path"]["level"] == "ok"
    gpus.fake.set(no_vmm=0, silent=2)
    found = findings()
    assert (found["cuda:0"]["level"], found["cuda:1"]["level"]) == ("ok", "error")


def test_a_cupy_that_does_not_work_leaves_digests_to_the_host(machine: NewMachine, model: Path, tmp_path: Path) -> None:
    (tmp_path / "cupy").mkdir()
    (tmp_path / "cupy" / "__init__.py").write_text("raise ImportError('no libcudart.so.13')")
    gpus = machine()
    daemon = gpus.daemon(PYTHONPATH=str(tmp_path))
    assert gpus.attach(daemon, model).found["digests"] == EXPECTED
    assert devices(daemon)["cuda:0"]["digest_path"] == "host"
    assert "no libcudart.so.13" in daemon.log.read_text()


def test_a_driver_that_does_not_start_leaves_the_host_to_serve(tmp_path: Path, model: Path) -> None:
    broken = tmp_path / "lib"
    broken.mkdir()
    source = "int cuInit(unsigned f) { (void)f; return 100; }"
    (tmp_path / "broken.c").write_text(source)
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", str(broken / "libcuda.so.1"), str(tmp_path / "broken.c")], check=True
    )
    with Daemon(tmp_path / "d", env={"LD_LIBRARY_PATH": str(broken)}) as daemon:
        assert daemon.stage(model)["device"] == "cpu"
        assert "GPUs are not used" in daemon.log.read_text()
