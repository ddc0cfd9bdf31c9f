"""What the node has refused lately, for who operates it: where there was no room, say, and no stage remembers it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

from weightd.daemon.errors import (
    DaemonError,
    InsufficientCapacity,
    LeaseLimit,
    NotAllowed,
    PeerNotAllowed,
    QueueFull,
    TooManyConnections,
    TooManyWatchers,
)

_NOTED = (
    InsufficientCapacity, LeaseLimit, NotAllowed, PeerNotAllowed, QueueFull, TooManyConnections, TooManyWatchers,
)  # fmt: skip
"""What an operator can do something about; all else is the client's own mistake, or in a stage's record."""
_REMEMBERED = 20


@dataclass
class Refusal:
    """One kind of refusal, in the words in which it was given."""

    number: int
    code: str
    message: str
    remedy: str
    count: int = 0
    at: float = 0.0
    """When it was given last, in seconds since the epoch."""


class Refusals:
    """The last refusals. Those with the same words are one."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._found: dict[tuple[str, str], Refusal] = {}

    def note(self, error: DaemonError) -> None:
        """A request is refused with this; what is none of the operator's business is passed over."""
        if not isinstance(error, _NOTED):
            return
        key = error.code, str(error)
        found = self._found.pop(key, None) or Refusal(next(self._numbers), *key, error.remedy)
        found.count += 1
        found.at = time.time()
        self._found[key] = found
        if len(self._found) > _REMEMBERED:
            del self._found[next(iter(self._found))]

    def __iter__(self) -> Iterator[Refusal]:
        """The oldest first."""
        return iter(list(self._found.values()))
