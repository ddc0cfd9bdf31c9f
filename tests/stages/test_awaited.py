"""Lessees of before a restart: what they leased is kept for them, whatever its time to live says."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import numpy
from safetensors.numpy import save_file

from tests.node.adopting import replaced
from tests.servers import Daemon, until
from weightd.ipc import wire

Start = Callable[..., Daemon]


def model(folder: Path, name: str) -> str:
    (folder / name).mkdir()
    save_file({name: numpy.arange(1024, dtype=numpy.float32)}, folder / name / "m.safetensors")
    return str(folder / name)


def test_a_time_to_live_waits_for_lessees_that_may_come_back(start_daemon: Start, tmp_path: Path) -> None:
    daemon = start_daemon(env={"WEIGHTD_LEASE_GRACE": "3600"})
    leased = model(tmp_path, "leased")
    with socket.socket(socket.AF_UNIX) as lease:  # by somebody who will not come back
        lease.settimeout(60)
        lease.connect(str(daemon.runtime_dir / "lease.sock"))
        wire.send(lease, {"op": "lease", "request": {"model": leased, "ttl_seconds": 1}})
        reply, fds = wire.receive(lease)
        while reply["type"] == "progress":
            reply, fds = wire.receive(lease)
        wire.close_all(fds)
        awaited = reply["stage"]
        replaced(daemon)
    # Used later than the other, and so the later of the two to go.
    idle = daemon.stage(model(tmp_path, "idle"), ttl_seconds=1)["id"]
    until(lambda: daemon.client.show(idle)["state"] == "evicted", "the one that nobody is awaited for has gone")
    assert daemon.client.show(awaited)["state"] == "ready", "its lessees may still come back"
