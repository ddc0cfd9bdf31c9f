"""Groups: a plan's extents, put together so that peers can give the same bytes as the origin.

The origin is read by ranges of files, a peer by ranges of its segments, which are laid out as ours. A group is the
smallest set of extents whose bytes are both: one extent, where it brings whole leaves of entries; all extents that
bring parts of the same leaves together, where those are cut otherwise than the files' bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from weightd.daemon.filling.account import Account
from weightd.daemon.layouts.digests import LEAF, leaf_count
from weightd.daemon.layouts.extents import Extent
from weightd.daemon.layouts.recipe import Recipe
from weightd.daemon.peers.moving.parts import PART, Part, Span

_STRIPE = 8 << 20
_MAX_SPANS = 256


@dataclass(eq=False, slots=True)
class Group:
    """``extents`` bring it from the origin, ``spans`` are where it lies; and how far it is."""

    index: int
    extents: list[Extent]
    spans: list[Span]
    extents_left: int = field(init=False)
    """That are still to land: what is forgotten before it was told of as landed is to land twice."""
    asked: bool = False
    """Whether a peer has had leave to write where it lies."""
    brought_by: str | None = None
    """The peer that has brought all of it."""
    _parts_left: int = 0
    """That are still to come, while a peer brings it."""
    _digests: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(segment, entry, leaf, digest) of those of its parts that have come."""

    def __post_init__(self) -> None:
        self.extents_left = len(self.extents)

    @property
    def stripe(self) -> str:
        """By what nodes agree on who reads it first, however large each one's extents are."""
        first = self.extents[0]
        return f"{first.file}:{first.offset // _STRIPE}"

    def landed(self) -> bool:
        """One of its extents has landed; whether all have now."""
        self.extents_left -= 1
        return not self.extents_left

    def begin_parts(self) -> list[Part]:
        """A peer is to bring it: the parts that it is asked for in."""
        self.asked = True
        parts: list[Part] = []
        room = 0
        for span in self.spans:
            at = 0
            while at < span.nbytes:
                if room < LEAF or parts[-1].spans[-1].segment != span.segment or len(parts[-1].spans) == _MAX_SPANS:
                    parts.append(Part(self.index, []))
                    room = PART
                nbytes = min(span.nbytes - at, room - room % LEAF)
                parts[-1].spans.append(Span(span.segment, span.entry, span.offset + at, nbytes, span.leaf + at // LEAF))
                at += nbytes
                room -= nbytes
        self._parts_left = len(parts)
        return parts

    def part_came(self, peer: str, found: Iterable[tuple[Span, int, int]]) -> bool:
        """A part has come from a peer, verified, with (span, leaf, digest); whether all have now."""
        self._digests.extend((span.segment, span.entry, leaf, digest) for span, leaf, digest in found)
        self._parts_left -= 1
        if not self._parts_left:
            self.brought_by = peer
        return not self._parts_left

    def take_digests(self) -> list[tuple[int, int, int, int]]:
        """Those of all its parts, once all have come."""
        found, self._digests = self._digests, []
        return found

    def let_go(self) -> None:
        """The peer that was to bring it does not."""
        self._digests = []


class Groups:
    """The groups of a plan, by number: what each brings, and which one brings what.

    ``starts[s][e]`` is where an entry's leaves begin, counted over all entries of its segment.
    """

    def __init__(self, extents: Sequence[Extent], recipes: Sequence[Recipe], starts: Sequence[Sequence[int]]) -> None:
        self.all = plan_groups(extents, recipes)
        self._starts = starts
        self._of_extent = {extent.index: group for group in self.all for extent in group.extents}
        self._by_leaf: list[dict[int, Group]] = [{} for _ in starts]
        for group in self.all:
            for segment, first, count in self.leaves(group):
                self._by_leaf[segment].update(dict.fromkeys(range(first, first + count), group))

    def of(self, extent: Extent) -> Group:
        """The one that an extent is in."""
        return self._of_extent[extent.index]

    def leaves(self, group: Group) -> list[tuple[int, int, int]]:
        """(segment, first leaf counted over all its entries, leaves) of what a group brings."""
        return [
            (span.segment, self._starts[span.segment][span.entry] + span.leaf, leaf_count(span.nbytes))
            for span in group.spans
        ]

    def at(self, segment: int, first: int, count: int) -> list[Group]:
        """Those that bring any of these leaves."""
        by_leaf = self._by_leaf[segment]
        return list(dict.fromkeys(by_leaf[leaf] for leaf in range(first, first + count) if leaf in by_leaf))

    def of_leaf(self, segment: int, leaf: int) -> Group | None:
        """The one that brings a leaf; None where that was there already."""
        return self._by_leaf[segment].get(leaf)


def begin_parts_anew(extents: Sequence[Extent], recipes: Sequence[Recipe], account: Account) -> None:
    """Of what a daemon before has left, forget groups that are there in part.

    A peer brings all of a group, and writes over what was there.
    """
    if not account.bytes_read:
        return
    for group in plan_groups(extents, recipes):
        landed = [extent for extent in group.extents if account.has(extent)]
        if 0 < len(landed) < len(group.extents):
            account.forget(landed)
            account.requeue(landed)


def plan_groups(extents: Sequence[Extent], recipes: Sequence[Recipe]) -> list[Group]:
    """Every extent is in exactly one group, in the order of the plan."""
    found: dict[int, list[Extent]] = {}
    leader = _Joined(len(extents))
    shared: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for number, extent in enumerate(extents):
        for piece in extent.pieces:
            if piece.shared:
                place = (piece.leaf, piece.leaf + piece.shared, number)
                shared.setdefault((piece.segment, piece.entry), []).append(place)
    for places in shared.values():
        places.sort()
        end, last = 0, 0
        for first, stop, number in places:
            if first < end:
                leader.join(last, number)
            end, last = max(end, stop), number
    for number, extent in enumerate(extents):
        found.setdefault(leader.of(number), []).append(extent)
    return [Group(index, members, _spans(members, recipes)) for index, members in enumerate(found.values())]


def _spans(extents: Sequence[Extent], recipes: Sequence[Recipe]) -> list[Span]:
    places = sorted(
        {
            (piece.segment, piece.entry, piece.leaf, piece.leaf + (piece.shared or leaf_count(piece.nbytes)))
            for extent in extents
            for piece in extent.pieces
        }
    )
    spans: list[Span] = []
    for segment, number, first, stop in places:
        entry = recipes[segment].entries[number]
        begin, end = first * LEAF, min(stop * LEAF, entry.nbytes)
        if spans and (spans[-1].segment, spans[-1].entry) == (segment, number):
            before = spans[-1].leaf * LEAF + spans[-1].nbytes
            if begin < before:  # they bring parts of the same leaves
                spans[-1] = spans[-1]._replace(nbytes=max(before, end) - spans[-1].leaf * LEAF)
                continue
        spans.append(Span(segment, number, entry.offset + begin, end - begin, first))
    return sorted(spans)


class _Joined:
    """Sets that grow together: union-find."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def of(self, item: int) -> int:
        while self._parent[item] != item:
            self._parent[item] = self._parent[self._parent[item]]
            item = self._parent[item]
        return item

    def join(self, a: int, b: int) -> None:
        a, b = self.of(a), self.of(b)
        self._parent[max(a, b)] = min(a, b)
