"""The daemon's own token, for the TCP port where the operator has set none: who can read its file may change things.

It lies in the runtime directory, for the daemon's user alone, and stays the same across restarts.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path

from weightd.ipc.runtime_dir import TOKEN_FILE

_TOKEN = re.compile(r"[0-9a-f]{64}")


def own_token(folder: Path) -> str:
    """The token of a runtime directory, made where there is none, or none that can be relied on. Raises OSError."""
    path = folder / TOKEN_FILE
    if (found := _kept(path)) is not None:
        return found
    made = secrets.token_hex(32)
    fresh = folder / f".{TOKEN_FILE}.{secrets.token_hex(6)}"
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(fd, 0o600)  # whatever the umask
        os.write(fd, f"{made}\n".encode())
    finally:
        os.close(fd)
    os.replace(fresh, path)
    return made


def forget_token(folder: Path) -> None:
    """Remove the file: no token of the daemon's own counts."""
    (folder / TOKEN_FILE).unlink(missing_ok=True)


def _kept(path: Path) -> str | None:
    """The token of an earlier daemon, where nobody else can have written or read it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = os.fstat(fd)
        private = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
        text = os.read(fd, 100).decode("ascii", "replace").strip() if private and found.st_nlink == 1 else ""
    finally:
        os.close(fd)
    return text if _TOKEN.fullmatch(text) else None
