"""The daemon is away: whether to try again, or it is gone."""

from __future__ import annotations

import math
import time

RESTART_SECONDS = 30.0
"""How long a daemon that was there may be away before it counts as gone."""
_PAUSE = 0.02
"""Seconds between tries."""


class Absence:
    """Of a daemon that is asked something, again where it went away: it may be on its way back, its socket kept for it.

    Gone at once is one that was never there, and one that was stopped, which has removed its socket.
    """

    def __init__(self, *, met: bool) -> None:
        """``met``: whether the daemon is known to be there."""
        self.end = -math.inf
        """When it counts as gone, in monotonic seconds."""
        if met:
            self.answered()

    def connected(self) -> None:
        """It has taken a connection. Once that shows that it is there, then no more: its kept socket takes them too."""
        if self.end == -math.inf:
            self.answered()

    def answered(self) -> None:
        """It is there: what it may take to come back counts from now."""
        self.end = time.monotonic() + RESTART_SECONDS

    def may_end(self, error: Exception) -> bool:
        """After a moment, True where what broke by ``error`` is to be tried again; False at once where it is gone."""
        if isinstance(error, FileNotFoundError) or time.monotonic() > self.end:
            return False
        time.sleep(_PAUSE)
        return True
