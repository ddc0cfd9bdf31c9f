"""Digests: what is expected is enforced, and what changes on the way is caught and named."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from tests.checkpoint_files import write_index
from tests.fault_proxy import FaultProxy, Kind, Request
from tests.servers import Daemon, SeaweedFS, until
from weightd.ipc import DigestMismatch

MiB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files: one tensor of 20 MiB in the first, small ones and a matrix in the second."""
    folder = tmp_path_factory.mktemp("checkpoint")
    rng = numpy.random.default_rng(3)
    save_file({"large": rng.standard_normal((5 * MiB,), numpy.float32)}, folder / "a.safetensors")
    second = {f"small.{i}": rng.standard_normal(100 + 2 * i, numpy.float32) for i in range(30)}
    second["matrix"] = rng.standard_normal((1024, 1024), numpy.float32)
    save_file(second, folder / "b.safetensors")
    write_index(folder)
    return folder


@pytest.fixture(scope="module")
def uri(s3: SeaweedFS, folder: Path) -> str:
    return s3.upload(folder, "verified")


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[dict[str, object]]:
    """The record of a staging from disk."""
    with Daemon(tmp_path_factory.mktemp("clean")) as daemon:
        yield daemon.stage(folder)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flip_once(request: Request, done: list[bool], least: int = MiB) -> Kind | None:
    """Flip a bit in the first large read of the tensor ``large`` that comes, and in no other."""
    if request.path.endswith("/a.safetensors") and request.method == "GET" and request.nbytes >= least and not done:
        done.append(True)
        return "flip"
    return None


@pytest.mark.parametrize("kind", ["xxh3", "sha256", "prefixed", "one file of two"])
def test_bytes_that_are_expected_are_accepted(daemon: Daemon, folder: Path, clean: dict[str, str], kind: str) -> None:
    files = {path.name: sha256(path) for path in folder.glob("*.safetensors")}
    expected: object = {
        "xxh3": clean["checkpoint_digest"],
        "sha256": files,
        "prefixed": {name: f"sha256:{digest}" for name, digest in files.items()},
        "one file of two": {"a.safetensors": files["a.safetensors"]},
    }[kind]
    record = daemon.stage(folder, expect_digest=expected)
    assert record["state"] == "ready", record["error"]
    assert record["checkpoint_digest"] == clean["checkpoint_digest"]


def test_the_sha256_of_the_only_file_may_stand_alone(daemon: Daemon, folder: Path) -> None:
    path = folder / "b.safetensors"
    assert daemon.stage(path, expect_digest=sha256(path))["state"] == "ready"
    assert daemon.stage(path, expect_digest="0" * 64)["error"]["code"] == "digest_mismatch"


@pytest.mark.parametrize("expected", ["xxh3:" + "0" * 32, {"a.safetensors": "f" * 64}])
def test_other_bytes_than_expected_fail_the_stage(
    start_daemon: Callable[..., Daemon], folder: Path, expected: object
) -> None:
    daemon = start_daemon()
    record = daemon.stage(folder, expect_digest=expected)
    assert record["state"] == "failed"
    assert record["error"]["code"] == "digest_mismatch"
    assert "the source itself holds others than expected" in record["error"]["message"]
    until(lambda: daemon.used_bytes == 0, "its memory is free again")
    with pytest.raises(DigestMismatch):
        daemon.attach(folder, expect_digest=expected)


def test_a_flipped_bit_shows_in_the_digest_of_a_second_staging(
    start_daemon: Callable[..., Daemon], s3: SeaweedFS, uri: str, clean: dict[str, str]
) -> None:
    done: list[bool] = []
    with FaultProxy(s3.url, lambda request: flip_once(request, done)) as proxy:
        daemon = start_daemon(env={**s3.env, "AWS_ENDPOINT_URL": proxy.url})
        first = daemon.stage(uri)
        assert done
        assert first["state"] == "ready"
        assert first["checkpoint_digest"] != clean["checkpoint_digest"]
        bad = daemon.client.manifest(first["id"], leaves=True)
        daemon.client.remove(first["id"])
        second = daemon.stage(uri)
        assert second["checkpoint_digest"] == clean["checkpoint_digest"]
        good = daemon.client.manifest(second["id"], leaves=True)
    differing = [
        (tensor["name"], leaf)
        for tensor, other in zip(bad["tensors"], good["tensors"], strict=True)
        for leaf, pair in enumerate(zip(tensor["leaves"], other["leaves"], strict=True))
        if pair[0] != pair[1]
    ]
    assert len(differing) == 1


