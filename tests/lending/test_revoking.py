"""Revoking: every new deadline is told to who leases, and only a shorter one is new."""

from __future__ import annotations

import queue
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from tests.servers import Daemon, until

Start = Callable[..., Daemon]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    save_file({"w": numpy.arange(1024, dtype=numpy.float32)}, tmp_path / "model" / "m.safetensors")
    return tmp_path / "model"


def test_a_shorter_deadline_is_told_as_well_and_a_longer_one_changes_nothing(start_daemon: Start, folder: Path) -> None:
    daemon = start_daemon()
    weights = daemon.attach(folder)
    stage = weights.manifest.stage
    told: queue.Queue[float] = queue.Queue()
    weights.on_revoke(told.put)
    daemon.client.remove(stage, force=True, grace=80_000)
    assert 70_000 < told.get(timeout=60) <= 80_000
    daemon.client.remove(stage, force=True, grace=3000)
    assert 2000 < told.get(timeout=60) <= 3000
    daemon.client.remove(stage, force=True, grace=50_000)
    daemon.client.remove(stage, force=True, grace=1000)
    assert 500 < told.get(timeout=60) <= 1000, "the longer one was told"
    assert daemon.client.show(stage)["state"] == "ready"
    weights.close()
    until(lambda: daemon.client.show(stage)["state"] == "evicted", "it goes once its lessee has let go")
