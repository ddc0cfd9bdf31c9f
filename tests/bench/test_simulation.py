"""Fleets that load at once, simulated: what ``make simulate`` shows of a thousand nodes holds for some dozens."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

from tests.bench.simulation.figures import plot
from tests.bench.simulation.load import simulate
from tests.bench.simulation.scenario import GBIT, Outcome, Scenario
from weightd.daemon.peers.finding.membership import degree

# Coarse, so that it takes seconds; so slow an origin that what is read twice costs time.
SMALL = Scenario(
    64, seed=1, groups=64, group_bytes=64 << 20, origin=5 * GBIT, origin_per_node=2 * GBIT, failing=0.05
)  # fmt: skip


@cache
def outcome(nodes: int) -> Outcome:
    return simulate(replace(SMALL, nodes=nodes))


def test_all_that_live_are_ready_and_the_origin_gives_little_more_than_once() -> None:
    found = outcome(64)
    assert found.died == 3
    assert found.unfinished == 0
    assert found.seconds < 1.2 * found.alone < found.without_peers / 10
    assert 1.0 <= found.origin_share < 1.5, "64 where each reads it all; the most of it before they know of each other"
    shares = [share for _, share in found.origin_over_time]
    assert shares == sorted(shares)


def test_control_traffic_grows_no_faster_than_the_logarithm_of_the_fleet() -> None:
    few, many = outcome(32), outcome(128)
    assert few.unfinished == many.unfinished == 0
    assert many.control_mean / few.control_mean < 1.1 * math.log2(128) / math.log2(32)
    assert few.control_mean < 0.01 * SMALL.size
    assert many.listeners_max < 4 * degree(127), "nobody is listened to by all"


def test_a_seed_gives_the_same_figures_again(tmp_path: Path) -> None:
    small = replace(SMALL, nodes=8, groups=32)
    first, second = ({**asdict(simulate(small)), "simulated_in": 0} for _ in range(2))
    assert first == second
    assert first != {**asdict(simulate(replace(small, seed=2))), "simulated_in": 0}
    plot([simulate(small), simulate(replace(small, nodes=16))], small, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
