"""Staging from each kind of source, against real servers."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import lacking
from tests.servers import Daemon, FakeGCS, SeaweedFS, until
from weightd.daemon.devices import libstreamer
from weightd.ipc import Weights


def checkpoint(folder: Path, seed: int = 0, shards: int = 3) -> dict[str, numpy.ndarray]:
    """Shards with an index: large tensors, many small ones, an empty one; returns what they hold."""
    rng = numpy.random.default_rng(seed)
    tensors: dict[str, numpy.ndarray] = {}
    weight_map = {}
    folder.mkdir(parents=True)
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        held = {f"layer.{shard}.weight": rng.standard_normal((1500, 1777), numpy.float32)}
        held |= {f"layer.{shard}.bias.{i}": rng.standard_normal(i, numpy.float32) for i in range(40)}
        save_file(held, folder / name)
        weight_map |= dict.fromkeys(held, name)
        tensors |= held
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "test"}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return tensors


def assert_holds(weights: Weights, tensors: dict[str, numpy.ndarray]) -> None:
    assert set(weights) == set(tensors)
    for name, expected in tensors.items():
        assert weights.entry(name).offset % 256 == 0
        assert bytes(weights.raw(name)) == expected.tobytes(), name


def test_a_folder_with_shards_arrives_byte_for_byte(daemon: Daemon, tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path / "m")
    record = daemon.stage(tmp_path / "m")
    assert record["state"] == "ready", record["error"]
    assert record["bytes_total"] == record["bytes_done"] == sum(tensor.nbytes for tensor in tensors.values())
    with daemon.attach(tmp_path / "m") as weights:
        assert_holds(weights, tensors)
        assert weights.metadata is not None
        kept = sorted(path.relative_to(weights.metadata).as_posix() for path in weights.metadata.rglob("*.json"))
        assert kept == ["1_Pooling/config.json", "config.json", "model.safetensors.index.json"]


@pytest.mark.usefixtures("host_fill")
def test_more_scalars_than_one_call_reads_arrive_whether_pages_are_huge_or_not(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    rng = numpy.random.default_rng(7)
    tensors = {f"layer.{i}.scale": numpy.array(rng.standard_normal(), numpy.float32) for i in range(1500)}
    tensors["weight"] = rng.standard_normal((700, 1024), numpy.float32)
    (tmp_path / "m").mkdir()
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    daemon = start_daemon()
    record = daemon.stage(tmp_path / "m")
    assert record["state"] == "ready", record["error"]
    with daemon.attach(tmp_path / "m") as weights:
        assert_holds(weights, tensors)


@pytest.mark.parametrize("prefix", ["", "file://", "file:"])
def test_one_file_is_a_checkpoint(daemon: Daemon, tmp_path: Path, prefix: str) -> None:
    tensors = {"w": numpy.arange(300, dtype=numpy.int16)}
    save_file(tensors, tmp_path / "one file.safetensors")
    with daemon.attach(f"{prefix}{tmp_path}/one file.safetensors") as weights:
        assert_holds(weights, tensors)


@pytest.fixture(scope="module")
def cloud_daemon(tmp_path_factory: pytest.TempPathFactory, s3: SeaweedFS, gcs: FakeGCS) -> object:
    with Daemon(tmp_path_factory.mktemp("cloud"), env={**s3.env, **gcs.env}) as server:
        yield server


@pytest.mark.parametrize("kind", ["s3", "gcs"])
def test_an_object_store_gives_the_same_bytes_and_digest_as_the_disk(
    cloud_daemon: Daemon, request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    tensors = checkpoint(tmp_path / "m", seed=1)
    uri = request.getfixturevalue(kind).upload(tmp_path / "m", "sharded")
    record = cloud_daemon.stage(uri)
    assert record["state"] == "ready", record["error"]
    assert record["source"] == uri.partition(":")[0]
    assert record["checkpoint_digest"] == cloud_daemon.stage(tmp_path / "m")["checkpoint_digest"]
    with cloud_daemon.attach(uri) as weights:
        assert_holds(weights, tensors)
        assert weights.metadata is not None
        assert (weights.metadata / "1_Pooling" / "config.json").read_text() == "{}"


def test_one_object_is_a_checkpoint(cloud_daemon: Daemon, s3: SeaweedFS, tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path / "m", shards=2)
    uri = s3.upload(tmp_path / "m", "single")
    with cloud_daemon.attach(f"{uri}/model-00001-of-00002.safetensors") as weights:
        assert_holds(weights, {name: value for name, value in tensors.items() if name.startswith("layer.0.")})


def test_ranks_of_an_object_are_cut_from_one_reading(cloud_daemon: Daemon, s3: SeaweedFS, tmp_path: Path) -> None:
    rng = numpy.random.default_rng(5)
    tensors = {
        "rows": rng.standard_normal((1024, 900), numpy.float32),
        "columns": rng.standard_normal((900, 1024), numpy.float32),
        "all": rng.standard_normal(100, numpy.float32),
    }
    (tmp_path / "m").mkdir()
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    uri = s3.upload(tmp_path / "m", "ranks")
    plan = {"tp_size": 2, "tp_rank": "all", "map": {"rows": 0, "col*": 1, "*": "replicate"}}
    record = cloud_daemon.stage(uri, parallel=plan)
    assert record["state"] == "ready", record["error"]
    assert record["bytes_total"] == sum(tensor.nbytes for tensor in tensors.values())
    for rank in (0, 1):
        with cloud_daemon.attach(uri, tp_rank=rank) as weights:
            assert weights.manifest.tp_rank == rank
            assert bytes(weights.raw("rows")) == numpy.split(tensors["rows"], 2)[rank].tobytes()
            assert bytes(weights.raw("columns")) == numpy.split(tensors["columns"], 2, axis=1)[rank].tobytes()
            assert bytes(weights.raw("all")) == tensors["all"].tobytes()


@pytest.mark.parametrize("uri", ["s3://models/nothing-here", "s3://no-such-bucket/x", "gs://models/nothing-here"])
def test_an_empty_prefix_is_said_to_be_empty(cloud_daemon: Daemon, uri: str) -> None:
    record = cloud_daemon.stage(uri)
    assert record["state"] == "failed"
    assert record["error"]["code"] == "checkpoint_not_found"
    assert uri in record["error"]["message"]


def test_an_object_replaced_while_it_is_read_fails_the_stage(
    start_daemon: Callable[..., Daemon], s3: SeaweedFS, tmp_path: Path
) -> None:
    from tests.fault_proxy import FaultProxy, Request

    checkpoint(tmp_path / "m", shards=1)
    uri = s3.upload(tmp_path / "m", "replaced")
    name = "model-00001-of-00001.safetensors"
    other = (tmp_path / "m" / name).read_bytes()[:-1] + b"\x7f"

    def replace(request: Request) -> None:
        if request.nbytes > 1 << 20 and not replaced:
            replaced.append(True)
            import obstore

            obstore.put(s3.store(), f"replaced/{name}", other)

    replaced: list[bool] = []
    with FaultProxy(s3.url, replace) as proxy:  # type: ignore[arg-type]
        record = start_daemon(env={**s3.env, "AWS_ENDPOINT_URL": proxy.url}).stage(uri)
    assert replaced
    assert record["state"] == "failed"
    assert record["error"]["code"] == "checkpoint_changed"
    assert name in record["error"]["message"]


def test_a_replaced_checkpoint_of_the_same_shape_is_never_served(daemon: Daemon, tmp_path: Path) -> None:
    save_file({"w": numpy.zeros(1000, numpy.float32)}, tmp_path / "model.safetensors")
    first = daemon.attach(tmp_path)
    save_file({"w": numpy.ones(1000, numpy.float32)}, tmp_path / "new")
    (tmp_path / "new").rename(tmp_path / "model.safetensors")
    with daemon.attach(tmp_path) as second:
        assert second["w"].sum() == 1000
        assert first["w"].sum() == 0
        assert first.digest != second.digest
    first.close()


def test_what_is_resident_is_served_while_its_source_is_away(
    start_daemon: Callable[..., Daemon], s3: SeaweedFS, tmp_path: Path
) -> None:
    from tests.fault_proxy import FaultProxy

    tensors = checkpoint(tmp_path / "m", shards=1)
    uri = s3.upload(tmp_path / "m", "away")
    with FaultProxy(s3.url) as proxy:
        server = start_daemon(env={**s3.env, "AWS_ENDPOINT_URL": proxy.url})
        assert server.stage(uri)["state"] == "ready"
    with server.attach(uri) as weights:
        assert_holds(weights, tensors)


def test_safetensors_itself_reads_the_same(daemon: Daemon, minilm: Path) -> None:
    with daemon.attach(minilm) as weights:
        assert_holds(weights, load_file(minilm / "model.safetensors"))


def test_lacking_is_a_skip_here_and_a_failure_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception):
        lacking("x")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception):
        lacking("x")


def test_who_waits_for_the_end_of_all_streamers_is_not_kept_waiting_by_new_ones() -> None:
    """One that may still write can be closed only once nobody loads: stages that come one after another must not be
    what it waits for."""
    first, unsettled = libstreamer.Streamer(), libstreamer.Streamer()
    unsettled._unsettled = True
    closing = threading.Thread(target=unsettled.close)
    closing.start()
    until(lambda: libstreamer._users.waiting, "it waits for the end")
    begun: list[libstreamer.Streamer] = []
    beginning = threading.Thread(target=lambda: begun.append(libstreamer.Streamer()))
    beginning.start()
    beginning.join(0.2)
    assert not begun
    first.close()
    closing.join(60)
    beginning.join(60)
    assert not closing.is_alive()
    begun[0].close()


def test_ending_one_streamer_leaves_others_and_what_they_wait_for_alone(
    s3: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own end of one shuts the clients of all of them down: stages that load beside others know it."""
    data = os.urandom(8 << 20)
    (tmp_path / "a.safetensors").write_bytes(data)
    uri = s3.upload(tmp_path, "streamers") + "/a.safetensors"
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    target = mmap.mmap(-1, len(data))
    address = ctypes.addressof(ctypes.c_char.from_buffer(target))

    def submit(streamer: libstreamer.Streamer, piece: int) -> None:
        streamer.submit(uri, [piece << 20], [1 << 20], [address + (piece << 20)])

    def answered(streamer: libstreamer.Streamer) -> int:
        return until(lambda: streamer.response(0.5), "it answers").code

    first, second = libstreamer.Streamer(), libstreamer.Streamer()
    submit(first, 0)
    submit(second, 1)
    assert answered(second) == libstreamer.SUCCESS
    submit(second, 2)  # what is under way when it is closed is waited for
    second.close()
    assert answered(first) == libstreamer.SUCCESS
    third = libstreamer.Streamer()
    for piece in range(3, 8):
        submit(first if piece % 2 else third, piece)
        assert answered(first if piece % 2 else third) == libstreamer.SUCCESS
    first.close()
    third.close()
    assert target[:] == data
