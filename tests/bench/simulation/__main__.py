"""``python -m tests.bench.simulation``: simulate fleets, and show what came of it."""

from __future__ import annotations

import sys

from tests.bench.simulation.fleet import main

if __name__ == "__main__":
    sys.exit(main())
