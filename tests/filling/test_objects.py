"""No weight byte becomes a Python object, on the way in or on the way out."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from tests.servers import Daemon, SeaweedFS
from weightd.daemon.layouts.digests import LEAF

MiB = 1 << 20
SIZE = 24 * MiB
FILLING = """
import gc, sys, tracemalloc
import numpy  # which whoever cuts columns imports: its own objects are none of weights
from weightd.daemon.checkpoints.contents import open_checkpoint
from weightd.daemon.checkpoints.listing import list_checkpoint
from weightd.daemon.devices.cpu import CpuDevice
from weightd.daemon.filling.fill import Fill
from weightd.daemon.layouts.checkpoint import checkpoint_layout
from weightd.daemon.layouts.extents import Demands, plan_extents
from weightd.daemon.limits import FillLimits
from weightd.daemon.sources.uris import Allow, canonical, open_source

uri = canonical(sys.argv[1])
source = open_source(uri, Allow())
checkpoint = open_checkpoint(source, list_checkpoint(uri, source))
ranks, dim = int(sys.argv[2]), int(sys.argv[3])
recipes = checkpoint_layout(checkpoint.tensors, tp_size=ranks, tp_ranks=range(ranks), splits={"*": dim})
device = CpuDevice("cpu", 1 << 40)
segments = [device.allocate(recipe.nbytes, str(recipe.rank)) for recipe in recipes]
demands = Demands(8 << 20, source.max_runs, source.min_range)
extents = plan_extents(checkpoint.tensors, recipes, demands)
limits = FillLimits(threads=2, in_flight_bytes=64 << 20, extent_bytes=8 << 20, bounce_buffers=4, retry_deadline=60.0)
fill = Fill(checkpoint.tensors, recipes, segments, extents, limits, on_verified=lambda segment, entries: None)
reader = source.reader(checkpoint.listing.weights)
gc.collect()
tracemalloc.start()
before, _ = tracemalloc.get_traced_memory()
reader.run(fill)
_, most = tracemalloc.get_traced_memory()
reader.close()
fill.account.check_complete()
assert any(segments[0].view[:4096])
print(most - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objects")
    tensors = {f"w{i}": numpy.random.default_rng(i).standard_normal((1024, SIZE // 4096 // 3)) for i in range(3)}
    save_file({name: tensor.astype(numpy.float32) for name, tensor in tensors.items()}, folder / "m.safetensors")
    return folder


def most_allocated(uri: str, env: Mapping[str, str], ranks: int, dim: int) -> int:
    """Bytes of Python objects that there were at once while a checkpoint was read, in a process of its own."""
    command = [sys.executable, "-c", FILLING, uri, str(ranks), str(dim)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize(("ranks", "dim"), [(1, 0), (2, 0), (2, 1)], ids=["whole", "rows", "columns"])
@pytest.mark.parametrize("kind", ["file", "s3"])
def test_reading_makes_no_objects_of_weights(kind: str, ranks: int, dim: int, folder: Path, s3: SeaweedFS) -> None:
    uri = str(folder) if kind == "file" else s3.upload(folder, "objects")
    allocated = most_allocated(uri, {**os.environ, **s3.env}, ranks, dim)
    assert allocated < LEAF, f"{allocated} bytes of objects for {SIZE} bytes of weights"


def test_attaching_makes_no_objects_of_weights(daemon: Daemon, folder: Path) -> None:
    daemon.stage(folder)
    with daemon.attach(folder) as warm:  # what is imported by the first one is not of weights
        assert warm["w0"].shape
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        with daemon.attach(folder) as weights:
            assert sum(float(weights[name].abs().sum()) for name in weights) > 0
            assert sum(len(weights.raw(name)) for name in weights) >= SIZE - MiB  # type: ignore[arg-type]
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most - before < LEAF
