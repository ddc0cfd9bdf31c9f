"""What kubelet and Prometheus ask: routes that the API has, and that can have ports of their own beside it."""

from __future__ import annotations

import asyncio
import socket

from fastapi import APIRouter, FastAPI
from fastapi.responses import PlainTextResponse, Response

from weightd.api.gate import BodyLimit, rules
from weightd.api.models import Health
from weightd.api.problems import install, responses
from weightd.api.uvicorn_server import Server
from weightd.daemon.errors import NotReady
from weightd.daemon.lasting import lasting
from weightd.daemon.lending.entrance import Entrance
from weightd.daemon.node.service import Node

_CONNECTIONS = 64
"""At the same time, of each port: it is open to the network, and what it answers is short."""
_IDLE_SECONDS = 5


def health_routes(node: Node, *, named: bool = False) -> APIRouter:
    """``/livez``, ``/readyz``, ``/healthz``; ``named`` says of what is not ready which it is, and why."""
    router = APIRouter()

    @router.get("/livez")
    @router.get("/healthz")
    async def live() -> Health:
        """The daemon answers."""
        return Health()

    @router.get("/readyz", responses=responses(503))
    async def ready() -> Health:
        """Everything that it is to preload was ready once since it started."""
        if missing := node.preload.missing:
            told = f": {'; '.join(missing)}" if named else ": ask /readyz of the local API which"
            raise NotReady(f"{len(missing)} of {len(node.preload.wanted)} stages to preload are not ready{told}")
        return Health()

    return router


def metrics_routes(node: Node) -> APIRouter:
    """``/metrics``."""
    router = APIRouter()

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(node.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


class Port:
    """A port that serves such routes and nothing else, to whoever asks. ``name`` is what its connections go by."""

    def __init__(self, node: Node, entrance: Entrance, name: str, routes: APIRouter, listener: socket.socket) -> None:
        self._name = name
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        app.include_router(routes)
        install(app, node.metrics)
        self._listener = listener
        self._server = Server(
            BodyLimit(app, 0),
            entrance,
            name,
            rules(node.metrics, _CONNECTIONS),
            timeout_graceful_shutdown=1,
            timeout_keep_alive=_IDLE_SECONDS,
        )
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = lasting(self._server.serve(sockets=[self._listener]), f"the port {self._name}")

    async def close(self) -> None:
        self._server.end()
        if self._task is not None:
            await self._task
