"""The daemon process: sockets, node, lease server and HTTP server put together, run until a signal ends them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import sys
from collections.abc import Iterator

import uvicorn

from weightd.api.app import create_app
from weightd.api.gate import PeerProtocol
from weightd.daemon.cache import Cache
from weightd.daemon.credentials import AllowedPeers
from weightd.daemon.devices import open_devices
from weightd.daemon.lending import LeaseServer
from weightd.daemon.metrics import Metrics
from weightd.daemon.node import Node
from weightd.daemon.settings import Settings
from weightd.daemon.sockets import RuntimeDir, bind_tcp
from weightd.daemon.sources import Allow
from weightd.ipc.runtime_dir import API_SOCKET, LEASE_SOCKET

log = logging.getLogger(__name__)

_STOP_DEADLINE = 10.0
"""Seconds that a clean stop may take; stalled native reads are left to the kernel after it."""


def serve(settings: Settings) -> int:
    """Run the daemon. Returns the exit code. Raises RuntimeDirInUse, OSError and ValueError before it listens."""
    logging.basicConfig(
        stream=sys.stderr, level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    _raise_file_limit()
    devices = open_devices({name: int(size) for name, size in settings.capacity.items()})
    allow = Allow(settings.allow)
    runtime = RuntimeDir(settings.runtime_dir)
    try:
        listeners = [runtime.bind(API_SOCKET)]
        if settings.listen:
            listeners.append(bind_tcp(settings.listen))
        lease_listener = runtime.bind(LEASE_SOCKET)
        peers = AllowedPeers(frozenset(settings.peer_uids), frozenset(settings.peer_gids))

        async def run() -> bool:
            metrics = Metrics()
            node = Node(
                devices,
                allow=allow,
                cache=Cache(settings.cache_dir),
                limits=settings.fill_limits,
                concurrent_loads=settings.concurrent_loads,
                metrics=metrics,
            )
            leases = LeaseServer(node, lease_listener, peers, settings.max_leases)
            app = create_app(
                node,
                peers=peers,
                token=settings.token.get_secret_value() if settings.token else None,
                listen_host=settings.listen.rpartition(":")[0],
            )
            server = _Server(
                uvicorn.Config(
                    app,
                    http=PeerProtocol,
                    lifespan="off",
                    log_config=None,
                    access_log=False,
                    server_header=False,
                    timeout_graceful_shutdown=2,
                )
            )
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, server.stop)
            log.info(
                "weightd listens on %s%s", settings.runtime_dir, f" and {settings.listen}" if settings.listen else ""
            )
            await server.serve(sockets=listeners)
            await leases.close()
            try:
                await asyncio.wait_for(node.close(), _STOP_DEADLINE)
            except TimeoutError:
                log.warning("native reads have not ended within %.0f s: leaving them to the kernel", _STOP_DEADLINE)
                return False
            return True

        clean = asyncio.run(run())
    finally:
        runtime.close()
    log.info("weightd has stopped")
    if not clean:
        logging.shutdown()
        os._exit(0)  # threads inside native code would keep the interpreter waiting
    return 0


def _raise_file_limit() -> None:
    """As many descriptors as the system lets us have: one a shard that is read, one a segment, one a lease."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling, which ends the process by the signal even after a clean stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        self.should_exit = True
