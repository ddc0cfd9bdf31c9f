"""Who is at the other end of a Unix socket."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from weightd.daemon.lending.credentials import AllowedPeers, peer_of

CLIENT = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.recv(1)"


def test_whoever_connects_is_known_by_all_of_their_groups(tmp_path: Path) -> None:
    groups = [4711, *range(5000, 5200)] if os.getuid() == 0 else os.getgroups()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(tmp_path / "s")],
            extra_groups=groups if os.getuid() == 0 else None,
        )
        listener.settimeout(30)
        connection, _ = listener.accept()
        with connection:
            peer = peer_of(connection)
        assert client.wait(30) == 0
    assert (peer.pid, peer.uid, peer.gid) == (client.pid, os.getuid(), os.getgid())
    assert set(peer.groups) == set(groups)
    assert all(AllowedPeers(uids=(), gids=(group,)).admits(peer) for group in groups)
    assert not AllowedPeers(uids=(), gids=(4710,)).admits(peer)
