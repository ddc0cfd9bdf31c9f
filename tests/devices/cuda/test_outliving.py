"""GPU memory that outlives processes, and errors that end them."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.devices.cuda.fakes import EXPECTED, NewMachine, killed
from tests.node.adopting import bytes_read, ended, half_loaded
from tests.servers import Daemon, SeaweedFS, until


def test_weights_on_a_gpu_outlive_the_daemon(machine: NewMachine, model: Path) -> None:
    gpus = machine(clean=False)  # a killed process has no chance to let go
    daemon = gpus.daemon()
    record = daemon.stage(model)
    before = gpus.attach(daemon, model)
    killed(daemon)
    adopted = daemon.client.show(record["id"])
    assert (adopted["state"], adopted["checkpoint_digest"]) == ("ready", record["checkpoint_digest"])
    assert gpus.fake.used(0) == record["footprint_bytes"] == adopted["footprint_bytes"], "it is the same memory"
    assert before.digests() == EXPECTED
    assert gpus.attach(daemon, model).found["digests"] == EXPECTED
    before.end()
    for reader in gpus.readers:
        reader.end()
    until(lambda: not daemon.client.leases(), "all leases have ended")
    pid = daemon.status["daemon_pid"]
    daemon.client.remove(record["id"], force=True, grace=0)
    until(lambda: gpus.fake.used(0) == 0, "its memory is free")
    assert gpus.fake.leaks([pid]) == {}


def test_an_interrupted_load_goes_on_where_it_was(machine: NewMachine, model: Path, s3: SeaweedFS) -> None:
    uri = s3.upload(model, "cuda-interrupted")
    gpus = machine(clean=False)
    with half_loaded(lambda *options, env: gpus.daemon(*options, **env), s3, uri) as (daemon, _, gate, stage):
        killed(daemon)
        gate.opened.set()
        record = ended(daemon, stage)
        assert record["state"] == "ready", record["error"]
        assert 0 < bytes_read(daemon) < record["bytes_total"], "what had landed was not read again"
        assert gpus.attach(daemon, stage=stage).found["digests"] == EXPECTED


def test_a_sticky_error_ends_the_daemon_with_its_reason_and_the_next_one_adopts(
    machine: NewMachine, model: Path
) -> None:
    gpus = machine(clean=False)
    daemon = gpus.daemon()
    kept = daemon.stage(model)
    pid = daemon.status["daemon_pid"]
    gpus.fake.set(sticky_at=1)
    daemon.client.stage(str(model), tensors={"include": ["wide"]})
    until(lambda: daemon.status["serving"] and daemon.status["daemon_pid"] != pid, "the next daemon serves", 60)
    assert "exit code 70" in daemon.status["last_exit"]
    assert "CUDA_ERROR_LAUNCH_FAILED" in daemon.status["last_exit"]
    assert "the GPU has failed" in daemon.log.read_text()
    assert daemon.client.show(kept["id"])["state"] == "ready"
    assert gpus.attach(daemon, stage=kept["id"]).found["digests"] == EXPECTED
    assert daemon.stage(model, tensors={"include": ["wide"]})["state"] == "ready", "what was interrupted is done too"


def test_a_stage_is_adopted_by_its_gpus_uuid_whatever_its_number(machine: NewMachine, model: Path) -> None:
    gpus = machine(devices=2, clean=False)
    visible = gpus.fake.folder / "visible"
    visible.write_text("0,1")
    command = ["sh", "-c", f'exec env CUDA_VISIBLE_DEVICES="$(cat {visible})" {sys.executable} "$@"', "sh"]
    daemon = Daemon(gpus.fake.folder / "d", env={"WEIGHTD_CUDA_RESERVE": "0", **gpus.fake.env}, command=["env"])
    # The keeper starts each daemon anew: by a command that looks up which GPUs are to be seen.
    daemon._command = [
        sys.executable, "-m", "weightd.daemon.keeper", *_absolute(command), "-m", "weightd.api"
    ]  # fmt: skip
    daemon._env["WEIGHTD_LISTEN"] = ""
    with daemon:
        record = daemon.stage(model, device="cuda:1")
        visible.write_text("1")
        killed(daemon)
        adopted = daemon.client.show(record["id"])
        assert (adopted["state"], adopted["device"]) == ("ready", "cuda:0")
        assert gpus.attach(daemon, stage=record["id"]).found["digests"] == EXPECTED
        for reader in gpus.readers:
            reader.end()
        visible.write_text("0")
        killed(daemon)
        (left,) = daemon.client.node()["unadopted"]
        assert (left["name"], gpus.fake.uuid(1) in left["reason"]) == (record["id"], True)


def _absolute(command: list[str]) -> list[str]:
    return ["/bin/sh", *command[1:]]
