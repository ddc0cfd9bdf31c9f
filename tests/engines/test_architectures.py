"""Whatever architecture vLLM knows, its trace lays it out as its own loader does, to the byte.

Each is the second of two tensor-parallel processes', which has shares of everything, and what pads them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.architectures import ARCHITECTURES
from tests.engines.environment import HERE
from tests.engines.hosts import Host
from tests.servers import Daemon

pytestmark = pytest.mark.timeout(600)

OPAQUE: dict[str, set[str]] = {
    # Mamba keeps the decay as a function of what is stored.
    "mamba": {"backbone.layers.*.mixer.A"},
    "mamba2": {"backbone.layers.*.mixer.A"},
    "jamba": {"model.layers.*.mamba.A"},
    "zamba2": {"model.layers.*.mamba.A", "model.layers.*.mamba_decoder.mamba.A"},
    "nemotron_h": {"model.layers.*.mixer.A"},
    "falcon_h1": {"model.layers.*.mamba.mamba.A"},
    "granitemoehybrid": {"model.layers.*.mamba.A"},
}
"""Architecture → the parameters that no recipe describes, ``*`` for any number. Others have none."""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, shim: Path) -> Iterator[Host]:
    # Which platform vLLM is on, weightd says before it is imported.
    with Host("vllm", "trace_vllm.py", tmp_path_factory.mktemp("host"), shim, HERE) as host:
        yield host


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_laid_out_as_its_own_loader_does_it(
    name: str, host: Host, shim: Path, daemon: Daemon, tmp_path: Path
) -> None:
    variables = {"WEIGHTD_RUNTIME_DIR": str(daemon.runtime_dir), "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{shim}:{HERE}"}
    run = host.run([name], tmp_path, variables)
    answers = [json.loads(line.removeprefix("ANSWER ")) for line in run.lines if line.startswith("ANSWER ")]
    assert answers, run.said()[-5000:]
    answer: dict[str, Any] = answers[0]
    assert answer["differ"] == answer["lost"] == [], answer
    assert {re.sub(r"\d+", "*", parameter) for parameter in answer["opaque"]} == OPAQUE.get(name, set())
    # Whatever else it has is the daemon's memory.
    assert set(answer["own"]) <= set(answer["opaque"])
