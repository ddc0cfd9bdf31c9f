"""This daemon among its peers: where it finds them, what it says that it has, and the port where they read it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl

from weightd.api.gate import rules
from weightd.api.peer_app import create_peer_app
from weightd.api.uvicorn_server import Server
from weightd.daemon.lasting import lasting
from weightd.daemon.lending.entrance import Entrance
from weightd.daemon.node.service import Node
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.peers.finding.directory import Directory, open_directory
from weightd.daemon.peers.finding.fleet import Fleet
from weightd.daemon.peers.moving.movers import MoverFailed, Movers, unavailable
from weightd.daemon.peers.serving.server import Serving
from weightd.daemon.settings import Settings

log = logging.getLogger(__name__)

_DEAD = 30_000
"""Milliseconds after which a peer that acknowledges nothing is hung up on."""
_LOOK = 0.1
"""Seconds between looks at what there is to publish."""
_CONNECTIONS = 2048


def open_fleet(settings: Settings, metrics: Metrics) -> tuple[Fleet | None, Directory | None]:
    """Whom to load from, and where they are found; None where no peers are wanted."""
    if settings.peers == "none" and not settings.peer_listen:
        return None, None
    address = settings.peer_address or settings.peer_listen
    directory = open_directory(settings.peers, node=address or os.uname().nodename, address=address or "127.0.0.1:1")
    fleet = Fleet(
        me=address,
        members=lambda: [(member.address, member.stages) for member in directory.members()],
        token=settings.peer_token.get_secret_value() if settings.peer_token else None,
        stall=settings.peer_stall,
        tls=_client_tls(settings),
        off=unavailable(),
        count_arrived=metrics.from_peer,
        count_sent=metrics.to_peer,
        count_slow=lambda better: metrics.slow_paths.labels(better).inc(),
        count_dropped=metrics.dropped_peer,
    )
    return fleet, directory


def _client_tls(settings: Settings) -> ssl.SSLContext | None:
    """Peers have to show a certificate of the fleet's authority; by what address they are reached says nothing."""
    if settings.peer_tls_cert is None:
        return None
    context = ssl.create_default_context(cafile=settings.peer_tls_ca)
    context.check_hostname = False
    context.load_cert_chain(settings.peer_tls_cert, settings.peer_tls_key)
    return context


class Peering:
    """Says what this daemon has, and serves it."""

    def __init__(
        self,
        node: Node,
        settings: Settings,
        directory: Directory,
        fleet: Fleet,
        movers: Movers,
        listener: socket.socket | None,
        entrance: Entrance,
    ) -> None:
        self._directory = directory
        self._fleet = fleet
        self._movers = movers
        self._listener = listener
        self._serving = Serving(node.residency, fleet, movers)
        node.residency.on_release = self._serving.withdraw
        if listener is not None:  # inherited by its connections
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD)
        authority = settings.peer_tls_ca
        self._server = Server(
            create_peer_app(self._serving, node.cache, node.metrics, fleet),
            entrance,
            "peers",
            rules(node.metrics, _CONNECTIONS, secured=settings.peer_tls_cert is not None),
            timeout_graceful_shutdown=1,
            ssl_certfile=settings.peer_tls_cert,
            ssl_keyfile=settings.peer_tls_key,
            ssl_ca_certs=str(authority) if authority else None,
            ssl_cert_reqs=ssl.CERT_REQUIRED if authority else ssl.CERT_NONE,
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self._directory.start()
        self._tasks.append(lasting(self._publish(), "telling peers what is here"))
        if self._listener is not None:
            self._tasks.append(lasting(self._server.serve(sockets=[self._listener]), "the port for peers"))

    async def _publish(self) -> None:
        self._fleet.off = self._fleet.off or await asyncio.to_thread(self._movers.test)
        if self._fleet.off:
            log.error("nothing comes from peers, and nothing goes to them: %s", self._fleet.off)
            return
        with contextlib.suppress(MoverFailed, OSError):  # then they are started when they are needed
            if self._listener is not None:
                await self._serving.mover()
            await asyncio.to_thread(self._movers.prepare)
        last: dict[str, float] | None = None
        while True:
            if self._listener is not None and (now := self._serving.published()) != last:
                last = now
                await self._directory.publish(now)
            await asyncio.sleep(_LOOK)  # others that are asked for the same now are to know

    async def close(self) -> None:
        self._tasks[0].cancel()
        self._serving.end()
        self._server.end()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._directory.close()
        await self._serving.close()
        await asyncio.to_thread(self._movers.close)
