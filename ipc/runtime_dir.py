"""Where daemon and clients meet: one folder with two sockets, and the token of the TCP port."""

from __future__ import annotations

import os
from pathlib import Path

API_SOCKET = "api.sock"
LEASE_SOCKET = "lease.sock"
TOKEN_FILE = "token"  # noqa: S105 - its name
"""File with what has to be shown over TCP to change anything, where the operator has set no token."""


def runtime_dir() -> Path:
    """``WEIGHTD_RUNTIME_DIR``, else ``/run/weightd`` for root, else weightd's folder in ``XDG_RUNTIME_DIR`` or /tmp."""
    if configured := os.environ.get("WEIGHTD_RUNTIME_DIR"):
        return Path(configured)
    if os.geteuid() == 0:
        return Path("/run/weightd")
    if session := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(session) / "weightd"
    return Path(f"/tmp/weightd-{os.geteuid()}")
