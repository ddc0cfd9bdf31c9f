"""GPUs as devices, on a fake of the CUDA driver: every byte, every copy and every handle, short of a real GPU."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest

from tests.checkpoints import Tensor, nbytes, write_checkpoint
from tests.conftest import lacking
from tests.fakecuda import FakeCuda, build
from tests.servers import Daemon, Missing, SeaweedFS, until
from tests.test_adoption import bytes_read, ended, half_loaded
from weightd.ipc import RequestRefused

MiB = 1 << 20
WEIGHTD = str(Path(sys.executable).parent / "weightd")
PATHS = ("auto", "ring")
"""Settings of cuda_fill: libstreamer's CUDA backend, which passes its self-test on the fake, and our own ring."""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return build(tmp_path_factory.mktemp("fakecuda")).parent
    except Missing as error:
        lacking(str(error))
        raise


class Machine:
    """Fake GPUs, and daemons on them, which have to leave nothing behind."""

    def __init__(self, library: Path, folder: Path, devices: int, memory: int, strict: bool) -> None:
        self.fake = FakeCuda(library, folder / "fake", devices=devices, memory=memory, strict=strict)
        self._folder = folder
        self._daemons: list[Daemon] = []
        self.readers: list[Reader] = []

    def daemon(self, *arguments: str, **env: str) -> Daemon:
        # torch takes half a second to import, and none of the fake's readers wants it.
        settings = {"WEIGHTD_CUDA_RESERVE": "0", **self.fake.env, **env}
        server = Daemon(self._folder / f"daemon{len(self._daemons)}", *arguments, env=settings)
        self._daemons.append(server)
        server.start()
        return server

    def attach(self, daemon: Daemon, model: Path | str | None = None, **options: Any) -> Reader:
        """An engine that attaches; its first answer is ``found``."""
        env = options.pop("env", {})
        if model is not None:
            options["model"] = os.fspath(model)
        reader = Reader(daemon, options, {**os.environ, **self.fake.env, "FAKECUDA_STRICT": "0", **env})
        self.readers.append(reader)
        return reader

    def close(self) -> None:
        for reader in self.readers:
            reader.end()
        for daemon in self._daemons:
            daemon.stop()

    def check_clean(self) -> None:
        """Nothing is held any more, by anybody."""
        assert self.fake.leaks() == {}
        until(lambda: not any(self.fake.used(i) for i in range(self.fake.devices)), "GPU memory is free")


class Reader:
    """A process of tests.cuda_reader."""

    def __init__(self, daemon: Daemon, options: dict[str, Any], env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.cuda_reader", str(daemon.runtime_dir), json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
            cwd=Path(__file__).parents[1],
        )  # fmt: skip
        self.found = self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found: dict[str, Any] = json.loads(line) if line else {"exit": self.process.wait(60)}
        return found

    def tell(self, word: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        self.process.wait(60)
        if self.process.stdout is not None:
            self.process.stdout.close()


NewMachine = Callable[..., Machine]


@pytest.fixture
def machine(library: Path, tmp_path: Path) -> Iterator[NewMachine]:
    """Make a machine: ``machine(devices=2)``. What its daemons leave behind fails the test."""
    made: list[Machine] = []

    def make(*, devices: int = 1, memory: int = 1 << 30, strict: bool = True, clean: bool = True) -> Machine:
        found = Machine(library, tmp_path / f"machine{len(made)}", devices, memory, strict)
        found.clean = clean  # type: ignore[attr-defined]
        made.append(found)
        return found

    yield make
    for found in made:
        found.close()
    for found in made:
        if found.clean:  # type: ignore[attr-defined]
            found.check_clean()


def tensors(seed: int, sizes: list[tuple[str, str, tuple[int, ...]]]) -> dict[str, Tensor]:
    rng = numpy.random.default_rng(seed)
    return {name: (dtype, shape, rng.bytes(nbytes(dtype, shape))) for name, dtype, shape in sizes}


SHARDS = {
    "a.safetensors": tensors(1, [
        ("embed", "BF16", (1000, 513)), ("norm", "F32", (7,)), ("empty", "F16", (0, 4)), ("scale", "F8_E4M3", ()),
        ("wide", "BF16", (512, 4096)), ("bits", "F4", (3, 6)),
    ]),
    "b.safetensors": tensors(2, [("q", "F16", (256, 2048)), ("o", "F16", (2048, 256)), ("bias", "F64", (513,))]),
}  # fmt: skip
EXPECTED = {name: hashlib.sha256(data).hexdigest() for shard in SHARDS.values() for name, (_, _, data) in shard.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), SHARDS, index=True)
    (folder / "config.json").write_text("{}")
    return folder


