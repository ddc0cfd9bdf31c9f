"""How bytes get to a GPU, on a fake of the driver: every one, to its place, and checked there."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tests.checkpoint_files import write_checkpoint
from tests.devices.cuda.fakes import EXPECTED, PATHS, SHARDS, MiB, NewMachine, devices, tensors
from tests.layouts import uploads
from tests.servers import SeaweedFS, until
from weightd.ipc import RequestRefused


@pytest.mark.parametrize("path", PATHS)
def test_what_an_engine_maps_on_a_gpu_is_what_the_files_hold(path: str, machine: NewMachine, model: Path) -> None:
    gpus = machine()
    daemon = gpus.daemon(WEIGHTD_CUDA_FILL=path)
    record = daemon.stage(model)
    assert (record["state"], record["error"], record["device"]) == ("ready", None, "cuda:0"), "the default is the GPU"
    assert devices(daemon)["cuda:0"]["fill_path"] == {"auto": "streamer", "ring": "ring"}[path]
    assert record["checkpoint_digest"] == daemon.stage(model, device="cpu")["checkpoint_digest"]
    reader = gpus.attach(daemon, model)
    assert (reader.found["device"], reader.found["digests"]) == ("cuda:0", EXPECTED)
    reader.engine.ask("let_go")
    assert gpus.fake.leaks([reader.engine.process.pid]) == {}, "an engine lets go of what it mapped"


@pytest.mark.parametrize("path", PATHS)
def test_objects_land_on_a_gpu_as_files_do(path: str, machine: NewMachine, model: Path, s3: SeaweedFS) -> None:
    gpus = machine()
    daemon = gpus.daemon(WEIGHTD_CUDA_FILL=path, **s3.env)
    uri = s3.upload(model, f"cuda-{path}")
    assert gpus.attach(daemon, uri).found["digests"] == EXPECTED


@pytest.mark.parametrize("path", PATHS)
def test_an_engines_own_layout_lands_on_a_gpu_cast_and_padded(path: str, machine: NewMachine, tmp_path: Path) -> None:
    gpus = machine()
    daemon = gpus.daemon(WEIGHTD_CUDA_FILL=path, WEIGHTD_EXTENT="1MiB")
    made = uploads.upload(uploads.checkpoint(tmp_path / "model"))
    daemon.client.put_layout(made.key.digest, made.document)
    found = gpus.attach(daemon, tmp_path / "model", layout=made.key.digest).found
    assert found["device"] == "cuda:0"
    raw = {name: bytes(value.view(-1).view(torch.uint8).numpy()) for name, value in made.expected.items()}
    assert found["digests"] == {name: hashlib.sha256(data).hexdigest() for name, data in raw.items()}


def test_what_is_in_host_memory_goes_to_a_gpu_from_there(machine: NewMachine, model: Path) -> None:
    gpus = machine()
    daemon = gpus.daemon(WEIGHTD_CUDA_FILL="auto")
    assert daemon.stage(model, device="cpu")["source"] == "file"
    assert gpus.attach(daemon, model).found["digests"] == EXPECTED
    assert daemon.stage(model)["source"] == "resident"


def test_a_small_ring_and_small_extents_are_enough(machine: NewMachine, model: Path) -> None:
    gpus = machine()
    daemon = gpus.daemon(WEIGHTD_CUDA_FILL="ring", WEIGHTD_EXTENT="1MiB", WEIGHTD_BOUNCE_BUFFERS="2")
    assert gpus.attach(daemon, model).found["digests"] == EXPECTED
    pid = daemon.status["daemon_pid"]
    pinned = gpus.fake.counters()[pid]["pinned"]
    assert pinned >= 2
    daemon.client.remove(daemon.stage(model)["id"], force=True, grace=0)
    until(lambda: not daemon.used_bytes, "the stage is gone")
    assert daemon.stage(model)["state"] == "ready"
    assert gpus.fake.counters()[pid]["pinned"] == pinned, "the ring is pinned once"


@pytest.mark.parametrize("path", PATHS)
def test_one_reading_fills_many_gpus_with_their_ranks(path: str, machine: NewMachine, model: Path) -> None:
    gpus = machine(devices=4, memory=64 * MiB)
    daemon = gpus.daemon(WEIGHTD_CUDA_FILL=path)
    splits = {"wide": 1, "q": 0, "o": 1, "embed": 0, "*": "replicate"}
    parallel = {"tp_size": 4, "tp_rank": "all", "map": splits}
    names = [f"cuda:{i}" for i in (2, 0, 3, 1)]
    record = daemon.stage(model, device=names, parallel=parallel)
    assert (record["state"], record["error"]) == ("ready", None)
    assert [segment["device"] for segment in record["segments"]] == names
    stored = sum(len(data) for shard in SHARDS.values() for _, _, data in shard.values())
    assert record["bytes_total"] == record["bytes_done"] == stored, "every byte is read once"
    on_host = daemon.stage(model, device="cpu", parallel=parallel)
    assert [s["digest"] for s in record["segments"]] == [s["digest"] for s in on_host["segments"]]
    reader = gpus.attach(daemon, stage=record["id"], tp_rank=2)
    assert reader.found["device"] == "cuda:3"
    assert gpus.attach(daemon, model, device="cuda:3", tp_rank=2).found["digests"] == reader.found["digests"]
    elsewhere = gpus.attach(daemon, model, device="cuda:1", tp_rank=2).found
    assert (elsewhere["code"], "cuda:1" in elsewhere["message"]) == ("unknown_stage", True)
    part = numpy.frombuffer(SHARDS["a.safetensors"]["wide"][2], numpy.uint16).reshape(512, 4096)[:, 2048:3072]
    assert reader.found["digests"]["wide"] == hashlib.sha256(part.tobytes()).hexdigest()
    with pytest.raises(RequestRefused, match="2 devices for 4 ranks"):
        daemon.stage(model, device=names[:2], parallel=parallel)
    with pytest.raises(RequestRefused, match="not in both"):
        daemon.stage(model, device=["cpu", *names[1:]], parallel=parallel)


def test_narrow_columns_are_copied_in_one_go(machine: NewMachine, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", {"m.safetensors": tensors(3, [("w", "BF16", (4096, 64))])})
    gpus = machine()
    daemon = gpus.daemon()
    record = daemon.stage(folder, parallel={"tp_size": 8, "tp_rank": [1, 6], "map": {"*": 1}})
    data = numpy.frombuffer((folder / "m.safetensors").read_bytes()[-4096 * 128 :], numpy.uint16).reshape(4096, 64)
    for rank in (1, 6):
        reader = gpus.attach(daemon, stage=record["id"], tp_rank=rank)
        part = data[:, rank * 8 : rank * 8 + 8].tobytes()
        assert reader.found["digests"]["w"] == hashlib.sha256(part).hexdigest()


def test_tensors_can_be_used_while_others_still_come(machine: NewMachine, model: Path) -> None:
    gpus = machine()
    daemon = gpus.daemon(WEIGHTD_EXTENT="1MiB")
    gpus.fake.set(delay_us=20_000)
    assert gpus.attach(daemon, model, wait=False).found["digests"] == EXPECTED


def test_expected_digests_are_checked_on_a_gpu(machine: NewMachine, model: Path) -> None:
    gpus = machine()
    daemon = gpus.daemon()
    whole = {name: hashlib.sha256((model / name).read_bytes()).hexdigest() for name in SHARDS}
    record = daemon.stage(model, expect_digest=whole)
    assert (record["state"], record["error"]) == ("ready", None)
    again = daemon.stage(model, expect_digest=record["checkpoint_digest"])
    assert again["id"] == record["id"]
    daemon.client.remove(record["id"])
    assert daemon.stage(model, expect_digest=record["checkpoint_digest"])["state"] == "ready"


@pytest.mark.parametrize("path", PATHS)
def test_a_bit_that_flips_in_gpu_memory_is_caught_and_named(path: str, machine: NewMachine, model: Path) -> None:
    gpus = machine()
    daemon = gpus.daemon(WEIGHTD_CUDA_FILL=path, WEIGHTD_EXTENT="1MiB")
    digest = daemon.stage(model, device="cpu")["checkpoint_digest"]
    assert daemon.stage(model, tensors={"include": ["norm"]})["state"] == "ready"  # the self-test is over
    gpus.fake.set(flip_at=3)
    record = daemon.stage(model, expect_digest=digest)
    assert (record["state"], record["error"]["code"]) == ("failed", "digest_mismatch")
    assert record["error"]["details"]["tensor"] in EXPECTED
    assert daemon.stage(model, expect_digest=digest)["state"] == "ready"


@pytest.mark.parametrize("parallel", [None, {"tp_size": 2, "tp_rank": "all", "map": {"wide": 1, "*": "replicate"}}])
def test_a_bit_that_flips_behind_a_file_with_the_right_sha256_is_caught(
    parallel: dict[str, Any] | None, machine: NewMachine, model: Path
) -> None:
    gpus = machine()
    daemon = gpus.daemon(WEIGHTD_EXTENT="1MiB")
    whole = {name: hashlib.sha256((model / name).read_bytes()).hexdigest() for name in SHARDS}
    daemon.stage(model, tensors={"include": ["norm"]})  # the self-test is over
    gpus.fake.set(flip_at=2)
    record = daemon.stage(model, expect_digest=whole, parallel=parallel)
    assert (record["state"], record["error"]["code"]) == ("failed", "digest_mismatch")
    for _ in range(2):  # and nothing of it is remembered
        record = daemon.stage(model, expect_digest=whole, parallel=parallel)
        assert (record["state"], record["error"]) == ("ready", None)
        daemon.client.remove(record["id"])


def test_a_streamer_that_corrupts_bytes_is_not_used(machine: NewMachine, model: Path) -> None:
    gpus = machine()
    gpus.fake.set(corrupt_streamer=1)
    daemon = gpus.daemon()
    assert gpus.attach(daemon, model).found["digests"] == EXPECTED
    assert devices(daemon)["cuda:0"]["fill_path"] == "ring"
    assert 'weightd_device_paths_info{device="cuda:0",digests="host",fill="ring"} 1.0' in daemon.get("/metrics")


def test_buffers_that_cannot_be_pinned_are_slow_and_right(machine: NewMachine, model: Path) -> None:
    gpus = machine()
    gpus.fake.set(fail_register=1)
    daemon = gpus.daemon(WEIGHTD_CUDA_FILL="ring")
    assert gpus.attach(daemon, model).found["digests"] == EXPECTED
    assert "cannot be pinned" in daemon.log.read_text()


def test_cancelling_a_load_leaves_nothing_on_the_gpu(machine: NewMachine, model: Path) -> None:
    gpus = machine()
    daemon = gpus.daemon(WEIGHTD_EXTENT="1MiB", WEIGHTD_CUDA_FILL="ring")
    gpus.fake.set(delay_us=200_000)
    record = daemon.stage(model, wait=0)
    daemon.client.remove(record["id"])
    until(lambda: not daemon.used_bytes and not gpus.fake.used(0), "its memory is free")
    gpus.fake.set(delay_us=0)
    assert daemon.stage(model)["state"] == "ready"
