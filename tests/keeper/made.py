"""A keeper in this process, and a clock for it."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from weightd.daemon.keeper import supervisor
from weightd.daemon.keeper.deposits import Deposits
from weightd.daemon.keeper.supervisor import Keeper


class Time:
    """In place of ``time`` where it is only read."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def strftime(self, form: str, *_: object) -> str:
        return form

    def gmtime(self) -> None:
        return None


class Made(Keeper):
    """A keeper with a channel whose other end is a daemon's deposits."""

    def __init__(self, folder: Path, limit: int = 0, refuses: bool = False, command: str = "/nowhere/daemon") -> None:
        super().__init__([command], str(folder), limit=limit, window=60.0, refuses=refuses)
        self.deposits = Deposits()
        self.connect()

    def connect(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.setblocking(False)
        self.deposits = Deposits(theirs)
        self.theirs = theirs

    def take(self) -> None:
        """All that the daemon has said."""
        channel = self._channel
        assert channel is not None
        while self._receive_left(channel):
            pass

    def put(self, *names: str) -> None:
        for name in names:
            fd = os.memfd_create("test")
            self.deposits.put(name, fd)
            os.close(fd)
        self.take()

    @property
    def held(self) -> list[str]:
        return sorted(set(self._held) - {"lock"})

    @property
    def said(self) -> list[str]:
        return [data.decode() for data, _ in self._outbox]

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(Path(self._folder, "keeper.json").read_text())
        return found

    def dies(self, how: str = "exit code 1", end: str = "crashed") -> float:
        """Seconds until the next daemon is to start; -1 where none is."""
        self._start_at = None
        self._died(how, end)
        return -1.0 if self._start_at is None else round(self._start_at - supervisor.time.monotonic(), 6)
