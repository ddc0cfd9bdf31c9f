"""Whether it is the daemon that is at the other end, before a word is said to it.

Anybody may listen at a path of their own, or in a folder of /tmp that they made first; what they lend would be loaded
for weights. So whoever listens has to be this process's own user, root, or a user that ``WEIGHTD_DAEMON_UID`` names.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from weightd.ipc.errors import DaemonNotTrusted
from weightd.ipc.runtime_dir import TOKEN_FILE

VARIABLE = "WEIGHTD_DAEMON_UID"
_UCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid (socket(7), SO_PEERCRED)
_LISTENING = "0A"
"""TCP_LISTEN, as /proc/net/tcp has it."""


def named() -> frozenset[int]:
    """Users that the setting names, by number. Raises DaemonNotTrusted where it is no list of numbers."""
    text = os.environ.get(VARIABLE, "")
    try:
        return frozenset(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise DaemonNotTrusted(
            f"{VARIABLE} is {text[:100]!r}: expected the number of a user, or several with commas"
        ) from None


def trusted() -> frozenset[int]:
    """Users, by number, whose daemon is believed."""
    return named() | {0, os.geteuid()}


def check(connection: socket.socket, path: Path) -> None:
    """Raise DaemonNotTrusted unless who listens at the other end of a Unix socket is trusted, and its folder is.

    ``path`` is where it was found. The kernel says who listens, so that nothing can be put in the path's place between
    the look and the word. A folder that others may write to is believed where the setting names the daemon's user.
    """
    _, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if uid not in trusted():
        raise DaemonNotTrusted(
            f"who listens at {path} is uid {uid}, neither root nor uid {os.geteuid()}, which this process is: where "
            f"that is who runs the daemon, set {VARIABLE}={uid}; else set WEIGHTD_RUNTIME_DIR to the daemon's folder"
        )
    if uid in named():
        return
    try:
        found = os.stat(path.parent)
    except OSError as error:
        raise DaemonNotTrusted(
            f"{path.parent} cannot be looked at: {error.strerror}: set WEIGHTD_RUNTIME_DIR"
        ) from None
    if found.st_uid not in trusted():
        raise DaemonNotTrusted(
            f"{path.parent} belongs to uid {found.st_uid}, neither root nor uid {os.geteuid()}, which this process is: "
            f"name the daemon's user, {VARIABLE}={uid}, or set WEIGHTD_RUNTIME_DIR to the daemon's folder"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise DaemonNotTrusted(
            f"others may write to {path.parent} (mode {stat.S_IMODE(found.st_mode):o}), and put sockets of their own "
            f"there: chmod go-w {path.parent}, or name the daemon's user, {VARIABLE}={uid}"
        )


def own_token(url: str, folder: Path) -> str | None:
    """What to show at a URL of this machine to change anything: the daemon's own token, where this process may read it.

    None where there is none, and where somebody listens at that port who is not trusted: it is not for them to know.
    """
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 80
        if parts.scheme != "http" or not (host == "localhost" or ipaddress.ip_address(host).is_loopback):
            return None
        text = (folder / TOKEN_FILE).read_text("ascii").strip()
    except (OSError, ValueError):
        return None
    listening = set(listeners(port))
    return text if text and listening and listening <= trusted() else None


def listeners(port: int) -> Iterator[int]:
    """Users that listen at a TCP port of this network namespace, by any address."""
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                yield int(fields[7])
