"""One load of a fleet: nodes start, publish what they have, die, and are ready."""

from __future__ import annotations

import gc
import math
import time
from collections import Counter
from dataclasses import asdict

from tests.bench.simulation.fleet import Fleet
from tests.bench.simulation.listening import look
from tests.bench.simulation.node import Node
from tests.bench.simulation.pulling import gone, turn
from tests.bench.simulation.scenario import (
    DIRECTORY,
    LATENCY,
    LOOK,
    PERCENTILES,
    PUBLISH,
    STALL,
    TTL,
    Outcome,
    Scenario,
)
from tests.bench.simulation.serving import tick
from tests.bench.simulation.traffic import watched_bytes
from weightd.daemon.peers.pulling.assignment import Assignment


def simulate(scenario: Scenario) -> Outcome:
    """Until all living nodes are ready, or the scenario's limit is over."""
    gc.disable()  # millions of tuples live, none in a cycle
    try:
        fleet = Fleet(scenario)
        _plan(fleet)
        began = time.perf_counter()
        while fleet.left and fleet.at < scenario.limit:
            fleet.step()
        return _outcome(fleet, time.perf_counter() - began)
    finally:
        gc.enable()


def _plan(fleet: Fleet) -> None:
    """Who starts when, and who dies when and how."""
    scenario = fleet.scenario
    for node in fleet.nodes:
        fleet.later(fleet.rng.uniform(0, scenario.starts), _start, node)
    doomed = fleet.rng.sample(fleet.nodes, round(scenario.failing * scenario.nodes))
    for number, node in enumerate(doomed):
        when = fleet.rng.uniform(scenario.starts, scenario.starts + scenario.bound)
        fleet.later(when, _die, node, ("killed", "vanished")[number % 2])
    fleet.later(0.0, _sample)


def _outcome(fleet: Fleet, simulated_in: float) -> Outcome:
    living = [node for node in fleet.nodes if not node.dead]
    times = sorted(node.ready for node in living)
    control = [node.sent.total() for node in fleet.nodes]
    kinds: Counter[str] = Counter()
    for node in fleet.nodes:
        kinds.update(node.sent)
    count = len(fleet.nodes)
    scenario = fleet.scenario
    return Outcome(
        nodes=count,
        died=count - len(living),
        unfinished=len(fleet.left),
        seconds=max((t for t in times if t < math.inf), default=math.inf) if not fleet.left else math.inf,
        median_seconds=times[len(times) // 2],
        alone=scenario.alone,
        bound=scenario.bound,
        without_peers=scenario.without_peers,
        origin_share=fleet.origin_bytes / scenario.size,
        twice=sum(times > 1 for times in fleet.read.values()),
        origin_nodes=len(fleet.read_by),
        control_mean=sum(control) / count,
        control_max=max(control),
        control_by_kind={kind: nbytes / count for kind, nbytes in sorted(kinds.items())},
        directory=float(fleet.directory_bytes),
        listeners_max=max(len(node.followers) for node in fleet.nodes),
        given_up=dict(sorted(fleet.given_up.items())),
        progress=fleet.progress,
        origin_over_time=fleet.origin_over_time,
        simulated_in=simulated_in,
        scenario=asdict(scenario),
    )


def _sample(fleet: Fleet) -> None:
    shares = sorted(len(node.there) / fleet.scenario.groups for node in fleet.nodes if not node.dead)
    fleet.progress.append((fleet.at, [shares[min(len(shares) * p // 100, len(shares) - 1)] for p in PERCENTILES]))
    fleet.origin_over_time.append((fleet.at, fleet.origin_bytes / fleet.scenario.size))
    fleet.later(0.25, _sample)


def _start(fleet: Fleet, node: Node) -> None:
    if node.dead:
        return
    node.started = node.progress = fleet.at
    node.assignment = Assignment(node.name, fleet.stripes, node.readers, STALL)
    fleet.later(fleet.rng.uniform(0, PUBLISH), _publish, node)
    look(fleet, node)
    fleet.later(fleet.rng.uniform(0, LOOK), tick, node)
    turn(fleet, node)


def _publish(fleet: Fleet, node: Node) -> None:
    """In quarters, as serving does."""
    share = 1.0 if node.ready < math.inf else int(4 * len(node.there) / fleet.scenario.groups) / 4
    if share != node.published:
        node.published = share
        fleet.later(DIRECTORY, _published, node, share)
    if not node.dead and share < 1.0:
        fleet.later(PUBLISH, _publish, node)


def _published(fleet: Fleet, node: Node, share: float) -> None:
    if not node.dead:
        fleet.version += node.name not in fleet.members
        fleet.members[node.name] = share
        fleet.directory_bytes += watched_bytes(node.name, share)


def _die(fleet: Fleet, node: Node, how: str) -> None:
    node.dead = how
    fleet.left.discard(node)
    if how == "killed":
        for other, peer in [*node.listeners.items(), *node.joining.items()]:
            fleet.later(LATENCY, gone, other, peer, "gone")
    else:
        for other, peer in [*node.listeners.items(), *node.joining.items()]:
            fleet.later(STALL, gone, other, peer, "gone")
    for peer in node.peers.values():
        peer.node.listeners.pop(node, None)
        peer.node.joining.pop(node, None)
    fleet.later(TTL, _expired, node)


def _expired(fleet: Fleet, node: Node) -> None:
    fleet.version += 1
    fleet.members.pop(node.name, None)
    fleet.directory_bytes += watched_bytes(node.name, 0.0)
