"""What engines may do with what they are lent on a GPU, by descriptor and by legacy handle."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.devices.cuda.fakes import EXPECTED, SHARDS, NewMachine, killed
from tests.gpu.machine import EngineDied
from tests.servers import Daemon, until
from weightd.ipc import RequestRefused

# ---------------------------------------------------------------------- what engines may do


def test_a_write_to_lent_gpu_memory_kills_the_writer_alone(machine: NewMachine, model: Path) -> None:
    gpus = machine(clean=False)  # the writer dies with what it holds
    daemon = gpus.daemon()
    writer, other = gpus.attach(daemon, model), gpus.attach(daemon, model)
    with pytest.raises(EngineDied) as died:
        writer.write()
    assert died.value.returncode == -signal.SIGSEGV
    assert other.digests() == EXPECTED
    until(lambda: len(daemon.client.leases()) == 1, "the writer's lease has ended")
    assert gpus.attach(daemon, model).found["digests"] == EXPECTED


def test_a_private_copy_can_be_written_to_and_nobody_else_sees_it(machine: NewMachine, model: Path) -> None:
    gpus = machine()
    daemon = gpus.daemon()
    writer, other = gpus.attach(daemon, model, private=True), gpus.attach(daemon, model)
    assert writer.found["digests"] == EXPECTED
    first = next(iter(SHARDS["a.safetensors"]))
    writer.write()
    changed = writer.digests()
    assert {name for name in changed if changed[name] != EXPECTED[name]} == {first}
    assert other.digests() == EXPECTED
    assert gpus.attach(daemon, model, private=True, wait=False).found["code"] == "invalid_request"


def test_an_engine_that_counts_gpus_differently_gets_the_right_one(machine: NewMachine, model: Path) -> None:
    gpus = machine(devices=4)
    daemon = gpus.daemon()
    only = {"CUDA_VISIBLE_DEVICES": gpus.fake.uuid(3)}
    reader = gpus.attach(daemon, model, device="cuda:0", env=only)
    assert (reader.found["device"], reader.found["digests"]) == ("cuda:0", EXPECTED)
    (stage,) = daemon.client.stages()
    assert stage["device"] == "cuda:3"
    assert gpus.fake.used(3) == stage["footprint_bytes"]
    blind = gpus.attach(daemon, stage=stage["id"], env={"CUDA_VISIBLE_DEVICES": "0,1"})
    assert blind.found["code"] == "device_not_visible"
    assert gpus.fake.uuid(3) in blind.found["message"]
    out_of_range = gpus.attach(daemon, model, device="cuda:1", env=only)
    assert out_of_range.found["code"] == "device_not_visible"
    assert daemon.stage(model, device=gpus.fake.uuid(3))["id"] == stage["id"], "a UUID is a name too"


def test_a_daemon_that_does_not_see_a_gpu_says_which_it_sees(machine: NewMachine, model: Path) -> None:
    gpus = machine(devices=2)
    daemon = gpus.daemon(CUDA_VISIBLE_DEVICES="1")
    refused = gpus.attach(daemon, model, device="cuda:0")  # the engine's is another
    assert refused.found["code"] == "invalid_request"
    assert f"cuda:0 ({gpus.fake.uuid(1)})" in refused.found["message"]


# ---------------------------------------------------------------------- legacy handles


@contextlib.contextmanager
def lent_over_http(daemon: Daemon, **body: Any) -> Iterator[Iterator[dict[str, Any]]]:
    """The events of ``POST /v1/leases``, as long as the block lasts."""
    transport = httpx.HTTPTransport(uds=str(daemon.runtime_dir / "api.sock"))
    with (
        httpx.Client(transport=transport, timeout=60) as client,
        client.stream("POST", "http://weightd/v1/leases", json=body) as answer,
    ):
        if answer.is_error:
            answer.read()
            raise RequestRefused(answer.json()["detail"], code=answer.json()["code"])
        yield (json.loads(line[5:]) for line in answer.iter_lines() if line.startswith("data:"))


_OPEN = """
import base64, ctypes, hashlib, json, sys
from weightd.ipc.cuda import call, driver, gpu_by_uuid
lease, entries = json.loads(sys.argv[1]), json.loads(sys.argv[2])
handle = driver().CUipcMemHandle()
ctypes.memmove(handle.getPtr(), base64.b64decode(lease["handle"]), 64)
with gpu_by_uuid(lease["gpu"]).context():
    base = int(call("cuIpcOpenMemHandle", handle, 1))
    found = {}
    for name, offset, nbytes in entries:
        host = ctypes.create_string_buffer(max(nbytes, 1))
        if nbytes:
            call("cuMemcpyDtoH", ctypes.addressof(host), base + lease["offset"] + offset, nbytes)
        found[name] = hashlib.sha256(host.raw[:nbytes]).hexdigest()
    call("cuIpcCloseMemHandle", base)
