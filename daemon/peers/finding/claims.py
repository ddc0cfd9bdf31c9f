"""What a peer says that it has of a stage, bounded whatever it sends."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Claims:
    """The digests that a peer claims for the leaves it has, by segment; ``starts[s][e]`` is where an entry's begin."""

    def __init__(self, starts: Sequence[Sequence[int]]) -> None:
        self.digests = [array("Q", bytes(8 * of_segment[-1])) for of_segment in starts]
        self.there = [bytearray(of_segment[-1]) for of_segment in starts]

    def at(self, said: Mapping[str, Any], count: int) -> tuple[int, int]:
        """The segment and the first leaf in it, over all entries, that an event is about. Raises ValueError."""
        segment, first = _number(said["segment"]), _number(said["first"])
        if segment >= len(self.there) or count < 0 or first + count > len(self.there[segment]):
            raise ValueError("leaves that there are not")
        return segment, first

    def add(self, said: Mapping[str, Any]) -> tuple[int, int, int]:
        """Add a ``leaves`` event: the segment, and the first and the number of its leaves. Raises ValueError."""
        digests = array("Q", bytes.fromhex(said["digests"]))
        if sys.byteorder == "little":
            digests.byteswap()
        segment, first = self.at(said, len(digests))
        self.digests[segment][first : first + len(digests)] = digests
        self.there[segment][first : first + len(digests)] = b"\1" * len(digests)
        return segment, first, len(digests)

    @property
    def any(self) -> bool:
        """Whether there are any."""
        return any(1 in of_segment for of_segment in self.there)

    def has_all(self, places: Iterable[tuple[int, int, int]]) -> bool:
        """Whether it is claimed that all of these are there: (segment, first leaf, leaves)."""
        return all(self.there[segment].count(1, first, first + count) == count for segment, first, count in places)

    def has_any(self, segment: int, first: int, count: int) -> bool:
        """Whether any of these leaves is."""
        return self.there[segment].count(1, first, first + count) > 0


def _number(found: object) -> int:
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < 1 << 62:
        raise ValueError(f"expected a number, found {str(found)[:100]!r}")
    return found
