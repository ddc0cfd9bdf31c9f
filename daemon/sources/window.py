"""How many bytes to keep in flight: as many as bring more, and no more than that."""

from __future__ import annotations

_START = 32 << 20
_ROUND = 16
_WORTH_IT = 1.2
_REST = 50


class Window:
    """Bytes to keep in flight, found by trying.

    What a store far away needs to be busy (its bandwidth times its latency, which may be a gigabyte) is what a store at
    hand suffers from: caches and queues overflow. So the window doubles as long as doubling it brings a fifth more
    bytes a second, goes back where it does not, and tries again after a while.
    """

    def __init__(self, most: int, extent: int) -> None:
        self.nbytes = min(most, max(_START, 2 * extent))
        """Bytes to keep in flight now."""
        self._most = most
        self._started: float | None = None
        self._landed = 0
        self._count = 0
        self._before: float | None = None
        """Bytes a second with half the window, while it is being tried."""
        self._rest = 0

    def landed(self, nbytes: int, now: float) -> None:
        """So many bytes have landed; ``now`` in monotonic seconds."""
        if self._started is None:
            self._started = now  # what lands first has waited for connections as well
            return
        self._landed += nbytes
        self._count += 1
        if self._landed < self.nbytes or self._count < _ROUND or now <= self._started:
            return
        rate = self._landed / (now - self._started)
        self._started, self._landed, self._count = now, 0, 0
        if self._rest:
            self._rest -= 1
        elif self._before is not None and rate < _WORTH_IT * self._before:
            self.nbytes //= 2
            self._before, self._rest = None, _REST
        elif self.nbytes * 2 <= self._most:
            self._before = rate
            self.nbytes *= 2
        else:
            self._before = None
