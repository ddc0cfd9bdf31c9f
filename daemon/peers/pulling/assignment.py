"""Who reads which group from where: each from the origin once in all the fleet, and from peers everywhere else.

The nodes that share the origin agree by rendezvous hashing (highest random weight) which of them reads a group; the
others get it from whoever has it by then. Pure bookkeeping, without a clock or a thread of its own: the simulation of
large fleets runs this very code.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Sequence

from weightd.daemon.peers.finding.membership import Readers, weight

_STOLEN = 2
"""Groups at once of those that fall to another: it may have begun with them."""


class Assignment:
    """What is still to come, and whose turn each group is. ``me`` is this node's name; for one thread at a time.

    ``stripes[i]`` is what nodes agree by on group ``i``; ``readers`` are those that share the origin; ``patience`` is
    in seconds. A group is free, with a worker, or done. Workers are peers by name, and ``None`` for the origin.
    """

    def __init__(self, me: str, stripes: Sequence[str], readers: Readers, patience: float) -> None:
        self._me = me
        self._stripes = stripes
        self._readers = readers
        self._patience = patience
        self._left = set(range(len(stripes)))
        self._free = set(self._left)
        self._holders: list[set[str]] = [set() for _ in stripes]
        self._coming: list[set[str]] = [set() for _ in stripes]
        """Peers that have begun to read the group from the origin."""
        self._order = array("Q", (weight(me, str(group)) for group in range(len(stripes))))
        """Each node takes groups in an order of its own, so that what two have differs."""
        self._waiting: dict[str, list[tuple[int, int]]] = {}
        """Peer → heap of (order, group) that it has."""
        self._weights: dict[str, array[int]] = {}
        """Reader → its weight for each group."""
        self._shared_by: list[str] = []
        self._first = [""] * len(stripes)
        self._second = [""] * len(stripes)
        """For each group, the reader whose turn it is, and the one who stands in for it."""

    @property
    def finished(self) -> bool:
        return not self._left

    def has(self, peer: str, groups: Iterable[int]) -> None:
        """The peer has these, verified."""
        heap = self._waiting.setdefault(peer, [])
        for group in groups:
            if group in self._left and peer not in self._holders[group]:
                self._holders[group].add(peer)
                heapq.heappush(heap, (self._order[group], group))

    def coming(self, peer: str, groups: Iterable[int]) -> None:
        """The peer has begun to read these from the origin."""
        for group in groups:
            self._coming[group].add(peer)

    def lost(self, peer: str) -> None:
        """The peer gives nothing any more, until it says again what it has."""
        self._waiting.pop(peer, None)
        for holders, coming in zip(self._holders, self._coming, strict=True):
            holders.discard(peer)
            coming.discard(peer)

    def from_peer(self, peer: str) -> int | None:
        """A group for the peer to give now; None where it has none that is still wanted."""
        heap = self._waiting.get(peer, [])
        while heap:
            _, group = heapq.heappop(heap)
            if group in self._free:
                self._free.discard(group)
                return group
        return None

    def from_origin(self, most: int, *, at: float, idle: float) -> list[int]:
        """Groups to read from the origin now, ``most`` at most: those that no peer has, and that fall to this node.

        ``idle`` is how long nothing has come, in seconds: then this node takes over what falls to others whose stand-in
        it is, a little at a time, and in the end passes over all who have not brought what fell to them.
        """
        if not self._free or most <= 0:
            return []
        readers = self._readers.now(at)
        if self._me not in readers and idle <= self._patience:
            return []
        self._share(readers)
        missing = [group for group in self._free if not self._holders[group]]
        if idle > self._patience:
            owners = {self._first[group] for group in missing} - {self._me}
            for owner in owners:
                self._readers.pass_over(owner, at)
            if owners:
                self._share(self._readers.now(at))
        alive = set(self._shared_by)
        open_ = [group for group in missing if not self._coming[group] & alive]
        found = heapq.nsmallest(
            most, (g for g in open_ if self._first[g] == self._me), key=lambda group: self._order[group]
        )
        if not found and idle > self._patience / 8:
            within_reach = missing if idle > self._patience / 2 else open_
            found = heapq.nsmallest(
                min(most, _STOLEN),
                (group for group in within_reach if self._second[group] == self._me),
                key=lambda group: self._order[group],
            )
        self._free.difference_update(found)
        return found

    def owner(self, group: int, *, at: float) -> str:
        """The node that reads the group from the origin."""
        self._share(self._readers.now(at))
        return self._first[group]

    def done(self, group: int) -> None:
        """It is here, verified."""
        self._left.discard(group)
        self._free.discard(group)
        self._holders[group] = set()

    def again(self, groups: Iterable[int]) -> None:
        """What was here is not to be believed."""
        self._left.update(groups)
        self._free.update(groups)

    def failed(self, group: int) -> None:
        """Whoever was to bring it did not: it is free again."""
        if group in self._left:
            self._free.add(group)
            for peer in self._holders[group]:
                heapq.heappush(self._waiting[peer], (self._order[group], group))

    def _share(self, nodes: list[str]) -> None:
        """Work out who reads what, where that has changed."""
        if nodes == self._shared_by:
            return
        gone = set(self._shared_by) - set(nodes)
        fresh = [node for node in nodes if node not in self._weights]
        if len(self._shared_by) < 2 or len(fresh) > len(nodes) // 2:
            gone, fresh = set(self._shared_by), []
        self._shared_by = nodes
        self._weights = {node: self._weights.get(node) or self._weigh(node) for node in nodes}
        for group in range(len(self._stripes)):
            if not self._first[group] or self._first[group] in gone or self._second[group] in gone:
                ranked = heapq.nlargest(2, nodes, key=lambda node: self._weights[node][group])
                self._first[group], self._second[group] = ranked[0], ranked[-1]
        for node in fresh:
            self._step_in(node)

    def _step_in(self, node: str) -> None:
        """A reader more: it takes what it weighs most for."""
        for group, mine in enumerate(self._weights[node]):
            first = self._first[group]
            if mine > self._weights[first][group]:
                self._first[group], self._second[group] = node, first
            elif first != node and mine > self._weights[self._second[group]][group]:
                self._second[group] = node

    def _weigh(self, node: str) -> array[int]:
        return array("Q", (weight(node, stripe) for stripe in self._stripes))
