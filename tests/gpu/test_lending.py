"""Stage, lend, map: the bytes that engines find on the GPU are the files'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fakecuda import FakeCuda
from tests.gpu.machine import Checkpoint, EngineRefused, Machine, leased_by_handle
from tests.servers import Daemon, until

Say = Callable[[str], None]


def staged(daemon: Daemon, model: Checkpoint, **request: Any) -> dict[str, Any]:
    record = daemon.stage(model.model, **{"device": "cuda:0", **request})
    assert record["state"] == "ready", record["error"]
    return record


@pytest.mark.parametrize("fill", ["auto", "ring"])
def test_every_tensor_in_a_second_process_is_what_the_files_hold(
    machine: Machine, tmp_path: Path, model: Checkpoint, fill: str, say: Say
) -> None:
    daemon = machine.daemon(tmp_path / "weightd", WEIGHTD_CUDA_FILL=fill)
    record = staged(daemon, model)
    device = next(one for one in daemon.client.node()["devices"] if one["name"] == "cuda:0")
    say(f"filled by {device['fill_path']}, digests on the {device['digest_path']}")
    assert device["uuid"] == machine.gpus[0]
    assert fill == "auto" or device["fill_path"] == "ring"
    engine = machine.engine()
    found = engine.ask("attach", runtime_dir=str(daemon.runtime_dir), model=model.model, device="cuda:0")
    assert found["gpu"] == machine.gpus[0]
    assert found["digest"] == record["checkpoint_digest"]
    assert engine.ask("hashes") == model.hashes()


def test_digests_on_the_gpu_are_those_on_the_host(machine: Machine, tmp_path: Path, model: Checkpoint) -> None:
    daemon = machine.daemon(tmp_path / "weightd")
    digest = staged(daemon, model)["checkpoint_digest"]
    assert digest == staged(daemon, model, device="cpu")["checkpoint_digest"]


def test_an_engine_that_counts_its_gpus_otherwise_maps_the_same_memory(
    machine: Machine, tmp_path: Path, model: Checkpoint
) -> None:
    daemon = machine.daemon(tmp_path / "weightd")
    last = len(machine.gpus) - 1
    record = staged(daemon, model, device=f"cuda:{last}")
    everything_backwards = machine.visible(*range(last, -1, -1))
    for visible in (everything_backwards, machine.visible(last)):
        engine = machine.engine(CUDA_VISIBLE_DEVICES=visible)
        found = engine.ask("attach", runtime_dir=str(daemon.runtime_dir), model=model.model, device="cuda:0")
        assert (found["device"], found["gpu"]) == ("cuda:0", machine.gpus[last])
        assert engine.ask("hashes") == model.hashes()
    assert [one["id"] for one in daemon.client.stages()] == [record["id"]]


def test_an_engine_that_does_not_see_the_gpu_is_told_which_one_it_lacks(
    machine: Machine, tmp_path: Path, model: Checkpoint
) -> None:
    daemon = machine.daemon(tmp_path / "weightd")
    record = staged(daemon, model)
    others = machine.visible(*range(1, len(machine.gpus)))
    engine = machine.engine(CUDA_VISIBLE_DEVICES=others)
    with pytest.raises(EngineRefused) as refused:
        engine.ask("attach", runtime_dir=str(daemon.runtime_dir), stage=record["id"])
    assert refused.value.code == ("device_not_visible" if others else "no_cuda_driver")
    assert not others or machine.gpus[0] in str(refused.value)
    until(lambda: not daemon.client.leases(), "the lease of who could not map it has ended")


def test_a_private_copy_is_the_engines_own_to_change(machine: Machine, tmp_path: Path, model: Checkpoint) -> None:
    daemon = machine.daemon(tmp_path / "weightd")
    staged(daemon, model)
    where = {"runtime_dir": str(daemon.runtime_dir), "model": model.model, "device": "cuda:0"}
    reader, owner = machine.engine(), machine.engine()
    reader.ask("attach", **where)
    owner.ask("attach", private=True, **where)
    owner.ask("write", how="memset", name="model.embed.weight")
    changed, truth = owner.ask("hashes"), model.hashes()
    assert {name for name, found in changed.items() if found != truth[name]} == {"model.embed.weight"}
    assert reader.ask("hashes") == truth


def test_a_legacy_handle_opens_to_the_same_bytes_while_its_stream_is_read(
    machine: Machine, tmp_path: Path, model: Checkpoint
) -> None:
    daemon = machine.daemon(tmp_path / "weightd")
    record = staged(daemon, model, handle="cuda_ipc")
    engine = machine.engine()
    with leased_by_handle(daemon, record["id"]) as lent:
        assert lent["gpu"] == machine.gpus[0]
        assert lent["digest"] == record["checkpoint_digest"]
        engine.ask("open_handle", **lent)
        assert engine.ask("hashes") == model.hashes()
        assert [one["id"] for one in daemon.client.leases()] == [lent["lease"]]
    until(lambda: not daemon.client.leases(), "the lease has ended with its stream")


def test_what_is_moved_to_the_gpu_and_back_stays_what_it_was(
    machine: Machine, tmp_path: Path, model: Checkpoint
) -> None:
    daemon = machine.daemon(tmp_path / "weightd")
    record = staged(daemon, model, device="cpu")
    moved = daemon.client.move(record["id"], "cuda:0")
    assert (moved["device"], moved["state"]) == ("cuda:0", "ready")
    engine = machine.engine()
    engine.ask("attach", runtime_dir=str(daemon.runtime_dir), stage=record["id"])
    assert engine.ask("hashes") == model.hashes()
    engine.close()
    until(lambda: not daemon.client.leases(), "the lease has ended")
    back = daemon.client.move(record["id"], "cpu")
    assert (back["device"], back["checkpoint_digest"]) == ("cpu", record["checkpoint_digest"])
    with daemon.attach(stage=record["id"]) as weights:
        entry = weights.raw("bytes.4097")
        assert isinstance(entry, memoryview)
        assert len(entry) == 4097
    expected = staged(daemon, model, device="cuda:0")["checkpoint_digest"]
    assert expected == record["checkpoint_digest"]


def test_a_hundred_stages_that_come_and_go_leave_nothing_behind(
    machine: Machine, tmp_path: Path, model: Checkpoint, say: Say
) -> None:
    daemon = machine.daemon(tmp_path / "weightd")
    cycles, warm = (100, 10) if machine.kind == "gpu" else (30, 4)
    engine = machine.engine()
    before: dict[str, float] = {}
    counts: dict[str, int] = {}
    for cycle in range(cycles + warm):
        handle = "cuda_ipc" if cycle % 5 == 4 else "fd"
        record = staged(daemon, model, handle=handle)
        if handle == "fd" and cycle % 10 == 0:
            engine.close()
            engine = machine.engine()
            engine.ask("attach", runtime_dir=str(daemon.runtime_dir), stage=record["id"])
            assert engine.ask("hashes") == model.hashes()
            engine.ask("close")
        until(lambda: not daemon.client.leases(), "the lease has ended")
        daemon.client.remove(record["id"])
        if cycle == warm - 1:
            engine.close()
            before = held(machine, daemon)
            counts = counted(machine.fake, daemon) if machine.fake else {}
    engine.close()
    after = held(machine, daemon)
    growth = {name: after[name] - before[name] for name in after}
    say(f"growth over {cycles} cycles: {growth}")
    assert growth["GPU bytes"] <= machine.slack  # a hundred segments would be 800 MiB
    assert growth["daemon's descriptors"] <= 2
    assert growth["keeper's descriptors"] <= 0
    assert growth["daemon's RSS"] <= 48 << 20
    if machine.fake is not None:
        assert machine.fake.used(0) == 0
        assert counted(machine.fake, daemon) == counts


def counted(fake: FakeCuda, daemon: Daemon) -> dict[str, int]:
    """What the daemon holds of the driver, thing by thing."""
    return {name: count for name, count in fake.counters()[daemon.pid].items() if name != "exports"}


def held(machine: Machine, daemon: Daemon) -> dict[str, float]:
    """What may grow: of the GPU, of the daemon and of the keeper."""
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    return {
        "GPU bytes": -machine.free_bytes(),
        "daemon's descriptors": len(list(Path(f"/proc/{daemon.pid}/fd").iterdir())),
        "keeper's descriptors": len(list(Path(f"/proc/{daemon.keeper_pid}/fd").iterdir())),
        "daemon's RSS": int(status.split("VmRSS:")[1].split()[0]) * 1024,
    }
