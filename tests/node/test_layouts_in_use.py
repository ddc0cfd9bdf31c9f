"""An engine's own layout under all else that may be asked of a stage: files, checksums, moves, eviction."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.layouts.uploads import Upload, checkpoint, upload
from tests.servers import Daemon, until
from weightd.ipc import StageFailed, Weights, attach

Start = Callable[..., Daemon]


def lent(node: Daemon, model: Path, made: Upload, **options: Any) -> Weights:
    node.client.put_layout(made.key.digest, made.document)
    return attach(model, layout=made.key.digest, socket=node.runtime_dir, timeout=60, **options)


def assert_holds(weights: Weights, made: Upload) -> None:
    for name, expected in made.expected.items():
        assert torch.equal(weights[name], expected), name


def test_files_are_chosen_as_of_any_checkpoint(start_daemon: Start, tmp_path: Path) -> None:
    node, model = start_daemon(), tmp_path / "model"
    tensors = checkpoint(model)
    others = {name: tensor + 1 for name, tensor in load_file(model / "model-00002-of-00002.safetensors").items()}
    save_file(others, model / "another.safetensors")
    chosen = ["model-00001-of-00002.safetensors", "another.safetensors"]
    made, stored = upload({**tensors, **others}), upload(tensors)
    assert made.key == stored.key, "what differs are values alone"
    with lent(node, model, made, weights=chosen) as weights:
        assert_holds(weights, made)
    with lent(node, model, stored, weights="model-*.safetensors") as weights:
        assert_holds(weights, stored)
    assert len({stage["id"] for stage in node.client.stages()}) == 2


def test_whole_files_may_be_expected_of_which_a_layout_takes_a_part(start_daemon: Start, tmp_path: Path) -> None:
    node, model = start_daemon(), tmp_path / "model"
    made = upload(checkpoint(model), 1, 2)
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in model.glob("*.safetensors")}
    with lent(node, model, made, expect_digest=sums) as weights:
        assert_holds(weights, made)
    node.client.remove(weights.manifest.stage)
    name = "model-00002-of-00002.safetensors"
    with pytest.raises(StageFailed, match=name):
        lent(node, model, made, expect_digest={**sums, name: "0" * 64})


def test_a_stage_moves_in_its_layout_without_its_source(start_daemon: Start, tmp_path: Path) -> None:
    node = start_daemon(env={"WEIGHTD_CAPACITY": "cpu:0=64MiB,cpu:1=64MiB"})
    model = tmp_path / "model"
    made = upload(checkpoint(model))
    with lent(node, model, made, device="cpu:0") as weights:
        stage = weights.manifest.stage
    until(lambda: not node.client.leases(), "the closed lease is gone")
    shutil.rmtree(model)
    moved = node.client.move(stage, "cpu:1")
    assert (moved["device"], moved["request"]["layout"]) == ("cpu:1", {"key": made.key.digest})
    with attach(stage=stage, socket=node.runtime_dir, timeout=60) as again:
        assert again.manifest.layout == weights.manifest.layout
        assert_holds(again, made)


def test_what_it_is_filled_from_may_be_evicted_by_force_meanwhile(start_daemon: Start, tmp_path: Path) -> None:
    node = start_daemon(env={"WEIGHTD_EXTENT": "1MiB", "WEIGHTD_THREADS": "1"})
    model = tmp_path / "model"
    made = upload(checkpoint(model))
    node.client.put_layout(made.key.digest, made.document)
    sources = set()
    for _ in range(8):
        donor = node.client.stage(str(model), wait=60)
        stage = node.client.stage(str(model), layout={"key": made.key.digest})
        node.client.remove(donor["id"], force=True, grace=0)
        with attach(stage=stage["id"], socket=node.runtime_dir, timeout=60) as weights:
            assert_holds(weights, made)
        sources.add(node.client.show(stage["id"])["source"])
        until(lambda: not node.client.leases(), "the closed lease is gone")
        node.client.remove(stage["id"])
        until(lambda: not node.used_bytes, "both have gone")
    assert sources <= {"resident", "file"}
