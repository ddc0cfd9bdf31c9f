"""What the threads of one fill spend their time on."""

from __future__ import annotations

import threading
import time

from prometheus_client import Counter

from weightd.daemon.observing.clock import Clock
from weightd.daemon.observing.metrics import Metrics

PHASES = ("source", "buffers", "copying", "verifying")
"""Where a loading thread's time goes: waiting on the source, waiting for a bounce buffer, copying, hashing."""


class Phases:
    """Thread-seconds by phase; ``clock`` is told what threads are at. Methods may be called from any thread."""

    def __init__(self, clock: Clock) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._clock = clock
        self._source = ""
        self._counter: Counter | None = None
        self._counters: dict[tuple[str, str], Counter] = {}
        self._lock = threading.Lock()

    def count_with(self, metrics: Metrics, source: str) -> None:
        """Add to a daemon's counter from now on, under the source's kind."""
        self._counter, self._source = metrics.phase_seconds, source

    def phase(self, name: str, source: str = "") -> Phase:
        """Count the time inside towards a phase; ``source``: where it is not the stage's own."""
        return Phase(self, name, source)

    def enter(self, phase: str, source: str) -> float:
        """This thread is at a phase from now on; returns when that is."""
        self._clock.join(phase, source)
        return time.perf_counter()

    def leave(self, phase: str, source: str, since: float) -> None:
        """It is not any more."""
        spent = time.perf_counter() - since
        self._clock.leave(phase, source)
        with self._lock:
            self.seconds[phase] += spent
        if self._counter is not None:
            counter = self._counters.get((phase, source))
            if counter is None:
                counter = self._counter.labels(source or self._source, phase)
                self._counters[phase, source] = counter
            counter.inc(spent)


class Phase:
    """A block of a thread's time; a class, as a generator would cost more than what it measures."""

    __slots__ = ("_name", "_phases", "_since", "_source")

    def __init__(self, phases: Phases, name: str, source: str) -> None:
        self._phases = phases
        self._name = name
        self._source = source

    def __enter__(self) -> None:
        self._since = self._phases.enter(self._name, self._source)

    def __exit__(self, *_: object) -> None:
        self._phases.leave(self._name, self._source, self._since)
