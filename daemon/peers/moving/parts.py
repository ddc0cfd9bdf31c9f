"""Parts: what is asked of a peer at once, and how far each is."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from weightd.daemon.layouts.digests import LEAF, leaf_count

PART = 8 << 20
"""Bytes of a part, at most."""


class Span(NamedTuple):
    """Whole leaves of one entry: where they lie in the segment, and the number of the first."""

    segment: int
    entry: int
    offset: int
    nbytes: int
    leaf: int


class PartState(Enum):
    """How far a part is on its way from a peer."""

    QUEUED = "queued"
    """It is to be asked of its peer."""
    AWAITED = "awaited"
    """The peer is to put it where it can be read."""
    READING = "reading"
    """The mover reads it."""
    SETTLING = "settling"
    """It has come, and is being put where it belongs, and hashed there."""
    SETTLED = "settled"
    """It lies where it belongs, verified."""
    LOST = "lost"
    """It does not come from this peer."""


NEXT = {
    PartState.QUEUED: {PartState.AWAITED, PartState.READING, PartState.LOST},
    PartState.AWAITED: {PartState.READING, PartState.QUEUED, PartState.LOST},  # queued: the peer has no room now
    PartState.READING: {PartState.SETTLING, PartState.LOST},
    PartState.SETTLING: {PartState.SETTLED, PartState.LOST},
    PartState.SETTLED: set[PartState](),
    PartState.LOST: set[PartState](),
}
"""What a part can become."""


@dataclass(eq=False, slots=True)
class Part:
    """What is asked of a peer at once: whole leaves of a group, ``PART`` bytes at most, from one segment."""

    group: int
    spans: list[Span]
    state: PartState = PartState.QUEUED
    slot: int | None = None
    """Where it waits on the way to where it belongs."""
    at: int | None = None
    """Where the peer has put it, on its way from a GPU, until it was read."""
    ticket: int | None = None
    """Of its read."""
    settling: Future[list[tuple[Span, int, int]]] | None = None
    """(span, leaf, digest) of all its leaves, once it has come."""

    @property
    def nbytes(self) -> int:
        return sum(span.nbytes for span in self.spans)

    def become(self, state: PartState) -> None:
        """It has come further, or is lost."""
        allowed = NEXT[self.state]
        assert state in allowed, f"a part that is {self.state.value} cannot become {state.value}"
        self.state = state


def leaf_ranges(span: Span) -> list[tuple[int, int, int]]:
    """Each leaf of a span: its number, and where it lies in the segment: offset, bytes."""
    return [
        (span.leaf + i, span.offset + i * LEAF, min(LEAF, span.nbytes - i * LEAF))
        for i in range(leaf_count(span.nbytes))
    ]


def packed(sizes: Sequence[int]) -> list[int]:
    """Where spans of so many bytes lie in a slot, one after another."""
    offsets, at = [], 0
    for nbytes in sizes:
        offsets.append(at)
        at += -(-nbytes // 256) * 256
    return offsets
