"""The node at a glance, in records that are small and many: what ``GET /v1/events`` tells and the status page shows.

Every text in them is bounded, and so is their number: what is left out is counted. The whole of a stage is at its own
route.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import metadata
from typing import Any, get_args

from pydantic import BaseModel, Field

from weightd.api.models import StageRecord, State, stage_record
from weightd.api.node_models import DeviceRecord, NodeRecord, Unadopted, device_record, preload_record
from weightd.api.peer_models import PeerUseRecord, peers_state
from weightd.daemon.node.feed import Row
from weightd.daemon.node.service import Node
from weightd.daemon.observing.refusals import Refusal
from weightd.daemon.peers.finding.directory import Member
from weightd.daemon.peers.finding.fleet import Traffic
from weightd.daemon.stages.stage import Lease, Stage

MAX_STAGES = 1000
"""Stages in it: those on their way first, then the latest."""
MAX_LEASES = 1000
MAX_PEERS = 1000
_MAX_TEXT = 600
"""Characters of one text; a longer one is cut."""
_MAX_MEMBERS = 64
"""Members of a list or a map within one record: peers of a stage, say."""
_VERSIONS = ("weightd", "runai-model-streamer", "obstore", "nixl-cu12", "nixl-cu13", "cupy-cuda12x", "cupy-cuda13x",
             "cuda-bindings")  # fmt: skip
_AT_WORK = frozenset({"planning", "loading", "verifying"})


class ErrorSummary(BaseModel):
    """Why something ended, or was refused."""

    code: str = Field(description="Stable name of the error, for programs.")
    message: str = Field(description="What went wrong with what, what was found, what is allowed.")
    remedy: str = Field(description="What to do about errors of this kind.")


class StageSummary(BaseModel):
    """One stage as it is at a moment."""

    id: str = Field(description="Name of the stage.")
    at: float = Field(description="The moment, in seconds since the epoch: what follows is as it was then.")
    model: str = Field(description="Canonical URI of the checkpoint.")
    device: str = Field(description="Device of its segments; several with commas between.")
    handle: str = Field(description="Kind of handle that it is lent by: fd, cuda_ipc.")
    state: State = Field(description="Where it is between queued and ready, or how it ended.")
    state_since: float = Field(description="Since when it is in that state, in seconds since the epoch.")
    error: ErrorSummary | None = Field(description="Why it ended, where it is failed or cancelled.")
    request_id: str = Field(description="X-Request-ID of the request that it was made for; empty where for none.")
    source: str = Field(description="Source of its bytes.")
    created_at: float = Field(description="When it was asked for, in seconds since the epoch.")
    ready_at: float | None = Field(description="When it became ready, in seconds since the epoch.")
    bytes_total: int = Field(description="Bytes to read; 0 until planned and started.")
    bytes_done: int = Field(description="Bytes read, landed and hashed.")
    bytes_per_second: float | None = Field(description="Mean rate of loading so far.")
    seconds: dict[str, float] = Field(
        description="Where its time went: seconds of wall clock by phase, which add up to its duration."
    )
    bytes_by_source: dict[str, int] = Field(description="Bytes done by where they came from: its source, or peer.")
    peers: list[PeerUseRecord] = Field(
        description="Peers that it was read from, or that were asked; the first of them."
    )
    reserved: dict[str, int] = Field(description="Bytes that it takes, by device.")
    segments: int = Field(description="Its segments, one for each rank; 0 until planned.")
    tensors: int = Field(description="Tensors in them.")
    checkpoint_digest: str | None = Field(description="Digest of the whole checkpoint's values, where known.")
    priority: int = Field(description="Its priority.")
    pin: bool = Field(description="Whether it is never evicted.")
    leases: int = Field(description="Leases held on it.")
    revoked_until: float | None = Field(
        description="By when its lessees have to let go, where it is being taken away: seconds since the epoch."
    )
    moving: str | None = Field(description="Device that it is being moved to.")


class LeaseSummary(BaseModel):
    """One process's use of one segment."""

    id: str = Field(description="Name of the lease.")
    stage: str = Field(description="The stage's id.")
    tp_rank: int = Field(description="Tensor-parallel rank of the segment.")
    uid: int | None = Field(description="User of the process, by number; null where it came over TCP.")
    pid: int | None = Field(description="Its process id; 0 in a foreign pid namespace, null where it came over TCP.")
    since: float = Field(description="Since when, in seconds since the epoch.")
    client: str | None = Field(None, description="HOST:PORT of who reads it over S3; else null.")


