"""An engine for the fault tests: attaches again and again, and checks every byte that it maps.

``python -m tests.faults.engine RUNTIME_DIR SEED MODEL...`` runs until its stdin ends; a wrong byte is exit code 1, an
error that nobody should see is exit code 2. Says ``ready`` once it has checked everything for the first time.
"""

from __future__ import annotations

import random
import select
import sys
from pathlib import Path
from typing import Any

import numpy
from safetensors.numpy import load_file

from weightd.ipc import RequestRefused, StageFailed, Weights, attach

EXPECTED = {
    "stage_revoked", "insufficient_capacity", "queue_full", "unknown_stage", "cancelled", "invalid_request",
    "interrupted",
}  # fmt: skip
"""What an engine hears where somebody drops its stage, fills the node with others, or kills daemon after daemon."""


def check(weights: Weights, truth: dict[str, Any], names: list[str]) -> None:
    for name in names:
        found = numpy.frombuffer(weights.raw(name), numpy.uint8)
        if not numpy.array_equal(found, truth[name].reshape(-1).view(numpy.uint8)):
            print(f"WRONG BYTES in {name} of {weights.manifest.model}, lease {weights.lease}", flush=True)
            sys.exit(1)


def use(runtime_dir: str, model: str, truth: dict[str, Any], rng: random.Random) -> None:
    """Attach once, in one of the ways there are."""
    streaming = rng.random() < 0.5
    with attach(model, socket=runtime_dir, wait=not streaming, timeout=120) as weights:
        if streaming:
            for name, _ in weights.stream(timeout=120):
                check(weights, truth, [name])
        for _ in range(rng.randrange(1, 6)):
            check(weights, truth, list(truth))


def main() -> None:
    runtime_dir, seed, *models = sys.argv[1:]
    rng = random.Random(int(seed))
    truths = {model: load_file(next(Path(model).glob("*.safetensors"))) for model in models}
    first = True
    while not select.select([sys.stdin], [], [], 0)[0]:
        model = rng.choice(models)
        try:
            use(runtime_dir, model, truths[model], rng)
        except (RequestRefused, StageFailed) as error:
            if error.code not in EXPECTED:
                print(f"UNEXPECTED {error.code}: {error}", flush=True)
                sys.exit(2)
        if first:
            print("ready", flush=True)
            first = False


if __name__ == "__main__":
    main()
