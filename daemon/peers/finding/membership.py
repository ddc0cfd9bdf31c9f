"""Whom a node listens to, and which nodes share the reading of the origin, without a coordinator.

Both by rendezvous hashing, so that all nodes agree as far as they know the same; and both bounded, so that what a node
hears and says does not grow with the fleet: it listens to ``degree`` others, and of the nodes that load the same it
knows the few that read. That spreads from neighbour to neighbour, as each repeats what it has heard. Without a clock or
a thread of its own: the simulation of large fleets runs this very code.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping

import xxhash

READERS = 32
"""Nodes that read the origin for all: enough to fill its link, few enough to know them all."""
_REMEMBERED = 4 * READERS


def weight(*what: str) -> int:
    """A number that all nodes agree on, by which the highest is chosen."""
    value: int = xxhash.xxh3_64_intdigest("\0".join(what).encode())
    return value


def degree(members: int) -> int:
    """To how many of so many other nodes one listens: all of a small fleet, and of a large one as its logarithm."""
    return max(16, 2 * members.bit_length())


def neighbours(me: str, key: str, members: Iterable[str]) -> list[str]:
    """Those of ``members`` to listen to for a stage, the same for both ends of most pairs."""
    others = {member for member in members if member != me}
    ordered = sorted(others, key=lambda other: weight(key, min(me, other), max(me, other)), reverse=True)
    return ordered[: degree(len(others))]


def first_readers(key: str, members: Iterable[str]) -> dict[str, int]:
    """Those of ``members`` that read the origin if all of them do, to be ``heard`` of before they have said anything.

    With stamps that anything which they say themselves is newer than.
    """
    return dict.fromkeys(heapq.nlargest(READERS, members, key=lambda node: weight(key, node)), 0)


class Readers:
    """The nodes that share the reading of one stage's origin, as far as this one knows.

    A node that reads says so again and again, with a stamp that grows; whose stamp has not grown for ``patience``
    seconds is taken for dead. Times are in seconds, of one clock; stamps are each node's own.
    """

    def __init__(self, me: str, key: str, patience: float) -> None:
        self._me = me
        self._key = key
        self._patience = patience
        self._known: dict[str, tuple[int, float]] = {}
        """Node → its last stamp, and when that was heard first."""
        self._out_until: dict[str, float] = {}
        """Node → until when it is passed over."""
        self._ranks: dict[str, int] = {}
        self._now: list[str] = []
        self._now_until = -math.inf
        """When ``_now`` is to be worked out again, at the latest: it is asked for many times a second."""

    def heard(self, stamps: Mapping[str, int], at: float) -> None:
        """Somebody says when these said last that they read."""
        for node, stamp in stamps.items():
            before, when = self._known.get(node, (-1, -math.inf))
            if node != self._me and stamp > before:
                self._known[node] = stamp, at
                if at - when >= self._patience:
                    self._now_until = -math.inf
        if len(self._known) > _REMEMBERED:
            kept = sorted(self._known, key=lambda node: (self._alive(node, at), self._rank(node)), reverse=True)
            self._known = {node: self._known[node] for node in kept[:_REMEMBERED]}

    def lost(self, node: str, at: float) -> None:
        """It is gone, or fails: only what it says anew counts."""
        if node in self._known:
            self._known[node] = self._known[node][0], at - self._patience
            self._now_until = -math.inf

    def pass_over(self, node: str, at: float) -> None:
        """It has not brought what fell to it: for a while it falls to others, whatever it says."""
        self._out_until[node] = at + 6 * self._patience
        self._now_until = -math.inf

    def now(self, at: float) -> list[str]:
        """Those that share the reading: this node, if it is among the first of them; in one order for all."""
        if at >= self._now_until:
            alive = [node for node in self._known if self._alive(node, at)]
            self._now = sorted([self._me, *alive], key=self._rank, reverse=True)[:READERS]
            ends = [self._known[node][1] + self._patience for node in self._now if node != self._me]
            self._now_until = min(
                [*ends, *(until for until in self._out_until.values() if until > at)], default=math.inf
            )
        return self._now

    def stamps(self, own: int | None, at: float) -> dict[str, int]:
        """What to tell others: the first of those alive; ``own`` is this node's stamp, None where it reads nothing."""
        alive = {node: stamp for node, (stamp, _) in self._known.items() if self._alive(node, at)}
        if own is not None:
            alive[self._me] = own
        return {node: alive[node] for node in sorted(alive, key=self._rank, reverse=True)[:READERS]}

    def _alive(self, node: str, at: float) -> bool:
        return at - self._known[node][1] < self._patience and at >= self._out_until.get(node, at)

    def _rank(self, node: str) -> int:
        found = self._ranks.get(node)
        if found is None:
            if len(self._ranks) > 2 * _REMEMBERED:
                self._ranks.clear()
            found = self._ranks[node] = weight(self._key, node)
        return found
