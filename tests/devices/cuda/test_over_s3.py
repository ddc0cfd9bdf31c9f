"""What lies on a GPU, read over S3: copied back, byte for byte, and kept for as long as it is being sent."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.devices.cuda.fakes import SHARDS, NewMachine
from tests.servers import free_ports


@pytest.mark.parametrize("handle", ["fd", "cuda_ipc"])
def test_files_of_a_stage_on_a_gpu_are_those_of_its_source(machine: NewMachine, model: Path, handle: str) -> None:
    gpus = machine()
    (port,) = free_ports(1)
    daemon = gpus.daemon("--s3-listen", f"127.0.0.1:{port}")
    stage = daemon.stage(model, device="cuda:0", handle=handle)
    assert stage["state"] == "ready", stage["error"]
    mapped = gpus.fake.counters()[daemon.pid]["mappings"]
    for shard in SHARDS:
        truth = (model / shard).read_bytes()
        url = f"http://127.0.0.1:{port}/weightd/{stage['id']}/{shard}"
        assert httpx.get(url, timeout=60).content == truth
        part = httpx.get(url, headers={"Range": f"bytes=1001-{len(truth) - 7}"}, timeout=60)
        assert part.content == truth[1001 : len(truth) - 6]
    assert daemon.client.leases() == []
    assert gpus.fake.counters()[daemon.pid]["mappings"] == mapped, "a mapping outlives its answer"
    outcome = "resident" if handle == "fd" else "passed"
    sent = [line for line in daemon.get("/metrics").splitlines() if f'sent_bytes_total{{outcome="{outcome}"}}' in line]
    assert float(sent[0].split()[-1]) > 0
    daemon.client.remove(stage["id"])