print(json.dumps(found))
"""


def test_a_legacy_handle_is_lent_over_http_as_long_as_the_connection_lasts(machine: NewMachine, model: Path) -> None:
    gpus = machine()
    daemon = gpus.daemon()
    request = {"model": str(model), "handle": "cuda_ipc"}
    with lent_over_http(daemon, request=request) as events:
        *_, lease = (event for event in until_lent(events))
        assert len(base64.b64decode(lease["handle"])) == 64
        assert lease["gpu"] == gpus.fake.uuid(0)
        (held,) = daemon.client.leases()
        assert (held["id"], held["pid"]) == (lease["lease"], os.getpid())
        with pytest.raises(RequestRefused) as refused:
            daemon.client.remove(lease["stage"])
        assert refused.value.code == "stage_leased"
        manifest = json.loads(daemon.get(lease["manifest"]))
        entries = [[tensor["name"], tensor["offset"], tensor["nbytes"]] for tensor in manifest["tensors"]]
        opened = subprocess.run(
            [sys.executable, "-c", _OPEN, json.dumps(lease), json.dumps(entries)],
            env={**os.environ, **gpus.fake.env}, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert opened.returncode == 0, opened.stderr
        assert json.loads(opened.stdout) == EXPECTED
        daemon.client.remove(lease["stage"], force=True, grace=20)
        assert next(events)["type"] == "revoked"
    until(lambda: not daemon.client.leases() and not daemon.used_bytes, "the lease has ended, and the stage with it")


def until_lent(events: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Events up to the lease."""
    for event in events:
        yield event
        if event["type"] == "lease":
            return


def test_each_kind_of_handle_is_refused_where_the_other_is_lent(machine: NewMachine, model: Path) -> None:
    gpus = machine()
    daemon = gpus.daemon()
    by_descriptor = daemon.stage(model)
    legacy = daemon.stage(model, handle="cuda_ipc")
    assert legacy["id"] != by_descriptor["id"]
    assert legacy["segments"][0]["handle"] == "cuda_ipc"
    with (
        pytest.raises(RequestRefused, match=r"lease\.sock") as refused,
        lent_over_http(daemon, stage=by_descriptor["id"]),
    ):
        pass
    assert refused.value.code == "needs_socket"
    assert "POST /v1/leases" in gpus.attach(daemon, stage=legacy["id"]).found["message"]
    with pytest.raises(RequestRefused, match="cpu has no segments with handle 'cuda_ipc'"):
        daemon.stage(model, device="cpu", handle="cuda_ipc")
    with pytest.raises(RequestRefused) as unknown, lent_over_http(daemon, stage="st-0"):
        pass
    assert unknown.value.code == "unknown_stage"


def test_what_is_being_taken_away_is_not_lent_by_legacy_handle(machine: NewMachine, model: Path) -> None:
    gpus = machine()
    daemon = gpus.daemon()
    stage = daemon.stage(model, handle="cuda_ipc")["id"]
    with lent_over_http(daemon, stage=stage) as events:
        *_, _ = until_lent(events)
        daemon.client.remove(stage, force=True, grace=60)
        with pytest.raises(RequestRefused) as refused, lent_over_http(daemon, stage=stage):
            pass
        assert refused.value.code == "stage_revoked"
    until(lambda: not daemon.used_bytes, "it has gone")


def test_a_load_that_fails_ends_the_stream_of_its_lease_with_the_reason(
    machine: NewMachine, model: Path, tmp_path: Path
) -> None:
    gpus = machine()
    daemon = gpus.daemon()
    request = {"model": str(model), "handle": "cuda_ipc", "expect_digest": "xxh3:" + "0" * 32}
    with lent_over_http(daemon, request=request) as events:
        *_, last = events
    assert (last["type"], last["code"]) == ("error", "digest_mismatch")


def test_a_legacy_segment_is_lost_with_its_daemon_and_staged_again_when_asked(machine: NewMachine, model: Path) -> None:
    gpus = machine(clean=False)
    daemon = gpus.daemon()
    record = daemon.stage(model, handle="cuda_ipc")
    kept = daemon.stage(model)
    killed(daemon)
    lost = daemon.client.show(record["id"])
    assert (lost["state"], lost["error"]["code"]) == ("failed", "lost")
    assert daemon.client.show(kept["id"])["state"] == "ready"
    again = daemon.stage(model, handle="cuda_ipc")
    assert (again["state"], again["id"] != record["id"]) == ("ready", True)
    killed(daemon)
    assert record["id"] not in [stage["id"] for stage in daemon.client.stages()], "what is lost is said once"
