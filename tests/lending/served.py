"""A node in this process that lends what it has over a lease socket, without a daemon around it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from tests.layouts.recipes import infos
from weightd.daemon.checkpoints.cache import Cache
from weightd.daemon.devices.cpu import CpuDevice, CpuSegment
from weightd.daemon.filling.fill import Fill
from weightd.daemon.keeper.deposits import Deposits
from weightd.daemon.layouts.checkpoint import checkpoint_layout
from weightd.daemon.lending.credentials import AllowedPeers
from weightd.daemon.lending.entrance import Entrance
from weightd.daemon.lending.lease_socket import LeaseServer
from weightd.daemon.limits import FillLimits, NodeLimits
from weightd.daemon.node.service import Node
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.sources.uris import Allow
from weightd.daemon.stages.manifests import SealedManifest
from weightd.daemon.stages.planning import Plan
from weightd.daemon.stages.request import parse_request
from weightd.daemon.stages.residency import Residency
from weightd.daemon.stages.segments import segment_manifest
from weightd.daemon.stages.stage import Stage
from weightd.ipc import wire

TENSORS = infos(("a", "F32", (4, 8)), ("b", "F32", (2, 8)), ("c", "F32", (2, 8)), ("d", "F32", (2, 8)))


class Served:
    """Make it on the event loop."""

    def __init__(self, folder: Path) -> None:
        self.metrics = Metrics()
        self.device = CpuDevice("cpu", 1 << 30)
        self.residency = Residency(
            {"cpu": self.device}, Deposits(), self.metrics, lease_grace=30, max_leases_per_user=100
        )
        self.node = Node(
            {"cpu": self.device},
            residency=self.residency,
            deposits=Deposits(),
            allow=Allow(),
            cache=Cache(folder / "cache"),
            fill_limits=FillLimits(1, 1 << 20, 1 << 20, 2, 1.0),
            limits=NodeLimits(concurrent_loads=1, max_queued=10, revoke_grace=1.0, trust_peers=False),
            metrics=self.metrics,
        )
        self.path = str(folder / "lease.sock")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen(64)
        peers = AllowedPeers({os.getuid()}, ())
        self.server = LeaseServer(self.node, listener, peers, 50, Entrance(self.metrics))
        self.clients: list[socket.socket] = []
        self._segments: list[CpuSegment] = []

    def stage(self, *ranks: int) -> Stage:
        """One that waits for its turn, as yet without segments."""
        rank = "all" if len(ranks) > 1 else ranks[0] if ranks else None
        parallel = None if rank is None else {"tp_size": 2, "tp_rank": rank, "map": {"*": 0}}
        request = parse_request({"model": "/m", "parallel": parallel})
        found = Stage("file:///m", ["cpu"] * max(1, len(ranks)), request, None)
        self.residency.keep(found)
        return found

    def load(self, stage: Stage) -> None:
        """It has segments, and loads."""
        request = stage.request.parallel
        recipes = (
            checkpoint_layout(TENSORS, tp_size=2, tp_ranks=list(stage.request.ranks), splits={"*": 0})
            if request
            else checkpoint_layout(TENSORS)
        )
        stage.plan = cast(Plan, SimpleNamespace(recipes=recipes))
        stage.segments = [self.device.allocate(recipe.nbytes, stage.id) for recipe in recipes]
        self._segments += cast(list[CpuSegment], stage.segments)
        stage.verified = [[] for _ in recipes]
        stage.fill = cast(Fill, SimpleNamespace(account=SimpleNamespace(bytes_read=7)))
        stage.bytes_total = 100
        stage.enter("loading")

    def ready(self, stage: Stage) -> None:
        """All of it is there."""
        assert stage.plan is not None
        count = len(stage.segments)
        stage.manifests = [SealedManifest.seal(segment_manifest(stage, stage.plan, i)) for i in range(count)]
        stage.segment_digests = [f"xxh3:{index:032x}" for index in range(count)]
        stage.checkpoint_digest = "xxh3:" + "c" * 32
        stage.plan = stage.fill = None
        stage.enter("ready")

    def made(self, *ranks: int) -> Stage:
        """One that is ready."""
        stage = self.stage(*ranks)
        self.load(stage)
        self.ready(stage)
        return stage

    def asks(self, message: dict[str, Any]) -> Asking:
        """Somebody connects and says this."""
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(60)
        client.connect(self.path)
        self.clients.append(client)
        wire.send(client, message)
        return Asking(client)

    async def close(self) -> None:
        for client in self.clients:
            client.close()
        await self.server.close()
        for stage in self.residency.stages.values():
            for manifest in stage.manifests:
                manifest.close()
        for segment in self._segments:
            segment.close()


class Asking:
    """A client of the lease socket."""

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self._next: asyncio.Future[dict[str, Any]] | None = None

    async def hears(self) -> dict[str, Any]:
        """What it is told next, with the inodes of the descriptors that came along."""
        self._next = self._next or asyncio.ensure_future(asyncio.to_thread(self._receive))
        found = await self._next
        self._next = None
        return found

    @property
    def heard(self) -> bool:
        """Whether it was told more."""
        self._next = self._next or asyncio.ensure_future(asyncio.to_thread(self._receive))
        return self._next.done()

    def _receive(self) -> dict[str, Any]:
        message, fds = wire.receive(self.client)
        if fds:
            message["inodes"] = [os.fstat(fd).st_ino for fd in fds]
            message["sizes"] = [os.fstat(fd).st_size for fd in fds]
        wire.close_all(fds)
        return message


def within(folder: Path, body: Callable[[Served], Awaitable[None]]) -> None:
    """Run it on an event loop, with a node that is served."""

    async def run() -> None:
        served = Served(folder)
        try:
            async with asyncio.timeout(60):
                await body(served)
        finally:
            await served.close()

    asyncio.run(run())
