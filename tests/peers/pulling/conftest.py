from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.filling.fills import DEFAULTS, MiB, prepared, store, tensor
from tests.peers.pulling.pulls import LEAVES, Fleeting, MakePull, Pull
from weightd.daemon.devices.cpu import CpuDevice
from weightd.daemon.layouts.checkpoint import checkpoint_layout
from weightd.daemon.layouts.extents import Demands
from weightd.daemon.peers.finding import following


@pytest.fixture
def pull(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakePull:
    stored = store(tmp_path, {f"t{i}": tensor("U8", (MiB,), i) for i in range(LEAVES)})
    recipes = checkpoint_layout(stored.checkpoint.tensors)

    @contextlib.contextmanager
    def pull(
        fleet: Fleeting, *, origin: bool = True, fill: str = "direct", demands: Demands = DEFAULTS, **options: Any
    ) -> Iterator[Pull]:
        monkeypatch.setattr(following, "listen", fleet.listen)
        with prepared(stored, recipes, demands, device=CpuDevice("cpu", 1 << 40, fill), **options) as filled:
            yield Pull(stored, filled, recipes, fleet, origin)

    return pull


@pytest.fixture
def whole() -> bytes:
    return b"".join(tensor("U8", (MiB,), i)[2] for i in range(LEAVES))
