"""What the HTTP API answers about peers. Sizes in bytes, times in seconds."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from weightd.daemon.node.service import Node
from weightd.daemon.peers.finding.fleet import Traffic
from weightd.daemon.stages.stage import Stage


class PeerUseRecord(BaseModel):
    """What one stage has had from one peer."""

    address: str = Field(description="HOST:PORT of its peers' port.")
    bytes: int = Field(description="Bytes that came from it, verified.")
    bytes_per_second: float | None = Field(description="While any were asked of it.")
    transport: str | None = Field(description="By what they came: rdma, cuda_ipc, shm, tcp, unknown; null: none came.")
    through_host: bool = Field(description="Whether a GPU is at either end: its bytes go through host memory there.")
    slow_path: str | None = Field(description="The better way that this machine has, and how to take it.")
    given_up: str | None = Field(description="Why nothing more was had from it, where it was given up.")


class PeerRecord(BaseModel):
    """One peer, as its directory knows it."""

    node: str = Field(description="Its name; its address where the directory knows none.")
    address: str = Field(description="HOST:PORT of its peers' port.")
    stages: dict[str, float] | None = Field(
        description="How much it has of what, 0 to 1, by stage key; null where it has to be asked."
    )
    bytes_from: int = Field(description="Bytes read from it, verified.")
    bytes_to: int = Field(description="Bytes that it says it has read from here.")
    bytes_per_second: float | None = Field(description="Of what was read from it last; null where nothing was.")
    transport: str | None = Field(description="By what the last bytes came from it; null where none did.")
    given_up: str | None = Field(description="Why it was given up last; null where it never was.")
    given_up_at: float | None = Field(description="When that was, in seconds since the epoch.")


class PeerList(BaseModel):
    """The other daemons of the fleet."""

    directory: str = Field(
        description="ok, or what is wrong with where they are found; none where there are to be none."
    )
    off: str | None = Field(description="Why nothing is read from peers, nor they from here; null while it is.")
    peers: list[PeerRecord] = Field(description="Each peer.")


class PeersState(BaseModel):
    """Whether the daemon reads from peers and serves them."""

    state: Literal["none", "ok", "off"] = Field(description="none: not asked for; off: not possible, see reason.")
    reason: str | None = Field(description="Why they are off, with the remedy.")
    address: str | None = Field(description="HOST:PORT where peers find it; null where it only reads.")


def peers_of(stage: Stage) -> list[PeerUseRecord]:
    """What a stage has had from each peer."""
    used = stage.fill.account.peers if stage.fill else stage.peers
    return [
        PeerUseRecord(
            address=address,
            bytes=use.nbytes,
            bytes_per_second=use.nbytes / use.seconds if use.seconds else None,
            transport=use.transport or None,
            through_host=use.through_host,
            slow_path=use.slow_path or None,
            given_up=use.given_up or None,
        )
        for address, use in sorted(dict(used).items())  # a copy: a thread adds to it
    ]


def peers_state(node: Node) -> PeersState:
    """What of the node concerns peers."""
    fleet = node.fleet
    if fleet is None:
        return PeersState(state="none", reason=None, address=None)
    return PeersState(state="off" if fleet.off else "ok", reason=fleet.off or None, address=fleet.me or None)


def peer_list(node: Node) -> PeerList:
    """The fleet as the API shows it."""
    if node.directory is None or node.fleet is None:
        return PeerList(directory="none", off=None, peers=[])
    traffic = node.fleet.traffic
    peers = []
    for member in node.directory.members():
        found = traffic.get(member.address) or Traffic()
        peers.append(
            PeerRecord(
                node=member.node,
                address=member.address,
                stages=dict(member.stages) if member.stages is not None else None,
                bytes_from=found.bytes_from,
                bytes_to=found.bytes_to,
                bytes_per_second=found.bytes_per_second,
                transport=found.transport or None,
                given_up=found.given_up or None,
                given_up_at=found.given_up_at,
            )
        )
    return PeerList(directory=node.directory.status(), off=node.fleet.off or None, peers=peers)
