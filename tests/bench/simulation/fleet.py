"""A simulated fleet: its nodes, and what they share: the clock, the directory and the origin."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.bench.simulation.node import Link, Node
from tests.bench.simulation.scenario import Scenario


class Fleet:
    """Nodes that are to load the same, none of which has begun to."""

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
        self.stripes = [f"model.safetensors:{group}" for group in range(scenario.groups)]

    @property
    def stamp(self) -> int:
        """What a reader of the origin says of itself: milliseconds, as the daemon's."""
        return 1_700_000_000_000 + int(self.at * 1000)

    def later(self, delay: float, action: Callable[..., None], *arguments: Any) -> None:
        """In so many seconds, call ``action`` with this fleet and these arguments."""
        self._count += 1
        heapq.heappush(self._queue, (self.at + delay, self._count, action, arguments))

    def step(self) -> None:
        """The next thing happens, and it is as late as that."""
        self.at, _, action, arguments = heapq.heappop(self._queue)
        action(self, *arguments)
