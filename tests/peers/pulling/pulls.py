"""Loading from peers whose every word a test says, with a mover in this process that copies what real ones read."""

from __future__ import annotations

import base64
import contextlib
import json
import mmap
from collections.abc import Callable, Sequence
from typing import Any, cast

from tests.filling.fills import Filled, MiB, Stored, in_time
from weightd.daemon.layouts.recipe import Recipe
from weightd.daemon.peers.finding.fleet import Fleet
from weightd.daemon.peers.finding.listening import FORMAT, Absent, Answered, Gone, Heard, Peer, Said
from weightd.daemon.peers.moving.movers import Arrival, MoverFailed, Movers
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
        if error == "not even begun":
            raise MoverFailed(error)
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
        for event in json.loads(json.dumps(said)):  # as it comes from others
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
            {
                "type": "segments", "epoch": "e", "reader": more.get("reader"),
                "segments": [{"address": 0, "metadata": metadata}],
            },
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
