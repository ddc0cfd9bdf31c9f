"""What the API says of the node: its devices, what it is to preload, what it holds and does not understand."""

from __future__ import annotations

from pydantic import BaseModel, Field

from weightd.api.peer_models import PeersState
from weightd.daemon.devices.base import Device
from weightd.daemon.node.preload import Wanted
from weightd.daemon.redaction import redacted
from weightd.daemon.stages.residency import Residency


class Unadopted(BaseModel):
    """What the keeper holds and this version of weightd does not understand; it is left alone."""

    name: str = Field(description="The stage's id.")
    nbytes: int = Field(description="Bytes of its segments.")
    reason: str = Field(description="Why it was not adopted.")


class UnadoptedList(BaseModel):
    """What the keeper held, was not adopted, and is dropped now."""

    unadopted: list[Unadopted] = Field(description="Everything that was dropped.")


class DeviceRecord(BaseModel):
    """One device of the node."""

    name: str = Field(description="As in requests.")
    capacity_bytes: int = Field(description="Bytes that segments may take.")
    used_bytes: int = Field(description="Bytes that segments take or are promised.")
    free_bytes: int = Field(description="What is left of it, for segments: of a GPU never more than others leave.")
    quarantined: str | None = Field(
        None, description="Why it is left alone, with what it holds, until weightd reload; null where it is not."
    )
    uuid: str | None = Field(None, description="The GPU's UUID.")
    total_bytes: int | None = Field(None, description="Bytes that the GPU has.")
    reserve_bytes: int | None = Field(
        None, description="Bytes of the GPU that are left to others, whoever uses it (WEIGHTD_CUDA_RESERVE)."
    )
    available_bytes: int | None = Field(
        None, description="Bytes of the GPU that nobody uses, less the reserve; null while the daemon does not use it."
    )
    used_share: float | None = Field(
        None,
        description="Share of the GPU's memory that segments take: what an engine beside them subtracts from its own, "
        "its gpu_memory_utilization, say.",
    )
    fill_path: str | None = Field(
        None, description="How it is filled: streamer (libstreamer's CUDA backend) or ring (pinned bounce buffers)."
    )
    digest_path: str | None = Field(None, description="Where digests of its memory are computed: gpu or host.")


class NodeRecord(BaseModel):
    """The daemon and what it runs on."""

    pid: int = Field(description="The daemon's process id.")
    started_at: float = Field(description="When it started, in seconds since the epoch.")
    default_device: str = Field(description="Device of requests that name none.")
    devices: list[DeviceRecord] = Field(description="Where segments can live.")
    mapped_elsewhere_bytes: int = Field(
        description="Bytes of segments that were freed here and that other processes still map, as far as can be seen."
    )
    unadopted: list[Unadopted] = Field(description="What the keeper holds that this version does not understand.")
    not_ready: list[str] = Field(description="Why /readyz answers 503; empty where it does not.")
    preload: list[PreloadRecord] = Field(description="What it stages by itself as it starts (WEIGHTD_PRELOAD).")
    peers: PeersState = Field(description="Whether it reads from peers and serves them.")
    versions: dict[str, str | None] = Field(description="Versions of weightd and of what moves its bytes.")


class PreloadRecord(BaseModel):
    """One of the stages that the daemon is to have from its start on."""

    model: str = Field(description="What was asked for.")
    state: str = Field(description="State of its stage; waiting before there is one, and before the next try.")
    stage: str | None = Field(description="Its stage, once there is one.")
    attempts: int = Field(description="Times that it was tried.")
    error: str = Field(description="Why it is not ready, where it has failed.")
    was_ready: bool = Field(description="Whether it was ready once since the daemon started, which is what counts.")


def preload_record(wanted: Wanted) -> PreloadRecord:
    """An entry of the preload list as the API shows it."""
    return PreloadRecord(
        model=redacted(wanted.request.model),
        state=wanted.state,
        stage=wanted.stage,
        attempts=wanted.attempts,
        error=wanted.error,
        was_ready=wanted.was_ready,
    )


def device_record(device: Device, residency: Residency) -> DeviceRecord:
    """A device as the API shows it."""
    used = residency.used(device.name)
    more = device.describe()
    total = more.get("total_bytes")
    return DeviceRecord.model_validate(
        {
            "name": device.name,
            "capacity_bytes": device.capacity,
            "used_bytes": used,
            "free_bytes": max(0, residency.room(device.name)),
            "quarantined": device.quarantined or None,
            "used_share": used / total if isinstance(total, int) and total else None,
            **more,
        }
    )
