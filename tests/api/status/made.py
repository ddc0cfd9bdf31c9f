"""Nodes as large, as odd or as rich as a test wants, served as the daemon serves them.

Everything is real but for where stages come from: they are put into the residency by hand, without a byte of memory.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from weightd.api.app import create_app
from weightd.api.gate import rules
from weightd.api.uvicorn_server import Server
from weightd.daemon.checkpoints.cache import Cache
from weightd.daemon.devices.cpu import CpuDevice
from weightd.daemon.keeper.deposits import Deposits
from weightd.daemon.lending.credentials import AllowedPeers
from weightd.daemon.lending.entrance import Entrance
from weightd.daemon.limits import FillLimits, NodeLimits
from weightd.daemon.node.service import Node
from weightd.daemon.observing.clock import Clock
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.peers.finding.directory import open_directory
from weightd.daemon.peers.finding.fleet import Fleet
from weightd.daemon.sources.uris import Allow
from weightd.daemon.stages.request import StageRequest
from weightd.daemon.stages.residency import Residency
from weightd.daemon.stages.stage import Lease, Stage

GiB = 1 << 30


class MadeNode:
    """A node, and its API on a port of loopback, in a thread of its own, between ``__enter__`` and ``__exit__``."""

    node: Node
    url: str

    def __init__(self, folder: Path, *, token: str | None = None, peers: Sequence[str] = ()) -> None:
        self._folder = folder
        self._token = token
        self._peers = peers
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> MadeNode:
        self._thread.start()
        assert self._up.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._server.end)
        self._thread.join(20)
        assert not self._thread.is_alive()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        devices, metrics = {"cpu": CpuDevice("cpu", 64 * GiB)}, Metrics()
        residency = Residency(devices, Deposits(), metrics, lease_grace=30, max_leases_per_user=10_000)
        me = "10.0.0.1:7401"
        fleet = directory = None
        if self._peers:
            fleet = Fleet(me=me, members=lambda: (), token=None, stall=10)
            directory = open_directory(f"static:{','.join(self._peers)}", node=me, address=me)
        self.node = Node(
            devices,  # type: ignore[arg-type]
            residency=residency,
            deposits=Deposits(),
            allow=Allow([]),
            cache=Cache(self._folder),
            fill_limits=FillLimits(1, 1 << 20, 1 << 20, 2, 1.0),
            limits=NodeLimits(concurrent_loads=2, max_queued=10, revoke_grace=1, trust_peers=False),
            metrics=metrics,
            fleet=fleet,
            directory=directory,
        )
        app = create_app(self.node, peers=AllowedPeers(frozenset(), frozenset()), token=self._token)
        self.feed = app.state.feed
        listener = socket.create_server(("127.0.0.1", 0))
        # Connections inherit it: whoever does not read is not read for by the kernel, which would take megabytes.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._server = Server(
            app, Entrance(metrics), "api", rules(metrics, 1000), on_end=self.feed.close, timeout_graceful_shutdown=2
        )
        self._loop.call_soon(self._up.set)
        await self._server.serve(sockets=[listener])
        if left := asyncio.all_tasks() - {asyncio.current_task()}:
            _, left = await asyncio.wait(left, timeout=5)
        assert not left, "tasks are left behind"

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call it on the event loop; returns what it returns."""

        async def called() -> Any:
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(called(), self._loop).result(20)

    def tasks(self) -> int:
        """Tasks that run on its event loop, the asking one not counted."""
        return self.call(lambda: len(asyncio.all_tasks())) - 1

    def lease(self, stage: Stage, pid: int) -> Lease:
        """Let somebody lease it."""
        found: Lease = self.call(lambda: self.node.residency.leases.begin(stage, 0, uid=1000, gid=1000, pid=pid))
        return found

    def add(
        self, model: str, state: str = "ready", nbytes: int = 0, spent: dict[str, float] | None = None, **members: Any
    ) -> Stage:
        """Put a stage into it, which has spent so many seconds in each phase."""

        def put() -> Stage:
            stage = Stage(model, ["cpu"], StageRequest(model=model), None)
            stage.source_kind = model.partition(":")[0]
            stage.bytes_total = stage.bytes_read = nbytes
            stage.reserved = {"cpu": nbytes} if nbytes else {}
            if spent is not None:
                phases = {(phase, ""): seconds for phase, seconds in spent.items()}
                stage.clock = Clock.taken_over(0.0, phases, stopped=True)
            for name, value in members.items():
                setattr(stage, name, value)
            stage.enter(state, members.get("error"))
            self.node.residency.keep(stage)
            return stage

        found: Stage = self.call(put)
        return found
