"""What the HTTP API answers, documented field by field. Sizes in bytes, times in seconds."""

from __future__ import annotations

import itertools
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from weightd.api.peer_models import PeerUseRecord, peers_of
from weightd.daemon.errors import UnknownStage
from weightd.daemon.node.service import Fit
from weightd.daemon.observing.clock import by_phase
from weightd.daemon.redaction import redacted
from weightd.daemon.stages.request import StageRequest
from weightd.daemon.stages.residency import summary
from weightd.daemon.stages.segments import entry_files, segment_leaves, segment_manifest
from weightd.daemon.stages.stage import Stage

_MAX_FILES = 1000

State = Literal["queued", "planning", "loading", "verifying", "ready", "failed", "cancelled", "evicted"]


class Problem(BaseModel):
    """An error, as RFC 9457 has it. Errors may carry further members, named in the documentation of their code."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="about:blank: the code says it all.")
    title: str = Field(description="The HTTP status in words.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What went wrong with what, what was found, what is allowed, what to do.")
    code: str = Field(description="Stable name of the error, for programs.")
    request_id: str | None = Field(None, description="Of the request, as X-Request-ID has it and the log.")


class StageError(BaseModel):
    """Why a stage ended without being ready."""

    code: str = Field(description="Stable name of the error, for programs.")
    message: str = Field(description="What went wrong with what, what was found, what is allowed.")
    remedy: str = Field(description="What to do about errors of this kind.")
    details: dict[str, Any] = Field(description="The same in single values, by code.")


class SegmentRecord(BaseModel):
    """One segment of a stage: one rank's memory."""

    tp_rank: int = Field(description="Tensor-parallel rank that it is for.")
    nbytes: int = Field(description="Bytes of the layout, padding included.")
    tensors: int = Field(description="Tensors in it.")
    device: str = Field(description="Device that it is on.")
    handle: str = Field(description="Kind of handle that it is lent by: fd, cuda_ipc.")
    digest: str | None = Field(description="Digest of its tensors' values, once ready.")


class LeftOutRecord(BaseModel):
    """A file at the URI that was not taken."""

    name: str = Field(description="Its name below the checkpoint's URI.")
    reason: str = Field(description="Why it was not taken, or could not be.")


class SelectionRecord(BaseModel):
    """Which of the files at the URI are the checkpoint. At most 1000 are listed of each kind."""

    rule: str = Field(description="Why these files hold the weights; empty where a version that did not say chose.")
    files: list[str] = Field(description="The files that hold the weights.")
    left_out: list[LeftOutRecord] = Field(
        description="Other files with weights, and files beside the weights that could not be had, with reasons."
    )


class StageRecord(BaseModel):
    """One stage as it is now."""

    id: str = Field(description="Name of the stage.")
    model: str = Field(description="Canonical URI of the checkpoint.")
    device: str = Field(description="Device of its segments; several with commas between.")
    state: State = Field(description="Where it is between queued and ready, or how it ended.")
    error: StageError | None = Field(description="Why it ended, where it is failed or cancelled.")
    request: StageRequest = Field(description="What was asked for.")
    request_id: str = Field(description="X-Request-ID of the request that it was made for; empty where for none.")
    source: str = Field(
        description="Source of its bytes: file, s3, gs, az, hf; resident where another layout of the "
        "checkpoint was in memory; peer where no origin answers."
    )
    created_at: float = Field(description="When it was asked for, in seconds since the epoch.")
    ready_at: float | None = Field(description="When it became ready, in seconds since the epoch.")
    bytes_total: int = Field(description="Bytes to read; 0 until planned and started.")
    bytes_done: int = Field(description="Bytes read, landed and hashed.")
    bytes_per_second: float | None = Field(description="Mean rate of loading so far.")
    eta_seconds: float | None = Field(description="Seconds until loaded at that rate, while loading.")
    state_seconds: dict[str, float] = Field(description="Seconds spent in each state.")
    seconds: dict[str, float] = Field(
        description="Where its time went, from the request until it was ready or ended otherwise, in seconds of wall "
        "clock that add up: queued, listing, headers, source (waiting on it), buffers (waiting for them), copying, "
        "verifying, other. A moment in which threads are at several of these is shared out among the threads."
    )
    source_seconds: dict[str, float] = Field(description="Of seconds.source, how much was waiting on which source.")
    phase_seconds: dict[str, float] = Field(
        description="Thread-seconds of loading by phase: source, buffers, copying, verifying."
    )
    bytes_by_source: dict[str, int] = Field(description="Bytes done by where they came from: its source, or peer.")
    peers: list[PeerUseRecord] = Field(description="Each peer that it was read from, or that was asked.")
    key: str | None = Field(description="What peers know it by, once planned, where there are peers.")
    footprint_bytes: int = Field(description="Bytes of its devices' capacity that it takes.")
    segments: list[SegmentRecord] = Field(description="One for each rank, once planned.")
    checkpoint_digest: str | None = Field(
        description="Digest of the whole checkpoint's values, where all of it was read; once ready."
    )
    metadata: str | None = Field(description="Folder with the checkpoint's configuration and tokenizer files.")
    selection: SelectionRecord | None = Field(description="The files that it is of, once its URI was listed.")
    priority: int = Field(description="Priority, the highest that anybody asked for.")
    pin: bool = Field(description="Whether anybody asked for it never to be evicted.")
    ttl_seconds: float | None = Field(
        description="Seconds without a lease after which it is evicted, the most that anybody asked for; null: only "
        "where room is needed."
    )
    leases: int = Field(description="Leases held on it.")
    revoked_until: float | None = Field(
        description="By when its lessees have to let go, once it was dropped by force: seconds since the epoch."
    )


