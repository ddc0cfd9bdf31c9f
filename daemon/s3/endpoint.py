"""The S3 endpoint: connections in threads of their own, so that sending keeps nobody waiting who asks for less.

What they ask for is found on the daemon's own loop, and bytes go from segments to sockets by sendfile(2).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket

from weightd.daemon.errors import DaemonError
from weightd.daemon.lending.credentials import Peer
from weightd.daemon.lending.entrance import Entrance, Rules, Visit
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.s3 import answers
from weightd.daemon.s3.answering import Answering
from weightd.daemon.s3.asked import Access
from weightd.daemon.s3.connection import Connection
from weightd.daemon.s3.delivery import Passing
from weightd.daemon.s3.errors import S3Error
from weightd.daemon.s3.lanes import Home, Lane
from weightd.daemon.s3.sending import Stalled

log = logging.getLogger(__name__)

_CONNECTIONS = 1024
"""At once."""


class Endpoint:
    """Serves connections that were accepted elsewhere. Made on the daemon's own loop."""

    def __init__(self, answering: Answering, access: Access, metrics: Metrics, *, threads: int) -> None:
        self._answering = answering
        self._access = access
        self._metrics = metrics
        self._passing = Passing()
        self._home = Home()
        self._lanes = [Lane(f"s3-{number}") for number in range(threads)]
        self._next = itertools.cycle(self._lanes)

    def open(self, entrance: Entrance, listener: socket.socket) -> None:
        """Serve whoever comes in at a listening socket."""
        entrance.open("s3", listener, Rules(_CONNECTIONS, _turned_away), self._take)

    def _take(self, connection: socket.socket, visit: Visit, _: Peer | None) -> None:
        connection.setblocking(False)
        visit.hang_up = lambda: _shut_down(connection)
        next(self._next).begin(self._serve(connection, visit))

    async def _serve(self, connection: socket.socket, visit: Visit) -> None:
        try:
            with connection:
                own = (self._access, self._answering, self._passing, self._home, self._metrics)
                await Connection(connection, visit, *own).serve()
        except (OSError, Stalled):
            pass
        except Exception:
            log.exception("S3: a connection has failed")
        finally:
            self._home.tell(visit.end)

    def close(self) -> None:
        """Cut all connections."""
        for lane in self._lanes:
            lane.close()
        self._answering.close()


def _turned_away(error: DaemonError) -> bytes:
    """What is said to who may not stay."""
    text = answers.error_xml(S3Error("SlowDown", str(error)), "/", "")
    head = f"HTTP/1.1 503 Slow Down\r\ncontent-length: {len(text)}\r\nretry-after: 1\r\nconnection: close\r\n\r\n"
    return head.encode() + text


def _shut_down(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        connection.shutdown(socket.SHUT_RDWR)
