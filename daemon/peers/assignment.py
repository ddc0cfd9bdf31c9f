"""Who reads which group from where: each from the origin once in all the fleet, and from peers everywhere else.

No coordinator: all nodes that want the same bytes agree by rendezvous hashing (highest random weight) which of them
reads a group from the origin; the others get it from whoever has it by then. Pure bookkeeping, without a clock or a
thread of its own: the simulation of large fleets runs this very code.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import xxhash


class Assignment:
    """What is still to come, and whose turn each group is. ``me`` is this node's name; for one thread at a time.

    ``stripes[i]`` is what nodes agree by on group ``i``. A group is free, with a worker, or done. Workers are peers by
    name, and ``None`` for the origin.
    """

    def __init__(self, me: str, stripes: Sequence[str]) -> None:
        self._me = me
        self._stripes = stripes
        self._left = set(range(len(stripes)))
        self._free = set(self._left)
        self._holders: list[set[str]] = [set() for _ in stripes]
        self._waiting: dict[str, list[tuple[int, int]]] = {}
        """Peer → heap of (weight, group) that it has: each node takes them in an order of its own."""
        self._wanting: set[str] = set()
        """Peers that load the same, and so read their part of the origin."""
        self._given_up: set[str] = set()

    @property
    def finished(self) -> bool:
        return not self._left

    def wants(self, peer: str) -> None:
        """The peer loads the same: it reads its share of the origin, and gives it on."""
        if peer not in self._given_up:
            self._wanting.add(peer)

    def has(self, peer: str, groups: Iterable[int]) -> None:
        """The peer has these, verified."""
        heap = self._waiting.setdefault(peer, [])
        for group in groups:
            if group in self._left and peer not in self._holders[group]:
                self._holders[group].add(peer)
                heapq.heappush(heap, (_weight(self._me, str(group)), group))

    def lost(self, peer: str) -> None:
        """The peer gives nothing any more: what it was to read from the origin falls to others."""
        self._given_up.add(peer)
        self._wanting.discard(peer)
        self._waiting.pop(peer, None)
        for holders in self._holders:
            holders.discard(peer)

    def back(self, peer: str) -> None:
        """A peer that was lost may be asked again."""
        self._given_up.discard(peer)

    def from_peer(self, peer: str) -> int | None:
        """A group for the peer to give now; None where it has none that is still wanted."""
        heap = self._waiting.get(peer, [])
        while heap:
            _, group = heapq.heappop(heap)
            if group in self._free:
                self._free.discard(group)
                return group
        return None

    def from_origin(self, *, most: int | None = None, impatient: bool = False) -> list[int]:
        """Groups to read from the origin now, ``most`` of them: those that no peer has and that fall to this node.

        ``impatient``: also those that fall to others, who have not brought anything for too long.
        """
        found = [
            group
            for group in sorted(self._free)
            if not self._holders[group] and (impatient or self.owner(group) == self._me)
        ][:most]
        self._free.difference_update(found)
        return found

    def owner(self, group: int) -> str:
        """The node that reads the group from the origin, of those that are known to want it."""
        stripe = self._stripes[group]
        return max((self._me, *self._wanting), key=lambda node: _weight(node, stripe))

    def done(self, group: int) -> None:
        """It is here, verified."""
        self._left.discard(group)
        self._free.discard(group)
        self._holders[group] = set()

    def failed(self, group: int) -> None:
        """Whoever was to bring it did not: it is free again."""
        if group in self._left:
            self._free.add(group)
            for peer in self._holders[group]:
                heapq.heappush(self._waiting[peer], (_weight(self._me, str(group)), group))


def _weight(node: str, what: str) -> int:
    value: int = xxhash.xxh3_64_intdigest(f"{node}\0{what}".encode())
    return value
