"""Where a stage's time goes: every second of it, from the request to its end, is some phase's.

The stage as a whole is in one phase at a time: ``enter`` says which. While it loads, threads work for it side by side,
and each says what it is at: ``join`` and ``leave``. A moment in which threads are at something is shared out among them
equally, a moment in which none is belongs to the stage's own phase. So phases add up to the stage's duration, however
many threads there are, and a phase's share is about what would be saved if it took no time.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Mapping

STAGE_PHASES = {
    "queued": "waiting for its turn, for a thread, or for peers to let go of what makes room for it",
    "listing": "listing what is at the URI",
    "headers": "reading headers and configuration files, and laying out",
    "source": "waiting on the source of its bytes, pauses between failed reads included",
    "buffers": "waiting for a bounce buffer",
    "copying": "copying from bounce buffers to where the bytes belong, on a GPU waiting for its copies as well",
    "verifying": "hashing, and comparing digests",
    "other": "everything else: allocating memory, laying out reads, sealing, a restart of the daemon",
}
"""Phase → what the stage does then."""


class Clock:
    """One stage's, running from ``began`` on (monotonic seconds; default: now). Methods are for any thread.

    Spans are kept by phase and source: ``origin`` is the stage's own source, "" where a method names none.
    """

    def __init__(self, began: float | None = None, phase: str = "queued") -> None:
        self.origin = ""
        self.began = time.monotonic() if began is None else began
        self._lock = threading.Lock()
        self._phase = phase
        self._at = self.began
        """Up to when it is accounted for."""
        self._spent: dict[tuple[str, str], float] = defaultdict(float)
        self._threads: dict[tuple[str, str], int] = {}
        """What threads are at, and how many."""
        self._count = 0
        """Of them all."""
        self._stopped = False
        self._before: dict[tuple[str, str], float] = {}
        """What had been spent when it was taken over."""

    @classmethod
    def taken_over(cls, began: float, spent: Mapping[tuple[str, str], float], *, stopped: bool) -> Clock:
        """Go on where the daemon before ended. What it has not noted down before it died is ``other``."""
        clock = cls(began)
        clock._spent.update(spent)
        clock._at = began + sum(spent.values())
        clock._stopped = stopped
        clock._phase = "other"
        clock.enter("queued")
        clock._before = dict(clock._spent)
        return clock

    def enter(self, phase: str) -> None:
        """From now on the stage is in this phase, while no thread says otherwise."""
        with self._lock:
            self._account()
            self._phase = phase

    def join(self, phase: str, source: str = "") -> None:
        """This thread is at this from now on, of one source or of the stage's own."""
        with self._lock:
            self._account()
            self._threads[phase, source] = self._threads.get((phase, source), 0) + 1
            self._count += 1

    def leave(self, phase: str, source: str = "") -> None:
        """It is not any more."""
        with self._lock:
            self._account()
            left = self._threads[phase, source] - 1
            if left:
                self._threads[phase, source] = left
            else:
                del self._threads[phase, source]
            self._count -= 1

    def stop(self) -> None:
        """The stage is ready, or has ended otherwise: nothing counts any more."""
        with self._lock:
            self._account()
            self._stopped = True

    def spent(self) -> dict[tuple[str, str], float]:
        """Seconds so far, by phase and source."""
        with self._lock:
            self._account()
            return self._by_source(self._spent)

    def fresh(self) -> dict[tuple[str, str], float]:
        """The same without what had been spent when it was taken over."""
        with self._lock:
            self._account()
            before = self._before
            return self._by_source({key: seconds - before.get(key, 0.0) for key, seconds in self._spent.items()})

    def _by_source(self, spent: Mapping[tuple[str, str], float]) -> dict[tuple[str, str], float]:
        found: dict[tuple[str, str], float] = {}
        for (phase, source), seconds in spent.items():
            key = phase, source or self.origin
            found[key] = found.get(key, 0.0) + seconds
        return found

    def _account(self) -> None:
        # Several times for each extent: as little as can be.
        now = time.monotonic()
        span, self._at = now - self._at, now
        if self._stopped or span <= 0:
            return
        if not self._count:
            self._spent[self._phase, ""] += span
            return
        share = span / self._count
        for key, count in self._threads.items():
            self._spent[key] += share * count


def by_phase(spent: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """Seconds in each of ``STAGE_PHASES``, of all sources together."""
    found = dict.fromkeys(STAGE_PHASES, 0.0)
    for (phase, _), seconds in spent.items():
        found[phase] += seconds
    return found
