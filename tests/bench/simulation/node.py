"""One simulated node: its links, its stage, and what it knows of others."""

from __future__ import annotations

import math
from collections import Counter, deque

from tests.bench.simulation.scenario import AHEAD, AT_ONCE, KEY, ORIGIN_AHEAD, STALL, Scenario
from weightd.daemon.peers.finding.membership import Readers
from weightd.daemon.peers.pulling.assignment import Assignment


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
    """As ``listening.Peer`` and ``lane.Lane``: what one node knows of another."""

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
