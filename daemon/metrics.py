"""Prometheus metrics of one daemon. Names follow the conventions that ``promtool check metrics`` knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from weightd.daemon.node import Node

_MAX_PEERS = 200
"""Peers with series of their own."""
STAGE_STATES = ("queued", "planning", "loading", "verifying", "ready", "failed", "cancelled", "evicted")


class Metrics:
    """All counters and histograms; gauges are read off the node when scraped."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        self.source_bytes = counter(
            "weightd_source_read_bytes_total", "Bytes of weights read, by kind of source.", "source"
        )
        self.source_retries = counter(
            "weightd_source_retries_total", "Reads that failed and were tried again.", "source"
        )
        self.phase_seconds = counter(
            "weightd_stage_phase_seconds_total",
            "Thread-seconds of staging by kind of source and phase: waiting on the source, waiting for bounce buffers, "
            "copying, verifying.",
            "source", "phase",
        )  # fmt: skip
        self.peer_bytes = counter(
            "weightd_peer_read_bytes_total",
            "Bytes of weights read from peers, and verified, by transport: rdma, cuda_ipc, shm, tcp, unknown.",
            "transport",
        )
        self.saved_bytes = counter(
            "weightd_origin_saved_bytes_total", "Bytes that were not read from an origin because peers had them."
        )
        self.peers_dropped = counter(
            "weightd_peers_dropped_total",
            "Peers given up while a stage was read from them, by peer and reason: stalled, gone, failed, unreachable, "
            "wrong_bytes, nonsense, version.",
            "peer", "reason",
        )  # fmt: skip
        self.slow_paths = counter(
            "weightd_peer_slow_path_total",
            "Stages that read from a peer by TCP, or not as fast as this machine can, by the better path there is.",
            "better",
        )
        self._named_peers: set[str] = set()
        self.finished = counter("weightd_stages_finished_total", "Stages that ended, by state.", "state")
        self.evictions = counter(
            "weightd_evictions_total",
            "Ready stages that were freed, by reason: capacity, ttl, request, revoked.",
            "reason",
        )
        self.adopted = counter(
            "weightd_stages_adopted_total", "Stages taken over from the daemon before, by what they were.", "state"
        )
        self.errors = counter(
            "weightd_errors_total", "Failed stages and refused requests, by code of the error.", "code"
        )
        self.stage_seconds = Histogram(
            "weightd_stage_duration_seconds",
            "Seconds from request to ready.",
            buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000),
            registry=self.registry,
        )
        self.attach_seconds = Histogram(
            "weightd_attach_duration_seconds",
            "Seconds from a lease request for a ready stage to its handle being sent.",
            buckets=(0.0005, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3),
            registry=self.registry,
        )
        self.api_seconds = Histogram(
            "weightd_api_request_duration_seconds",
            "Seconds to answer an HTTP request (to the first byte of an event stream).",
            ("method", "route", "status"),
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
            registry=self.registry,
        )
        for state in ("ready", "failed", "cancelled"):
            self.finished.labels(state)

    def from_peers(self, transport: str, nbytes: int) -> None:
        """Bytes have come from a peer. Callable from any thread."""
        self.peer_bytes.labels(transport).inc(nbytes)

    def dropped_peer(self, peer: str, why: str) -> None:
        """A peer was given up. Of very many, not all have a series of their own. Callable from any thread."""
        if len(self._named_peers) < _MAX_PEERS:
            self._named_peers.add(peer)
        self.peers_dropped.labels(peer if peer in self._named_peers else "other", why).inc()

    def watch(self, node: Node) -> None:
        """Read gauges off ``node`` at every scrape."""
        self.registry.register(_NodeCollector(lambda: node))

    def exposition(self) -> bytes:
        """The text format, version 0.0.4."""
        return generate_latest(self.registry)


class _NodeCollector:
    def __init__(self, node: Callable[[], Node]) -> None:
        self._node = node

    def collect(self) -> Iterable[Metric]:
        node = self._node()
        stages = GaugeMetricFamily("weightd_stages", "Stages known, by state.", labels=["state"])
        counts = dict.fromkeys(STAGE_STATES, 0)
        resident: dict[tuple[str, str], int] = {}
        for stage in node.stages():
            counts[stage.state] += 1
            for device, nbytes in stage.reserved.items():
                resident[device, stage.uri] = resident.get((device, stage.uri), 0) + nbytes
        for state, count in counts.items():
            stages.add_metric([state], count)
        yield stages
        held = GaugeMetricFamily(
            "weightd_resident_bytes", "Bytes of device memory that segments take.", labels=["device", "model"]
        )
        for (device, model), nbytes in resident.items():
            held.add_metric([device, model], nbytes)
        yield held
        capacity = GaugeMetricFamily("weightd_capacity_bytes", "Bytes that segments may take.", labels=["device"])
        for name, device_ in node.devices.items():
            capacity.add_metric([name], device_.capacity)
        yield capacity
        paths = GaugeMetricFamily(
            "weightd_device_paths_info",
            "How a GPU is filled (streamer: libstreamer's CUDA backend, ring: pinned bounce buffers), and where "
            "digests of its memory are computed (gpu, host); always 1.",
            labels=["device", "fill", "digests"],
        )
        for name, device_ in node.devices.items():
            found = device_.describe()
            if found.get("fill_path"):
                paths.add_metric([name, str(found["fill_path"]), str(found["digest_path"])], 1)
        yield paths
        yield GaugeMetricFamily("weightd_leases", "Leases held.", value=sum(len(s.leases) for s in node.stages()))
