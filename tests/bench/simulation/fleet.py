"""A fleet of hundreds of nodes that load one checkpoint at the same time, simulated: ``make simulate``.

Every decision is the daemon's own code's: whom a node listens to (``neighbours``), who reads the origin (``Readers``),
which group comes from where (``Assignment``). What is simulated is around it: links, latencies, deaths, and the loop
of ``pulling`` that feeds these decisions, with its constants and its rules.

What is simplified, each for a run of minutes:

- A link serves one group after another. A node has hundreds in flight, from dozens of others: that comes to equal
  shares of a link, and costs one event for each group. Nothing between the nodes' own links is a bottleneck.
- A group is a unit of ``group_bytes``, coarser than the daemon's 8 MiB. How many are asked for at once is scaled, so
  that it is as many bytes; events are counted as for groups of 8 MiB.
- A node looks at its events every 20 ms; what it says goes to all who listen at the same moment, every 50 ms.
- Hashing, planning and allocating take no time. Nodes start within ``starts`` seconds of each other.

Of the nodes that fail, every other one is killed, which its peers see at once; the rest vanish, which they have to find
out. Control traffic is HTTP bodies: the events as the daemon writes them, without the headers of TCP and TLS.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import json
import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from weightd.daemon.peers.finding.membership import Readers, degree, first_readers, neighbours
from weightd.daemon.peers.pulling.assignment import Assignment

KEY = "5bd1c1f9a6f84f0c8ea1ad32c57b3ed2"
GROUP = 8 << 20
"""The daemon's."""
LEAF = 1 << 20
GBIT = 1e9 / 8
GIB = 1 << 30

# Of daemon/peers/pulling.py, following.py and serving.py, under their names there.
AT_ONCE = 4
AHEAD = 0.25
FIRST_WORD = 2.0
AGAIN = 1.0
WHOLE = 4
STRIKES = 3
LOOK = 0.05
PUBLISH = 0.1
ORIGIN_AHEAD = 0.5
HEARTBEAT = 1.0
REPORT = 2.0
STALL = 10.0
"""WEIGHTD_PEER_STALL; it is also how long a silent connection is read from."""

TURN = 0.02
"""Seconds that a node waits for events at most."""
LATENCY = 0.001
"""Seconds there and back between two nodes."""
ORIGIN_LATENCY = 0.03
CONNECTED = 0.005
"""Seconds until a peer has answered."""
CONNECT = 5.0
"""Seconds until a node that has vanished is known not to answer."""
DIRECTORY = 0.05
"""Seconds until all know what was published."""
TTL = 10.0
"""Seconds that the directory keeps a dead node."""
MOVER = 1.0
"""Seconds until a new mover process can read."""
ENTRY = 64
"""Leaves of a tensor: an event is about one tensor's."""


@dataclass(frozen=True)
class Scenario:
    """What is simulated. Rates are in bytes a second."""

    nodes: int
    seed: int = 0
    groups: int = 512
    group_bytes: int = 32 << 20
    links: tuple[tuple[float, float], ...] = ((10 * GBIT, 0.3), (25 * GBIT, 0.5), (100 * GBIT, 0.2))
    """Of each kind of node its link, the same up and down, and its share of the fleet."""
    origin: float = 40 * GBIT
    origin_per_node: float = 8 * GBIT
    failing: float = 0.01
    starts: float = 1.0
    limit: float = 900.0
    """Simulated seconds after which it is given up."""

    @property
    def size(self) -> int:
        return self.groups * self.group_bytes

    @property
    def scale(self) -> float:
        """The daemon's groups in one of these."""
        return self.group_bytes / GROUP

    @property
    def alone(self) -> float:
        """Seconds of one node with the slowest link that reads the origin, and nobody else."""
        return self.size / min(self.origin, self.origin_per_node, min(rate for rate, _ in self.links))

    @property
    def bound(self) -> float:
        """No fleet is faster: the origin gives each byte once, the slowest link takes them all."""
        return self.size / min(self.origin, min(rate for rate, _ in self.links))

    @property
    def without_peers(self) -> float:
        """Seconds where each reads the origin by itself: equal shares of its link."""
        return max(self.alone, self.nodes * self.size / self.origin)