class ResidentRecord(BaseModel):
    """A stage that takes memory, in short."""

    id: str = Field(description="The stage's id.")
    model: str = Field(description="Canonical URI of the checkpoint.")
    state: str = Field(description="Its state.")
    bytes: int = Field(description="Bytes of the device's capacity that it takes.")
    leases: int = Field(description="Leases held on it.")
    pin: bool = Field(description="Whether it is never evicted.")
    priority: int = Field(description="Its priority.")


class FitRecord(BaseModel):
    """What a dry run found. Nothing has changed by it."""

    fits: bool = Field(description="Whether it would fit.")
    needed_bytes: int = Field(description="Bytes of the device's capacity that it would take.")
    stage: str | None = Field(description="The stage that is there already, or on its way.")
    evicts: list[ResidentRecord] = Field(description="What would go for it, in this order.")


class Change(BaseModel):
    """What to change of a stage; null: as it is."""

    model_config = ConfigDict(extra="forbid")

    pin: bool | None = Field(None, description="Whether never to evict it.")
    priority: int | None = Field(None, ge=-1000, le=1000, description="Lower goes first where room is made.")


class Move(BaseModel):
    """Where to move a stage."""

    model_config = ConfigDict(extra="forbid")

    device: str = Field(min_length=1, max_length=64, description="Device that its segments move to, or a GPU's UUID.")


class StageList(BaseModel):
    """All stages, oldest first."""

    stages: list[StageRecord] = Field(description="Each stage's record.")


class ManifestTensor(BaseModel):
    """One tensor of a segment."""

    name: str = Field(description="Its name in the checkpoint.")
    dtype: str = Field(description="Its safetensors dtype.")
    shape: list[int] = Field(description="Its sizes in the segment, in elements, row-major.")
    offset: int = Field(description="Where it starts, in bytes from the segment's start.")
    nbytes: int = Field(description="Bytes that it takes.")
    file: str = Field(description="The checkpoint's file that it is from.")
    digest: str | None = Field(description="Digest of its values, once ready.")
    leaves: list[str] | None = Field(None, description="XXH3-64 of each MiB of it, in hexadecimal, where asked for.")


class ManifestFile(BaseModel):
    """One file of the checkpoint, as it was when the stage was planned."""

    name: str = Field(description="Its name below the checkpoint's URI.")
    size: int = Field(description="Its bytes.")
    version: str = Field(description="What changes when it is replaced: an ETag, or inode and mtime.")


