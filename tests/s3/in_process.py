"""The S3 endpoint in this process, with a real node behind it, for tests that look into it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import numpy
from safetensors.numpy import save_file

from tests.s3.conftest import MiB
from weightd.api.server import open_endpoint
from weightd.daemon.checkpoints.cache import Cache
from weightd.daemon.devices.cpu import CpuDevice
from weightd.daemon.keeper.deposits import Deposits
from weightd.daemon.lending.entrance import Entrance
from weightd.daemon.limits import FillLimits, NodeLimits
from weightd.daemon.node.service import Node
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.settings import Settings
from weightd.daemon.sources.uris import Allow
from weightd.daemon.stages.request import StageRequest
from weightd.daemon.stages.residency import Residency
from weightd.daemon.stages.stage import Stage


@contextlib.asynccontextmanager
async def endpoint(folder: Path, buffer: int | None = None) -> AsyncIterator[tuple[Node, str, tuple[str, int]]]:
    """An endpoint in this process: its node, a ready stage of a file of 16 MiB, and its address.

    ``buffer``: bytes that the kernel keeps for who is sent to, or some more; None: as it sees fit.
    """
    save_file({"w": numpy.random.default_rng(1).integers(0, 256, 16 * MiB, numpy.uint8)}, folder / "m.safetensors")
    metrics = Metrics()
    devices = {"cpu": CpuDevice("cpu", 64 * MiB)}
    node = Node(
        dict(devices),
        residency=Residency(dict(devices), Deposits(), metrics, lease_grace=30, max_leases_per_user=10),
        deposits=Deposits(),
        allow=Allow(),
        cache=Cache(folder / "cache"),
        fill_limits=FillLimits(2, 8 * MiB, 8 * MiB, 2, 1.0),
        limits=NodeLimits(concurrent_loads=1, max_queued=1, revoke_grace=1.0, trust_peers=False),
        metrics=metrics,
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        address: tuple[str, int] = listener.getsockname()
        served = open_endpoint(Settings(s3_listen=f"127.0.0.1:{address[1]}"), node, Allow())
        entrance = Entrance(metrics)
        served.open(entrance, listener)
        try:
            stage, _ = await node.stage(StageRequest(model=str(folder / "m.safetensors"), device="cpu"))
            await ended(stage)
            yield node, stage.id, address
        finally:
            served.close()
            await node.close()


async def ended(stage: Stage) -> None:
    while not stage.finished:
        await stage.changed(60)
    assert stage.state == "ready", stage.error
