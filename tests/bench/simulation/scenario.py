"""What is simulated, by which of the daemon's constants, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

KEY = "5bd1c1f9a6f84f0c8ea1ad32c57b3ed2"
GROUP = 8 << 20
"""The daemon's."""
LEAF = 1 << 20
GBIT = 1e9 / 8
GIB = 1 << 30

# Of daemon/peers, under their names there.
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
PERCENTILES = (1, 10, 50, 90, 99)


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
