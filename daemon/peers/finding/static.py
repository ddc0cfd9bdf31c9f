"""``static:HOST:PORT,...``: peers that are listed, and ``none``: no peers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from weightd.daemon.addresses import join_address, parse_address
from weightd.daemon.peers.finding.directory import MAX_MEMBERS, BaseDirectory, Member, Opener


def parse(kind: str, place: str) -> Opener:
    """The list, or nothing."""
    if kind == "none":
        if place:
            raise ValueError(f"none has nothing behind it, found {place!r}")
        return partial(StaticDirectory, ())
    peers = sorted({parse_address(part.strip()) for part in place.split(",") if part.strip()})
    if not 1 <= len(peers) <= MAX_MEMBERS:
        raise ValueError(f"static lists 1 to {MAX_MEMBERS} peers, as in static:10.0.0.1:7401,10.0.0.2:7401, "
                         f"found {len(peers)}")  # fmt: skip
    return partial(StaticDirectory, peers)


class StaticDirectory(BaseDirectory):
    """The same list on every node, this one's own address included or not. A host named as this node is this node."""

    name = "static"

    def __init__(self, peers: Sequence[tuple[str, int]], *, node: str, address: str) -> None:
        super().__init__()
        if peers:
            self.own_host, self.own_port = parse_address(address)
        for host, port in peers:
            if not self.is_own(host, port) and (host, port) != (node.lower(), self.own_port):
                place = join_address(host, port)
                self.put(place, Member(place, place, None))
        self._changed.clear()  # it never does
