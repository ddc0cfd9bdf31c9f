"""Talking to the keeper from outside: how it fares, and telling it to replace its daemon."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from weightd.daemon.keeper.supervisor import LOCK, STATUS


class NoKeeper(RuntimeError):
    """No keeper runs in the runtime directory."""


def keeper_status(folder: Path) -> dict[str, Any]:
    """What the keeper of a runtime directory says of itself. Raises NoKeeper."""
    try:
        fd = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NoKeeper(f"no keeper in {folder}: {error.strerror}: start one with 'weightd serve'") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        pass  # somebody holds it: what the status says is true of somebody who lives
    else:
        raise NoKeeper(f"no keeper in {folder}: start one with 'weightd serve'")
    finally:
        os.close(fd)
    try:
        found: dict[str, Any] = json.loads((folder / STATUS).read_bytes())
    except (OSError, ValueError) as error:
        raise NoKeeper(f"the keeper of {folder} does not say how it fares: {error}") from None
    return found


def reload_daemon(folder: Path, wait: float) -> tuple[int, int]:
    """Have the daemon replaced, and wait for the new one; returns the old and the new daemon's pid.

    Raises NoKeeper, TimeoutError where the new one does not serve in time.
    """
    before = keeper_status(folder)
    try:
        os.kill(before["pid"], signal.SIGHUP)
    except PermissionError:
        raise NoKeeper(
            f"the keeper of {folder}, pid {before['pid']}, is another user's: run this as that user"
        ) from None
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        now = keeper_status(folder)
        if now["serving"] and now["daemon_pid"] != before["daemon_pid"]:
            return before["daemon_pid"], now["daemon_pid"]
        time.sleep(0.02)
    raise TimeoutError(
        f"the new daemon does not serve after {wait:g} s: {now['state']}, {now['last_exit']}; see its log"
    )