class PeerSummary(BaseModel):
    """One peer, as its directory knows it."""

    node: str = Field(description="Its name; its address where the directory knows none.")
    address: str = Field(description="HOST:PORT of its peers' port.")
    stages: int | None = Field(description="Stages that it has or loads; null where it has to be asked.")
    bytes_from: int = Field(description="Bytes read from it, verified.")
    bytes_to: int = Field(description="Bytes that it says it has read from here.")
    bytes_per_second: float | None = Field(description="Of what was read from it last; null where nothing was.")
    transport: str | None = Field(description="By what the last bytes came from it; null where none did.")
    given_up: str | None = Field(description="Why it was given up last; null where it never was.")
    given_up_at: float | None = Field(description="When that was, in seconds since the epoch.")


class RefusalSummary(ErrorSummary):
    """Requests that were refused with the same words."""

    id: str = Field(description="Tells it from others.")
    count: int = Field(description="How often.")
    at: float = Field(description="When last, in seconds since the epoch.")


class NodeSummary(BaseModel):
    """The daemon, and how many there are of what."""

    version: str = Field(description="Version of weightd.")
    stages: dict[State, int] = Field(description="Stages by state, those that are not shown included.")
    leases: int = Field(description="Leases, those that are not shown included.")
    peers: int = Field(description="Peers, those that are not shown included.")
    directory: str = Field(description="Where peers are found: ok, none, or what is wrong with it.")
    node: dict[str, Any] = Field(
        description="As GET /v1/node has it, without its devices and what takes long to find out."
    )


class Gone(BaseModel):
    """What is no more: keys, by kind."""

    devices: list[str] = Field([], description="Names of devices.")
    stages: list[str] = Field([], description="Ids of stages.")
    leases: list[str] = Field([], description="Ids of leases.")
    peers: list[str] = Field([], description="Addresses of peers.")
    refusals: list[str] = Field([], description="Ids of refusals.")


class NodeEvent(BaseModel):
    """What has changed of the node: whole records, each in place of the one with its key that was there before."""

    at: float = Field(description="The daemon's time, in seconds since the epoch.")
    part: int = Field(description="Which event of the snapshot this is, from 0; 0 as well where it is none.")
    more: bool = Field(description="Whether more follows at once: until then not all that belongs together is there.")
    node: list[NodeSummary] = Field([], description="The node: at most one.")
    devices: list[DeviceRecord] = Field([], description="Devices, by name.")
    stages: list[StageSummary] = Field([], description="Stages, by id.")
    leases: list[LeaseSummary] = Field([], description="Leases, by id.")
    peers: list[PeerSummary] = Field([], description="Peers, by address.")
    refusals: list[RefusalSummary] = Field([], description="What was refused lately, by id.")
    gone: Gone | None = Field(None, description="What is no more.")


def node_record(node: Node, mapped_elsewhere: int) -> NodeRecord:
    """The daemon and its devices as the API shows them."""
    return NodeRecord(
        pid=os.getpid(),
        started_at=node.started_at,
        default_device=node.default_device,
        devices=[device_record(device, node.residency) for device in node.devices.values()],
        mapped_elsewhere_bytes=mapped_elsewhere,
        unadopted=[Unadopted(**left) for left in node.residency.unadopted],
        not_ready=node.preload.missing,
        preload=[preload_record(wanted) for wanted in node.preload.wanted],
        peers=peers_state(node),
        versions={name: version(name) for name in _VERSIONS},
    )