class SegmentManifest(BaseModel):
    """What one segment holds."""

    stage: str = Field(description="The stage's id.")
    model: str = Field(description="Canonical URI of the checkpoint.")
    tp_rank: int = Field(description="Tensor-parallel rank of the segment.")
    tp_size: int = Field(description="Ranks of the plan.")
    nbytes: int = Field(description="Bytes of the segment.")
    digest: str | None = Field(description="Digest of the segment's values, once ready.")
    checkpoint_digest: str | None = Field(description="Digest of the whole checkpoint's values, where known.")
    metadata: str | None = Field(description="Folder with the checkpoint's configuration and tokenizer files.")
    files: list[ManifestFile] = Field(description="The checkpoint's files with weights.")
    tensors: list[ManifestTensor] = Field(description="Its tensors in the order of their offsets.")


_TENSORS: TypeAdapter[list[ManifestTensor]] = TypeAdapter(list[ManifestTensor])
_TENSORS_AT_ONCE = 256


class LeaseRecord(BaseModel):
    """One process's use of one segment."""

    id: str = Field(description="Name of the lease.")
    stage: str = Field(description="The stage's id.")
    model: str = Field(description="Canonical URI of the checkpoint.")
    tp_rank: int = Field(description="Tensor-parallel rank of the segment.")
    uid: int | None = Field(description="User of the process, by number; null where it came over TCP.")
    gid: int | None = Field(description="Group of the process, by number; null where it came over TCP.")
    pid: int | None = Field(
        description="Its process id as the daemon sees it; 0 in a foreign pid namespace, null where it came over TCP."
    )
    since: float = Field(description="Since when, in seconds since the epoch.")
    client: str | None = Field(description="HOST:PORT of who reads it over S3, until that is answered; else null.")


class LeaseRequest(BaseModel):
    """Which segment to lend: a stage's by its id, or that of the stage that a request means."""

    model_config = ConfigDict(extra="forbid")

    stage: str | None = Field(None, max_length=64, description="The stage's id.")
    request: StageRequest | None = Field(None, description="What to stage, where no id is given.")
    tp_rank: int | None = Field(None, ge=0, lt=1024, description="Which segment; needed where there are several.")

    @model_validator(mode="after")
    def _one_of_both(self) -> LeaseRequest:
        if (self.stage is None) == (self.request is None):
            raise ValueError("name either a stage or a request")
        return self


class LeaseEvent(BaseModel):
    """What the holder of a lease is told: ``progress`` until the stage is ready, ``lease``, ``revoked``; ``error``."""

    model_config = ConfigDict(extra="allow")

    type: Literal["progress", "lease", "revoked", "error"] = Field(description="Which of these.")
    lease: str | None = Field(None, description="Name of the lease.")
    stage: str | None = Field(None, description="The stage's id.")
    gpu: str | None = Field(None, description="UUID of the GPU that the segment is on.")
    handle: str | None = Field(
        None, description="cudaIpcMemHandle_t in base64. Whoever opens it can write to what others use."
    )
    offset: int | None = Field(None, description="Where in what the handle opens the segment begins, in bytes.")
    nbytes: int | None = Field(None, description="Bytes of the segment.")
    digest: str | None = Field(None, description="Digest of the segment's values.")
    manifest: str | None = Field(None, description="Route with what lies where in it.")
    seconds: float | None = Field(None, description="Seconds left to let go, where it is revoked.")
    code: str | None = Field(None, description="Stable name of the error, which is the last event.")
    message: str | None = Field(None, description="The error in words.")


class LeaseList(BaseModel):
    """All leases."""

    leases: list[LeaseRecord] = Field(description="Each lease.")


class Health(BaseModel):
    """The daemon is there."""

    status: Literal["ok"] = Field("ok", description="Always ok; anything else is no answer, or a problem.")


