"""Descriptors: no process that a client, the daemon or its keeper starts gets any of them by accident."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from tests.servers import Daemon
from weightd.ipc.lease import LeaseConnection

CLOEXEC = 0o2000000
"""O_CLOEXEC, as /proc/<pid>/fdinfo shows it."""
CHILD = """
import os
for fd in os.listdir("/proc/self/fd"):
    try: print(fd, os.readlink(f"/proc/self/fd/{fd}"))
    except OSError: pass
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"w": numpy.arange(1024, dtype=numpy.float32)}, tmp_path / "m.safetensors")
    return tmp_path


def inherited() -> set[str]:
    """What a process gets that this one starts without closing anything."""
    done = subprocess.run([sys.executable, "-c", CHILD], close_fds=False, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())


def test_a_process_that_an_engine_starts_gets_nothing_of_its_lease(daemon: Daemon, folder: Path) -> None:
    message = {"op": "lease", "request": {"model": str(folder)}, "tp_rank": None}
    lease = LeaseConnection(daemon.runtime_dir / "lease.sock", message)
    before = inherited()
    _, fds = lease.acquire(60)
    try:
        assert len(fds) == 2
        assert [fd for fd in fds if os.get_inheritable(fd)] == []
        after = inherited()
        assert not any("memfd:weightd" in line for line in after - before)
        assert {line.split()[0] for line in after - before} <= {line.split()[0] for line in before}, (
            "a child would hold the lease"
        )
    finally:
        for fd in fds:
            os.close(fd)
        lease.close()


def left_open(pid: int) -> list[str]:
    """Descriptors, beside the three that every process has, that whatever it runs would get."""
    found = []
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        if int(info.name) > 2:
            try:
                flags = int(info.read_text().split("flags:")[1].split()[0], 8)
                if not flags & CLOEXEC:
                    found.append(f"{info.name} {os.readlink(f'/proc/{pid}/fd/{info.name}')}")
            except OSError:  # closed meanwhile
                continue
    return found


def test_processes_that_the_daemon_or_its_keeper_start_get_no_descriptor(daemon: Daemon, folder: Path) -> None:
    with daemon.attach(folder):
        assert left_open(daemon.pid) == []
        assert left_open(daemon.keeper_pid) == []
        held = [os.readlink(fd) for fd in Path(f"/proc/{daemon.keeper_pid}/fd").iterdir()]
        assert any("memfd:weightd" in link for link in held), "the keeper holds something"
