"""How much to have asked for at once."""

from __future__ import annotations

import time
from collections import deque


class Pace:
    """How many to have asked for at once: as many as come in two seconds, ``least`` until that is known."""

    def __init__(self, *, least: int, most: int) -> None:
        self._least = least
        self._most = most
        self._came: deque[float] = deque(maxlen=most)

    def came(self) -> None:
        """One has come."""
        self._came.append(time.monotonic())

    @property
    def at_once(self) -> int:
        if len(self._came) < 2:
            return self._least
        rate = (len(self._came) - 1) / max(self._came[-1] - self._came[0], 1e-3)
        return max(2, min(self._most, round(2 * rate)))