@pytest.mark.parametrize("parallel", [None, {"tp_size": 2, "tp_rank": "all", "map": {"matrix": 1, "*": 0}},
                                      {"tp_size": 2, "tp_rank": 1, "map": {"large": 0, "*": "replicate"}}])  # fmt: skip
@pytest.mark.parametrize("by", ["xxh3", "sha256"])
def test_a_bit_flipped_on_the_way_fails_the_stage_and_names_tensor_and_leaf(
    start_daemon: Callable[..., Daemon],
    s3: SeaweedFS,
    folder: Path,
    uri: str,
    clean: dict[str, str],
    by: str,
    parallel: object,
) -> None:
    files = {path.name: sha256(path) for path in folder.glob("*.safetensors")}
    expected: object = clean["checkpoint_digest"] if by == "xxh3" else files
    done: list[bool] = []
    with FaultProxy(s3.url, lambda request: flip_once(request, done)) as proxy:
        daemon = start_daemon(env={**s3.env, "AWS_ENDPOINT_URL": proxy.url})
        record = daemon.stage(uri, expect_digest=expected, parallel=parallel)
        assert done
        assert record["state"] == "failed"
        assert record["error"]["code"] == "digest_mismatch"
        assert record["error"]["details"]["tensor"] == "large"
        assert "leaf" in record["error"]["message"]
        until(lambda: daemon.used_bytes == 0, "its memory is free again")
        again = daemon.stage(uri, expect_digest=expected, parallel=parallel)
        assert again["state"] == "ready", again["error"]


def test_a_bit_flipped_in_every_reading_is_named_by_a_daemon_that_knows_the_leaves(
    start_daemon: Callable[..., Daemon], s3: SeaweedFS, uri: str, clean: dict[str, str]
) -> None:
    flipping: list[bool] = []
    with FaultProxy(s3.url, lambda request: "flip" if flipping and request.nbytes >= MiB else None) as proxy:
        daemon = start_daemon(env={**s3.env, "AWS_ENDPOINT_URL": proxy.url})
        record = daemon.stage(uri)
        daemon.client.remove(record["id"])
        flipping.append(True)
        record = daemon.stage(uri, expect_digest=clean["checkpoint_digest"])
    assert record["state"] == "failed"
    assert record["error"]["details"]["tensor"] in ("large", "matrix")
    assert record["error"]["details"]["leaf"] >= 0


def test_tensors_of_a_stage_with_an_expectation_are_not_lent_before_it_is_met(
    start_daemon: Callable[..., Daemon], s3: SeaweedFS, uri: str
) -> None:
    """A streaming client of a checkpoint that turns out to be another one has been given nothing."""
    daemon = start_daemon(env=s3.env)
    weights = daemon.attach(uri, wait=False, expect_digest="xxh3:" + "1" * 32)
    given = []
    with pytest.raises(DigestMismatch):
        given.extend(name for name, _ in weights.stream(timeout=120))
    assert given == []


def test_an_expectation_that_names_no_file_of_the_checkpoint_is_refused(daemon: Daemon, folder: Path) -> None:
    from weightd.ipc import RequestRefused

    with pytest.raises(RequestRefused, match=r"nope\.safetensors"):
        daemon.stage(folder, expect_digest={"nope.safetensors": "0" * 64})
    with pytest.raises(RequestRefused, match="2 files"):
        daemon.stage(folder, expect_digest="0" * 64)
    with pytest.raises(RequestRefused, match="expect_digest"):
        daemon.stage(folder, expect_digest="md5:1234")
