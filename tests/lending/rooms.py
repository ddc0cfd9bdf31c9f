"""An entrance alone, with doors behind which nobody does anything."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from weightd.daemon.errors import DaemonError, LeaseLimit
from weightd.daemon.lending.credentials import AllowedPeers, Peer
from weightd.daemon.lending.entrance import Entrance, Rules, Visit
from weightd.daemon.observing.metrics import Metrics


class Room:
    """An entrance with one door, on a Unix socket, behind which nobody does anything."""

    def __init__(self, folder: Path, most: int, entrance: Entrance | None = None, **options: Any) -> None:
        self.entrance = entrance or Entrance(Metrics(), **options)
        self.metrics = self.entrance.metrics
        self.path = str(folder / "door.sock")
        self.words = True
        """Whether anything is said to those who are turned away."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen(1024)
        self.visits: list[Visit] = []
        self.hung_up: list[Visit] = []
        self.refused: list[DaemonError] = []
        self._connections: list[socket.socket] = []
        rules = Rules(most, self._refuse, AllowedPeers({0, 1000, 2000}, ()), LeaseLimit, "WEIGHTD_MAX_LEASES")
        self.door = self.entrance.open("lease.sock", listener, rules, self._take)

    def _refuse(self, error: DaemonError) -> bytes | None:
        self.refused.append(error)
        return str(error).encode() if self.words else None

    def _take(self, connection: socket.socket, visit: Visit, peer: Peer | None) -> None:
        self._connections.append(connection)
        self.visits.append(visit)

        def hang_up() -> None:
            self.hung_up.append(visit)
            connection.close()

        visit.hang_up = hang_up

    async def come(self) -> socket.socket:
        """Connect, and wait until that was noticed."""
        seen = len(self.visits) + len(self.refused)
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.path)
        connection.setblocking(False)
        self._connections.append(connection)
        await noticed(lambda: len(self.visits) + len(self.refused) > seen)
        return connection

    async def close(self) -> None:
        self.door.close()
        await self.door.wait_closed()
        for connection in (*self._connections, self.door.listener):
            connection.close()


async def noticed(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - of whatever it is
            await asyncio.sleep(0.001)


def inside(folder: Path, most: int, body: Callable[[Room], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        room = Room(folder, most, **options)
        try:
            await body(room)
        finally:
            await room.close()

    asyncio.run(run())
