"""Loading from peers whose every word a test says: whom bytes come from, who is given up for what, what is read then.

A mover in this process copies what real ones read over a network.
"""

from __future__ import annotations

import base64
import contextlib
import mmap
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from tests.filling.fills import DEFAULTS, Filled, MiB, Stored, in_time, leaves_of, prepared, store, tensor
from weightd.daemon.devices.cpu import CpuDevice
from weightd.daemon.errors import DigestMismatch, SourceFailed
from weightd.daemon.layouts.checkpoint import checkpoint_layout
from weightd.daemon.layouts.recipe import Recipe
from weightd.daemon.peers.finding import following
from weightd.daemon.peers.finding.fleet import Fleet
from weightd.daemon.peers.finding.listening import FORMAT, Absent, Answered, Gone, Heard, Peer, Said
from weightd.daemon.peers.moving.movers import Arrival, MoverFailed, Movers
from weightd.daemon.peers.pulling.for_stages import Pulling
from weightd.daemon.peers.pulling.reader import PeerReader

LEAVES = 8


class Copies:
    """A mover: what it reads from a peer is in this process."""

    def __init__(self, fleet: Fleeting) -> None:
        self.on_arrival: Callable[[Arrival | None], None] = lambda arrival: None
        self.alive = True
        self._fleet = fleet
        self._maps: list[mmap.mmap] = []
        self._peers: list[str] = []
        self._tickets = 0

    def into(self, fd: int, nbytes: int) -> int:
        self._maps.append(mmap.mmap(fd, nbytes))
        return len(self._maps) - 1

    def peer(self, *metadata: bytes) -> int:
        if metadata[0] == b"unreachable":
            raise MoverFailed("no way there")
        self._peers.append(metadata[0].decode())
        return len(self._peers) - 1

    def read(self, peer: int, region: int, pairs: Sequence[tuple[int, int, int]]) -> int:
        name = self._peers[peer]
        self._tickets += 1
        error = self._fleet.errors.pop(0) if self._fleet.errors else None
        for offset, address, nbytes in pairs:
            if error is None:
                self._maps[region][offset : offset + nbytes] = self._fleet.memory[name][address : address + nbytes]
                self._fleet.read[name] = self._fleet.read.get(name, 0) + nbytes
        self.on_arrival(Arrival(self._tickets, error, "shm"))
        return self._tickets

    def kill(self) -> None:
        self.alive = False
        for mapping in self._maps:
            mapping.close()
        self._maps = []


class Fleeting:
    """Peers that say what a test has them say, once for each time that they are asked; and what became of them."""

    def __init__(self, *names: str, stall: float = 30.0) -> None:
        self.memory: dict[str, bytes] = {}
        self.said: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        self.read: dict[str, int] = {}
        self.errors: list[str] = []
        self.dropped: list[tuple[str, str]] = []
        self.asked: list[str] = []
        self.fleet = Fleet("me:1", lambda: [(name, None) for name in names], None, stall)
        self.fleet.count_dropped = lambda name, why: self.dropped.append((name, why))

    def listen(self, fleet: Fleet, key: str, peer: Peer, report: Callable[[Heard], object]) -> None:
        self.asked.append(peer.name)
        said = self.said[peer.name]
        if not said:
            report(Absent(peer))
            return
        report(Answered(peer))
        for event in said:
            peer.unheard.acquire()
            if event.get("type") == "hangs up":
                report(Gone(peer, "it hung up"))
                return
            report(Said(peer, event))
        peer.gone.wait(60)

    def has(self, name: str, memory: bytes, leaves: Sequence[int], claimed: Sequence[int], **more: Any) -> None:
        """A peer that has these leaves, and claims these digests for them."""
        self.memory[name] = memory
        metadata = base64.b64encode(more.get("metadata", name.encode())).decode()
        self.said[name] = [
            {"type": "hello", "format": more.get("format", FORMAT), "epoch": "e", "ready": True},
            {"type": "segments", "epoch": "e", "reader": None, "segments": [{"address": 0, "metadata": metadata}]},
            *(
                {
                    "type": "leaves", "epoch": more.get("epoch", "e"), "segment": 0, "first": leaf,
                    "digests": f"{claimed[leaf]:016x}",
                }
                for leaf in leaves
            ),
            {"type": "complete"},
        ]  # fmt: skip


