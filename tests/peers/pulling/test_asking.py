"""What is asked of which peer and how much at once, how long it is waited for, and what peers put where it can be read.

Most of it one decision at a time, of a reader that has begun and does what a test has it do.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import httpx
import pytest

from tests.filling.fills import DEFAULTS, MiB, land, leaves_of
from tests.peers.pulling.pulls import LEAVES, Fleeting, MakePull, Pull
from weightd.daemon.errors import SourceFailed
from weightd.daemon.filling.account import PeerUse
from weightd.daemon.peers.finding.claims import Claims
from weightd.daemon.peers.finding.listening import Absent, Peer
from weightd.daemon.peers.moving.lane import Lane
from weightd.daemon.peers.moving.movers import Arrival, MoverFailed
from weightd.daemon.peers.moving.parts import PART, Part, PartState


class Begun:
    """A reader that has begun, and is at no work of its own."""

    def __init__(self, pulled: Pull) -> None:
        self.pulled, self.fleet = pulled, pulled.fleet
        self.reader = pulled.reader
        pulled.filled.fill.stop()
        self.reader.run(pulled.filled.fill)

    def peer(self, name: str, leaves: range = range(LEAVES), rate: float = 0.0) -> Lane:
        """One that is listened to, and says that it has these leaves; so many bytes in a second have come from it."""
        account = self.pulled.account
        peer = Peer(name, Claims([account.leaf_starts(0)]), PeerUse(int(rate), 1.0 if rate else 0.0))
        peer.epoch, peer.metadata, peer.addresses = "e", [name.encode()], [0]
        self.reader._following._peers[name] = peer
        self.reader._assignment.has(name, leaves)
        return self.reader._transfers.lane(peer)

    def ask(self, lane: Lane, *leaves: int) -> None:
        """These were asked of it."""
        for leaf in leaves:
            parts = self.reader._groups.all[leaf].begin_parts()
            lane.queue(parts)
            for part in parts:
                lane.move(part, PartState.READING)


MakeBegun = Callable[..., contextlib.AbstractContextManager[Begun]]


@pytest.fixture
def begun(pull: MakePull) -> MakeBegun:
    @contextlib.contextmanager
    def begun(*names: str, **options: Any) -> Iterator[Begun]:
        with pull(Fleeting(*names), **options) as pulled:
            found = Begun(pulled)
            try:
                yield found
            finally:
                found.reader._transfers.kill()
                found.reader.close()

    return begun


# ---------------------------------------------------------------------------- whom to ask


def test_more_is_asked_of_who_brings_it_soonest_and_one_part_of_who_is_not_known(
    begun: MakeBegun, whole: bytes
) -> None:
    with begun("slow:1", "fast:1", "new:1") as one:
        one.fleet.memory = dict.fromkeys(["slow:1", "fast:1", "new:1"], whole)
        slow, fast, new = one.peer("slow:1", rate=2 * MiB), one.peer("fast:1", rate=8 * MiB), one.peer("new:1")
        one.reader._ask_peers(50.0)
        assert (slow.busy, fast.busy, new.busy) == (0, 3, 1), "four are asked for, until it is known how fast they come"
        assert (slow.arrived, fast.arrived) == (0.0, 50.0)
        for leaf in range(4):
            one.reader._groups.all[leaf].brought_by = None
        one.reader._ask_peers(51.0)
        assert (slow.busy, fast.busy, new.busy) == (0, 3, 1), "and no more while they are on their way"


def test_whom_to_ask_next_is_who_has_brought_one_more_first(
    begun: MakeBegun, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with begun("slow:1", "fast:1") as one:
        one.fleet.memory = dict.fromkeys(["slow:1", "fast:1"], whole)
        one.peer("slow:1", rate=3 * MiB)
        one.peer("fast:1", rate=8 * MiB)
        ask, asked = one.reader._transfers.ask, []

        def noted(lane: Lane, part: Part) -> None:
            asked.append(lane.peer.name)
            ask(lane, part)

        monkeypatch.setattr(one.reader._transfers, "ask", noted)
        one.reader._ask_peers(50.0)
        assert asked == ["fast:1", "fast:1", "slow:1", "fast:1"], "of three in 3/8 s and one in 1/3 s"


def test_of_those_that_are_as_fast_each_is_asked_in_turn(begun: MakeBegun, whole: bytes) -> None:
    with begun("a:1", "b:1") as one:
        one.fleet.memory = dict.fromkeys(["a:1", "b:1"], whole)
        lanes = one.peer("a:1", rate=8 * MiB), one.peer("b:1", rate=8 * MiB)
        one.reader._ask_peers(50.0)
        assert [lane.busy for lane in lanes] == [2, 2]


def test_who_has_not_said_where_its_segments_are_is_asked_nothing(begun: MakeBegun) -> None:
    with begun("a:1") as one:
        lane = one.peer("a:1")
        lane.peer.metadata = []
        one.reader._ask_peers(50.0)
        assert (lane.busy, lane.empty) == (0, True)


def test_what_was_read_where_peers_have_put_it_is_given_back_by_itself_only_to_those_that_are_asked_nothing(
    begun: MakeBegun, monkeypatch: pytest.MonkeyPatch
) -> None:
    with begun("a:1", "b:1", "c:1") as one:
        free, busy, _ = (one.peer(name, range(0)) for name in ("a:1", "b:1", "c:1"))
        one.ask(busy, 0)
        free.read_out, busy.read_out = [1], [2]
        given: list[Lane] = []
        monkeypatch.setattr(one.reader._transfers, "give_back", given.append)
        one.reader._ask_peers(50.0)
        assert given == [free], "others are told along with what is asked of them"


# ---------------------------------------------------------------------------- how long it is waited for


@pytest.mark.parametrize(
    ("rate", "asked", "patience"), [(0, 1, 30.0), (PART, 1, 32.0), (PART, 2, 34.0), (2 * PART, 2, 32.0)]
)
def test_a_peer_is_waited_for_as_long_as_what_was_asked_of_it_may_take(
    begun: MakeBegun, rate: int, asked: int, patience: float
) -> None:
    with begun("a:1") as one:
        lane = one.peer("a:1", rate=rate)
        one.ask(lane, *range(asked))
        lane.arrived = 100.0
        one.reader._drop_dead(100.0 + patience)
        assert one.fleet.dropped == []
        one.reader._drop_dead(100.25 + patience)
        assert one.fleet.dropped == [("a:1", "stalled")]
        assert lane.peer.use.given_up == f"nothing came for {patience:.1f} s"
        assert not one.reader._assignment._free.isdisjoint(range(asked)), "others may bring it"


def test_of_whom_nothing_was_asked_nothing_is_waited_for(begun: MakeBegun) -> None:
    with begun("a:1") as one:
        one.peer("a:1", rate=PART)
        one.reader._drop_dead(1e6)
        assert one.fleet.dropped == []


def test_who_does_not_say_where_its_segments_are_is_waited_for_where_it_claims_anything(begun: MakeBegun) -> None:
    with begun("a:1") as one:
        lane = one.peer("a:1")
        lane.peer.since = 100.0
        lane.peer.claims.there[0][7] = 1
        one.reader._drop_dead(1e6)
        assert one.fleet.dropped == [], "it has said so"
        lane.peer.metadata = []
        one.reader._drop_dead(130.0)
        assert one.fleet.dropped == []
        lane.peer.claims.there[0][7] = 0
        one.reader._drop_dead(1e6)
        assert one.fleet.dropped == [], "nobody waits for what it has"
        lane.peer.claims.there[0][7] = 1
        one.reader._drop_dead(130.25)
        assert one.fleet.dropped == [("a:1", "stalled")]
        assert lane.peer.use.given_up == "for 30 s it did not say where its segments are"


def test_peers_that_have_nothing_may_come_to_have_it_three_times_as_long_as_one_may_stall(begun: MakeBegun) -> None:
    with begun("a:1") as one:
        assert not one.reader._may_come(0.0), "there is nobody"
        lane = one.peer("a:1")
        assert one.reader._may_come(89.9)
        assert not one.reader._may_come(90.0)
        lane.peer.metadata = []
        assert not one.reader._may_come(0.0), "it waits as this node does"


def test_without_an_origin_the_load_fails_once_nothing_came_for_as_long_as_one_may_stall(begun: MakeBegun) -> None:
    with begun("a:1", origin=False) as one:
        one.reader._progress = 20.0
        one.reader._feed_origin(50.0)
        assert one.reader._origin.error is None
        with pytest.raises(SourceFailed, match="no peer has brought anything for 30 s"):
            one.reader._feed_origin(50.25)
    with begun("a:1", origin=False) as one:
        one.reader._progress = 100.0
        one.peer("a:1")
        one.reader._feed_origin(189.5)
        with pytest.raises(SourceFailed, match="no peer has brought anything"):
            one.reader._feed_origin(190.0)


def test_what_an_origin_leaves_over_is_free_for_others_unless_it_has_come(
    begun: MakeBegun, monkeypatch: pytest.MonkeyPatch
) -> None:
    with begun(origin=False) as one:
        one.reader._progress = 20.0
        taken = one.reader._assignment.from_origin(LEAVES, at=20.0, idle=0.0)
        assert sorted(taken) == list(range(LEAVES))
        one.reader._groups.all[1].extents_left = 0
        monkeypatch.setattr(one.reader._origin, "left_over", lambda: {0, 1})
        one.reader._feed_origin(20.0)
        assert one.reader._assignment._free == {0}


# ---------------------------------------------------------------------------- what happens, and what it means


def test_of_what_has_happened_a_thousand_are_taken_at_once_and_reads_that_have_ended_first(begun: MakeBegun) -> None:
    with begun("a:1") as one:
        assert one.reader._happened(0.0) == []
        absent = Absent(one.peer("a:1").peer)
        for event in [absent] * 998 + [Arrival(1, None, "shm"), Arrival(2, None, "shm"), absent]:
            one.reader._events.put(event)
        found = one.reader._happened(0.0)
        assert [event.ticket for event in found[:2]] == [1, 2]  # type: ignore[attr-defined]
        assert found[2:] == [absent] * 998
        assert one.reader._happened(0.0) == [absent]


def test_time_is_counted_as_waiting_for_peers_unless_only_others_are_at_work(begun: MakeBegun) -> None:
    def waits() -> bool:
        return not isinstance(one.reader._waiting(), nullcontext)

    with begun("a:1", "b:1") as one:
        one.peer("b:1")
        lane = one.peer("a:1")
        assert waits(), "nobody is at work"
        one.reader._origin.groups = {7}
        assert not waits()
        one.ask(lane, 0)
        assert waits(), "a peer is as well"
        lane.move(lane.parts(PartState.READING)[0], PartState.SETTLING)
        one.reader._origin.groups = set()
        assert not waits(), "it has come, and is being hashed"


def test_what_a_peer_has_put_for_nobody_is_given_back(begun: MakeBegun) -> None:
    with begun("a:1") as one:
        lane = one.peer("a:1")
        (part,) = one.reader._groups.all[0].begin_parts()
        for address in (None, "x", 4096):
            one.reader._put(lane, part, address, "")
        assert lane.read_out == [4096]
        assert one.fleet.dropped == []


def test_what_is_said_of_a_peer_that_fails_is_bounded(begun: MakeBegun, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(lane: Lane) -> int:
        raise MoverFailed("x" * 999)

    with begun("a:1") as one:
        monkeypatch.setattr(one.reader._transfers, "connect", fail)
        peer = one.peer("a:1").peer
        peer.metadata = []
        said = {"type": "segments", "epoch": "e", "reader": None, "segments": [{"address": 9, "metadata": ""}]}
        one.reader._heard(peer, said)
        assert peer.use.given_up.startswith("it cannot be read: x")
        assert len(peer.use.given_up) == 500


def test_what_a_later_version_says_besides_is_passed_over(begun: MakeBegun) -> None:
    with begun("a:1") as one:
        for kind in ("a thing", "lease", "something", "words"):
            one.reader._heard(one.peer("a:1").peer, {"type": kind})
        assert one.fleet.dropped == []


def test_what_a_liar_has_brought_comes_from_those_who_claim_it_too(begun: MakeBegun, whole: bytes) -> None:
    with begun("a:1", "b:1") as one:
        liar, other = one.peer("a:1", range(0)).peer, one.peer("b:1", range(0)).peer
        other.claims.there[0][0] = other.claims.there[0][1] = 1
        group, account = one.reader._groups.all[0], one.pulled.account
        account.arrived(group.extents, [(0, *account.leaf_at(0, 0), leaves_of(whole)[0])])
        assert group.landed()
        group.brought_by = "a:1"
        one.reader._assignment.done(0)
        one.reader._liar(liar, "it lies")
        assert (group.extents_left, group.brought_by, account.bytes_read) == (1, None, 0)
        assert one.reader._assignment.from_peer("b:1") == 0
        assert one.reader._assignment.from_peer("b:1") is None


def test_a_peer_that_stops_giving_may_do_so_again_and_again(begun: MakeBegun) -> None:
    with begun("a:1") as one:
        for _ in range(5):
            one.reader._understand(one.peer("a:1").peer, {"type": "gone"})
        assert one.reader._following._lost == set()
        for _ in range(3):
            assert one.reader._following._lost == set()
            one.reader._strike(one.peer("a:1").peer, "failed", "it broke")
        assert one.reader._following._lost == {"a:1"}


def test_a_claim_that_comes_after_the_origins_bytes_is_held_against_them(begun: MakeBegun, whole: bytes) -> None:
    with begun("a:1") as one:
        (content,) = [file.read_bytes() for file in one.pulled.stored.files()]
        land(one.pulled.filled.fill, one.pulled.filled.extents[6], content)
        peer = one.peer("a:1", range(0)).peer
        said = {"type": "leaves", "epoch": "e", "segment": 0, "first": 5}
        right = "".join(f"{digest:016x}" for digest in leaves_of(whole)[5:7])
        one.reader._understand(peer, {**said, "digests": right})
        assert one.fleet.dropped == []
        assert one.reader._assignment.from_peer("a:1") in (5, 6)
        one.reader._understand(peer, {**said, "digests": right[:16] + "0" * 16})
        assert one.fleet.dropped == [("a:1", "wrong_bytes")]


@pytest.mark.parametrize("wrong", [[6], [7], [6, 7]])
def test_what_has_come_from_the_origin_tells_once_who_claimed_something_else(
    begun: MakeBegun, whole: bytes, wrong: list[int]
) -> None:
    with begun("a:1", "b:1", demands=DEFAULTS._replace(extent_bytes=2 * MiB)) as one:
        (content,) = [file.read_bytes() for file in one.pulled.stored.files()]
        group = one.reader._groups.all[3]
        assert len(group.spans) == 2, "leaves 6 and 7"
        for name, lies in (("a:1", wrong), ("b:1", [])):
            claims = one.peer(name, range(0)).peer.claims
            for leaf in (5, 6, 7):
                claims.there[0][leaf] = 1
                claims.digests[0][leaf] = leaves_of(whole)[leaf] ^ (leaf in lies)
        one.reader._origin.groups = {3}
        land(one.pulled.filled.fill, group.extents[0], content)
        one.reader._landed(group.extents[0])
        assert one.fleet.dropped == [("a:1", "wrong_bytes")]
        assert (one.reader._origin.groups, one.reader._here) == (set(), 1)


# ---------------------------------------------------------------------------- what is put where it can be read


class Window:
    """Where a peer puts what is on its GPU: eight places, each of which it has back once that was read."""

    def __init__(self, fleet: Fleeting, memory: bytes) -> None:
        self.answers: list[Any] = []
        """What it says first, instead of where it has put what was asked for."""
        self.held: set[int] = set()
        self.given: list[int] = []
        self._memory = memory
        self._places = bytearray(8 * MiB)
        self._lock = threading.Lock()
        fleet.has("a:1", memory, range(LEAVES), leaves_of(memory), reader="who")
        fleet.memory["a:1"] = self._places  # type: ignore[assignment]
        transport = httpx.MockTransport(self._answer)
        fleet.fleet.client = lambda name: httpx.Client(transport=transport, base_url=f"http://{name}")  # type: ignore[method-assign]

    def _answer(self, request: httpx.Request) -> httpx.Response:
        said = json.loads(request.content)
        assert said["reader"] == "who"
        with self._lock:
            assert self.held.issuperset(said["given"]), "what it never had is given back"
            self.held.difference_update(said["given"])
            self.given.extend(said["given"])
            if not said["pieces"]:
                return httpx.Response(200, json={"address": None})
            if self.answers:
                answer = self.answers.pop(0)
                return answer if isinstance(answer, httpx.Response) else httpx.Response(200, json={"address": answer})
            ((segment, offset, nbytes),) = said["pieces"]
            assert (segment, nbytes) == (0, MiB)
            address = next(at for at in range(0, 8 * MiB, MiB) if at not in self.held)
            self.held.add(address)
            self._places[address : address + nbytes] = self._memory[offset : offset + nbytes]
            return httpx.Response(200, json={"address": address})


@pytest.mark.parametrize("busy", [0, 1, 5])
def test_what_is_on_a_peers_gpu_comes_through_its_window_once_there_is_room(
    pull: MakePull, whole: bytes, busy: int
) -> None:
    fleet = Fleeting("a:1")
    window = Window(fleet, whole)
    window.answers = [None] * busy
    with pull(fleet) as pulled:
        pulled.run()
        pulled.check(LEAVES * MiB)
        assert (fleet.dropped, pulled.origins) == ([], 0)
        assert pulled.account.peers["a:1"].through_host
        assert window.given, "what was read is given back"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (-1, "it says of no address where it has put what was asked for"),
        (1 << 62, "it says of no address"),
        ("0", "it says of no address"),
        (1.0, "it says of no address"),
        (httpx.Response(500), "500 Internal Server Error"),
        (httpx.Response(200, content=b"{"), "JSONDecodeError"),
    ],
    ids=str,
)
def test_a_peer_that_does_not_say_where_it_has_put_it_has_failed(
    pull: MakePull, whole: bytes, answer: object, words: str
) -> None:
    fleet = Fleeting("a:1")
    Window(fleet, whole).answers = [answer]
    with pull(fleet) as pulled:
        given_up: list[str] = []
        dropped = fleet.fleet.count_dropped
        fleet.fleet.count_dropped = lambda name, why: (  # type: ignore[assignment]
            dropped(name, why), given_up.append(fleet.fleet.traffic[name].given_up)
        )  # fmt: skip
        pulled.run()
        pulled.account.check_complete()
        assert fleet.dropped == [("a:1", "failed")]
        assert words in given_up[0]
