"""What is known of leaves, held against what peers claim and bring; and what a peer says in the origin's place."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from tests.layouts.recipes import infos
from weightd.daemon.errors import CheckpointNotFound, SourceFailed
from weightd.daemon.filling.account import Account
from weightd.daemon.layouts.checkpoint import checkpoint_layout
from weightd.daemon.layouts.digests import LEAF
from weightd.daemon.layouts.extents import Demands, plan_extents
from weightd.daemon.peers.finding.claims import Claims
from weightd.daemon.peers.finding.fleet import Fleet
from weightd.daemon.peers.moving.parts import Span
from weightd.daemon.peers.pulling import source as source_module
from weightd.daemon.peers.pulling.groups import Groups
from weightd.daemon.peers.pulling.source import PeerSource, _bounded, _file, open_source
from weightd.daemon.peers.pulling.truth import Truth
from weightd.daemon.sources.base import SourceFile
from weightd.daemon.sources.object_store import ObjectStoreSource
from weightd.daemon.tensors import TensorInfo

TENSORS = infos(("a", "U8", (2 * LEAF,)), ("b", "U8", (2 * LEAF,)))


class Known:
    """An account whose leaves 0 to 3 have the digests 100 to 103, with claims of the same."""

    def __init__(self, expected: dict[str, array[int]] | None = None, tensors: Sequence[TensorInfo] = TENSORS) -> None:
        recipes = checkpoint_layout(tensors)
        self.extents = plan_extents(tensors, recipes, Demands(LEAF, 16, 0))
        self.account = Account(
            tensors, recipes, self.extents, ledger=None, expected_leaves=expected or {},
            on_verified=lambda segment, entries: None,
        )  # fmt: skip
        starts = [self.account.leaf_starts(0)]
        self.groups = Groups(self.extents, recipes, starts)
        self.claims = Claims(starts)
        self.truth = Truth(self.account, self.groups, recipes)
        for leaf in range(4):
            entry, at = self.account.leaf_at(0, leaf)
            self.account.leaves[0][entry][at] = self.claims.digests[0][leaf] = 100 + leaf
            self.claims.there[0][leaf] = 1


def test_a_claim_is_wrong_where_the_origins_bytes_have_another_digest() -> None:
    known = Known()
    known.claims.digests[0][2] = known.claims.digests[0][3] = 5
    assert known.truth.wrong_claim(known.claims, 0, 0, 4) == "", "nothing is here that could tell"
    known.account.there[0][0] = known.account.there[0][1] = 1
    assert known.truth.wrong_claim(known.claims, 0, 0, 4) == ""
    known.account.there[0][3] = 1
    said = "tensor 'b', leaf 1: not the digest that the origin's bytes have"
    assert known.truth.wrong_claim(known.claims, 0, 0, 4) == said
    assert known.truth.wrong_claim(known.claims, 0, 3, 1) == said
    assert known.truth.wrong_claim(known.claims, 0, 0, 3) == ""
    known.groups.all[3].brought_by = "another"
    assert known.truth.wrong_claim(known.claims, 0, 0, 4) == "", "what a peer brought tells nothing of another"
    known.groups.all[3].brought_by = None
    known.claims.there[0][3] = 0
    assert known.truth.wrong_claim(known.claims, 0, 0, 4) == "", "it was not claimed"


def test_bytes_are_wrong_where_they_are_not_what_was_claimed_or_not_what_is_expected() -> None:
    known = Known({"b": array("Q", [102, 7])})
    span = Span(0, 1, 2 * LEAF, 2 * LEAF, 0)
    assert known.truth.wrong_bytes(known.claims, [(span, 0, 102)]) == ""
    assert known.truth.wrong_bytes(known.claims, [(span, 0, 102), (span, 1, 7)]) == (
        "tensor 'b', leaf 1: not the bytes that it claims"
    )
    assert known.truth.wrong_bytes(known.claims, [(span, 1, 103)]) == "tensor 'b', leaf 1: not the expected bytes"
    assert known.truth.wrong_bytes(known.claims, [(Span(0, 0, 0, 2 * LEAF, 0), 1, 101)]) == "", (
        "nothing is expected of a"
    )
    assert known.truth.wrong_bytes(known.claims, []) == ""
    another = Known(tensors=infos(("a", "U8", (LEAF,)), ("b", "U8", (3 * LEAF,))))
    found = [(Span(0, 1, LEAF, 3 * LEAF, 0), leaf, 101 + leaf) for leaf in range(3)]
    assert another.truth.wrong_bytes(another.claims, found) == ""


# ---------------------------------------------------------------------------- in the origin's place

LISTING: dict[str, Any] = {
    "uri": "s3://b/m", "identity": "1d", "wanted": [], "weights": [["b.safetensors", 9, "v"]],
    "metadata": [["a.json", 2, "w"]],
}  # fmt: skip


class Fleeting:
    """A fleet of peers that answer, each in its way."""

    def __init__(self, *answers: Any) -> None:
        self.asked: list[httpx.URL] = []
        self._answers = [json.dumps(a).encode() if isinstance(a, dict) else a for a in answers]
        self.fleet = cast(Fleet, SimpleNamespace(client=self.client, members=self.members))

    def members(self) -> list[tuple[str, None]]:
        return [(f"peer{index}", None) for index in range(len(self._answers))]

    def client(self, peer: str) -> httpx.Client:
        def answer(request: httpx.Request) -> httpx.Response:
            self.asked.append(request.url)
            found = self._answers[int(peer.removeprefix("peer"))]
            if isinstance(found, int):
                return httpx.Response(found)
            return httpx.Response(200, content=iter([found]))

        return httpx.Client(transport=httpx.MockTransport(answer), base_url=f"http://{peer}")


def test_the_first_peer_that_has_it_gives_its_listing_and_files() -> None:
    fleet = Fleeting(404, b"{", {**LISTING, "uri": "s3://b/other"}, {**LISTING, "weights": 5}, LISTING)
    source = open_source("s3://b/m", [], fleet.fleet)
    assert source.list() == [SourceFile("a.json", 2, "w"), SourceFile("b.safetensors", 9, "v")]
    assert source.stat("a.json") == SourceFile("a.json", 2, "w")
    with pytest.raises(CheckpointNotFound, match="s3://b/m/c: peer peer4 knows no such file"):
        source.stat("c")
    assert source.single is None
    assert len(fleet.asked) == 5
    assert dict(fleet.asked[0].params) == {"uri": "s3://b/m"}
    assert source.read("a.json", 0, 0) == b""
    assert len(fleet.asked) == 5, "for no bytes nobody is asked"
    with pytest.raises(SourceFailed, match="more than the 5 bytes"):
        source.read("a.json", 3, 5)
    assert dict(fleet.asked[5].params) == {"identity": "1d", "name": "a.json", "offset": "3", "length": "5"}
    size = len(json.dumps(LISTING))
    assert len(source.read("a.json", 0, size)) == size
    with pytest.raises(SourceFailed, match="its origin cannot be reached, and peers have not all of it"):
        source.reader([]).run(cast(Any, None))


def test_of_many_peers_sixteen_are_asked() -> None:
    fleet = Fleeting(*[404] * 16, LISTING)
    with pytest.raises(SourceFailed, match="no peer has it"):
        open_source("s3://b/m", [], fleet.fleet)
    assert len(fleet.asked) == 16


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({"wanted": ["x"]}, []),
        ({}, ["x"]),
        ({"identity": None, "weights": [["a", 1]]}, []),
        ({"weights": [["a", -1, "v"]]}, []),
        ({"weights": [["a", "1", "v"]]}, []),
        ({"weights": [[1, 1, "v"]]}, []),
        ({"weights": [["a", 1, 2]]}, []),
    ],
)
def test_what_is_not_the_listing_that_was_asked_for_is_none(more: dict[str, Any], wanted: list[str]) -> None:
    with pytest.raises(SourceFailed, match="peer0 answers with no listing"):
        PeerSource("s3://b/m", wanted, Fleeting({**LISTING, **more}).fleet, "peer0")


def test_a_listing_may_name_its_weights_and_has_so_many_files_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    named = Fleeting({**LISTING, "wanted": ["a", "b"]})
    assert PeerSource("s3://b/m", ["b", "a"], named.fleet, "peer0").list()
    assert named.asked[0].params.get_list("weights") == ["b", "a"]
    older = {key: value for key, value in LISTING.items() if key != "wanted"}
    assert PeerSource("s3://b/m", [], Fleeting(older).fleet, "peer0").list()
    three = {**LISTING, "metadata": [*LISTING["metadata"], ["b.json", 2, "w"]]}
    monkeypatch.setattr(source_module, "MAX_OBJECTS", 3)
    assert PeerSource("s3://b/m", [], Fleeting(three).fleet, "peer0").list()
    monkeypatch.setattr(source_module, "MAX_OBJECTS", 2)
    with pytest.raises(SourceFailed, match="no listing"):
        PeerSource("s3://b/m", [], Fleeting(three).fleet, "peer0")


def test_a_listing_has_64_mib_at_most_and_a_peers_extents_are_those_of_an_object_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(source_module, "_bounded", lambda answer, most: asked.append(most) or answer.read())
    found = PeerSource("s3://b/m", [], Fleeting(LISTING).fleet, "peer0")
    assert asked == [64 << 20]
    assert (found.max_extent, found.max_runs) == (ObjectStoreSource.max_extent, ObjectStoreSource.max_runs)
    assert found.min_range == 256 << 10


def test_what_is_said_of_a_peers_answer_is_bounded() -> None:
    uri = "s3://b/" + "x" * 600
    for answer in (LISTING, 404):
        with pytest.raises(SourceFailed, match="s3://b/x") as raised:
            PeerSource(uri, [], Fleeting(answer).fleet, "peer0")
        assert len(str(raised.value)) == 500


@pytest.mark.parametrize(
    ("uri", "single"),
    [("hf://o/n/x.safetensors@main", "x.safetensors"), ("s3://b/x.safetensors", "x.safetensors"), ("s3://b/x", None)],
)
def test_a_uri_of_one_file_is_known_by_its_name(uri: str, single: str | None) -> None:
    assert PeerSource(uri, [], Fleeting({**LISTING, "uri": uri}).fleet, "peer0").single == single


def test_an_answer_is_taken_as_far_as_was_asked_for() -> None:
    def parts() -> Iterator[bytes]:
        yield from (b"ab", b"cd")

    assert _bounded(httpx.Response(200, content=parts(), request=httpx.Request("GET", "http://x")), 4) == b"abcd"
    with pytest.raises(ValueError, match="more than the 3 bytes"):
        _bounded(httpx.Response(200, content=parts(), request=httpx.Request("GET", "http://x")), 3)
    assert _file("a", 0, "") == SourceFile("a", 0, "")
