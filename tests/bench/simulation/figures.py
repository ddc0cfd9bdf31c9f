"""What came of simulated fleets, as a table and as a plot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.bench.simulation.scenario import GBIT, GIB, PERCENTILES, Outcome, Scenario


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


def show(rows: Iterable[Sequence[str]]) -> None:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
