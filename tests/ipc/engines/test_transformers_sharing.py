"""A model over lent memory: how long its lease lasts, and what is its own of the pages under it."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.servers import Daemon, until

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from tests.ipc.engines.conftest import leases_of  # noqa: E402
from tests.ipc.engines.models import NORM, llama  # noqa: E402
from weightd.ipc.engines.transformers import load  # noqa: E402


def test_the_lease_lasts_as_long_as_the_model(daemon: Daemon, tmp_path: Path) -> None:
    folder = llama(tmp_path / "m")
    model: Any = load(folder)
    gc.collect()
    assert len(leases_of(daemon, folder)) == 1
    kept = model.model.norm.weight
    del model
    gc.collect()
    until(lambda: leases_of(daemon, folder) == [], "the lease of a model that is garbage ends")
    assert torch.equal(kept, load_file(folder / "model.safetensors")[NORM]), "its memory stays as long as it is held"


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_lease_of_the_callers_own_is_kept_and_left_alone(daemon: Daemon, tmp_path: Path) -> None:
    folder = llama(tmp_path / "m")
    model: Any = load(daemon.attach(folder))
    gc.collect()
    assert len(leases_of(daemon, folder)) == 1, "weights that nobody else holds are held by the model"
    del model
    with daemon.attach(folder) as weights:
        model = load(weights)
        del model
        gc.collect()
        assert weights.lease in [lease["id"] for lease in leases_of(daemon, folder)]


CHILD = """
import json, os, sys, torch
from weightd.ipc.engines.transformers import load

def private(model):
    start = min(parameter.data_ptr() for parameter in model.parameters())
    found, inside = {}, False
    for line in open("/proc/self/smaps"):
        key, *rest = line.split()
        if not key.endswith(":"):
            first, last = (int(part, 16) for part in key.split("-"))
            inside = first <= start < last
        elif inside and rest[-1] == "kB":
            found[key[:-1]] = int(rest[0]) * 1024
    return found

model = load(sys.argv[1])
with torch.no_grad():
    outputs = model(torch.arange(2000).reshape(20, 100))[0]
    total = sum(float(parameter.double().sum()) for parameter in model.parameters())
    before = private(model)
    model.embeddings.LayerNorm.weight.fill_(7)
    changed = model(torch.arange(2000).reshape(20, 100))[0]
print(json.dumps({
    "outputs": outputs.double().sum().item(), "changed": changed.double().sum().item(), "total": total,
    "before": before, "after": private(model),
}))
"""


@pytest.fixture(scope="module")
def second_process(daemon: Daemon, minilm: Path) -> tuple[Any, dict[str, Any]]:
    """The model here, and what another process that loads it too, and then writes into it, has to tell."""
    model = load(minilm)
    with torch.no_grad():
        outputs = model(torch.arange(2000).reshape(20, 100))[0].double().sum().item()
        total = sum(float(parameter.double().sum()) for parameter in model.parameters())
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": "/nonexistent",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(minilm)], capture_output=True, text=True, timeout=120, env=env, check=False
    )
    assert child.returncode == 0, child.stderr
    return model, {**json.loads(child.stdout), "expected": {"outputs": outputs, "total": total}}


def test_a_second_process_computes_the_same_without_a_network(second_process: tuple[Any, dict[str, Any]]) -> None:
    _, told = second_process
    assert told["outputs"] == told["expected"]["outputs"]
    assert told["total"] == told["expected"]["total"]


def test_a_second_process_has_no_memory_of_its_own_for_the_weights(second_process: tuple[Any, dict[str, Any]]) -> None:
    model, told = second_process
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    assert told["before"]["Rss"] > 0.9 * nbytes, "it has read all of them"
    assert told["before"]["Private_Dirty"] + told["before"]["Private_Clean"] < 0.01 * nbytes
    assert told["before"]["Anonymous"] == 0
    assert 0 < told["after"]["Anonymous"] <= 4 * 2**20, "only the pages that it wrote to"


def test_a_stray_write_stays_in_the_process_that_made_it(
    daemon: Daemon, minilm: Path, second_process: tuple[Any, dict[str, Any]]
) -> None:
    model, told = second_process
    assert told["changed"] != told["outputs"]
    stored = load_file(minilm / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name]), name
    stray = load(minilm)
    with torch.no_grad():
        stray.embeddings.LayerNorm.weight.zero_()
    with daemon.attach(minilm, strict=True) as weights:  # a mapping of its own
        assert torch.equal(weights["embeddings.LayerNorm.weight"], stored["embeddings.LayerNorm.weight"])