def stage_record(stage: Stage) -> StageRecord:
    """A stage as the API shows it."""
    states, spent = stage.state_seconds(), stage.clock.spent()
    loading = states.get("loading", 0.0)
    rate = stage.bytes_done / loading if loading > 0 and stage.bytes_done else None
    left = stage.bytes_total - stage.bytes_done
    return StageRecord(
        id=stage.id,
        model=stage.uri,
        device=stage.device,
        state=stage.state,
        error=StageError(
            code=stage.error.code,
            message=str(stage.error),
            remedy=stage.error.remedy,
            details=stage.error.details,
        )
        if stage.error
        else None,
        request=stage.request,
        request_id=stage.request_id,
        source=stage.source_kind,
        created_at=stage.created_at,
        ready_at=stage.ready_at,
        bytes_total=stage.bytes_total,
        bytes_done=stage.bytes_done,
        bytes_per_second=rate,
        eta_seconds=left / rate if rate and stage.state == "loading" else None,
        state_seconds=states,
        seconds=by_phase(spent),
        source_seconds={source: span for (phase, source), span in spent.items() if phase == "source"},
        phase_seconds=dict(stage.fill.seconds) if stage.fill else stage.phase_seconds,
        bytes_by_source=stage.bytes_by_source(),
        peers=peers_of(stage),
        key=stage.key or None,
        footprint_bytes=stage.footprint,
        segments=[
            SegmentRecord(
                tp_rank=info.rank,
                nbytes=info.nbytes,
                tensors=info.tensors,
                device=stage.devices[index],
                handle=stage.request.handle,
                digest=stage.segment_digests[index] if stage.segment_digests else None,
            )
            for index, info in enumerate(stage.infos)
        ],
        checkpoint_digest=stage.checkpoint_digest,
        metadata=stage.metadata,
        selection=selection_record(stage),
        priority=stage.priority,
        pin=stage.pin,
        ttl_seconds=stage.ttl_seconds,
        leases=len(stage.leases),
        revoked_until=stage.revoked_until,
    )


def selection_record(stage: Stage) -> SelectionRecord | None:
    """Which files a stage is of, as the API shows it."""
    if stage.listing is None:
        return None
    return SelectionRecord(
        rule=stage.listing.rule,
        files=[_text(file.name) for file in stage.listing.weights[:_MAX_FILES]],
        left_out=[
            LeftOutRecord(name=_text(file.name), reason=redacted(_text(file.reason)))
            for file in stage.left_out[:_MAX_FILES]
        ],
    )


def _text(name: str) -> str:
    """A name as text, whatever bytes a file system has for it."""
    return name.encode(errors="replace").decode()


def fit_record(fit: Fit) -> FitRecord:
    """A dry run as the API shows it."""
    return FitRecord(
        fits=fit.fits,
        needed_bytes=fit.needed,
        stage=fit.stage.id if fit.stage else None,
        evicts=[ResidentRecord.model_validate(summary(stage)) for stage in fit.evicts],
    )


def manifest_json(stage: Stage, index: int, leaves: bool) -> bytes:
    """A planned stage's segment as the API shows it, a SegmentManifest; ``leaves`` once it is ready. For a thread: of
    many tensors it takes long, and holds the interpreter for a part of them at a time.

    Raises UnknownStage where the stage goes meanwhile.
    """
    assert stage.listing is not None
    plan, manifests = stage.plan, stage.manifests
    if manifests:
        manifest, sources = manifests[index].read()
    elif plan is not None:
        manifest, sources = segment_manifest(stage, plan, index), entry_files(plan, index)
    else:
        raise UnknownStage(f"stage {stage.id} has gone meanwhile: stage it again")
    files = stage.listing.weights
    digests = segment_leaves(stage, index) if leaves and manifests else None
    head = SegmentManifest(
        stage=manifest.stage,
        model=manifest.model,
        tp_rank=manifest.tp_rank,
        tp_size=manifest.tp_size,
        nbytes=manifest.nbytes,
        digest=manifest.digest,
        checkpoint_digest=manifest.checkpoint_digest,
        metadata=manifest.metadata,
        files=[ManifestFile(**file._asdict()) for file in files],
        tensors=[],
    )
    tensors = (
        ManifestTensor(
            name=entry.name,
            dtype=entry.dtype,
            shape=list(entry.shape),
            offset=entry.offset,
            nbytes=entry.nbytes,
            file=files[sources[i]].name,
            digest=manifest.digests[i] if manifest.digests else None,
            leaves=[f"{leaf:016x}" for leaf in digests[i]] if digests else None,
        )
        for i, entry in enumerate(manifest)
    )
    parts = []
    while part := list(itertools.islice(tensors, _TENSORS_AT_ONCE)):
        parts.append(_TENSORS.dump_json(part)[1:-1])
    return head.model_dump_json().removesuffix("]}").encode() + b",".join(parts) + b"]}"