class Pull:
    """A fill of eight leaves, each a group of its own, and a reader of it that asks peers."""

    def __init__(
        self, stored: Stored, filled: Filled, recipes: Sequence[Recipe], fleet: Fleeting, origin: bool
    ) -> None:
        self.stored, self.filled, self.fleet = stored, filled, fleet
        self.origins = 0
        movers = cast(Movers, self)
        self.reader = PeerReader(
            "k" * 32, fleet.fleet, movers, recipes, filled.segments, filled.fill, self.origin if origin else None
        )
        self.account = filled.fill.account

    def take(self) -> Any:
        return Copies(self.fleet)

    def prepare(self) -> None:
        """None is kept at hand."""

    def origin(self) -> Any:
        self.origins += 1
        return self.stored.reader()

    def run(self) -> None:
        try:
            in_time(lambda: self.reader.run(self.filled.fill), self.filled.fill)
        finally:
            self.reader.close()

    def check(self, peer_bytes: int) -> None:
        """All of it is there, so much of it from peers."""
        self.account.check_complete()
        assert (self.account.bytes_read, self.account.peer_bytes) == (LEAVES * MiB, peer_bytes)
        whole = b"".join(self.stored.data.values())
        assert bytes(self.filled.segments[0].view[: len(whole)]) == whole
        assert sorted(set(self.filled.verified[0])) == list(range(LEAVES))


MakePull = Callable[..., contextlib.AbstractContextManager[Pull]]


@pytest.fixture
def pull(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakePull:
    stored = store(tmp_path, {f"t{i}": tensor("U8", (MiB,), i) for i in range(LEAVES)})
    recipes = checkpoint_layout(stored.checkpoint.tensors)

    @contextlib.contextmanager
    def pull(fleet: Fleeting, *, origin: bool = True, fill: str = "direct", **options: Any) -> Iterator[Pull]:
        monkeypatch.setattr(following, "listen", fleet.listen)
        with prepared(stored, recipes, DEFAULTS, device=CpuDevice("cpu", 1 << 40, fill), **options) as filled:
            yield Pull(stored, filled, recipes, fleet, origin)

    return pull


@pytest.fixture
def whole() -> bytes:
    return b"".join(tensor("U8", (MiB,), i)[2] for i in range(LEAVES))


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


def test_a_claim_that_the_origins_bytes_contradict_gives_a_peer_up(pull: MakePull, whole: bytes) -> None:
    fleet = Fleeting("a:1")
    claimed = leaves_of(whole)
    claimed[6] ^= 1
    fleet.has("a:1", whole, [6], claimed, metadata=b"unreachable")
    with pull(fleet) as pulled:
        pulled.run()
        pulled.check(0)
        assert {why for _, why in fleet.dropped} <= {"unreachable", "wrong_bytes"}


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


@pytest.mark.parametrize("how", ["fails", "hangs up"])
def test_what_a_peer_does_not_bring_after_all_comes_from_elsewhere(how: str, pull: MakePull, whole: bytes) -> None:
    fleet = Fleeting("a:1")
    fleet.has("a:1", whole, [1, 3], leaves_of(whole))
    if how == "fails":
        fleet.errors = ["broken"]
    else:
        fleet.said["a:1"].insert(1, {"type": "hangs up"})
    with pull(fleet) as pulled:
        pulled.run()
        pulled.account.check_complete()
        assert fleet.dropped[0] == ("a:1", "failed" if how == "fails" else "gone")


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
