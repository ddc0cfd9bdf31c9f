"""The daemon's listening sockets, and the lock that keeps a second daemon out of its runtime directory."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

SOCKET_MODE = 0o660


class RuntimeDirInUse(RuntimeError):
    """Another daemon lives there."""


class RuntimeDir:
    """A runtime directory that this process owns until ``close``: nobody else listens in it meanwhile."""

    def __init__(self, path: Path) -> None:
        """Create it (mode 0750) where it is missing, and lock it. Raises RuntimeDirInUse, OSError."""
        self.path = path
        path.mkdir(mode=0o750, parents=True, exist_ok=True)
        self._lock = os.open(path / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._lock, 32).decode(errors="replace").strip()
            os.close(self._lock)
            raise RuntimeDirInUse(
                f"{path} is in use by another weightd, pid {holder or 'unknown'}: "
                "stop it, or choose another --runtime-dir"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        self._bound: list[Path] = []

    def bind(self, name: str) -> socket.socket:
        """A listening Unix socket in it, mode 0660. A socket file that a dead daemon left is replaced."""
        path = self.path / name
        path.unlink(missing_ok=True)  # the lock says that nobody listens there
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
        self._bound.append(path)
        return listener

    def close(self) -> None:
        """Remove the sockets and let the directory go."""
        for path in self._bound:
            path.unlink(missing_ok=True)
        os.close(self._lock)


def bind_tcp(address: str) -> socket.socket:
    """A listening TCP socket at HOST:PORT. Raises OSError."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        return socket.create_server(
            (host, int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024
        )
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {address}: {error.strerror}") from None
