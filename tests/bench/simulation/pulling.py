"""What a node gets: groups from peers and from the origin, until all have landed; and peers that it gives up."""

from __future__ import annotations

from tests.bench.simulation.fleet import Fleet
from tests.bench.simulation.node import Node, Peer
from tests.bench.simulation.scenario import FIRST_WORD, LATENCY, MOVER, ORIGIN_LATENCY, STALL, STRIKES, TURN


def plan_turn(fleet: Fleet, node: Node) -> None:
    """A turn soon, unless there is to be one already."""
    if not node.turn_planned:
        node.turn_planned = True
        fleet.later(TURN, turn, node)


def turn(fleet: Fleet, node: Node) -> None:
    """What a node does about what it has heard: it asks peers, and the origin where none of them is awaited."""
    node.turn_planned = False
    if not node.loading:
        return
    for peer in list(node.peers.values()):
        if peer.in_flight and fleet.at - peer.arrived > STALL:
            gone(fleet, node, peer, "stalled", for_good=True)
    if fleet.at >= node.mover_ready:
        _ask_peers(fleet, node)
    if not any(_awaited(fleet, node, peer) for peer in node.peers.values()):
        _feed_origin(fleet, node)
    plan_turn(fleet, node)


def _awaited(fleet: Fleet, node: Node, peer: Peer) -> bool:
    if peer.heard:
        return False
    return fleet.at - peer.told < STALL if peer.answered else fleet.at - node.started < FIRST_WORD


def _ask_peers(fleet: Fleet, node: Node) -> None:
    able = [p for p in node.peers.values() if p.readable and not p.leaving and p.has_room(fleet.scenario)]
    willing = [peer for peer in able if not peer.dry]
    if not willing:
        return
    asked = sum(len(peer.in_flight) for peer in node.peers.values())
    most = node.peer_window.size
    fastest = max(peer.rate for peer in able)
    while willing and asked < most:
        peer = min(willing, key=lambda peer: (len(peer.in_flight) + 1) / (peer.rate or fastest or 1.0))
        group = node.assignment.from_peer(peer.node.name)
        if group is None:
            peer.dry = True
            willing.remove(peer)
            continue
        if not peer.in_flight:
            peer.arrived = fleet.at
        peer.in_flight.add(group)
        if not peer.node.dead:
            done = peer.node.up.send(fleet.at + LATENCY, fleet.scenario.group_bytes)
            fleet.later(done - fleet.at, _sent, node, peer, group, node.mover)
        asked += 1
        if not peer.has_room(fleet.scenario):
            willing.remove(peer)


def _sent(fleet: Fleet, node: Node, peer: Peer, group: int, mover: int) -> None:
    """The last of it has left the other's link: it has come once it is through this one's, too."""
    if peer.node.dead or not node.loading or mover != node.mover:
        return
    nbytes = fleet.scenario.group_bytes
    done = node.down.send(fleet.at - nbytes / peer.node.up.rate, nbytes)
    fleet.later(max(0.0, done - fleet.at), _arrived, node, peer, group, mover)


def _arrived(fleet: Fleet, node: Node, peer: Peer, group: int, mover: int) -> None:
    if peer.gone or not node.loading or mover != node.mover:
        return
    peer.in_flight.discard(group)
    peer.seconds += fleet.at - peer.arrived
    peer.arrived = fleet.at
    peer.nbytes += fleet.scenario.group_bytes
    node.peer_window.came(fleet.at)
    _landed(fleet, node, group)


def _feed_origin(fleet: Fleet, node: Node) -> None:
    idle = 0.0 if node.with_origin else fleet.at - node.progress
    room = node.origin_window.size - len(node.with_origin)
    room = min(room, 1 + len(node.there) - len(node.with_origin))
    for group in node.assignment.from_origin(room, at=fleet.at, idle=idle):
        node.with_origin.add(group)
        node.coming.append(group)
        begins = max(fleet.at, node.from_origin.free)
        ends = node.from_origin.send(fleet.at, fleet.scenario.group_bytes)
        fleet.later(begins - fleet.at + ORIGIN_LATENCY / 2, _read, node, group, ends - begins)


def _read(fleet: Fleet, node: Node, group: int, seconds: float) -> None:
    """The origin is asked for it: that cannot be called back, and counts as read."""
    if not node.loading:
        return
    nbytes = fleet.scenario.group_bytes
    fleet.origin_bytes += nbytes
    fleet.read[group] += 1
    fleet.read_by.add(node)
    done = max(fleet.origin.send(fleet.at, nbytes), fleet.at + seconds, node.down.send(fleet.at, nbytes))
    fleet.later(done - fleet.at + ORIGIN_LATENCY / 2, _brought, node, group)


def _brought(fleet: Fleet, node: Node, group: int) -> None:
    if node.loading:
        node.with_origin.discard(group)
        node.origin_window.came(fleet.at)
        _landed(fleet, node, group)


def _landed(fleet: Fleet, node: Node, group: int) -> None:
    node.progress = fleet.at
    node.there.append(group)
    node.assignment.done(group)
    if not node.assignment.finished:
        plan_turn(fleet, node)
        return
    node.ready = fleet.at
    node.again = True
    fleet.left.discard(node)
    for peer in node.peers.values():
        peer.gone = True
        peer.node.listeners.pop(node, None)
        peer.node.joining.pop(node, None)
    node.peers.clear()
    del node.assignment


def gone(fleet: Fleet, node: Node, peer: Peer, why: str, *, for_good: bool = False) -> None:
    """As ``reader._strike`` and ``_drop``."""
    if not node.loading or peer.gone:
        return
    peer.gone = True
    name = peer.node.name
    node.strikes[name] += 1
    fleet.given_up[why] += 1
    del node.peers[name]
    peer.node.listeners.pop(node, None)
    peer.node.joining.pop(node, None)
    if for_good or node.strikes[name] >= STRIKES:
        node.lost.add(name)
    node.readers.lost(name, fleet.at)
    if peer.in_flight:
        node.mover += 1
        node.mover_ready = fleet.at + MOVER
        for other in (peer, *node.peers.values()):
            for group in other.in_flight:
                node.assignment.failed(group)
            other.in_flight.clear()
            other.dry = False
    node.assignment.lost(name)
    plan_turn(fleet, node)
