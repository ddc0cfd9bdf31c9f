"""Requests: what is taken, what each field may be at most, and what is said of what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from weightd.daemon.errors import InvalidRequest
from weightd.daemon.stages.request import StageRequest, parse_request

HEX = "0123456789abcdef" * 4


def request(**fields: Any) -> StageRequest:
    return parse_request({"model": "/m", **fields})


def test_what_is_not_said_is_whole_tensors_on_the_nodes_default_device_from_anywhere() -> None:
    plain = request()
    assert plain.model_dump() == {
        "model": "/m", "weights": None, "device": None, "handle": "fd", "layout": "checkpoint", "parallel": None,
        "tensors": {"include": [], "exclude": []}, "expect_digest": None, "sources": ["peer", "origin"],
        "priority": 0, "pin": False, "ttl_seconds": None,
    }  # fmt: skip
    assert (plain.ranks, plain.files) == ((0,), ())
    parallel = request(parallel={}).parallel
    assert parallel is not None
    assert (parallel.tp_size, parallel.tp_rank, parallel.map, parallel.ranks) == (1, 0, {}, (0,))


MAP = {"*": "replicate"}
TAKEN: list[dict[str, Any]] = [
    {"model": "m" * 4096},
    {"weights": "f" * 1024},
    {"weights": ["f"] * 10_000},
    {"device": "d" * 64},
    {"priority": 1000},
    {"priority": -1000},
    {"ttl_seconds": 0.001},
    {"ttl_seconds": 315_360_000},
    {"tensors": {"include": ["p" * 512] * 10_000, "exclude": ["p"] * 10_000}},
    {"expect_digest": {"n" * 1024: HEX}},
    {"sources": ["peer"]},
    {"parallel": {"tp_size": 1024, "tp_rank": 1023, "map": {"p" * 512: 0}}},
    {"parallel": {"tp_size": 2, "tp_rank": [1, 0, 1], "map": MAP}, "device": ["cpu", "cuda:0"]},
]


@pytest.mark.parametrize("fields", TAKEN, ids=lambda fields: "-".join(fields))
def test_the_most_and_the_least_that_is_allowed_is_taken(fields: dict[str, Any]) -> None:
    request(**fields)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": ""}, "^model: .*at least 1"),
    ({"model": "m" * 4097}, "^model: .*at most 4096"),
    ({"weights": ""}, "weights"),
    ({"weights": "f" * 1025}, "weights.*at most 1024"),
    ({"weights": []}, "weights: lists 0 files, allowed are 1 to 10000"),
    ({"weights": ["f"] * 10_001}, "weights: lists 10001 files"),
    ({"device": ""}, "device"),
    ({"device": "d" * 65}, "device.*at most 64"),
    ({"priority": 1001}, "^priority: .*1000"),
    ({"priority": -1001}, "^priority: .*-1000"),
    ({"ttl_seconds": 0}, "^ttl_seconds: .*greater than 0"),
    ({"ttl_seconds": 315_360_001}, "^ttl_seconds: .*315360000"),
    ({"tensors": {"include": ["p" * 513]}}, "tensors.include.0: .*512"),
    ({"tensors": {"include": [""]}}, "tensors.include.0: .*at least 1"),
    ({"tensors": {"include": ["p"] * 10_001}}, "tensors.include: .*10000"),
    ({"tensors": {"exclude": ["p"] * 10_001}}, "tensors.exclude: .*10000"),
    ({"tensors": {"x": 1}}, "tensors.x: "),
    ({"parallel": {"x": 1}}, "parallel.x: "),
    ({"x": 1}, "^x: "),
    ({"sources": []}, "^sources: .*at least 1"),
    ({"sources": ["peer", "origin", "peer"]}, "^sources: .*at most 2"),
    ({"sources": ["disk"]}, "sources.0: "),
    ({"handle": "ptr"}, "^handle: "),
    ({"layout": "x"}, "^layout: "),
    ({"expect_digest": {}}, "^expect_digest: an empty map expects nothing"),
    ({"expect_digest": "xxh3:12"}, "^expect_digest: 'xxh3:12' is neither xxh3:"),
    ({"expect_digest": "x" + "y" * 99}, f"^expect_digest: '{'x' + 'y' * 79}' is neither"),
    ({"expect_digest": HEX + "0"}, "is neither"),
    ({"expect_digest": {"n" * 1025: HEX}}, "expect_digest.*1024"),
    ({"expect_digest": {"n": "md5:1"}}, "'md5:1' is neither"),
    ({"parallel": {"tp_size": 0}}, "parallel.tp_size: .*1"),
    ({"parallel": {"tp_size": 1025, "map": MAP}}, "parallel.tp_size: .*1024"),
    ({"parallel": {"tp_rank": []}}, "parallel: tp_rank is an empty list"),
    ({"parallel": {"tp_rank": 1}}, "parallel: tp_rank 1 is not below tp_size 1"),
    ({"parallel": {"tp_size": 3, "tp_rank": [0, 3], "map": MAP}}, "tp_rank 3 is not below tp_size 3"),
    ({"parallel": {"tp_size": 2, "tp_rank": -1, "map": MAP}}, "parallel.tp_rank"),
    ({"parallel": {"tp_size": 2}}, "parallel: tp_size needs a map"),
    ({"parallel": {"tp_size": 2, "map": {"": 0}}}, "parallel.map"),
    ({"parallel": {"tp_size": 2, "map": {"p" * 513: 0}}}, "parallel.map.*512"),
    ({"device": ["cpu"], "parallel": {"tp_size": 2, "tp_rank": "all", "map": MAP}}, "lists 1 devices for 2 ranks"),
    ({"device": ["cpu", "cpu"]}, "lists 2 devices for 1 ranks"),
]


@pytest.mark.parametrize(
    ("fields", "message"), REFUSED, ids=[f"{n}-{next(iter(f))}" for n, (f, _) in enumerate(REFUSED)]
)
def test_what_is_wrong_is_refused_by_the_name_of_its_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        request(**fields)


def test_what_is_no_object_is_refused_and_of_many_errors_the_first_twenty_are_said() -> None:
    for value in (None, [], 1, "x"):
        with pytest.raises(InvalidRequest, match=r"^body: "):
            parse_request(value)
    with pytest.raises(InvalidRequest) as refused:
        request(**{f"x{i}": 1 for i in range(30)})
    assert len(str(refused.value).split("; ")) == 20


def test_a_map_has_100_000_patterns_at_most() -> None:
    many = {f"p{i}": 0 for i in range(100_000)}
    assert request(parallel={"tp_size": 2, "map": many}).ranks == (0,)
    with pytest.raises(InvalidRequest, match=r"parallel.map: .*100000"):
        request(parallel={"tp_size": 2, "map": {**many, "one more": 0}})


def test_ranks_are_sorted_and_come_once() -> None:
    for given, ranks in ((2, (2,)), ([3, 1, 3], (1, 3)), ("all", (0, 1, 2, 3))):
        assert request(parallel={"tp_size": 4, "tp_rank": given, "map": MAP}).ranks == ranks


def test_files_are_sorted_and_come_once() -> None:
    assert request(weights="a.safetensors").files == ("a.safetensors",)
    assert request(weights=["b", "a", "b"]).files == ("a", "b")


def test_a_sha256_is_kept_in_one_form_and_a_checkpoint_digest_as_it_is() -> None:
    for given in (HEX, HEX.upper(), f"sha256:{HEX}"):
        assert request(expect_digest=given).expect_digest == f"sha256:{HEX}"
    assert request(expect_digest={"a": HEX.upper()}).expect_digest == {"a": f"sha256:{HEX}"}
    assert request(expect_digest="xxh3:" + HEX[:32]).expect_digest == "xxh3:" + HEX[:32]


def test_requests_for_other_bytes_or_other_places_have_another_key_and_no_others() -> None:
    two = {"tp_size": 2, "tp_rank": 0, "map": {"a": 0, "b": 1}}
    different: list[dict[str, Any]] = [
        {},
        {"handle": "cuda_ipc"},
        {"weights": "a"},
        {"tensors": {"include": ["a"]}},
        {"tensors": {"exclude": ["a"]}},
        {"parallel": two},
        {"parallel": {**two, "tp_rank": 1}},
        {"parallel": {**two, "map": {"b": 1, "a": 0}}},
        {"parallel": {**two, "tp_size": 4}},
    ]
    assert len({request(**fields).layout_key() for fields in different}) == len(different)
    same: list[dict[str, Any]] = [
        {"parallel": {}},
        {"parallel": {"map": {"a": 0}}},
        {"device": "cpu"},
        {"priority": 5, "pin": True, "ttl_seconds": 5},
        {"sources": ["origin"]},
        {"expect_digest": HEX},
    ]
    assert {request(**fields).layout_key() for fields in same} == {request().layout_key()}
