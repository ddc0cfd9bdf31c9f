"""How much to have asked for at once."""

from __future__ import annotations

import time
from collections import deque

_LEAST = 4


class Pace:
    """How many to have asked for at once: as many as come in so many ``seconds``, and a few until that is known."""

    def __init__(self, seconds: float, *, most: int) -> None:
        self._seconds = seconds
        self._most = most
        self._came: deque[float] = deque(maxlen=most)

    def came(self) -> None:
        """One has come."""
        self._came.append(time.monotonic())

    @property
    def at_once(self) -> int:
        if len(self._came) < 2:
            return _LEAST
        rate = (len(self._came) - 1) / max(self._came[-1] - self._came[0], 1e-3)
        return max(_LEAST, min(self._most, round(self._seconds * rate)))
