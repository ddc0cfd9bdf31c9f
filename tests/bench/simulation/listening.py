"""What the one that listens hears, and whom it listens to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tests.bench.simulation.fleet import Fleet
from tests.bench.simulation.node import Node, Peer
from tests.bench.simulation.pulling import gone, plan_turn
from tests.bench.simulation.scenario import AGAIN, CONNECT, CONNECTED, KEY, LATENCY, REPORT, WHOLE
from tests.bench.simulation.traffic import REPORT_BYTES, REQUEST_BYTES, SEGMENTS_BYTES
from weightd.daemon.peers.finding.membership import degree, first_readers, neighbours


def told(
    fleet: Fleet,
    listeners: Mapping[Node, Peer],
    there: Sequence[int],
    coming: Sequence[int],
    stamps: Mapping[str, int],
    complete: bool,
) -> None:
    """What one node has said comes to those who listen to it."""
    for node, peer in listeners.items():
        if not node.loading or peer.gone:
            continue
        name = peer.node.name
        if stamps:
            node.readers.heard(stamps, fleet.at)
        if coming:
            peer.told = fleet.at
            node.assignment.coming(name, coming)
        if there:
            peer.told = fleet.at
            peer.dry = False
            node.assignment.has(name, there)
        if complete:
            peer.heard = True
        plan_turn(fleet, node)


def look(fleet: Fleet, node: Node) -> None:
    """As ``Following.look`` and ``announce``, every second."""
    if not node.loading:
        return
    _follow_new(fleet, node)
    node.stamps = node.readers.stamps(fleet.stamp, fleet.at)
    for peer in node.peers.values():
        if peer.seconds and int(fleet.at / REPORT) != int((fleet.at - AGAIN) / REPORT):
            node.sent["reports"] += REPORT_BYTES
    fleet.later(AGAIN, look, node)


def _follow_new(fleet: Fleet, node: Node) -> None:
    version, lost, wanted = node.listens_to
    if (version, lost) != (fleet.version, len(node.lost)):
        wanted = neighbours(node.name, KEY, [name for name in fleet.members if name not in node.lost])
        node.listens_to = fleet.version, len(node.lost), wanted
        if fleet.hint[0] != fleet.version:
            loading = [name for name, share in fleet.members.items() if share < 1.0]
            fleet.hint = fleet.version, first_readers(KEY, loading)
        node.readers.heard(fleet.hint[1], fleet.at)
    if node.name in node.readers.now(fleet.at):
        whole = [name for name, share in fleet.members.items() if share == 1.0]
        if whole:
            wanted = wanted + neighbours(node.name, KEY, whole)[:WHOLE]
    back = [name for name in sorted(node.followers) if name in fleet.members]
    _hang_up(fleet, node, {*wanted, *back})
    most = 2 * degree(len(fleet.members))
    for name in [*wanted, *back]:
        if len(node.peers) >= most:
            break
        if name in node.peers or name in node.lost:
            continue
        if fleet.at >= node.not_before.get(name, 0.0) or name in node.followers:
            _follow(fleet, node, name)


def _hang_up(fleet: Fleet, node: Node, wanted: set[str]) -> None:
    for name, peer in list(node.peers.items()):
        peer.leaving = name not in wanted
        if peer.leaving and peer.answered and not peer.in_flight:
            peer.gone = True
            del node.peers[name]
            peer.node.listeners.pop(node, None)
            peer.node.joining.pop(node, None)
            peer.node.followers.discard(node.name)
            node.assignment.lost(name)


def _follow(fleet: Fleet, node: Node, name: str) -> None:
    node.asked[name] += 1
    node.not_before[name] = fleet.at + min(30.0, AGAIN * 1.5 ** node.asked[name])
    other = fleet.by_name[name]
    peer = node.peers[name] = Peer(other)
    node.sent["connecting"] += REQUEST_BYTES
    if other.dead:
        fleet.later(CONNECT if other.dead == "vanished" else LATENCY, gone, node, peer, "gone")
    else:
        fleet.later(CONNECTED, _connected, node, peer)


def _connected(fleet: Fleet, node: Node, peer: Peer) -> None:
    other = peer.node
    if not node.loading or peer.gone:
        return
    if other.dead:
        gone(fleet, node, peer, "gone")
        return
    other.sent["connecting"] += SEGMENTS_BYTES
    other.joining[node] = peer
    if node.name not in other.followers:
        other.followers.add(node.name)
        if other.loading and node.name in fleet.members:
            _follow_new(fleet, other)  # it looks at once when there are new ones
    peer.answered = peer.readable = True
    peer.told = fleet.at
    peer.heard = other.ready == math.inf
    plan_turn(fleet, node)
