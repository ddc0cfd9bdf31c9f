"""Who is at the other end of a Unix socket, and whether they may be."""

from __future__ import annotations

import array
import contextlib
import socket
import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

_UCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid (socket(7), SO_PEERCRED)
_SO_PEERGROUPS = 59  # asm-generic/socket.h; Linux 4.13
_GROUPS_BYTES = 1024  # of 256 groups: Python's getsockopt takes no larger buffer


class Peer(NamedTuple):
    """A process, as the kernel saw it when it connected. ``pid`` is 0 where it is in a foreign pid namespace."""

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...]


@dataclass(frozen=True)
class AllowedPeers:
    """Users and groups, by number, that may use the sockets; a peer that is in either is in."""

    uids: Collection[int]
    gids: Collection[int]

    def admits(self, peer: Peer) -> bool:
        """Whether the peer's user, group or one of its supplementary groups is allowed."""
        return peer.uid in self.uids or not {peer.gid, *peer.groups}.isdisjoint(self.gids)

    def refusal(self, peer: Peer) -> str:
        """What to tell a peer that is not admitted."""
        return (
            f"uid {peer.uid}, gid {peer.gid} may not use this socket: "
            "the settings WEIGHTD_PEER_UIDS and WEIGHTD_PEER_GIDS decide"
        )


def peer_of(connection: socket.socket) -> Peer:
    """The process at the other end of a connected Unix socket."""
    pid, uid, gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    groups = array.array("I")
    with contextlib.suppress(OSError):  # more groups than fit, or an old kernel: the primary group counts
        groups.frombytes(connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES))
    return Peer(pid, uid, gid, tuple(groups))
