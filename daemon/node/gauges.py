"""What is read off the daemon at every scrape. On the event loop, in time that grows with the number of stages only."""

from __future__ import annotations

import heapq
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from weightd.daemon.keeper.supervisor import STATUS
from weightd.daemon.node.service import Node
from weightd.daemon.observing.families import AGES, ENDS, FAMILIES, MAX_MODELS, STAGE_STATES
from weightd.daemon.observing.labels import OTHER, model_label
from weightd.daemon.stages.eviction import awaited, evictable, now
from weightd.daemon.stages.stage import Stage


class NodeGauges(Collector):
    """Gauges of a node; ``ended_seconds`` are where the seconds of stages went that have ended."""

    def __init__(self, node: Node, ended_seconds: Mapping[tuple[str, str], float]) -> None:
        self._node = node
        self._ended_seconds = ended_seconds

    def collect(self) -> Iterable[Metric]:
        stages = list(self._node.stages())
        yield from self._stages(stages)
        yield from _latest(stages)
        yield from self._devices(stages)
        yield from self._leases(stages)
        yield from self._orphans()
        yield from self._peers(stages)

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering asks nobody."""
        return ()

    def _stages(self, stages: list[Stage]) -> Iterator[Metric]:
        counts = dict.fromkeys(STAGE_STATES, 0)
        oldest = 0.0
        seconds = dict(self._ended_seconds)
        for stage in stages:
            counts[stage.state] += 1
            if stage.finished:
                continue
            if stage.state == "queued":
                oldest = max(oldest, now() - stage.entered)
            for key, span in stage.clock.fresh().items():
                seconds[key] = seconds.get(key, 0.0) + span
        yield _gauge("weightd_stages", {(state,): count for state, count in counts.items()})
        yield _gauge("weightd_queue_oldest_seconds", {(): oldest})
        yield _gauge("weightd_preload_entries", {(): len(self._node.preload.wanted)})
        yield _gauge("weightd_preload_missing", {(): len(self._node.preload.missing)})
        yield _counter("weightd_stage_wall_seconds_total", seconds)

    def _devices(self, stages: list[Stage]) -> Iterator[Metric]:
        residency, devices, at = self._node.residency, self._node.devices, now()
        held: dict[str, dict[str, int]] = {name: {} for name in devices}
        evictable_bytes = dict.fromkeys(devices, 0)
        for stage in stages:
            may_go = evictable(stage, at)
            for device, nbytes in stage.reserved.items():
                of = held[device]
                of[stage.uri] = of.get(stage.uri, 0) + nbytes
                evictable_bytes[device] += nbytes if may_go else 0
        yield _gauge("weightd_capacity_bytes", {(name,): device.capacity for name, device in devices.items()})
        yield _gauge("weightd_used_bytes", {(name,): residency.used(name) for name in devices})
        yield _gauge("weightd_evictable_bytes", {(name,): nbytes for name, nbytes in evictable_bytes.items()})
        yield _gauge("weightd_free_bytes", {(name,): max(0, residency.room(name)) for name in devices})
        yield _gauge(
            "weightd_resident_bytes",
            {(name, model): nbytes for name, of in held.items() for model, nbytes in _largest(of).items()},
        )
        yield _gauge(
            "weightd_device_quarantined",
            {(name,): int(bool(device.quarantined)) for name, device in devices.items() if device.uuid},
        )
        described = {name: device.describe() for name, device in devices.items()}
        yield _gauge(
            "weightd_device_paths_info",
            {
                (name, str(found["fill_path"]), str(found["digest_path"])): 1
                for name, found in described.items()
                if found.get("fill_path")
            },
        )

    def _leases(self, stages: list[Stage]) -> Iterator[Metric]:
        at = time.time()
        ages = sorted(max(0.0, at - lease.since) for stage in stages for lease in stage.leases.values())
        by_age = dict.fromkeys(AGES, 0)
        for age in ages:
            by_age[next(name for name, below in AGES.items() if age < below)] += 1
        yield _gauge("weightd_leases", {(): len(ages)})
        yield _gauge("weightd_leases_by_age", {(name,): count for name, count in by_age.items()})
        yield _gauge("weightd_lease_oldest_seconds", {(): ages[-1] if ages else 0.0})
        still = now()
        yield _gauge("weightd_leases_awaited", {(): sum(awaited(stage, still) for stage in stages if stage.awaited)})

    def _orphans(self) -> Iterator[Metric]:
        orphans = self._node.residency.unadopted
        yield _gauge("weightd_keeper_orphans", {(): len(orphans)})
        yield _gauge("weightd_keeper_orphaned_bytes", {(): sum(left["nbytes"] for left in orphans)})

    def _peers(self, stages: list[Stage]) -> Iterator[Metric]:
        fleet = self._node.fleet
        if fleet is None:
            return
        yield _gauge("weightd_peers", {(): sum(address != fleet.me for address, _ in fleet.members())})
        yield _gauge("weightd_peers_off", {(): int(bool(fleet.off))})
        yield _gauge("weightd_peer_readers", {(): sum(len(stage.peer_leases) for stage in stages)})


def _latest(stages: list[Stage]) -> Iterator[Metric]:
    """The latest stage of each model on each device: of those on their way, then of the youngest."""
    latest: dict[tuple[str, tuple[str, ...]], Stage] = {}
    ready: dict[tuple[str, tuple[str, ...]], Stage] = {}
    for stage in stages:
        _keep_later(latest, stage)
        if stage.ready_at is not None:
            _keep_later(ready, stage)
    shown: dict[tuple[str, str], Stage] = {}
    last: dict[tuple[str, str], Stage] = {}
    for stage in heapq.nsmallest(MAX_MODELS, latest.values(), key=lambda stage: (stage.finished, -stage.created_at)):
        key = model_label(stage.uri), stage.device
        if key not in shown:  # of URIs that differ only in what no label says, one
            shown[key] = stage
            if (found := ready.get((stage.uri, stage.devices))) is not None:
                last[key] = found
    yield _gauge(
        "weightd_latest_stage_seconds",
        {
            (*key, phase, source): seconds
            for key, stage in shown.items()
            for (phase, source), seconds in stage.clock.spent().items()
        },
    )
    yield _gauge(
        "weightd_latest_stage_bytes",
        {(*key, source): nbytes for key, stage in shown.items() for source, nbytes in stage.bytes_by_source().items()},
    )
    yield _gauge("weightd_latest_stage_size_bytes", {key: stage.bytes_total for key, stage in shown.items()})
    yield _gauge("weightd_latest_stage_state", {(*key, stage.state): 1 for key, stage in shown.items()})
    yield _gauge(
        "weightd_latest_stage_created_timestamp_seconds", {key: stage.created_at for key, stage in shown.items()}
    )
    yield _gauge(
        "weightd_latest_ready_seconds", {key: sum(stage.clock.spent().values()) for key, stage in last.items()}
    )


def _keep_later(found: dict[tuple[str, tuple[str, ...]], Stage], stage: Stage) -> None:
    other = found.setdefault((stage.uri, stage.devices), stage)
    if other.created_at < stage.created_at:
        found[stage.uri, stage.devices] = stage


def _largest(held: Mapping[str, int]) -> dict[str, int]:
    """Bytes by model's label: the largest models, and all others together."""
    found: dict[str, int] = {}
    for rank, (uri, nbytes) in enumerate(sorted(held.items(), key=lambda item: (-item[1], item[0]))):
        model = model_label(uri) if rank < MAX_MODELS else OTHER
        found[model] = found.get(model, 0) + nbytes
    return found


