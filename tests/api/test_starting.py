"""What a daemon's start costs whoever runs it beside an engine: no library that nothing has asked for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy
from safetensors.numpy import save_file

from tests.servers import Daemon, free_ports

HEAVY = re.compile(r"/(libucs|libucp|libuct|nixl\w*|libtorch\w*|torch|cupy\w*|libcuda|transformers|tokenizers|scipy)\b")


def loaded(daemon: Daemon) -> set[str]:
    """Names of heavy libraries that are in the daemon's process."""
    return set(HEAVY.findall(Path(f"/proc/{daemon.pid}/maps").read_text()))


def test_a_daemon_with_peers_starts_and_stages_without_nixl_cupy_or_torch(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    save_file({"w": numpy.zeros(1024, numpy.float32)}, tmp_path / "m.safetensors")
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    env = {"WEIGHTD_PEER_LISTEN": address, "WEIGHTD_PEERS": f"static:{address}", "WEIGHTD_PEER_TOKEN": "fleet"}
    daemon = start_daemon(env=env)
    assert loaded(daemon) == set()
    assert daemon.stage(tmp_path)["state"] == "ready"
    assert loaded(daemon) == set()
    assert "/libc" in Path(f"/proc/{daemon.pid}/maps").read_text(), "something is seen"
