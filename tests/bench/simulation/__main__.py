"""``python -m tests.bench.simulation``: simulate fleets, and show what came of it."""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tests.bench import simulation
from tests.bench.simulation.figures import plot, show, table
from tests.bench.simulation.load import simulate
from tests.bench.simulation.scenario import Scenario


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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.simulation", description=(simulation.__doc__ or "").split("\n")[0]
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


if __name__ == "__main__":
    sys.exit(main())
