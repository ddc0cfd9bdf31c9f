"""Parts: what is asked of a peer at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(eq=False, slots=True)
class Part:
    """What is asked of a peer at once: whole leaves of a group, ``PART`` bytes at most, from one segment."""

    group: int
    spans: list[Span]
    slot: int | None = None
    """Where it waits on the way to a GPU."""
    at: int | None = None
    """Where the peer has put it, on its way from a GPU."""

    @property
    def nbytes(self) -> int:
        return sum(span.nbytes for span in self.spans)


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
