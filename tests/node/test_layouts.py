"""Engines' own layouts: uploaded, checked, kept, and staged into."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fault_proxy import FaultProxy
from tests.layouts.uploads import Upload, checkpoint, other, upload
from tests.servers import Daemon, SeaweedFS, until
from weightd.ipc import RequestRefused, StageFailed, Weights, attach
from weightd.ipc.recipe import digest_of


@pytest.fixture
def model(tmp_path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    folder = tmp_path / "model"
    tensors = checkpoint(folder)
    (folder / "config.json").write_text('{"model_type": "tests"}')
    return str(folder), tensors


@pytest.fixture
def node(start_daemon: Callable[..., Daemon]) -> Daemon:
    return start_daemon()


def put(node: Daemon, made: Upload) -> str:
    record = node.client.put_layout(made.key.digest, made.document)
    assert record["digest"] == digest_of(made.document)
    return made.key.digest


def assert_holds(weights: Weights, made: Upload) -> None:
    assert weights.manifest.layout == digest_of(made.document)
    assert list(weights) == list(made.expected)
    for name, expected in made.expected.items():
        assert weights[name].dtype == expected.dtype, name
        assert torch.equal(weights[name], expected), name


def lent(node: Daemon, model: str, layout: Any, **options: Any) -> Weights:
    return attach(model, layout=layout, socket=node.runtime_dir, timeout=60, **options)


def test_headers_tell_what_a_layout_is_keyed_by(node: Daemon, model: tuple[str, dict[str, torch.Tensor]]) -> None:
    uri, tensors = model
    found = node.client.checkpoint(uri)
    assert found["headers"] == upload(tensors).key.headers
    assert {name: shape for name, _, shape in found["tensors"]} == {n: list(t.shape) for n, t in tensors.items()}
    assert json.loads((Path(found["metadata"]) / "config.json").read_text()) == {"model_type": "tests"}
    assert node.client.stages() == []
    assert node.client.checkpoint(uri, weights="model-00002-of-00002.safetensors")["headers"] != found["headers"]


def test_an_engines_own_layout_is_staged_straight_from_the_source(
    node: Daemon, model: tuple[str, dict[str, torch.Tensor]]
) -> None:
    uri, tensors = model
    made = upload(tensors)
    key = put(node, made)
    with lent(node, uri, key) as weights, lent(node, uri, key) as again:
        assert_holds(weights, made)
        assert again.manifest.stage == weights.manifest.stage
        (stage,) = node.client.stages()
        assert stage["request"]["layout"] == {"key": key}
        assert stage["bytes_done"] <= sum(tensor.nbytes for tensor in tensors.values()) - tensors["left out"].nbytes
    with attach(uri, socket=node.runtime_dir, timeout=60) as stored:
        assert stored.manifest.stage != stage["id"]
        assert torch.equal(stored["q_proj"], tensors["q_proj"])


def test_ranks_are_one_stage_that_reads_each_byte_once(
    node: Daemon, model: tuple[str, dict[str, torch.Tensor]]
) -> None:
    uri, tensors = model
    ranks = [upload(tensors, rank, 2) for rank in (0, 1)]
    keys = [put(node, made) for made in ranks]
    for rank, made in enumerate(ranks):
        with lent(node, uri, keys, tp_rank=rank) as weights:
            assert_holds(weights, made)
            assert (weights.manifest.tp_rank, weights.manifest.tp_size) == (rank, 2)
    (stage,) = node.client.stages()
    assert stage["bytes_done"] == sum(tensor.nbytes for tensor in tensors.values()) - tensors["left out"].nbytes
    with pytest.raises(RequestRefused, match="no tp_rank 2"):
        lent(node, uri, keys, tp_rank=2)


def test_it_is_staged_from_an_object_store(
    s3: SeaweedFS, start_daemon: Callable[..., Daemon], model: tuple[str, dict[str, torch.Tensor]]
) -> None:
    folder, tensors = model
    uri = s3.upload(Path(folder), "layouts")
    node = start_daemon(env=s3.env)
    made = upload(tensors)
    with lent(node, uri, put(node, made)) as weights:
        assert_holds(weights, made)


def test_another_layout_of_what_is_resident_is_filled_from_memory(
    s3: SeaweedFS, start_daemon: Callable[..., Daemon], model: tuple[str, dict[str, torch.Tensor]]
) -> None:
    folder, tensors = model
    uri = s3.upload(Path(folder), "resident")
    with FaultProxy(s3.url) as origin:
        node = start_daemon(env={**s3.env, "AWS_ENDPOINT_URL": origin.url})
        ranks = [upload(tensors, rank, 2) for rank in (0, 1)]
        keys = [put(node, made) for made in ranks]
        with attach(uri, socket=node.runtime_dir, timeout=60) as stored:
            before = node.client.show(stored.manifest.stage)
        read = len(origin.seen)
        for rank, made in enumerate(ranks):
            with lent(node, uri, keys, tp_rank=rank) as weights:
                assert_holds(weights, made)
        stage = node.client.show(weights.manifest.stage)
        assert (before["source"], stage["source"]) == ("s3", "resident")
        assert stage["bytes_by_source"]["resident"] == stage["bytes_done"] > 0
        weights_read = [seen for seen in origin.seen[read:] if seen.method == "GET" and "safetensors" in seen.path]
        assert len(weights_read) <= 2, "the two headers"
        until(lambda: not node.client.leases(), "what it was filled from is let go")
        assert node.client.remove(before["id"])["state"] == "evicted"
        with lent(node, uri, keys, tp_rank=1) as weights:
            assert_holds(weights, ranks[1])


def test_a_daemon_that_was_killed_lends_it_again(node: Daemon, model: tuple[str, dict[str, torch.Tensor]]) -> None:
    uri, tensors = model
    made = upload(tensors)
    key = put(node, made)
    with lent(node, uri, key) as weights:
        os.kill(node.pid, signal.SIGKILL)
        with lent(node, uri, key) as again:
            assert_holds(again, made)
            assert again.manifest.stage == weights.manifest.stage
    assert [layout["key"] for layout in node.client.layouts()] == [key]


def test_a_stage_that_was_on_its_way_goes_on_in_its_layout(
    start_daemon: Callable[..., Daemon], model: tuple[str, dict[str, torch.Tensor]]
) -> None:
    uri, tensors = model
    node = start_daemon(env={"WEIGHTD_EXTENT": "1MiB", "WEIGHTD_THREADS": "1"})
    made = upload(tensors)
    key = put(node, made)
    stage = node.client.stage(uri, layout={"key": key})
    os.kill(node.pid, signal.SIGKILL)
    with lent(node, uri, key) as weights:
        assert_holds(weights, made)
        assert weights.manifest.stage == stage["id"]


def test_a_digest_may_be_expected_of_the_checkpoint(node: Daemon, model: tuple[str, dict[str, torch.Tensor]]) -> None:
    uri, tensors = model
    with attach(uri, socket=node.runtime_dir, timeout=60) as stored:
        digest = stored.manifest.checkpoint_digest
    made = upload(tensors)
    key = put(node, made)
    with lent(node, uri, key, expect_digest=digest) as weights:
        assert_holds(weights, made)
        assert weights.manifest.checkpoint_digest == digest
    node.client.remove(weights.manifest.stage)
    with pytest.raises(StageFailed, match="digest"):
        lent(node, uri, key, expect_digest="xxh3:" + "0" * 32)


def test_the_same_layout_again_changes_nothing_and_another_is_refused(
    node: Daemon, model: tuple[str, dict[str, torch.Tensor]]
) -> None:
    made = upload(model[1])
    key = put(node, made)
    assert put(node, made) == key
    with pytest.raises(RequestRefused) as refusal:
        node.client.put_layout(key, other(made))
    assert refusal.value.code == "layout_differs"
    assert node.client.layout(key)["about"] == made.key.document()


def test_a_layout_goes_once_no_stage_is_in_it(node: Daemon, model: tuple[str, dict[str, torch.Tensor]]) -> None:
    made = upload(model[1])
    key = put(node, made)
    with lent(node, model[0], key) as weights:
        with pytest.raises(RequestRefused) as refusal:
            node.client.remove_layout(key)
        assert refusal.value.code == "layout_in_use"
    node.client.remove(weights.manifest.stage, force=True, grace=0)
    until(lambda: not node.used_bytes, "the stage is gone")
    node.client.remove_layout(key)
    with pytest.raises(RequestRefused) as refusal:
        node.client.remove_layout(key)
    assert refusal.value.code == "unknown_layout"
    node.client.put_layout(key, other(made))  # by which nobody is given what was there before
    with attach(model[0], layout=key, socket=node.runtime_dir, timeout=60) as anew:
        assert anew.manifest.layout == digest_of(other(made))


def test_a_layout_of_another_checkpoint_is_refused_by_its_headers(
    node: Daemon, model: tuple[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    made = upload(model[1])
    tensors = checkpoint(tmp_path / "another")
    tensors["norm"] = tensors["norm"][:-1].clone()
    from safetensors.torch import save_file

    (tmp_path / "another").joinpath("model-00001-of-00002.safetensors").unlink()
    (tmp_path / "another").joinpath("model-00002-of-00002.safetensors").unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "another/model.safetensors")
    with pytest.raises(RequestRefused, match="of a checkpoint with headers") as refusal:
        lent(node, str(tmp_path / "another"), put(node, made))
    assert refusal.value.code == "invalid_request"
    assert node.client.stages() == []


def test_a_layout_that_nobody_uploaded_is_unknown(node: Daemon, model: tuple[str, dict[str, torch.Tensor]]) -> None:
    made = upload(model[1])
    with pytest.raises(RequestRefused) as refusal:
        lent(node, model[0], made.key.digest)
    assert refusal.value.code == "unknown_layout"
    with pytest.raises(RequestRefused) as refusal:
        node.client.layout(made.key.digest)
    assert refusal.value.code == "unknown_layout"


def test_whoever_waits_for_a_layout_is_told_when_it_comes(
    node: Daemon, model: tuple[str, dict[str, torch.Tensor]]
) -> None:
    made = upload(model[1])
    found: list[dict[str, Any]] = []
    waiting = threading.Thread(target=lambda: found.append(node.client.layout(made.key.digest, wait=60)))
    waiting.start()
    put(node, made)
    waiting.join(60)
    assert found == [node.client.layout(made.key.digest)]


def test_a_layout_says_what_is_in_it_and_nothing_else_may(
    node: Daemon, model: tuple[str, dict[str, torch.Tensor]]
) -> None:
    key = put(node, upload(model[1]))
    for also in ({"parallel": {"tp_size": 2, "map": {"*": 0}}}, {"tensors": {"include": ["q_proj"]}}):
        with pytest.raises(RequestRefused, match="leave parallel and tensors out"):
            node.client.stage(model[0], layout={"key": key}, **also)


def broken(made: Upload) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is wrong with it, by the words that say so."""
    document = made.document

    def changed(**fields: Any) -> dict[str, Any]:
        return {**json.loads(json.dumps(document)), **fields}

    copies, boxes, entries = document["copies"], document["boxes"], document["entries"]
    yield "key: what is described has the key", changed(key={**document["key"], "engine": "another"})
    yield "key: its fields are", changed(key={"engine": "tests"})
    yield "key.rank: a str", changed(key={**document["key"], "rank": "0"})
    yield "surplus: a layout has no such field", changed(surplus=1)
    yield "copies: a list", changed(copies={})
    yield "copies.0: a list of 5 whole numbers", changed(copies=[[0]])
    yield "copies.0: -1 is no whole number", changed(copies=[[0, 0, 0, -1, 0]])
    yield "copies.0: it names entry 99", changed(copies=[[0, 99, 0, 0, 0]])
    yield "reaches element", changed(copies=[[*copies[0][:4], 1 << 40], *copies[1:]])
    yield "bytes of", changed(copies=copies[1:])
    yield "written more than once", changed(copies=[*copies, copies[0]])
    yield "casts: they name copies up to", changed(casts=[len(copies)])
    yield "boxes.0: 2 sizes, 1 and 2 strides", changed(boxes=[[[2, 2], [1], [2, 1]], *boxes[1:]])
    yield "boxes.0: 65 dimensions", changed(boxes=[[[1] * 65] * 3, *boxes[1:]])
    yield "entries.0: 'F4' is no dtype", changed(entries=[["x", "F4", [2]], *entries[1:]])
    yield "entries.0: a name of 0 characters", changed(entries=[["", *entries[0][1:]], *entries[1:]])
    yield "two entries of the recipe have the same name", changed(entries=[*entries[:-1], [entries[0][0], "U8", [0]]])
    yield "more than any memory has", changed(entries=[["x", "F64", [1 << 50]], *entries[1:]])
    yield "constants.0: it names entry 99", changed(constants=[[99, "00", 0, [1], [1]]])
    yield "no hexadecimal digits", changed(constants=[[0, "zz", 0, [1], [1]]])
    yield "a constant of 1 bytes is no", changed(constants=[[0, "00", 0, [1], [1]], *document["constants"]])
    huge = [[1 << 20, 1 << 20], [0, 0], [0, 0]]
    yield "more than", changed(boxes=[*boxes, huge], copies=[*copies, [0, 0, len(boxes), 0, 0]])


