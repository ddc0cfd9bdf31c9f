"""What the one that serves says: to those who listen, and all of it to those who have begun to."""

from __future__ import annotations

import math

from tests.bench.simulation.fleet import Fleet
from tests.bench.simulation.listening import told
from tests.bench.simulation.node import Node
from tests.bench.simulation.scenario import ENTRY, HEARTBEAT, LATENCY, LEAF, LOOK
from tests.bench.simulation.traffic import event_bytes

OF_GROUPS = event_bytes("coming", 8), event_bytes("leaves", 8)
"""Bytes of saying that one of the daemon's groups comes, and that it is there."""


def tick(fleet: Fleet, node: Node) -> None:
    """A look at what there is to say. To those who listen, and all of it to those who have begun to."""
    if node.dead:
        return
    there, coming = node.there[node.said_there :], node.coming[node.said_coming :]
    node.said_there, node.said_coming = len(node.there), len(node.coming)
    ready = node.ready < math.inf
    stamps: dict[str, int] = {}
    if fleet.at - node.said_stamps >= HEARTBEAT:
        stamps = _stamps(fleet, node)
    if node.listeners:
        per_coming, per_leaves = OF_GROUPS
        of_groups = round(fleet.scenario.scale)
        count = len(node.listeners)
        node.sent["coming"] += count * len(coming) * of_groups * per_coming
        node.sent["leaves"] += count * len(there) * of_groups * per_leaves
        if stamps:
            node.sent["readers"] += count * event_bytes("readers", stamps=stamps)
            node.said_stamps = fleet.at
        if node.again:
            node.sent["alive"] += count * event_bytes("complete")
        if there or coming or stamps or node.again:
            node.spoke = fleet.at
            fleet.later(LATENCY, told, dict(node.listeners), there, coming, stamps, node.again)
        elif fleet.at - node.spoke >= HEARTBEAT:
            node.spoke = fleet.at
            node.sent["alive"] += count * event_bytes("alive")
    node.again = False
    if node.joining:
        stamps = _stamps(fleet, node)
        count = len(node.joining)
        node.sent["readers"] += count * event_bytes("readers", stamps=stamps)
        node.sent["leaves"] += count * _all_leaves(fleet, node)
        if node.coming and not ready:
            node.sent["coming"] += count * len(node.coming) * round(fleet.scenario.scale) * OF_GROUPS[0]
        fleet.later(LATENCY, told, dict(node.joining), list(node.there), list(node.coming), stamps, ready)
        node.listeners.update(node.joining)
        node.joining.clear()
    fleet.later(LOOK, tick, node)


def _stamps(fleet: Fleet, node: Node) -> dict[str, int]:
    return {node.name: fleet.stamp} if node.ready < math.inf else node.stamps


def _all_leaves(fleet: Fleet, node: Node) -> int:
    """Bytes of saying all that a node has: an event for each run of leaves within a tensor."""
    per_group = fleet.scenario.group_bytes // LEAF
    entry_groups = max(1, ENTRY // per_group)
    events = 0
    before = -2
    for group in sorted(node.there):
        events += group != before + 1 or group % entry_groups == 0
        before = group
    return events * event_bytes("leaves") + len(node.there) * per_group * 16
