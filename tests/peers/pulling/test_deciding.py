"""Loading from peers whose every word a test says: whom bytes come from, who is given up for what, and what then."""

from __future__ import annotations

import threading
from array import array
from typing import Any, cast

import pytest

from tests.filling.fills import MiB, leaves_of
from tests.peers.pulling.pulls import LEAVES, Fleeting, MakePull
from weightd.daemon.errors import DigestMismatch, SourceFailed
from weightd.daemon.peers.finding.listening import FORMAT
from weightd.daemon.peers.moving.movers import Movers
from weightd.daemon.peers.pulling.for_stages import Pulling


@pytest.mark.parametrize("fill", ["direct", "buffered"])
def test_what_a_peer_has_comes_from_it_and_the_origin_is_not_asked(fill: str, pull: MakePull, whole: bytes) -> None:
    fleet = Fleeting("a:1")
    fleet.has("a:1", whole, range(LEAVES), leaves_of(whole))
    with pull(fleet, fill=fill) as pulled:
        pulled.run()
        pulled.check(LEAVES * MiB)
        assert (pulled.origins, fleet.read, fleet.dropped) == (0, {"a:1": LEAVES * MiB}, [])
        use = pulled.account.peers["a:1"]
        assert (use.nbytes, use.transport, use.through_host, use.given_up) == (LEAVES * MiB, "shm", False, "")
        assert fleet.fleet.traffic["a:1"].bytes_from == LEAVES * MiB
        assert pulled.filled.fill.seconds["verifying"] > 0


def test_what_no_peer_has_is_read_from_the_origin(pull: MakePull, whole: bytes) -> None:
    fleet = Fleeting("a:1", "b:1", "c:1")
    fleet.has("a:1", whole, [0, 2], leaves_of(whole))
    fleet.has("b:1", whole, [2, 5], leaves_of(whole))
    with pull(fleet) as pulled:
        pulled.run()
        pulled.check(3 * MiB)
        assert pulled.origins == 1
        assert sum(fleet.read.values()) == 3 * MiB, "each leaf comes once"
        assert sorted(pulled.account.peers) == ["a:1", "b:1"], "who has nothing of it is not told of"


def test_a_fill_that_lacks_nothing_asks_nobody(pull: MakePull, whole: bytes) -> None:
    fleet = Fleeting("a:1")
    with pull(fleet) as pulled:
        pulled.account.drain()
        pulled.run()
        assert (fleet.asked, pulled.origins) == ([], 0)


def test_bytes_that_are_not_those_that_were_claimed_end_it_for_a_peer_and_come_again(
    pull: MakePull, whole: bytes
) -> None:
    fleet = Fleeting("a:1")
    spoiled = bytearray(whole)
    spoiled[5 * MiB + 7] ^= 1
    fleet.has("a:1", bytes(spoiled), range(LEAVES), leaves_of(whole))
    with pull(fleet) as pulled:
        pulled.run()
        pulled.check(0)
        assert fleet.dropped == [("a:1", "wrong_bytes")]
        assert "tensor 't5', leaf 0: not the bytes that it claims" in pulled.account.peers["a:1"].given_up
        assert fleet.asked == ["a:1"], "it is not asked again"


def test_where_clients_use_what_a_liar_has_brought_the_load_fails(pull: MakePull, whole: bytes) -> None:
    fleet = Fleeting("a:1")
    spoiled = bytearray(whole)
    spoiled[7] ^= 1
    fleet.has("a:1", bytes(spoiled), range(LEAVES), leaves_of(whole))
    with pull(fleet) as pulled:
        pulled.account.take_back = lambda entries: False
        with pytest.raises(DigestMismatch, match="peer a:1 serves wrong bytes, and clients use what it has brought"):
            pulled.run()


def test_bytes_that_are_not_the_expected_ones_do_too(pull: MakePull, whole: bytes) -> None:
    fleet = Fleeting("a:1")
    other = bytes(reversed(whole))
    fleet.has("a:1", other, range(LEAVES), leaves_of(other))
    with pull(fleet, expected_leaves={"t3": array("Q", [leaves_of(whole)[3]])}) as pulled:
        pulled.run()
        pulled.check(0)
        assert fleet.dropped == [("a:1", "wrong_bytes")]
        assert "not the expected bytes" in pulled.account.peers["a:1"].given_up


