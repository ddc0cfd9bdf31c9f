"""Prometheus metrics of one daemon: counters and histograms, which whatever happens is told to.

``families`` says what there is; what is read off the daemon at every scrape is handed in by who assembles it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.registry import Collector

from weightd.daemon import errors
from weightd.daemon.observing.build import build_info
from weightd.daemon.observing.clock import Clock
from weightd.daemon.observing.families import (
    ADOPTED,
    BETTER_PATHS,
    DROPPED,
    EVICTED,
    FAMILIES,
    MAX_PEERS,
    S3_OUTCOMES,
    SOURCES,
)
from weightd.daemon.observing.labels import OTHER, Named

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_ENDED = ("ready", "failed", "cancelled")

# Their timestamps would double the number of series.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """What happened since the daemon's start. Methods may be called from any thread, unless they say otherwise."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.source_bytes = self._counter("weightd_source_read_bytes_total")
        self.source_retries = self._counter("weightd_source_retries_total")
        self.phase_seconds = self._counter("weightd_stage_phase_seconds_total")
        self.saved_bytes = self._counter("weightd_origin_saved_bytes_total")
        self.slow_paths = self._counter("weightd_peer_slow_path_total")
        self.finished = self._counter("weightd_stages_finished_total")
        self.evictions = self._counter("weightd_evictions_total")
        self.restaged = self._counter("weightd_stages_restaged_total")
        self.errors = self._counter("weightd_errors_total")
        self.mismatches = self._counter("weightd_digest_mismatches_total")
        self._adopted = self._counter("weightd_stages_adopted_total")
        self._adopted_bytes = self._counter("weightd_adopted_bytes_total")
        self._peer_bytes = self._counter("weightd_peer_read_bytes_total")
        self._sent_bytes = self._counter("weightd_peer_sent_bytes_total")
        self._peers_dropped = self._counter("weightd_peers_dropped_total")
        self._stage_seconds = self._histogram("weightd_stage_duration_seconds")
        self.connections = self._gauge("weightd_connections")
        self.connections_dropped = self._counter("weightd_connections_dropped_total")
        self.s3_requests = self._counter("weightd_s3_requests_total")
        self.s3_bytes = self._counter("weightd_s3_sent_bytes_total")
        self.attach_seconds = self._histogram("weightd_attach_duration_seconds")
        self._api_seconds = self._histogram("weightd_api_request_duration_seconds")
        self._start_seconds = self._gauge("weightd_start_duration_seconds")
        self._gauge("weightd_build_info").labels(**build_info()).set(1)
        ProcessCollector(registry=self.registry)
        self.wall_seconds: dict[tuple[str, str], float] = {}
        """Of stages that have ended, by phase and source."""
        self._peer = Named(MAX_PEERS)
        self._text = b""
        self._good_until = 0.0
        """Until when the last exposition is given again (monotonic seconds)."""
        # A counter's first step shows only where there was a 0 before.
        for counter, values in (
            (self.source_retries, SOURCES), (self.slow_paths, BETTER_PATHS), (self.finished, _ENDED),
            (self.evictions, EVICTED), (self._adopted, ADOPTED), (self.mismatches, SOURCES),
            (self.s3_bytes, S3_OUTCOMES),
            (self.errors, error_codes()),
        ):  # fmt: skip
            for value in values:
                counter.labels(value)
        for why in DROPPED:
            self._peers_dropped.labels(OTHER, why)

    def _counter(self, name: str) -> Counter:
        family = FAMILIES[name]
        return Counter(name, family.text, family.labels, registry=self.registry)

    def _gauge(self, name: str) -> Gauge:
        family = FAMILIES[name]
        return Gauge(name, family.text, family.labels, registry=self.registry)

    def _histogram(self, name: str) -> Histogram:
        family = FAMILIES[name]
        return Histogram(name, family.text, family.labels, registry=self.registry, buckets=family.buckets)

    # ------------------------------------------------------------------ stages

    def ended(self, state: str, source: str, clock: Clock, error: errors.DaemonError | None, *, refused: bool) -> None:
        """A stage has become ready, has failed or was cancelled. Once for each; on the event loop.

        ``source`` is the kind of its source. ``refused``: it was none, and whoever says so counts the error.
        """
        for key, seconds in clock.fresh().items():
            self.wall_seconds[key] = self.wall_seconds.get(key, 0.0) + seconds
        if refused:
            return
        self.finished.labels(state).inc()
        if state == "ready":
            self._stage_seconds.labels(source).observe(sum(clock.spent().values()))
        elif state == "failed" and error is not None:
            self.errors.labels(error.code).inc()
            if isinstance(error, errors.DigestMismatch):
                self.mismatches.labels(source).inc()

    def adopted(self, state: str, nbytes: int) -> None:
        """A stage was taken over from the daemon before: ``ready``, ``failed``, or ``interrupted``."""
        self._adopted.labels(state).inc()
        self._adopted_bytes.inc(nbytes)

    def serving(self) -> None:
        """The daemon is about to serve."""
        self._start_seconds.set(_seconds_since_start())

    # ------------------------------------------------------------------ peers

    def from_peer(self, peer: str, transport: str, nbytes: int) -> None:
        """Bytes have come from a peer."""
        self._peer_bytes.labels(self._peer(peer), transport).inc(nbytes)

    def to_peer(self, peer: str, nbytes: int) -> None:
        """A peer says that it has read so many bytes."""
        self._sent_bytes.labels(self._peer(peer)).inc(nbytes)

    def dropped_peer(self, peer: str, why: str) -> None:
        """A peer was given up."""
        self._peers_dropped.labels(self._peer(peer), why).inc()
        if why == "wrong_bytes":
            self.mismatches.labels("peer").inc()

    # ------------------------------------------------------------------ the API

    def answered(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """A request was answered; ``route`` is its template. The method is whatever the client has made up."""
        known = method if route is not None and method in _METHODS else OTHER
        self._api_seconds.labels(known, route or "unmatched", str(status)).observe(seconds)

    # ------------------------------------------------------------------ the exposition

    def watch(self, collector: Collector) -> None:
        """Ask this as well at every scrape."""
        self.registry.register(collector)

    def exposition(self) -> bytes:
        """The text format, version 0.0.4. On the event loop, of whose time whoever asks gets half at most."""
        started = time.monotonic()
        if started >= self._good_until:
            self._text = generate_latest(self.registry)
            ended = time.monotonic()
            self._good_until = ended + (ended - started)
        return self._text


def error_codes(of: type[errors.DaemonError] = errors.DaemonError) -> dict[str, str]:
    """Every error's code, with the first line of what it says of itself."""
    found = {of.code: (of.__doc__ or "").partition("\n")[0]}
    for kind in of.__subclasses__():
        found |= error_codes(kind)
    return found


def _seconds_since_start() -> float:
    """Seconds since this process was started, its interpreter's own start included; in steps of 10 ms."""
    # proc(5): the 22nd field; the 2nd is the command in parentheses, which may hold anything.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
