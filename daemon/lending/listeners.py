"""The daemon's listening sockets."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from weightd.daemon.addresses import parse_listen
from weightd.daemon.keeper.deposits import Deposits
from weightd.daemon.keeper.supervisor import LISTEN

SOCKET_MODE = 0o660


class Listeners:
    """The sockets of a runtime directory. Under a keeper they outlive the daemon: who connects while there is none
    waits in their backlog for the next one."""

    def __init__(self, folder: Path, deposits: Deposits, held: dict[str, int]) -> None:
        """``held`` are sockets that the daemon before this one has deposited, by ``listen:<address>``."""
        self._folder = folder
        self._deposits = deposits
        self._held = held
        self._paths: list[Path] = []

    def unix(self, name: str) -> socket.socket:
        """A listening Unix socket in the directory, mode 0660. A socket file that a dead daemon left is replaced."""
        path = self._folder / name
        self._paths.append(path)
        return self._adopted(name) or self._deposited(name, _bind_unix(path))

    def tcp(self, address: str) -> socket.socket:
        """A listening TCP socket at HOST:PORT. Raises OSError, and ValueError where it is no such thing."""
        listener = self._adopted(address) or self._deposited(address, _bind_tcp(address))
        # Inherited by its connections, on which asyncio does not set it: an event would wait 40 ms for the one before.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener

    def _adopted(self, address: str) -> socket.socket | None:
        fd = self._held.pop(LISTEN + address, None)
        return None if fd is None else socket.socket(fileno=fd)

    def _deposited(self, address: str, listener: socket.socket) -> socket.socket:
        self._deposits.put(LISTEN + address, listener.fileno())
        return listener

    def drop_others(self) -> None:
        """Close what was adopted and nobody asked for: the settings have changed."""
        for name, fd in self._held.items():
            self._deposits.drop(name)
            os.close(fd)

    def close(self) -> None:
        """Remove the sockets' files."""
        for path in self._paths:
            path.unlink(missing_ok=True)


def _bind_unix(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)  # the lock on the directory says that nobody listens there
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    previous = os.umask(0o777 & ~SOCKET_MODE)  # never, not even for a moment, open to more
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"{error.strerror} (a socket's path has at most 107 bytes)", str(path)) from None
    finally:
        os.umask(previous)
    os.chmod(path, SOCKET_MODE)
    listener.listen(1024)
    return listener


def _bind_tcp(address: str) -> socket.socket:
    host, port = parse_listen(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {address}: {error.strerror}") from None