def test_who_claims_everything_and_never_says_where_it_lies_is_waited_for_no_longer_than_one_may_stall(
    pull: MakePull, whole: bytes
) -> None:
    fleet = Fleeting("a:1", stall=0.2)
    fleet.has("a:1", whole, range(LEAVES), leaves_of(whole))
    del fleet.said["a:1"][1]
    with pull(fleet) as pulled:
        pulled.run()
        pulled.check(0)
        assert fleet.dropped == [("a:1", "stalled")]
        assert "did not say where its segments are" in pulled.account.peers["a:1"].given_up


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ({"format": FORMAT + 1}, "version"),
        ({"format": FORMAT - 1}, "version"),
        ({"epoch": "another"}, "nonsense"),
        ({"metadata": b"unreachable"}, "unreachable"),
    ],
)
def test_who_cannot_be_understood_or_read_is_given_up_and_the_origin_read(
    what: dict[str, Any], why: str, pull: MakePull, whole: bytes
) -> None:
    fleet = Fleeting("a:1")
    fleet.has("a:1", whole, range(LEAVES), leaves_of(whole), **what)
    with pull(fleet) as pulled:
        pulled.run()
        pulled.check(0)
        assert fleet.dropped[0] == ("a:1", why)
        assert pulled.origins == 1


@pytest.mark.parametrize(
    "event",
    [
        {"type": "leaves", "epoch": "e", "segment": 1, "first": 0, "digests": "0" * 16},
        {"type": "leaves", "epoch": "e", "segment": 0, "first": LEAVES, "digests": "0" * 16},
        {"type": "coming", "epoch": "e", "segment": 0, "first": 0, "count": LEAVES + 1},
        {"type": "leaves", "epoch": "e", "segment": 0, "first": 0, "digests": "xyz"},
        {"type": "hello", "format": FORMAT, "epoch": "e", "ready": True},
        {"type": "segments", "epoch": "e", "reader": None, "segments": []},
        {"type": "readers", "stamps": 5},
        {"no": "type"},
    ],
)
def test_what_makes_no_sense_ends_it(event: dict[str, Any], pull: MakePull, whole: bytes) -> None:
    fleet = Fleeting("a:1")
    fleet.has("a:1", whole, [], [])
    fleet.said["a:1"][2:2] = [event]
    with pull(fleet) as pulled:
        pulled.run()
        pulled.check(0)
        assert fleet.dropped == [("a:1", "nonsense")]


@pytest.mark.parametrize(("how", "why"), [("broken", "failed"), ("not even begun", "unreachable"), ("", "gone")])
def test_what_a_peer_does_not_bring_after_all_comes_from_elsewhere(
    how: str, why: str, pull: MakePull, whole: bytes
) -> None:
    fleet = Fleeting("a:1")
    fleet.has("a:1", whole, [1, 3], leaves_of(whole))
    if how:
        fleet.errors = [how]
    else:
        fleet.said["a:1"].insert(1, {"type": "hangs up"})
    with pull(fleet) as pulled:
        pulled.run()
        pulled.account.check_complete()
        assert fleet.dropped[0] == ("a:1", why)


def test_one_that_gives_nothing_any_more_is_not_to_blame(pull: MakePull, whole: bytes) -> None:
    fleet = Fleeting("a:1")
    fleet.has("a:1", whole, [], [])
    fleet.said["a:1"][2:] = [{"type": "gone"}]
    with pull(fleet) as pulled:
        pulled.run()
        pulled.check(0)
        assert fleet.dropped == [("a:1", "gone")]


def test_without_an_origin_nobody_is_waited_for_for_ever(pull: MakePull) -> None:
    fleet = Fleeting("a:1", stall=0.05)
    nothing = pytest.raises(SourceFailed, match=r"no peer has brought anything for 0.05 s")
    with pull(fleet, origin=False) as pulled, nothing:
        pulled.run()


def test_an_origin_that_fails_leaves_the_rest_to_peers_and_fails_the_load_where_there_are_none(
    pull: MakePull, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> Any:
        raise SourceFailed("503")

    with pull(Fleeting()) as pulled:
        monkeypatch.setattr(pulled.reader._origin, "_make", fails)
        with pytest.raises(SourceFailed, match="503"):
            pulled.run()


def test_one_that_is_stopped_ends_at_once_with_nobody_reading(pull: MakePull, whole: bytes) -> None:
    fleet = Fleeting("a:1")
    fleet.has("a:1", whole, [], [])
    fleet.said["a:1"] = fleet.said["a:1"][:1]  # it never says what it has
    with pull(fleet) as pulled:
        stopper = threading.Timer(0.0, pulled.filled.fill.stop)
        stopper.start()
        pulled.run()
        stopper.join()
        assert pulled.account.bytes_read == 0
        assert pulled.reader._transfers._mover is None


def test_stages_are_told_why_nothing_can_be_read_from_peers(pull: MakePull) -> None:
    fleet = Fleeting()
    with pull(fleet) as pulled:
        pulling = Pulling(fleet.fleet, cast(Movers, pulled))
        assert pulling.off == ""
        fleet.fleet.off = "there is no NIXL"
        assert pulling.off == "there is no NIXL"