class KeeperGauges(Collector):
    """What the keeper says of itself in ``folder``, its runtime directory; None where there is no keeper."""

    def __init__(self, folder: Path | None) -> None:
        self._path = folder / STATUS if folder else None

    def collect(self) -> Iterable[Metric]:
        yield _gauge("weightd_keeper_up", {(): int(self._path is not None)})
        try:
            status = json.loads(self._path.read_bytes()) if self._path else {}
            # A keeper of the version before knows fewer kinds.
            ends = {(how,): int(status["ends"].get(how, 0)) for how in ENDS}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return  # none, or one of another version, which is replaced when its container is
        yield _counter("weightd_keeper_daemon_ends_total", ends)

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering reads nothing."""
        return ()


def _gauge(name: str, values: Mapping[Any, float]) -> GaugeMetricFamily:
    family = FAMILIES[name]
    metric = GaugeMetricFamily(name, family.text, labels=family.labels)
    for labels, value in values.items():
        metric.add_metric(labels, value)
    return metric


def _counter(name: str, values: Mapping[Any, float]) -> CounterMetricFamily:
    family = FAMILIES[name]
    metric = CounterMetricFamily(name, family.text, labels=family.labels)
    for labels, value in values.items():
        metric.add_metric(labels, value)
    return metric