@cache
def version(package: str) -> str | None:
    """The version of a package that is installed, None where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def node_summary(node: Node) -> NodeSummary:
    """The node as it is now."""
    return NodeSummary(
        version=version("weightd") or "",
        stages=_by_state(node),
        leases=sum(len(stage.leases) for stage in node.stages()),
        peers=len(node.directory.members()) if node.directory else 0,
        directory=node.directory.status() if node.directory else "none",
        node=node_record(node, 0).model_dump(exclude={"devices", "mapped_elsewhere_bytes"}),
    )


def stage_summary(stage: Stage) -> StageSummary:
    """A stage as it is now."""
    found, now = stage_record(stage), time.time()
    entered = found.ready_at if found.state == "ready" else None
    return StageSummary(
        **found.model_dump(include=_AS_IN_RECORD),
        at=now,
        handle=stage.request.handle,
        state_since=entered or now - (time.monotonic() - stage.entered),
        reserved=dict(stage.reserved),
        segments=len(stage.infos),
        tensors=sum(info.tensors for info in stage.infos),
        moving=stage.moving,
    )


_AS_IN_RECORD = StageSummary.model_fields.keys() & StageRecord.model_fields.keys() - {"segments"}


def lease_summary(lease: Lease) -> LeaseSummary:
    """A lease."""
    return LeaseSummary(
        id=lease.id,
        stage=lease.stage,
        tp_rank=lease.rank,
        uid=lease.uid,
        pid=lease.pid,
        since=lease.since,
        client=lease.client or None,
    )


def peer_summary(member: Member, traffic: Traffic) -> PeerSummary:
    """A peer, and what went to and fro."""
    return PeerSummary(
        node=member.node,
        address=member.address,
        stages=None if member.stages is None else len(member.stages),
        bytes_from=traffic.bytes_from,
        bytes_to=traffic.bytes_to,
        bytes_per_second=traffic.bytes_per_second,
        transport=traffic.transport or None,
        given_up=traffic.given_up or None,
        given_up_at=traffic.given_up_at,
    )


def refusal_summary(refusal: Refusal) -> RefusalSummary:
    """What was refused."""
    return RefusalSummary(
        id=str(refusal.number),
        code=refusal.code,
        message=refusal.message,
        remedy=refusal.remedy,
        count=refusal.count,
        at=refusal.at,
    )


def rows(node: Node) -> Iterator[Row]:
    """All records that there are, as a feed wants them: each with what tells whether it has changed."""
    second = int(time.monotonic())
    yield Row("node", "", (second, *_by_state(node).values()), partial(_json, node_summary, node))
    for name, device in node.devices.items():
        # What others use of a GPU changes without a word.
        mark = second, node.residency.used(name)
        yield Row("devices", name, mark, partial(_json, device_record, device, node.residency))
    for stage in _shown(node):
        yield Row("stages", stage.id, _mark(stage, second), partial(_json, stage_summary, stage))
    for lease in itertools.islice(node.residency.leases, MAX_LEASES):
        yield Row("leases", lease.id, None, partial(_json, lease_summary, lease))
    for member, traffic in peers(node):
        said = None if member.stages is None else len(member.stages)
        yield Row(
            "peers", member.address, (said, *vars(traffic).values()), partial(_json, peer_summary, member, traffic)
        )
    for refusal in node.refusals:
        yield Row("refusals", str(refusal.number), refusal.count, partial(_json, refusal_summary, refusal))


def peers(node: Node) -> Iterator[tuple[Member, Traffic]]:
    """Each peer, and what went to and fro."""
    if node.directory is not None and node.fleet is not None:
        traffic, nothing = node.fleet.traffic, Traffic()
        for member in itertools.islice(node.directory.members(), MAX_PEERS):
            yield member, traffic.get(member.address, nothing)


def bounded(record: BaseModel) -> dict[str, Any]:
    """A record as JSON values, with what is too long or too much cut off."""
    found: dict[str, Any] = _cut(record.model_dump())
    return found


def _shown(node: Node) -> list[Stage]:
    found = list(node.stages())
    if len(found) > MAX_STAGES:
        found = sorted(found, key=lambda stage: (stage.finished, -stage.created_at))[:MAX_STAGES]
    return found


def _by_state(node: Node) -> dict[str, int]:
    counts = dict.fromkeys(get_args(State), 0)
    for stage in node.stages():
        counts[stage.state] += 1
    return counts


def _mark(stage: Stage, second: int) -> tuple[Any, ...]:
    """What of a stage's record changes, but for seconds that pass: they are looked at now and then while it works."""
    return (
        stage.state,
        stage.bytes_done,
        stage.bytes_total,
        stage.devices,
        tuple(stage.reserved.values()),
        len(stage.infos),
        len(stage.leases),
        stage.pin,
        stage.priority,
        stage.revoked_until,
        stage.moving,
        second // 2 if stage.state in _AT_WORK else None,
    )


def _json(summary: Callable[..., BaseModel], *of: Any) -> str:
    return json.dumps(bounded(summary(*of)), separators=(",", ":"), allow_nan=False)


def _cut(value: Any) -> Any:
    if isinstance(value, str) and len(value) > _MAX_TEXT:
        return value[: _MAX_TEXT - 1] + "…"
    if isinstance(value, dict):
        return {_cut(key): _cut(item) for key, item in itertools.islice(value.items(), _MAX_MEMBERS)}
    if isinstance(value, list):
        return [_cut(item) for item in value[:_MAX_MEMBERS]]
    return value