def test_a_hostile_layout_is_refused_by_field(node: Daemon, model: tuple[str, dict[str, torch.Tensor]]) -> None:
    made = upload(model[1])
    for words, document in broken(made):
        with pytest.raises(RequestRefused) as refusal:
            node.client.put_layout(made.key.digest, document)
        assert refusal.value.code == "invalid_request", words
        assert words in str(refusal.value), (words, str(refusal.value))
    assert node.client.layouts() == []


@pytest.mark.parametrize(
    ("words", "copy"),
    [("names tensor 99", [99, 0, 0, 0, 0]), ("reaches element", [0, 0, 0, 1 << 40, 0])],
)
def test_what_only_the_headers_tell_is_refused_when_it_is_staged(
    words: str, copy: list[int], node: Daemon, model: tuple[str, dict[str, torch.Tensor]]
) -> None:
    made = upload(model[1])
    first = made.document["copies"][0]
    document = {**made.document, "copies": [[copy[0] or first[0], *first[1:3], copy[3], first[4]],
                                            *made.document["copies"][1:]]}  # fmt: skip
    node.client.put_layout(made.key.digest, document)
    with pytest.raises(RequestRefused, match=words):
        lent(node, model[0], made.key.digest)


def test_a_cast_that_torch_does_otherwise_is_refused(node: Daemon, model: tuple[str, dict[str, torch.Tensor]]) -> None:
    made = upload(model[1])
    steps = next(i for i, entry in enumerate(made.document["entries"]) if entry[0] == "steps")
    index = next(i for i, copy in enumerate(made.document["copies"]) if copy[1] == steps)
    node.client.put_layout(made.key.digest, {**made.document, "casts": [*made.document["casts"], index]})
    with pytest.raises(RequestRefused, match="a cast of tensor 'steps' from I64 to I64"):
        lent(node, model[0], made.key.digest)