@dataclass
class Outcome:
    """Seconds are since the first node could have started; control traffic is what a node sends."""

    nodes: int
    died: int
    unfinished: int
    seconds: float
    """Until the last living node is ready."""
    median_seconds: float
    alone: float
    bound: float
    without_peers: float
    origin_share: float
    """Bytes asked of the origin, by those of the checkpoint."""
    twice: int
    """Groups that were read from the origin more than once."""
    origin_nodes: int
    """Nodes that read from it at all."""
    control_mean: float
    control_max: float
    control_by_kind: dict[str, float]
    """Bytes a node, on average."""
    directory: float
    """Bytes that a directory pushes to each node."""
    listeners_max: int
    given_up: dict[str, int]
    progress: list[tuple[float, list[float]]]
    """Time, and how much of it living nodes have: the percentiles of ``PERCENTILES``."""
    origin_over_time: list[tuple[float, float]]
    """Time, and how much was asked of the origin until then, by the checkpoint; it may still wait for its link."""
    simulated_in: float
    scenario: dict[str, Any] = field(default_factory=dict)


class Link:
    """Serves one after another."""

    __slots__ = ("free", "rate")

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.free = 0.0

    def send(self, at: float, nbytes: int) -> float:
        """Until when it is busy with that."""
        self.free = max(at, self.free) + nbytes / self.rate
        return self.free


class Window:
    """As ``pace.Pace``, by the simulation's clock."""

    __slots__ = ("_ahead", "_came", "_least", "_most")

    def __init__(self, least: float, most: float, scale: float, ahead: float = 2.0) -> None:
        self._ahead = ahead
        self._least = max(1, round(least / scale))
        self._most = max(2, round(most / scale))
        self._came: deque[float] = deque(maxlen=self._most)

    def came(self, at: float) -> None:
        self._came.append(at)

    @property
    def size(self) -> int:
        if len(self._came) < 2:
            return self._least
        rate = (len(self._came) - 1) / max(self._came[-1] - self._came[0], 1e-3)
        return max(self._least, min(self._most, round(self._ahead * rate)))


class Peer:
    """As ``following.Peer``: what one node knows of another."""

    __slots__ = ("answered", "arrived", "dry", "gone", "heard", "in_flight", "leaving", "nbytes", "node", "readable",
                 "seconds", "told")  # fmt: skip

    def __init__(self, node: Node) -> None:
        self.node = node
        self.answered = self.heard = self.readable = self.leaving = self.gone = False
        self.told = self.arrived = self.seconds = 0.0
        self.nbytes = 0
        self.in_flight: set[int] = set()
        self.dry = True
        """It has nothing that is wanted, until it says more: asking the assignment again would find nothing."""

    @property
    def rate(self) -> float:
        return self.nbytes / self.seconds if self.seconds > 0 else 0.0

    def has_room(self, scenario: Scenario) -> bool:
        asked = len(self.in_flight)
        most = max(1, round(AT_ONCE / scenario.scale))
        return not asked or (asked < most and asked * scenario.group_bytes <= AHEAD * self.rate)


class Node:
    """One daemon and its stage."""

    def __init__(self, number: int, link: float, scenario: Scenario) -> None:
        self.name = f"10.0.{number >> 8}.{number & 255}:7401"
        self.up, self.down, self.from_origin = Link(link), Link(link), Link(scenario.origin_per_node)
        self.readers = Readers(self.name, KEY, STALL)
        self.assignment: Assignment
        self.started = math.inf
        self.ready = math.inf
        self.dead = ""
        """``killed`` or ``vanished``."""
        self.progress = 0.0
        self.peers: dict[str, Peer] = {}
        self.lost: set[str] = set()
        self.strikes: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.not_before: dict[str, float] = {}
        self.followers: set[str] = set()
        self.seen: frozenset[str] = frozenset()
        self.mover = 0
        """How many its mover processes were: what an earlier one reads does not arrive."""
        self.mover_ready = 0.0
        self.with_origin: set[int] = set()
        self.origin_window = Window(4, 64, scenario.scale, ORIGIN_AHEAD)
        self.peer_window = Window(4, 256, scenario.scale)
        self.listeners: dict[Node, Peer] = {}
        """Who listens → what they know this node as."""
        self.joining: dict[Node, Peer] = {}
        """Those who have been told nothing yet."""
        self.there: list[int] = []
        self.coming: list[int] = []
        self.said_there = self.said_coming = 0
        self.spoke = 0.0
        self.said_stamps = -math.inf
        self.again = False
        """It has become ready: it is to say once more what it has, and that this is all."""
        self.stamps: dict[str, int] = {}
        self.turn_planned = False
        self.listens_to: tuple[int, int, list[str]] = (-1, -1, [])
        """Neighbours, of which state of the directory, with how many lost."""
        self.published = -1.0
        self.sent: Counter[str] = Counter()

    @property
    def loading(self) -> bool:
        return self.started < math.inf and self.ready == math.inf and not self.dead


