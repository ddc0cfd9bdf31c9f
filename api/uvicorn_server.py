"""uvicorn's server, as the daemon runs it: its connections come in by the daemon's own entrance."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from weightd.daemon.lending.credentials import Peer
from weightd.daemon.lending.entrance import Entrance, Rules, Visit

log = logging.getLogger(__name__)


class VisitProtocol(H11Protocol):
    """uvicorn's HTTP protocol, which says how far a request is, and tells the application who is at the other end of
    a Unix socket, and how to hang up on whoever takes nothing."""

    def __init__(self, visit: Visit, peer: Peer | None, **options: Any) -> None:
        super().__init__(**options)
        self._visit = visit
        self._peer = peer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._visit.hang_up = transport.abort
        self._visit.unsent = transport.get_write_buffer_size
        self.app_state = {**self.app_state, "hang_up": transport.abort}
        if self._peer is not None:
            self.app_state["peer"] = self._peer

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._visit.end()

    def handle_events(self) -> None:
        super().handle_events()
        self._note()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._note()

    def _note(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._visit.waits()
        elif self.cycle.more_body:
            self._visit.sends()
        else:
            self._visit.works()


class Server(uvicorn.Server):
    """uvicorn without its own signal handling, which ends the process by the signal even after a clean stop.

    And without the tick by which it looks ten times a second whether to stop: an idle daemon sleeps. ``on_end`` ends
    answers that would go on by themselves, and which it would wait for. ``options`` are those of ``uvicorn.Config``.

    ``name`` is what its sockets are called where connections are counted, a Unix socket with ``.sock`` behind it;
    ``rules`` say who may come in there.
    """

    def __init__(
        self,
        app: Any,
        entrance: Entrance,
        name: str,
        rules: Rules,
        *,
        on_end: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=VisitProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,  # the tick would keep it up to date
                **options,
            )
        )
        self._entrance = entrance
        self._name = name
        self._rules = rules
        self._on_end = on_end
        self._ending = asyncio.Event()
        self._coming: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        self.servers: list[Any] = [
            self._entrance.open(
                f"{self._name}.sock" if listener.family == socket.AF_UNIX else self._name,
                listener,
                self._rules,
                self._take,
            )
            for listener in sockets or ()
        ]
        self.started = True

    def _take(self, connection: socket.socket, visit: Visit, peer: Peer | None) -> None:
        # While there is no transport: what reads from it, TLS that is being agreed on, say, finds its end.
        visit.hang_up = lambda: _shut_down(connection)
        task = asyncio.create_task(self._connect(connection, visit, peer))
        self._coming.add(task)
        task.add_done_callback(self._coming.discard)

    async def _connect(self, connection: socket.socket, visit: Visit, peer: Peer | None) -> None:
        def protocol() -> VisitProtocol:
            return VisitProtocol(
                visit, peer, config=self.config, server_state=self.server_state, app_state=self.lifespan.state
            )

        try:
            await asyncio.get_running_loop().connect_accepted_socket(protocol, connection, ssl=self.config.ssl)
        except OSError as error:  # TLS that came to nothing, which is an OSError as well
            log.debug("%s: %s", self._name, error)
            visit.end()

    async def main_loop(self) -> None:
        await self._ending.wait()

    def end(self) -> None:
        self.should_exit = True
        self._on_end()
        self._ending.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _shut_down(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        connection.shutdown(socket.SHUT_RDWR)
