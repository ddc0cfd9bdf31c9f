"""What is known of a stage's segments: their manifests, which file each tensor is of, and what peers know them by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.filling.fills import Stored, store, tensor
from weightd.daemon.checkpoints.cache import Cache
from weightd.daemon.devices.cpu import CpuDevice
from weightd.daemon.errors import InvalidRequest
from weightd.daemon.layouts.recipe import Recipe
from weightd.daemon.sources.base import SourceFile
from weightd.daemon.stages.manifests import SealedManifest
from weightd.daemon.stages.planning import Plan, SegmentInfo, allocated, expected_sha256, make_plan
from weightd.daemon.stages.request import parse_request
from weightd.daemon.stages.segments import entry_files, key_of, segment_manifest
from weightd.daemon.stages.stage import Stage

HEX = "ab" * 32
TP = {"tp_size": 2, "tp_rank": "all", "map": {"wide": 1, "*": "replicate"}}


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    return store(tmp_path, {"a": tensor("F32", (3,)), "wide": tensor("BF16", (4, 6))}, {"b": tensor("U8", (5,))})


def planned(stored: Stored, **request: Any) -> tuple[Stage, Plan]:
    listing = stored.checkpoint.listing
    stage = Stage(listing.uri, ["cpu", "cpu:1"], parse_request({"model": "/m", **request}), listing)
    stage.plan = make_plan(stored.source, listing, stage.request, Cache(Path("/dev/null/none")))
    stage.infos, stage.metadata = stage.plan.infos, "/cache/m"
    return stage, stage.plan


def test_a_manifest_says_what_is_planned_and_digests_where_there_are_any(stored: Stored) -> None:
    stage, plan = planned(stored, parallel=TP)
    manifest = segment_manifest(stage, plan, 1)
    assert (manifest.stage, manifest.model, manifest.device) == (stage.id, stage.uri, "cpu:1")
    assert (manifest.tp_rank, manifest.tp_size, manifest.nbytes, manifest.metadata) == (1, 2, 512 + 5, "/cache/m")
    assert (manifest.digest, manifest.checkpoint_digest, manifest.digests) == (None, None, None)
    assert [tuple(entry) for entry in manifest] == [
        ("a", "F32", (3,), 0, 12),
        ("wide", "BF16", (4, 3), 256, 24),
        ("b", "U8", (5,), 512, 5),
    ]
    known = segment_manifest(stage, plan, 0, ["1", "2", "3"], "4", "5")
    assert (known.digests, known.digest, known.checkpoint_digest, known.tp_rank) == (["1", "2", "3"], "4", "5", 0)
    assert segment_manifest(*planned(stored), 0).tp_size == 1


def test_each_tensor_is_of_the_file_that_its_bytes_are_from(stored: Stored) -> None:
    _, plan = planned(stored, parallel=TP)
    assert entry_files(plan, 0) == entry_files(plan, 1) == [0, 0, 1]
    without = replace(plan, recipes=[Recipe(plan.recipes[0].entries, plan.recipes[0].copies[2:], 517, 0)])
    assert entry_files(without, 0) == [0, 0, 1]


@pytest.fixture
def keys(stored: Stored) -> Callable[..., str]:
    return lambda **request: key_of(planned(stored, **request)[0])


def test_peers_know_equal_bytes_in_equal_places_by_one_key(stored: Stored, keys: Callable[..., str]) -> None:
    different = [
        {}, {"parallel": TP}, {"parallel": {**TP, "tp_rank": [0]}}, {"tensors": {"exclude": ["b"]}},
        {"tensors": {"exclude": ["wide"]}},
    ]  # fmt: skip
    assert len({keys(**request) for request in different}) == len(different)
    assert keys() == keys(priority=5, pin=True, tensors={"include": ["*"]}), "what is asked for besides is no matter"
    stage, plan = planned(stored)
    before = key_of(stage)
    stage.listing = replace(stored.checkpoint.listing, identity="another")
    assert key_of(stage) != before
    stage.listing = stored.checkpoint.listing
    stage.manifests, stage.plan = [SealedManifest.seal(segment_manifest(stage, plan, 0))], None
    assert key_of(stage) == before, "it is the same once it is ready"
    stage.manifests[0].close()


# ---------------------------------------------------------------------------- planning


def test_a_plan_says_how_many_tensors_and_bytes_each_segment_has(stored: Stored) -> None:
    _, plan = planned(stored, parallel=TP)
    assert plan.infos == (SegmentInfo(0, 517, 3), SegmentInfo(1, 517, 3))
    assert (plan.metadata, plan.left_out) == (None, ())
    devices = [CpuDevice("cpu", 1 << 20), CpuDevice("cpu:1", 1 << 20)]
    assert allocated(plan.recipes, devices) == {"cpu": 4096, "cpu:1": 4096}
    assert allocated(plan.recipes, devices[:1] * 2) == {"cpu": 8192}


def test_planning_tells_what_it_is_at_and_may_be_cancelled(stored: Stored) -> None:
    stage, _ = planned(stored)
    asked: list[bool] = []
    assert stage.clock.spent().keys() <= {("queued", ""), ("listing", "")}
    make_plan(stored.source, stored.checkpoint.listing, stage.request, Cache(Path("/dev/null/none")), stage.clock,
              lambda: bool(asked.append(True)))  # fmt: skip
    assert asked
    assert {phase for phase, _ in stage.clock.spent()} >= {"headers"}


def test_what_is_expected_of_files_is_told_by_their_names(stored: Stored) -> None:
    def expected(digest: Any) -> dict[int, str]:
        return expected_sha256(stored.checkpoint, parse_request({"model": "/m", "expect_digest": digest}))

    assert expected(None) == {}
    assert expected("xxh3:" + HEX[:32]) == {}
    assert expected({"1.safetensors": HEX}) == {1: f"sha256:{HEX}"}
    with pytest.raises(InvalidRequest, match="one SHA-256 is given and the checkpoint has 2 files"):
        expected(HEX)
    with pytest.raises(InvalidRequest, match=r"'2.safetensors' is no file .* \['0.safetensors', '1.safetensors'\]"):
        expected({"2.safetensors": HEX, "1.safetensors": HEX})


def test_the_only_file_needs_no_name_and_one_with_gaps_cannot_be_expected(tmp_path: Path) -> None:
    checkpoint = store(tmp_path, {"a": tensor("U8", (3,))}).checkpoint
    request = parse_request({"model": "/m", "expect_digest": HEX})
    assert expected_sha256(checkpoint, request) == {0: f"sha256:{HEX}"}
    gappy = replace(checkpoint, gaps=frozenset({0}))
    for wanted in (request, parse_request({"model": "/m", "expect_digest": {"0.safetensors": HEX}})):
        with pytest.raises(InvalidRequest, match=r"0.safetensors holds tensors that None leaves out"):
            expected_sha256(gappy, wanted)
    assert expected_sha256(gappy, parse_request({"model": "/m"})) == {}


def test_of_many_files_ten_are_named(tmp_path: Path) -> None:
    checkpoint = store(tmp_path, {"a": tensor("U8", (3,))}).checkpoint
    files = tuple(SourceFile(f"{i:02}.safetensors", 9, "v") for i in range(12))
    many = replace(checkpoint, listing=replace(checkpoint.listing, weights=files))
    with pytest.raises(InvalidRequest) as refused:
        expected_sha256(many, parse_request({"model": "/m", "expect_digest": {"x": HEX, "y": HEX}}))
    assert "'x' is no file" in str(refused.value)
    assert str(refused.value).endswith(f"its files are {[file.name for file in files[:10]]}")
