"""What is not resident, over S3: staged by who asks first, passed on, or refused."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from botocore.exceptions import ClientError, IncompleteReadError, ResponseStreamingError
from safetensors.numpy import load_file, save_file

from tests.checkpoint_files import INDEX
from tests.fault_proxy import FaultProxy, Request
from tests.s3.conftest import SHARDS, Endpoint, MiB, Start, refusal, weight_bytes
from tests.servers import SeaweedFS, until


def test_the_first_get_stages_and_whoever_comes_after_reads_nothing_at_the_origin(
    start_daemon: Start, s3: SeaweedFS, origin: FaultProxy, model: Path
) -> None:
    s3.upload(model, "s3-cold")
    here = Endpoint(start_daemon, origin.url, s3.env, "--extent", "1MiB")
    keys = [f"s3-cold/{shard}" for shard in SHARDS]
    assert here.get(f"s3-cold/{INDEX}") == (model / INDEX).read_bytes()
    assert here.daemon.client.stages() == [], "who reads what is beside weights may want no weights"
    with ThreadPoolExecutor(8) as pool:
        ranges = [(key, first) for key in keys for first in range(0, 12 * MiB, MiB)]
        truth = {key: (model / key.partition("/")[2]).read_bytes() for key in keys}
        found = list(pool.map(lambda at: here.get(at[0], Range=f"bytes={at[1]}-{at[1] + MiB - 1}"), ranges))
    assert found == [truth[key][first : first + MiB] for key, first in ranges]
    (stage,) = here.daemon.client.stages()
    assert (stage["model"], stage["device"]) == ("s3://models/s3-cold", "cpu")
    until(lambda: here.daemon.client.show(stage["id"])["state"] == "ready", "it is staged")
    tensors = sum(tensor.nbytes for shard in SHARDS for tensor in load_file(model / shard).values())
    assert here.daemon.client.show(stage["id"])["bytes_done"] == tensors
    assert here.sent("passed") == (model / INDEX).stat().st_size
    before = weight_bytes(origin)
    for key in keys:
        assert here.get(key) == truth[key]
    assert weight_bytes(origin) == before


def test_what_is_replaced_while_it_loads_is_never_sent_under_the_tag_of_what_was_there(
    start_daemon: Start, s3: SeaweedFS, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": numpy.zeros(4 * MiB, numpy.uint8), "x": numpy.zeros(4 * MiB, numpy.uint8)}, path)
    old = path.read_bytes()
    s3.upload(tmp_path, "s3-replaced-amid")
    save_file({"w": numpy.ones(4 * MiB, numpy.uint8), "x": numpy.ones(4 * MiB, numpy.uint8)}, path)
    replaced = threading.Event()

    def amid(request: Request) -> None:
        """Another file takes its place just before the first of its weights are read."""
        if request.nbytes > 300_000 and not replaced.is_set():
            s3.upload(tmp_path, "s3-replaced-amid")
            replaced.set()

    with FaultProxy(s3.url, amid) as proxy:
        here = Endpoint(start_daemon, proxy.url, s3.env)
        asked = {"Bucket": "models", "Key": "s3-replaced-amid/model.safetensors"}
        tag = here.s3.head_object(**asked)["ETag"]
        with contextlib.suppress(ClientError, IncompleteReadError, ResponseStreamingError):  # refused, or cut short
            found = here.s3.get_object(**asked, Range=f"bytes={4 * MiB}-{5 * MiB - 1}")
            assert (found["Body"].read() == old[4 * MiB : 5 * MiB]) == (found["ETag"] == tag)
            assert found["ETag"] != tag, "bytes that the origin has no more came from there"
        assert replaced.is_set()


def test_a_range_is_answered_as_soon_as_its_bytes_are_verified(start_daemon: Start, s3: SeaweedFS, model: Path) -> None:
    s3.upload(model, "s3-early")
    opened = threading.Event()

    def only_the_beginning(request: Request) -> None:
        """Weights of the first two MiB of the first shard come, all others once that is opened."""
        if request.nbytes > 300_000 and not (request.path.endswith(SHARDS[0]) and (request.first or 0) < 2 * MiB):
            opened.wait(120)

    with FaultProxy(s3.url, only_the_beginning) as slow:
        here = Endpoint(start_daemon, slow.url, s3.env, "--extent", "1MiB")
        try:
            early = here.get(f"s3-early/{SHARDS[0]}", Range="bytes=0-999999")
            assert early == (model / SHARDS[0]).read_bytes()[:1_000_000]
            (stage,) = here.daemon.client.stages()
            assert stage["state"] == "loading"
            late = threading.Thread(target=lambda: found.append(here.get(f"s3-early/{SHARDS[1]}")))
            found: list[bytes] = []
            late.start()
            until(lambda: here.daemon.client.leases(), "it is waited for under a lease")
            (lease,) = here.daemon.client.leases()
            assert lease["client"].startswith("127.0.0.1:")
            assert lease["pid"] is None
        finally:
            opened.set()
        late.join(60)
        assert found == [(model / SHARDS[1]).read_bytes()]
        assert here.sent("waited") > 0


def test_what_may_not_be_kept_is_passed_on_and_what_may_not_be_passed_on_is_refused(
    start_daemon: Start, s3: SeaweedFS, model: Path
) -> None:
    s3.upload(model, "s3-passed")
    passing = Endpoint(start_daemon, s3.url, s3.env, "--s3-absent", "pass")
    truth = (model / SHARDS[0]).read_bytes()
    assert passing.get(f"s3-passed/{SHARDS[0]}") == truth
    assert passing.get(f"s3-passed/{SHARDS[0]}", Range="bytes=1000-1000999") == truth[1000:1_001_000]
    assert passing.daemon.client.stages() == []
    assert passing.sent("passed") == len(truth) + 1_000_000
    refusing = Endpoint(start_daemon, s3.url, s3.env, "--s3-absent", "refuse")
    asked = {"Bucket": "models", "Key": f"s3-passed/{SHARDS[0]}"}
    assert refusal(refusing.s3.get_object, **asked) == ("AccessDenied", 403)
    assert refusing.s3.head_object(**asked)["ContentLength"] == len(truth)
    assert refusing.get("s3-passed/config.json") == (model / "config.json").read_bytes()
    refusing.daemon.stage("s3://models/s3-passed")
    assert refusing.get(f"s3-passed/{SHARDS[0]}") == truth


def test_what_does_not_fit_is_passed_on(start_daemon: Start, s3: SeaweedFS, model: Path) -> None:
    s3.upload(model, "s3-too-large")
    here = Endpoint(start_daemon, s3.url, s3.env, "--capacity", "cpu=1MiB")
    assert here.get(f"s3-too-large/{SHARDS[0]}") == (model / SHARDS[0]).read_bytes()
    assert here.sent("resident") == here.sent("waited") == 0
    assert "is passed on, it cannot be staged" in here.daemon.log.read_text()


def test_files_that_are_not_the_checkpoint_are_staged_by_their_own_names(
    start_daemon: Start, s3: SeaweedFS, model: Path, tmp_path: Path
) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({name: numpy.full(200_000, ord(name[0]), numpy.float32)}, tmp_path / name)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02" * 1000)
    s3.upload(tmp_path, "s3-several")
    here = Endpoint(start_daemon, s3.url, s3.env)
    for path in tmp_path.iterdir():
        assert here.get(f"s3-several/{path.name}") == path.read_bytes()
    ready = [stage for stage in here.daemon.client.stages() if stage["state"] != "failed"]
    assert len(ready) == 2


def test_only_what_may_be_staged_is_there(start_daemon: Start, s3: SeaweedFS, model: Path) -> None:
    for prefix in ("s3-allowed", "s3-allowed-not", "s3-forbidden"):
        s3.upload(model, prefix)
    here = Endpoint(start_daemon, s3.url, s3.env, "--allow", "s3://models/s3-allowed")
    assert here.get("s3-allowed/config.json") == (model / "config.json").read_bytes()
    for prefix in ("s3-allowed-not", "s3-forbidden"):
        for name in ("config.json", SHARDS[0]):
            asked = {"Bucket": "models", "Key": f"{prefix}/{name}"}
            assert refusal(here.s3.get_object, **asked) == ("AccessDenied", 403)
        assert refusal(here.s3.list_objects_v2, Bucket="models", Prefix=f"{prefix}/") == ("AccessDenied", 403)
    assert refusal(here.s3.list_objects_v2, Bucket="others") == ("AccessDenied", 403)
    for delimiter in ({}, {"Delimiter": "/"}):
        found = here.s3.list_objects_v2(Bucket="models", **delimiter)
        keys = [item["Key"] for item in found.get("Contents", [])]
        keys += [item["Prefix"] for item in found.get("CommonPrefixes", [])]
        assert keys
        assert all(key.startswith("s3-allowed/") for key in keys)