def devices(daemon: Daemon) -> dict[str, dict[str, Any]]:
    return {device["name"]: device for device in daemon.client.node()["devices"]}


# ---------------------------------------------------------------------- filling and lending


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
    pid = reader.process.pid
    reader.end()
    assert gpus.fake.leaks([pid]) == {}, "an engine lets go of what it mapped"


@pytest.mark.parametrize("path", PATHS)
def test_objects_land_on_a_gpu_as_files_do(path: str, machine: NewMachine, model: Path, s3: SeaweedFS) -> None:
    gpus = machine()
    daemon = gpus.daemon(WEIGHTD_CUDA_FILL=path, **s3.env)
    uri = s3.upload(model, f"cuda-{path}")
    assert gpus.attach(daemon, uri).found["digests"] == EXPECTED


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
    assert gpus.attach(daemon, model, streamed=True).found["digests"] == EXPECTED


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


# ---------------------------------------------------------------------- what engines may do


def test_a_write_to_lent_gpu_memory_kills_the_writer_alone(machine: NewMachine, model: Path) -> None:
    gpus = machine(clean=False)  # the writer dies with what it holds
    daemon = gpus.daemon()
    writer, other = gpus.attach(daemon, model), gpus.attach(daemon, model)
    assert writer.tell("write")["exit"] == -signal.SIGSEGV
    assert other.tell("read")["digests"] == EXPECTED
    until(lambda: len(daemon.client.leases()) == 1, "the writer's lease has ended")
    assert gpus.attach(daemon, model).found["digests"] == EXPECTED


def test_a_private_copy_can_be_written_to_and_nobody_else_sees_it(machine: NewMachine, model: Path) -> None:
    gpus = machine()
    daemon = gpus.daemon()
    writer, other = gpus.attach(daemon, model, private=True), gpus.attach(daemon, model)
    assert writer.found["digests"] == EXPECTED
    first = next(iter(SHARDS["a.safetensors"]))
    changed = writer.tell("write")["digests"]
    assert {name for name in changed if changed[name] != EXPECTED[name]} == {first}
    assert other.tell("read")["digests"] == EXPECTED
    refused = gpus.attach(daemon, model, private=True, streamed=True).found
    assert (refused["error"], refused["code"]) == ("RequestRefused", "invalid_request")


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
    assert (blind.found["error"], blind.found["code"]) == ("DeviceUnavailable", "device_not_visible")
    assert gpus.fake.uuid(3) in blind.found["message"]
    out_of_range = gpus.attach(daemon, model, device="cuda:1", env=only)
    assert out_of_range.found["code"] == "device_not_visible"
    assert daemon.stage(model, device=gpus.fake.uuid(3))["id"] == stage["id"], "a UUID is a name too"


def test_a_daemon_that_does_not_see_a_gpu_says_which_it_sees(machine: NewMachine, model: Path) -> None:
    gpus = machine(devices=2)
    daemon = gpus.daemon(CUDA_VISIBLE_DEVICES="1")
    refused = gpus.attach(daemon, model, device="cuda:0")  # the engine's is another
    assert refused.found["error"] == "RequestRefused"
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


# ---------------------------------------------------------------------- outliving processes


def killed(daemon: Daemon, number: int = signal.SIGKILL) -> None:
    """Kill the daemon, and wait for the next one."""
    pid = daemon.status["daemon_pid"]
    os.kill(pid, number)
    until(lambda: daemon.status["serving"] and daemon.status["daemon_pid"] != pid, "another daemon serves", 60)


def test_weights_on_a_gpu_outlive_the_daemon(machine: NewMachine, model: Path) -> None:
    gpus = machine(clean=False)  # a killed process has no chance to let go
    daemon = gpus.daemon()
    record = daemon.stage(model)
    before = gpus.attach(daemon, model)
    killed(daemon)
    adopted = daemon.client.show(record["id"])
    assert (adopted["state"], adopted["checkpoint_digest"]) == ("ready", record["checkpoint_digest"])
    assert gpus.fake.used(0) == record["footprint_bytes"] == adopted["footprint_bytes"], "it is the same memory"
    assert before.tell("read")["digests"] == EXPECTED
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
    with half_loaded(lambda *options, env: gpus.daemon(*options, **env), s3, uri) as (daemon, gate, stage):
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
