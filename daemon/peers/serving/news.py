"""What there is to tell a peer of a stage's leaves."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from typing import Any

from weightd.daemon.stages.segments import segment_leaves
from weightd.daemon.stages.stage import Stage

_MAX_LEAVES = 4096
"""Leaf digests in one event."""


class News:
    """What one peer has been told of a stage's leaves."""

    def __init__(self, epoch: str) -> None:
        self.complete = False
        self._epoch = epoch
        self._there: list[bytearray] | None = None
        self._coming: list[bytearray] = []
        self._all = False

    def behind(self, stage: Stage) -> bool:
        """Whether there is anything new to tell."""
        if stage.fill is None:
            return stage.state == "ready" and not self._all
        account = stage.fill.account
        return account.there != self._there or account.coming != self._coming

    def catch_up(self, stage: Stage) -> list[dict[str, Any]]:
        """Events about leaves that are there, or coming, and that it has not been told of."""
        fill = stage.fill
        if fill is not None:
            account = fill.account
            if self._there is None:
                self._there = [bytearray(len(flags)) for flags in account.there]
                self._coming = [bytearray(len(flags)) for flags in account.there]
            events: list[dict[str, Any]] = []
            for segment, flags in enumerate(account.there):
                for first, count in _fresh(self._coming[segment], account.coming[segment]):
                    events.append(self._event("coming", segment, first, count=count))
                for first, count in _fresh(self._there[segment], flags):
                    digests = _hex(account.leaves_at(segment, first, count))
                    events.append(self._event("leaves", segment, first, digests=digests))
            return events
        if stage.state != "ready" or self._all:
            return []
        self._all = True
        return list(self._rest(stage))

    def _rest(self, stage: Stage) -> Iterator[dict[str, Any]]:
        """Of a ready stage, what it was not told while that was loading."""
        for segment in range(len(stage.segments)):
            told = self._there and self._there[segment]
            leaves = array("Q", b"".join(segment_leaves(stage, segment)))
            for first in range(0, len(leaves), _MAX_LEAVES):
                digests = leaves[first : first + _MAX_LEAVES]
                if not told or told.count(1, first, first + len(digests)) < len(digests):
                    yield self._event("leaves", segment, first, digests=_hex(digests))

    def _event(self, kind: str, segment: int, first: int, **more: Any) -> dict[str, Any]:
        """``first`` counts leaves over all entries of the segment."""
        return {"type": kind, "epoch": self._epoch, "segment": segment, "first": first, **more}


def _fresh(told: bytearray, flags: bytearray) -> Iterator[tuple[int, int]]:
    """(first leaf, leaves) of what is flagged and was not told of, which ``told`` then says."""
    now, before = int.from_bytes(flags, "little"), int.from_bytes(told, "little")  # of 100,000 leaves in no time
    told[:] = (now & before).to_bytes(len(told), "little")
    fresh = (now & ~before).to_bytes(len(told), "little")
    at = fresh.find(1)
    while at >= 0:
        end = fresh.find(0, at)
        end = min(len(fresh) if end < 0 else end, at + _MAX_LEAVES)
        told[at:end] = b"\1" * (end - at)
        yield at, end - at
        at = fresh.find(1, end)


def _hex(leaves: array[int]) -> str:
    """16 hexadecimal digits of each."""
    found = leaves[:]
    if sys.byteorder == "little":
        found.byteswap()
    return found.tobytes().hex()
