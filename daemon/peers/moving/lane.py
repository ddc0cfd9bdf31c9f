"""The lane of one peer: the parts that it is to bring, by how far they are, and how fast they come."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import wait

from weightd.daemon.peers.finding.listening import Peer
from weightd.daemon.peers.moving.parts import NEXT, Part, PartState

_AT_ONCE = 4
"""Parts that are asked of one peer at the same time, at most."""
_AHEAD = 0.25
"""Seconds that what was asked of a peer may take to come where more is to be asked of it: while parts wait for one that
is asked by all, others come to have them."""


class Lane:
    """What one peer is to bring. A part is in it until it has ended, as settled or lost. For one thread."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.number: int | None = None
        """The peer's with the mover, once connected."""
        self.read_out: list[int] = []
        """Where it has put what was read since: others wait for that room."""
        self.arrived = 0.0
        """When bytes came from it last, or were asked of it while none were, in monotonic seconds."""
        self.full = False
        """Whether it had no room for what it was asked for last."""
        self._parts: dict[PartState, OrderedDict[Part, None]] = {
            state: OrderedDict() for state, following in NEXT.items() if following
        }

    def queue(self, parts: Iterable[Part]) -> None:
        """Parts that are to be asked of it, in this order."""
        self._parts[PartState.QUEUED].update(dict.fromkeys(parts))

    def move(self, part: Part, to: PartState) -> None:
        """One of its parts has come further, or is lost; what is queued again is the next to be asked for."""
        before = part.state
        part.become(to)
        del self._parts[before][part]
        if to in self._parts:
            self._parts[to][part] = None
            self._parts[to].move_to_end(part, last=to is not PartState.QUEUED)

    def parts(self, state: PartState) -> list[Part]:
        """Those that are so far."""
        return list(self._parts[state])

    @property
    def next(self) -> Part | None:
        """What is to be asked of it next."""
        return next(iter(self._parts[PartState.QUEUED]), None)

    @property
    def busy(self) -> int:
        """Parts that were asked of it, and have not come."""
        return len(self._parts[PartState.AWAITED]) + len(self._parts[PartState.READING])

    @property
    def empty(self) -> bool:
        """Whether it is to bring nothing."""
        return not any(self._parts.values())

    @property
    def rate(self) -> float:
        """Bytes in a second while any were asked of it; 0 where nothing has come yet."""
        use = self.peer.use
        return use.nbytes / use.seconds if use.seconds > 0 else 0.0

    @property
    def has_room(self) -> bool:
        """Whether to ask more of it now: one part at a time until it is known how fast they come."""
        asked = sum(part.nbytes for part in (*self._parts[PartState.AWAITED], *self._parts[PartState.READING]))
        return not asked or (self.busy < _AT_ONCE and asked <= _AHEAD * self.rate)

    def reading(self, ticket: int) -> Part | None:
        """The part that is being read by this ticket."""
        return next((part for part in self._parts[PartState.READING] if part.ticket == ticket), None)

    def begin(self, now: float) -> None:
        """It is about to be asked for a part: from now on it is waited for, if it was not before."""
        if not self.busy and not self.full:
            self.arrived = now

    def came(self, part: Part, now: float) -> None:
        """A part has come, and is to settle."""
        self.move(part, PartState.SETTLING)
        self._free(part)
        self.peer.use.seconds += now - self.arrived
        self.arrived, self.full = now, False

    def take_read_out(self) -> list[int]:
        """What to tell the peer that it has back."""
        found, self.read_out = self.read_out, []
        return found

    def let_go(self) -> list[Part]:
        """Lose all that has not settled, of which nothing is being read any more. Waits for what is being hashed."""
        wait([part.settling for part in self._parts[PartState.SETTLING] if part.settling is not None])
        lost = [part for parts in self._parts.values() for part in parts]
        for part in lost:
            self.move(part, PartState.LOST)
            self._free(part)
        self.number = None
        return lost

    def _free(self, part: Part) -> None:
        if part.at is not None:
            self.read_out.append(part.at)
            part.at = None
