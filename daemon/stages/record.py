"""A stage's record: what the next daemon has to know of it, beside its memory.

Deposited under ``<stage id>/record``, as one JSON object in a memfd, anew at every change of state, after everything
that it speaks of: ``segment/<i>`` and ``ledger``, and ``manifest/<i>`` once ready. A stage without a record is none.
Where it has moved, they are called ``segment.<n>/<i>`` and ``manifest.<n>/<i>``: the record, which is replaced at once,
says which of them count.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from weightd.daemon.checkpoints.listing import Listing
from weightd.daemon.checkpoints.selection import LeftOut
from weightd.daemon.devices.base import Device
from weightd.daemon.devices.quarantine import Quarantine
from weightd.daemon.errors import Lost
from weightd.daemon.filling.ledger import Ledger
from weightd.daemon.keeper.deposits import Deposits
from weightd.daemon.observing.clock import Clock
from weightd.daemon.sources.base import SourceFile
from weightd.daemon.stages.manifests import SealedManifest
from weightd.daemon.stages.planning import SegmentInfo
from weightd.daemon.stages.request import StageRequest
from weightd.daemon.stages.stage import Stage

log = logging.getLogger(__name__)

FORMAT = 1
MAX_LEFT_OUT = 1000
"""Files that were not taken, as far as the next daemon is told of them."""


class UnknownRecord(ValueError):
    """The record is of another version of weightd, or no record at all: what it belongs to is left alone."""


def deposit(deposits: Deposits, stage: Stage) -> None:
    """Let the keeper hold all of a stage that has memory. Works again and again; only the record changes then."""
    if not deposits.kept:
        return
    for index, segment in enumerate(stage.segments):
        if segment.fd >= 0:
            deposits.put(f"{stage.id}/segment{stage.deposited_as}/{index}", segment.fd)
    for index, manifest in enumerate(stage.manifests):
        deposits.put(f"{stage.id}/manifest{stage.deposited_as}/{index}", manifest.fd)
    if stage.ledger is not None:
        deposits.put(f"{stage.id}/ledger", stage.ledger.fd)
    update(deposits, stage)


def redeposit(deposits: Deposits, stage: Stage) -> None:
    """Let the keeper hold what a stage has now instead of what it had: whole, whenever this process is killed."""
    before = stage.deposited_as
    stage.deposited_as = f".{int(before[1:] or 0) + 1}"
    deposit(deposits, stage)
    for kind in ("segment", "manifest"):
        deposits.drop(f"{stage.id}/{kind}{before}")


def update(deposits: Deposits, stage: Stage) -> None:
    """Replace the record of a stage that has been deposited."""
    if not deposits.kept or not stage.segments:
        return
    try:
        fd = os.memfd_create("weightd:record", os.MFD_CLOEXEC)
    except OSError as error:
        # Not for a stage to fail of: the next daemon finds it less far than it is, and goes on from its ledger.
        log.error("%s: its record cannot be replaced: %s", stage.id, error.strerror)
        return
    try:
        text = memoryview(json.dumps(_describe(stage), separators=(",", ":")).encode())
        while text:
            text = text[os.write(fd, text) :]
        deposits.put(f"{stage.id}/record", fd)
    finally:
        os.close(fd)


def leftovers(stage: Stage, parts: Iterable[str]) -> set[str]:
    """Of what was deposited of a stage, what its record does not speak of: a daemon died while it moved."""
    kept = {f"{kind}{stage.deposited_as}" for kind in ("segment", "manifest")}
    kinds = {part.partition("/")[0] for part in parts}
    return {f"{stage.id}/{kind}" for kind in kinds - kept if kind.startswith(("segment", "manifest"))}


def withdraw(deposits: Deposits, stage: Stage) -> None:
    """Let the keeper forget a stage."""
    deposits.drop(stage.id)


def _describe(stage: Stage) -> dict[str, Any]:
    listing = stage.listing
    assert listing is not None
    return {
        "format": FORMAT,
        "id": stage.id,
        "uri": stage.uri,
        "devices": stage.devices,
        # Their numbers may be others next time; what they are called everywhere is not.
        "uuids": [segment.device.uuid for segment in stage.segments],
        "request": stage.request.model_dump(mode="json"),
        "identity": listing.identity,
        "weights": [list(file) for file in listing.weights],
        "rule": listing.rule,
        "left_out": [list(file) for file in stage.left_out[:MAX_LEFT_OUT]],
        "state": stage.state,
        "deposited_as": stage.deposited_as,
        "source_kind": stage.source_kind,
        "request_id": stage.request_id,
        "priority": stage.priority,
        "pin": stage.pin,
        "deaths": stage.deaths,
        "handed_over": stage.handed_over,
        "ttl_seconds": stage.ttl_seconds,
        "created_at": stage.created_at,
        "ready_at": stage.ready_at,
        "revoked_until": stage.revoked_until,
        "revoke_deadline": stage.revoke_deadline,
        "seconds": stage.seconds,
        "phase_seconds": stage.phase_seconds,
        "began": stage.clock.began,
        "spent": [[*of, seconds] for of, seconds in stage.clock.spent().items()],
        "bytes_total": stage.bytes_total,
        "bytes_read": stage.bytes_done,
        "peer_bytes": stage.peer_bytes,
        "footprints": [segment.footprint for segment in stage.segments],
        "infos": [asdict(info) for info in stage.infos],
        "metadata": stage.metadata,
        "segment_digests": stage.segment_digests,
        "checkpoint_digest": stage.checkpoint_digest,
        "satisfied": sorted(stage.satisfied),
        "manifest_nbytes": [manifest.nbytes for manifest in stage.manifests],
    }


def restore(parts: Mapping[str, int], devices: Mapping[str, Device], quarantine: Quarantine) -> Stage:
    """The stage whose parts these are, by what they were deposited under, with duplicates of the descriptors.

    A stage that is not ready comes back as ``queued``, one whose memory nobody could keep as ``failed``. Raises
    UnknownRecord.
    """
    stage, footprints, uuids, manifest_nbytes = _read(parts["record"])
    if stage.request.handle == "cuda_ipc":
        stage.state = "failed"
        stage.clock.stop()
        stage.error = Lost(f"stage {stage.id} had legacy handles, whose memory goes with the daemon: stage it again")
        return stage
    try:
        found = [_device(devices, name, uuid) for name, uuid in zip(stage.devices, uuids, strict=True)]
        stage.devices = tuple(device.name for device in found)
        for device, nbytes in zip(found, footprints, strict=True):
            stage.reserved[device.name] = stage.reserved.get(device.name, 0) + nbytes
        stage.ledger = Ledger.adopt(os.dup(parts["ledger"]))
        for index, (info, device) in enumerate(zip(stage.infos, found, strict=True)):
            part = f"segment{stage.deposited_as}/{index}"
            with quarantine.adopting(device.uuid):
                stage.segments.append(device.adopt(os.dup(parts[part]), info.nbytes))
                if stage.state == "ready":
                    stage.segments[-1].seal()
        for index, nbytes in enumerate(manifest_nbytes):
            part = f"manifest{stage.deposited_as}/{index}"
            stage.manifests.append(SealedManifest(os.dup(parts[part]), nbytes))
    except (KeyError, ValueError, OSError) as error:
        for segment in stage.segments:
            segment.close()
        for manifest in stage.manifests:
            manifest.close()
        if stage.ledger is not None:
            stage.ledger.close()
        raise UnknownRecord(f"its parts are not what its record says: {error!r}") from None
    return stage


def _device(devices: Mapping[str, Device], name: str, uuid: str | None) -> Device:
    """The device that a segment was on. Raises ValueError where it is not here, or not to be touched."""
    for device in devices.values():
        if device.uuid == uuid if uuid else device.name == name:
            if device.quarantined:
                raise ValueError(
                    f"its device {device.name} ({uuid}) is in quarantine: {device.quarantined}: 'weightd reload' tries "
                    "it again"
                )
            return device
    raise ValueError(f"its device {name!r}{f' ({uuid})' if uuid else ''} is not on this node")


def _read(fd: int) -> tuple[Stage, list[int], list[str | None], list[int]]:
    try:
        table = json.loads(os.pread(fd, os.fstat(fd).st_size, 0))
        found = table["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise UnknownRecord(f"no record of a stage: {error!r}") from None
    if found != FORMAT:
        raise UnknownRecord(f"a record of format {found!r}, this version of weightd knows {FORMAT}")
    try:
        request = StageRequest.model_validate(table["request"])
        # Until there was a choice of weights, nothing was said of what was left out.
        listing = Listing(
            table["uri"],
            table["identity"],
            tuple(SourceFile(*file) for file in table["weights"]),
            None,
            (),
            rule=str(table.get("rule", "")),
            left_out=tuple(LeftOut(*map(str, file)) for file in table.get("left_out", ())),
        )
        # Until GPUs came, a stage had one device and one footprint.
        devices = table.get("devices") or [table["device"]] * len(table["infos"])
        stage = Stage(table["uri"], devices, request, listing)
        for name in (
            "id", "source_kind", "priority", "pin", "created_at", "ready_at", "revoked_until", "revoke_deadline",
            "bytes_total", "bytes_read", "metadata", "segment_digests", "checkpoint_digest",
            "phase_seconds", "seconds",
        ):  # fmt: skip
            setattr(stage, name, table[name])
        # Versions before did not count. A daemon that made room has said so; any other has died.
        stage.deaths = int(table.get("deaths", 0)) + int(table["state"] != "ready" and not table.get("handed_over"))
        stage.peer_bytes, stage.request_id = table.get("peer_bytes", 0), table.get("request_id", "")
        stage.deposited_as = str(table.get("deposited_as", ""))
        stage.ttl_seconds = table.get("ttl_seconds", request.ttl_seconds)
        stage.listed_at = stage.created_at
        # Until there were clocks, when a stage had begun was told in seconds since the epoch.
        began = table.get("began", time.monotonic() - (time.time() - stage.created_at))
        spent = {(str(phase), str(source)): float(seconds) for phase, source, seconds in table.get("spent", ())}
        stage.clock = Clock.taken_over(float(began), spent, stopped=table["state"] == "ready")
        stage.clock.origin = stage.source_kind
        stage.infos = tuple(SegmentInfo(**info) for info in table["infos"])
        stage.satisfied = set(table["satisfied"])
        stage.announced = True
        if table["state"] == "ready":
            stage.state = "ready"
            stage.planned.set()
        footprints = table.get("footprints") or [table["footprint"]] + [0] * (len(devices) - 1)
        uuids = table.get("uuids") or [None] * len(devices)
        return stage, footprints, uuids, list(table["manifest_nbytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise UnknownRecord(f"a record of format {FORMAT} that cannot be read: {error!r}") from None