class Simulation:
    """One fleet, one load."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.rng = random.Random(f"{scenario.seed}:{scenario.nodes}")
        self.at = 0.0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        rates = [rate for rate, share in scenario.links for _ in range(round(share * scenario.nodes))]
        rates = (rates + [scenario.links[0][0]] * scenario.nodes)[: scenario.nodes]
        self.rng.shuffle(rates)
        self.nodes = [Node(number, rate, scenario) for number, rate in enumerate(rates)]
        self.by_name = {node.name: node for node in self.nodes}
        self.members: dict[str, float] = {}
        """The directory: who loads or has it → how much."""
        self.version = 0
        """Of the members' names."""
        self.hint: tuple[int, dict[str, int]] = (-1, {})
        self.origin = Link(scenario.origin)
        self.origin_bytes = 0
        self.read: Counter[int] = Counter()
        self.read_by: set[Node] = set()
        self.directory_bytes = 0
        self.given_up: Counter[str] = Counter()
        self.progress: list[tuple[float, list[float]]] = []
        self.origin_over_time: list[tuple[float, float]] = []
        self.left = set(self.nodes)
        """Living nodes that are not ready."""
        self._stripes = [f"model.safetensors:{group}" for group in range(scenario.groups)]
        self._of_groups = event_bytes("coming", 8), event_bytes("leaves", 8)
        for node in self.nodes:
            self._later(self.rng.uniform(0, scenario.starts), self._start, node)
        doomed = self.rng.sample(self.nodes, round(scenario.failing * scenario.nodes))
        for number, node in enumerate(doomed):
            when = self.rng.uniform(scenario.starts, scenario.starts + scenario.bound)
            self._later(when, self._die, node, ("killed", "vanished")[number % 2])
        self._later(0.0, self._sample)

    def run(self) -> Outcome:
        began = time.perf_counter()
        while self.left and self.at < self.scenario.limit:
            self.at, _, action, arguments = heapq.heappop(self._queue)
            action(*arguments)
        living = [node for node in self.nodes if not node.dead]
        times = sorted(node.ready for node in living)
        control = [node.sent.total() for node in self.nodes]
        kinds: Counter[str] = Counter()
        for node in self.nodes:
            kinds.update(node.sent)
        count = len(self.nodes)
        scenario = self.scenario
        return Outcome(
            nodes=count,
            died=count - len(living),
            unfinished=len(self.left),
            seconds=max((t for t in times if t < math.inf), default=math.inf) if not self.left else math.inf,
            median_seconds=times[len(times) // 2],
            alone=scenario.alone,
            bound=scenario.bound,
            without_peers=scenario.without_peers,
            origin_share=self.origin_bytes / scenario.size,
            twice=sum(times > 1 for times in self.read.values()),
            origin_nodes=len(self.read_by),
            control_mean=sum(control) / count,
            control_max=max(control),
            control_by_kind={kind: nbytes / count for kind, nbytes in sorted(kinds.items())},
            directory=float(self.directory_bytes),
            listeners_max=max(len(node.followers) for node in self.nodes),
            given_up=dict(sorted(self.given_up.items())),
            progress=self.progress,
            origin_over_time=self.origin_over_time,
            simulated_in=time.perf_counter() - began,
            scenario=asdict(scenario),
        )

    def _later(self, delay: float, action: Callable[..., None], *arguments: Any) -> None:
        self._count += 1
        heapq.heappush(self._queue, (self.at + delay, self._count, action, arguments))

    def _sample(self) -> None:
        shares = sorted(len(node.there) / self.scenario.groups for node in self.nodes if not node.dead)
        self.progress.append((self.at, [shares[min(len(shares) * p // 100, len(shares) - 1)] for p in PERCENTILES]))
        self.origin_over_time.append((self.at, self.origin_bytes / self.scenario.size))
        self._later(0.25, self._sample)

    # ------------------------------------------------------------------ coming and going

    def _start(self, node: Node) -> None:
        if node.dead:
            return
        node.started = node.progress = self.at
        node.assignment = Assignment(node.name, self._stripes, node.readers, STALL)
        self._later(self.rng.uniform(0, PUBLISH), self._publish, node)
        self._look(node)
        self._later(self.rng.uniform(0, LOOK), self._tick, node)
        self._turn(node)

    def _publish(self, node: Node) -> None:
        """In quarters, as serving does."""
        share = 1.0 if node.ready < math.inf else int(4 * len(node.there) / self.scenario.groups) / 4
        if share != node.published:
            node.published = share
            self._later(DIRECTORY, self._published, node, share)
        if not node.dead and share < 1.0:
            self._later(PUBLISH, self._publish, node)

    def _published(self, node: Node, share: float) -> None:
        if not node.dead:
            self.version += node.name not in self.members
            self.members[node.name] = share
            self.directory_bytes += watched_bytes(node.name, share)

    def _die(self, node: Node, how: str) -> None:
        node.dead = how
        self.left.discard(node)
        if how == "killed":
            for other, peer in [*node.listeners.items(), *node.joining.items()]:
                self._later(LATENCY, self._gone, other, peer, "gone")
        else:
            for other, peer in [*node.listeners.items(), *node.joining.items()]:
                self._later(STALL, self._gone, other, peer, "gone")
        for peer in node.peers.values():
            peer.node.listeners.pop(node, None)
            peer.node.joining.pop(node, None)
        self._later(TTL, self._expired, node)

    def _expired(self, node: Node) -> None:
        self.version += 1
        self.members.pop(node.name, None)
        self.directory_bytes += watched_bytes(node.name, 0.0)

    # ------------------------------------------------------------------ what the one that serves says

    def _tick(self, node: Node) -> None:
        """A look at what there is to say. To those who listen, and all of it to those who have begun to."""
        if node.dead:
            return
        there, coming = node.there[node.said_there :], node.coming[node.said_coming :]
        node.said_there, node.said_coming = len(node.there), len(node.coming)
        ready = node.ready < math.inf
        stamps: dict[str, int] = {}
        if self.at - node.said_stamps >= HEARTBEAT:
            stamps = self._stamps(node)
        if node.listeners:
            per_coming, per_leaves = self._of_groups
            of_groups = round(self.scenario.scale)
            count = len(node.listeners)
            node.sent["coming"] += count * len(coming) * of_groups * per_coming
            node.sent["leaves"] += count * len(there) * of_groups * per_leaves
            if stamps:
                node.sent["readers"] += count * event_bytes("readers", stamps=stamps)
                node.said_stamps = self.at
            if node.again:
                node.sent["alive"] += count * event_bytes("complete")
            if there or coming or stamps or node.again:
                node.spoke = self.at
                self._later(LATENCY, self._told, dict(node.listeners), there, coming, stamps, node.again)
            elif self.at - node.spoke >= HEARTBEAT:
                node.spoke = self.at
                node.sent["alive"] += count * event_bytes("alive")
        node.again = False
        if node.joining:
            stamps = self._stamps(node)
            count = len(node.joining)
            node.sent["readers"] += count * event_bytes("readers", stamps=stamps)
            node.sent["leaves"] += count * self._all_leaves(node)
            if node.coming and not ready:
                node.sent["coming"] += count * len(node.coming) * round(self.scenario.scale) * self._of_groups[0]
            self._later(LATENCY, self._told, dict(node.joining), list(node.there), list(node.coming), stamps, ready)
            node.listeners.update(node.joining)
            node.joining.clear()
        self._later(LOOK, self._tick, node)

    def _stamps(self, node: Node) -> dict[str, int]:
        return {node.name: self._stamp()} if node.ready < math.inf else node.stamps

    def _stamp(self) -> int:
        return 1_700_000_000_000 + int(self.at * 1000)

    def _all_leaves(self, node: Node) -> int:
        """Bytes of saying all that a node has: an event for each run of leaves within a tensor."""
        per_group = self.scenario.group_bytes // LEAF
        entry_groups = max(1, ENTRY // per_group)
        events = 0
        before = -2
        for group in sorted(node.there):
            events += group != before + 1 or group % entry_groups == 0
            before = group
        return events * event_bytes("leaves") + len(node.there) * per_group * 16

    # ------------------------------------------------------------------ what the one that listens hears

    def _told(
        self,
        listeners: Mapping[Node, Peer],
        there: Sequence[int],
        coming: Sequence[int],
        stamps: Mapping[str, int],
        complete: bool,
    ) -> None:
        for node, peer in listeners.items():
            if not node.loading or peer.gone:
                continue
            name = peer.node.name
            if stamps:
                node.readers.heard(stamps, self.at)
            if coming:
                peer.told = self.at
                node.assignment.coming(name, coming)
            if there:
                peer.told = self.at
                peer.dry = False
                node.assignment.has(name, there)
            if complete:
                peer.heard = True
            self._plan_turn(node)

    def _look(self, node: Node) -> None:
        """As ``pulling._look`` and ``_tell``, every second."""
        if not node.loading:
            return
        self._follow_new(node)
        node.stamps = node.readers.stamps(self._stamp(), self.at)
        for peer in node.peers.values():
            if peer.seconds and int(self.at / REPORT) != int((self.at - AGAIN) / REPORT):
                node.sent["reports"] += REPORT_BYTES
        self._later(AGAIN, self._look, node)

    def _follow_new(self, node: Node) -> None:
        version, lost, wanted = node.listens_to
        if (version, lost) != (self.version, len(node.lost)):
            wanted = neighbours(node.name, KEY, [name for name in self.members if name not in node.lost])
            node.listens_to = self.version, len(node.lost), wanted
            if self.hint[0] != self.version:
                loading = [name for name, share in self.members.items() if share < 1.0]
                self.hint = self.version, first_readers(KEY, loading)
            node.readers.heard(self.hint[1], self.at)
        if node.name in node.readers.now(self.at):
            whole = [name for name, share in self.members.items() if share == 1.0]
            if whole:
                wanted = wanted + neighbours(node.name, KEY, whole)[:WHOLE]
        back = [name for name in sorted(node.followers) if name in self.members]
        self._hang_up(node, {*wanted, *back})
        most = 2 * degree(len(self.members))
        for name in [*wanted, *back]:
            if len(node.peers) >= most:
                break
            if name in node.peers or name in node.lost:
                continue
            if self.at >= node.not_before.get(name, 0.0) or name in node.followers:
                self._follow(node, name)

    def _hang_up(self, node: Node, wanted: set[str]) -> None:
        for name, peer in list(node.peers.items()):
            peer.leaving = name not in wanted
            if peer.leaving and peer.answered and not peer.in_flight:
                peer.gone = True
                del node.peers[name]
                peer.node.listeners.pop(node, None)
                peer.node.joining.pop(node, None)
                peer.node.followers.discard(node.name)
                node.assignment.lost(name)

    def _follow(self, node: Node, name: str) -> None:
        node.asked[name] += 1
        node.not_before[name] = self.at + min(30.0, AGAIN * 1.5 ** node.asked[name])
        other = self.by_name[name]
        peer = node.peers[name] = Peer(other)
        node.sent["connecting"] += REQUEST_BYTES
        if other.dead:
            self._later(CONNECT if other.dead == "vanished" else LATENCY, self._gone, node, peer, "gone")
        else:
            self._later(CONNECTED, self._connected, node, peer)

    def _connected(self, node: Node, peer: Peer) -> None:
        other = peer.node
        if not node.loading or peer.gone:
            return
        if other.dead:
            self._gone(node, peer, "gone")
            return
        other.sent["connecting"] += SEGMENTS_BYTES
        other.joining[node] = peer
        if node.name not in other.followers:
            other.followers.add(node.name)
            if other.loading and node.name in self.members:
                self._follow_new(other)  # it looks at once when there are new ones
        peer.answered = peer.readable = True
        peer.told = self.at
        peer.heard = other.ready == math.inf
        self._plan_turn(node)

    def _gone(self, node: Node, peer: Peer, why: str, *, for_good: bool = False) -> None:
        """As ``pulling._strike`` and ``_drop``."""
        if not node.loading or peer.gone:
            return
        peer.gone = True
        name = peer.node.name
        node.strikes[name] += 1
        self.given_up[why] += 1
        del node.peers[name]
        peer.node.listeners.pop(node, None)
        peer.node.joining.pop(node, None)
        if for_good or node.strikes[name] >= STRIKES:
            node.lost.add(name)
        node.readers.lost(name, self.at)
        if peer.in_flight:
            node.mover += 1
            node.mover_ready = self.at + MOVER
            for other in (peer, *node.peers.values()):
                for group in other.in_flight:
                    node.assignment.failed(group)
                other.in_flight.clear()
                other.dry = False
        node.assignment.lost(name)
        self._plan_turn(node)

    # ------------------------------------------------------------------ what a node does

    def _plan_turn(self, node: Node) -> None:
        if not node.turn_planned:
            node.turn_planned = True
            self._later(TURN, self._turn, node)

    def _turn(self, node: Node) -> None:
        node.turn_planned = False
        if not node.loading:
            return
        for peer in list(node.peers.values()):
            if peer.in_flight and self.at - peer.arrived > STALL:
                self._gone(node, peer, "stalled", for_good=True)
        if self.at >= node.mover_ready:
            self._ask_peers(node)
        if not any(self._awaited(node, peer) for peer in node.peers.values()):
            self._feed_origin(node)
        self._plan_turn(node)

    def _awaited(self, node: Node, peer: Peer) -> bool:
        if peer.heard:
            return False
        return self.at - peer.told < STALL if peer.answered else self.at - node.started < FIRST_WORD

    def _ask_peers(self, node: Node) -> None:
        able = [p for p in node.peers.values() if p.readable and not p.leaving and p.has_room(self.scenario)]
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
                peer.arrived = self.at
            peer.in_flight.add(group)
            if not peer.node.dead:
                done = peer.node.up.send(self.at + LATENCY, self.scenario.group_bytes)
                self._later(done - self.at, self._sent, node, peer, group, node.mover)
            asked += 1
            if not peer.has_room(self.scenario):
                willing.remove(peer)

    def _sent(self, node: Node, peer: Peer, group: int, mover: int) -> None:
        """The last of it has left the other's link: it has come once it is through this one's, too."""
        if peer.node.dead or not node.loading or mover != node.mover:
            return
        nbytes = self.scenario.group_bytes
        done = node.down.send(self.at - nbytes / peer.node.up.rate, nbytes)
        self._later(max(0.0, done - self.at), self._arrived, node, peer, group, mover)

    def _arrived(self, node: Node, peer: Peer, group: int, mover: int) -> None:
        if peer.gone or not node.loading or mover != node.mover:
            return
        peer.in_flight.discard(group)
        peer.seconds += self.at - peer.arrived
        peer.arrived = self.at
        peer.nbytes += self.scenario.group_bytes
        node.peer_window.came(self.at)
        self._landed(node, group)

    def _feed_origin(self, node: Node) -> None:
        idle = 0.0 if node.with_origin else self.at - node.progress
        room = node.origin_window.size - len(node.with_origin)
        room = min(room, 1 + len(node.there) - len(node.with_origin))
        for group in node.assignment.from_origin(room, at=self.at, idle=idle):
            node.with_origin.add(group)
            node.coming.append(group)
            begins = max(self.at, node.from_origin.free)
            ends = node.from_origin.send(self.at, self.scenario.group_bytes)
            self._later(begins - self.at + ORIGIN_LATENCY / 2, self._read, node, group, ends - begins)

    def _read(self, node: Node, group: int, seconds: float) -> None:
        """The origin is asked for it: that cannot be called back, and counts as read."""
        if not node.loading:
            return
        nbytes = self.scenario.group_bytes
        self.origin_bytes += nbytes
        self.read[group] += 1
        self.read_by.add(node)
        done = max(self.origin.send(self.at, nbytes), self.at + seconds, node.down.send(self.at, nbytes))
        self._later(done - self.at + ORIGIN_LATENCY / 2, self._brought, node, group)

    def _brought(self, node: Node, group: int) -> None:
        if node.loading:
            node.with_origin.discard(group)
            node.origin_window.came(self.at)
            self._landed(node, group)

    def _landed(self, node: Node, group: int) -> None:
        node.progress = self.at
        node.there.append(group)
        node.assignment.done(group)
        if not node.assignment.finished:
            self._plan_turn(node)
            return
        node.ready = self.at
        node.again = True
        self.left.discard(node)
        for peer in node.peers.values():
            peer.gone = True
            peer.node.listeners.pop(node, None)
            peer.node.joining.pop(node, None)
        node.peers.clear()
        del node.assignment


# ---------------------------------------------------------------------- bytes as the daemon writes them

PERCENTILES = (1, 10, 50, 90, 99)


def event_bytes(kind: str, leaves: int = 0, stamps: Mapping[str, int] | None = None) -> int:
    """Bytes of one event, about so many leaves, or with these stamps."""
    event: dict[str, Any] = {"type": kind}
    if kind in ("leaves", "coming"):
        event |= {"epoch": "0" * 16, "segment": 0, "entry": 300, "first": 300}
        event |= {"digests": "0" * 16 * leaves} if kind == "leaves" else {"count": leaves}
    elif kind == "readers":
        event["stamps"] = stamps
    return len(f"event: {kind}\ndata: {json.dumps(event)}\n\n") + len("1ff\r\n\r\n")


def watched_bytes(address: str, share: float) -> int:
    """Bytes of one entry's change as etcd tells each of those who watch."""
    entry = json.dumps({"node": f"node-{address[:-5]}", "address": address, "stages": {KEY: share}})
    return 350 + (len(entry) + 2 * len(address) + 30) * 4 // 3


REQUEST_BYTES = len(f"GET /peer/v1/stages/{KEY}?format=1&by=10.0.0.1%3A7401 HTTP/1.1\r\n") + 250
"""Of beginning to listen, with usual headers and a token."""
SEGMENTS_BYTES = 200 + 1000
"""The answer's headers, and the event that says where one segment is: the most of it is NIXL's, 700 bytes."""
REPORT_BYTES = 300 + 100
"""Saying how much was read, and the answer."""


# ---------------------------------------------------------------------- figures


def table(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """Headings, and a row for each size of the fleet."""
    rows = [["nodes", "died", "last ready", "of one alone", "of the bound", "median", "without peers", "origin bytes",
             "groups twice", "control a node: mean", "max", "directory", "listeners"]]  # fmt: skip
    rows += [
        [
            f"{found.nodes}",
            f"{found.died}",
            f"{found.seconds:.1f} s" if not found.unfinished else f"{found.unfinished} never",
            f"{found.seconds / found.alone:.2f} ×",
            f"{found.seconds / found.bound:.2f} ×",
            f"{found.median_seconds:.1f} s",
            f"{found.without_peers:.0f} s",
            f"{found.origin_share:.2f} ×",
            f"{found.twice}",
            f"{found.control_mean / 1e6:.1f} MB",
            f"{found.control_max / 1e6:.1f} MB",
            f"{found.directory / 1e6:.2f} MB",
            f"{found.listeners_max}",
        ]
        for found in outcomes
    ]
    return rows


def plot(outcomes: Sequence[Outcome], scenario: Scenario, file: Path) -> None:
    """Four panels: time, origin bytes and control traffic by the size of the fleet; progress of the largest."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    nodes = [found.nodes for found in outcomes]
    figure, ((times, origin), (control, progress)) = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    links = ", ".join(f"{share:.0%} {rate / GBIT:g}" for rate, share in scenario.links)
    figure.suptitle(
        f"Simulated: all nodes load {scenario.size / GIB:g} GiB at once in units of {scenario.group_bytes >> 20} MiB; "
        f"links {links} Gb/s;\norigin {scenario.origin / GBIT:g} Gb/s, {scenario.origin_per_node / GBIT:g} a node; "
        f"{scenario.failing:.0%} fail; seed {scenario.seed}"
    )
    times.plot(nodes, [found.without_peers for found in outcomes], "s:", color="tab:red", label="without peers")
    times.plot(nodes, [found.seconds for found in outcomes], "o-", label="last living node is ready")
    times.plot(nodes, [found.median_seconds for found in outcomes], "o--", label="median node")
    times.axhline(scenario.alone, color="gray", linestyle="--", label="one node alone, from the origin")
    times.axhline(scenario.bound, color="black", linestyle=":", label="bound: slowest link, or origin once")
    times.set(title="Time", xlabel="nodes", ylabel="seconds", xscale="log", yscale="log")
    origin.plot(nodes, [found.origin_share for found in outcomes], "o-", label="with peers")
    origin.axhline(1.0, color="black", linestyle=":", label="each byte once")
    origin.set(title="Bytes read from the origin", xlabel="nodes", ylabel="× the checkpoint", xscale="log")
    origin.set_ylim(0, max(2.0, 1.1 * max(found.origin_share for found in outcomes)))
    for name, figures in (
        ("mean", [found.control_mean / 1e6 for found in outcomes]),
        ("most of one node", [found.control_max / 1e6 for found in outcomes]),
        ("pushed by a directory", [found.directory / 1e6 for found in outcomes]),
    ):
        control.plot(nodes, figures, "o-", label=name)
    like = next((found for found in outcomes if found.nodes >= 32), outcomes[-1])  # in smaller ones each hears all
    c = like.control_mean / 1e6 / math.log2(like.nodes)
    control.plot(nodes, [c * math.log2(n) for n in nodes], ":", color="black", label="c · log₂(nodes)")
    control.set(title="Control traffic that one node sends", xlabel="nodes", ylabel="MB", xscale="log", yscale="log")
    largest = outcomes[-1]
    for number, percentile in enumerate(PERCENTILES):
        points = [(at, shares[number]) for at, shares in largest.progress]
        progress.plot(*zip(*points, strict=True), label=f"{percentile}% of the nodes have less")
    asked = zip(*largest.origin_over_time, strict=True)
    progress.plot(*asked, ":", color="black", label="asked of the origin, × the checkpoint")
    progress.set(title=f"Progress of {largest.nodes} nodes", xlabel="seconds", ylabel="share that has come")
    for panel in (times, origin, control, progress):
        panel.legend(fontsize="small")
        panel.grid(alpha=0.3)
    for panel in (times, origin, control):
        panel.set_xticks(nodes, [str(n) for n in nodes], minor=False)
        panel.set_xticks([], minor=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def simulate(scenario: Scenario) -> Outcome:
    gc.disable()  # millions of tuples live, none in a cycle
    try:
        return Simulation(scenario).run()
    finally:
        gc.enable()


def main() -> int:
    arguments = _arguments()
    scenarios = [
        Scenario(
            nodes,
            arguments.seed,
            arguments.groups,
            arguments.group_mib << 20,
            failing=arguments.failing,
        )
        for nodes in sorted(arguments.nodes)
    ]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        # The largest first: the others are done beside it.
        outcomes = list(pool.map(simulate, reversed(scenarios)))[::-1]
    show(table(outcomes))
    for found in outcomes:
        kinds = ", ".join(f"{kind} {nbytes / 1e3:.0f}" for kind, nbytes in found.control_by_kind.items())
        print(f"{found.nodes} nodes: control traffic a node, kB: {kinds}; given up: {found.given_up or 'none'}")
    picture = arguments.json.with_suffix(".png")
    arguments.json.write_text(json.dumps([asdict(found) for found in outcomes], indent=1) + "\n")
    plot(outcomes, scenarios[-1], picture)
    print(f"seed {arguments.seed}; all figures are in {arguments.json}, the plot in {picture}")
    return 0


def show(rows: Iterable[Sequence[str]]) -> None:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.simulation", description=(__doc__ or "").split("\n")[0]
    )
    sizes = partial(map, int)
    parser.add_argument("--nodes", type=lambda text: list(sizes(text.split(","))), default=[8, 32, 128, 512, 1000])
    parser.add_argument("--groups", type=int, default=512, help="units of the checkpoint (default: 512)")
    parser.add_argument("--group-mib", type=int, default=32, help="MiB of each (default: 32; the daemon's have 8)")
    parser.add_argument("--failing", type=float, default=0.01, help="share of the nodes that fail (default: 0.01)")
    parser.add_argument("--seed", type=int, default=0, help="the same figures again (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="fleets that are simulated at once (default: 2)")
    parser.add_argument("--json", type=Path, default=Path("simulation.json"), help="the plot is written beside it")
    return parser.parse_args()
