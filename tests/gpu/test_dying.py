"""Whoever dies: the weights of the others stay what they are."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gpu.machine import Checkpoint, EngineDied, EngineRefused, Machine, checkpoint, leased_by_handle
from tests.gpu.test_lending import Say, staged
from tests.servers import Daemon, until


def kill_daemon(daemon: Daemon) -> None:
    """kill -9, and wait for the next one."""
    pid = daemon.status["daemon_pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: daemon.status["daemon_pid"] not in (0, pid) and daemon.status["serving"], "it serves again", 90)


def gone(pid: int) -> Callable[[], bool]:
    return lambda: not Path(f"/proc/{pid}/stat").exists() or ") Z " in Path(f"/proc/{pid}/stat").read_text()


def test_kill_9_of_the_daemon_changes_no_byte_for_engines_before_and_after(
    machine: Machine, tmp_path: Path, heavy: Checkpoint
) -> None:
    daemon = machine.daemon(tmp_path / "weightd")
    record = staged(daemon, heavy)
    where = {"runtime_dir": str(daemon.runtime_dir), "stage": record["id"]}
    before = machine.engine()
    lease = before.ask("attach", **where)["lease"]
    free = machine.free_bytes()
    for _ in range(3):
        kill_daemon(daemon)
        (found,) = daemon.client.stages()
        assert (found["id"], found["state"], found["ready_at"]) == (record["id"], "ready", record["ready_at"])
        assert before.ask("hashes") == heavy.hashes()
        after = machine.engine()
        assert after.ask("attach", **where)["digest"] == record["checkpoint_digest"]
        assert after.ask("hashes") == heavy.hashes()
        after.close()
        # Also that the one who is gone is no longer counted: a daemon that is killed before would wait for it.
        until(lambda: {one["id"] for one in daemon.client.leases()} == {lease}, "the lease is taken up again", 60)
    assert machine.free_bytes() >= free - machine.slack, "nothing was loaded twice, nothing of the dead is left"
    before.close()
    until(lambda: not daemon.client.leases(), "the leases have ended", 60)
    daemon.client.remove(record["id"])
    again = staged(daemon, heavy)
    assert again["checkpoint_digest"] == record["checkpoint_digest"]


@pytest.mark.parametrize("how", ["memset", "copy", "host pointer"])
def test_who_writes_to_what_it_was_lent_dies_and_nobody_else_notices(
    machine: Machine, tmp_path: Path, model: Checkpoint, how: str, say: Say
) -> None:
    if how == "host pointer" and machine.kind == "gpu":
        pytest.skip("an address of a GPU is none of the host's: only kernels write there")
    written(machine, tmp_path, model, how, say)


@pytest.mark.gpu
def test_a_kernel_that_writes_to_what_it_was_lent_ends_its_own_process_only(
    gpu: Machine, tmp_path: Path, model: Checkpoint, say: Say
) -> None:
    error = written(gpu, tmp_path, model, "kernel", say)
    assert isinstance(error, EngineRefused)
    assert error.sticky, error


def written(machine: Machine, tmp_path: Path, model: Checkpoint, how: str, say: Say) -> Exception:
    """Have an engine write, beside one that reads; returns what became of the one that wrote."""
    daemon = machine.daemon(tmp_path / "weightd")
    record = staged(daemon, model)
    pid = daemon.pid
    where = {"runtime_dir": str(daemon.runtime_dir), "stage": record["id"]}
    reader, writer = machine.engine(), machine.engine(FAKECUDA_STRICT="0")
    for engine in (reader, writer):
        engine.ask("attach", **where)
    with pytest.raises((EngineRefused, EngineDied)) as failed:
        writer.ask("write", how=how, name="model.embed.weight")
    say(str(failed.value).splitlines()[0])
    if isinstance(failed.value, EngineRefused):
        assert failed.value.code == "cuda_error"
    if isinstance(failed.value, EngineDied):
        assert failed.value.returncode == -signal.SIGSEGV
    elif failed.value.sticky:
        with pytest.raises(EngineRefused):  # nothing on the GPU works for it any more
            writer.ask("hashes")
    else:  # refused before anything was done, which is as good
        assert writer.ask("hashes") == model.hashes()
    assert reader.ask("hashes") == model.hashes()
    late = machine.engine()
    late.ask("attach", **where)
    assert late.ask("hashes") == model.hashes()
    assert daemon.pid == pid
    assert staged(daemon, model)["id"] == record["id"]
    other = checkpoint(tmp_path / "other", seed=1)  # the daemon's own context works, too
    staged(daemon, other)
    writer.close()
    until(lambda: len(daemon.client.leases()) == 2, "the lease of who died has ended", 60)
    error: Exception = failed.value
    return error


def test_an_engine_keeps_its_bytes_when_daemon_and_keeper_are_killed(
    machine: Machine, tmp_path: Path, heavy: Checkpoint
) -> None:
    empty = machine.free_bytes()
    daemon = machine.daemon(tmp_path / "weightd")
    record = staged(daemon, heavy)
    engine = machine.engine()
    engine.ask("attach", runtime_dir=str(daemon.runtime_dir), stage=record["id"])
    pid = daemon.pid
    os.kill(daemon.keeper_pid, signal.SIGKILL)
    until(gone(pid), "the daemon has died with its keeper")
    assert engine.ask("hashes") == heavy.hashes()
    # A new daemon knows nothing of them, and has the GPU as well.
    fresh = machine.daemon(tmp_path / "another")
    assert staged(fresh, heavy)["checkpoint_digest"] == record["checkpoint_digest"]
    assert engine.ask("hashes") == heavy.hashes()
    fresh.stop()
    engine.close()
    until(lambda: machine.free_bytes() >= empty - machine.slack, "the memory goes with the last who maps it", 60)


def test_a_stage_with_legacy_handles_is_lost_with_the_daemon_and_staged_again(
    machine: Machine, tmp_path: Path, heavy: Checkpoint, say: Say
) -> None:
    empty = machine.free_bytes()
    daemon = machine.daemon(tmp_path / "weightd")
    record = staged(daemon, heavy, handle="cuda_ipc")
    engine = machine.engine()
    with leased_by_handle(daemon, record["id"]) as lent:
        engine.ask("open_handle", **lent)
        assert engine.ask("hashes") == heavy.hashes()
        kill_daemon(daemon)
    lost = daemon.client.show(record["id"])
    assert (lost["state"], lost["error"]["code"]) == ("failed", "lost")
    # CUDA says of an importer whose exporter is gone that it is undefined what it finds. It must not harm others.
    try:
        same = engine.ask("hashes") == heavy.hashes()
        say(f"the importer of an exporter that died reads {'the same' if same else 'OTHER'} bytes")
    except (EngineRefused, EngineDied) as error:
        say(f"the importer of an exporter that died: {str(error).splitlines()[0]}")
    again = staged(daemon, heavy, handle="cuda_ipc")
    assert again["id"] != record["id"]
    assert again["checkpoint_digest"] == record["checkpoint_digest"]
    other = machine.engine()
    with leased_by_handle(daemon, again["id"]) as lent:
        other.ask("open_handle", **lent)
        assert other.ask("hashes") == heavy.hashes()
    engine.close()
    other.close()
    daemon.stop()
    until(lambda: machine.free_bytes() >= empty - machine.slack, "nothing of it is left on the GPU", 60)
