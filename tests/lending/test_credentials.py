"""Who is at the other end of a Unix socket."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from weightd.daemon.lending.credentials import AllowedPeers, Peer, peer_of

CLIENT = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.recv(1)"


def connects(folder: Path, groups: list[int]) -> tuple[int, Peer]:
    """Somebody who is in these groups: its pid, and who it is taken for."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        listener.listen()
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(folder / "s")],
            extra_groups=groups if os.getuid() == 0 else None,
        )
        listener.settimeout(30)
        connection, _ = listener.accept()
        with connection:
            peer = peer_of(connection)
        assert client.wait(30) == 0
    return client.pid, peer


def test_whoever_connects_is_known_by_all_of_their_groups(tmp_path: Path) -> None:
    groups = [4711, *range(5000, 5255)] if os.getuid() == 0 else os.getgroups()
    pid, peer = connects(tmp_path, groups)
    assert (peer.pid, peer.uid, peer.gid) == (pid, os.getuid(), os.getgid())
    assert set(peer.groups) == set(groups)
    assert all(AllowedPeers(uids=(), gids=(group,)).admits(peer) for group in groups)
    assert not AllowedPeers(uids=(), gids=(4710,)).admits(peer)


def test_of_whoever_is_in_more_groups_than_can_be_asked_for_the_primary_one_counts(tmp_path: Path) -> None:
    if os.getuid():
        pytest.skip("needs root, to be in any groups")
    _, peer = connects(tmp_path, list(range(5000, 5257)))
    assert peer.groups == ()
    assert AllowedPeers(uids=(), gids=(os.getgid(),)).admits(peer)
    assert not AllowedPeers(uids=(), gids=(5000,)).admits(peer)
