"""Moving stages from device to device, without their sources."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from weightd.daemon.devices.base import Device, Segment
from weightd.daemon.devices.copying import copy_segment, segment_digests
from weightd.daemon.errors import DeviceFailed, DigestMismatch, InvalidRequest, NotMovable
from weightd.daemon.keeper.deposits import Deposits
from weightd.daemon.limits import FillLimits
from weightd.daemon.stages import record
from weightd.daemon.stages.manifests import SealedManifest
from weightd.daemon.stages.residency import Residency
from weightd.daemon.stages.segments import segment_leaves
from weightd.daemon.stages.stage import Stage
from weightd.ipc.errors import CudaError


async def move_segments(
    residency: Residency,
    deposits: Deposits,
    stage: Stage,
    device: Device,
    limits: FillLimits,
    in_thread: Callable[..., Awaitable[Any]],
) -> None:
    """Move all of a ready stage's segments to another device, verified there; the stage stays what it is until then.

    Raises InvalidRequest, NotMovable, StageLeased, InsufficientCapacity, DigestMismatch.
    """
    if set(stage.devices) == {device.name}:
        return
    if stage.request.handle not in device.handles:
        raise InvalidRequest(f"{device.name} has no segments with handle {stage.request.handle!r}")
    await in_thread(device.open)
    _check_movable(residency, stage)
    here = dict(stage.reserved)
    more = sum(device.footprint(segment.nbytes) for segment in stage.segments)
    fresh: list[Segment] = []
    manifests: list[SealedManifest] = []
    failure: BaseException | None = None
    stage.moving = device.name  # so that it is not itself what goes to make room
    try:
        await residency.dismiss([stage])
        await residency.dismiss_victims({device.name: more})
        residency.make_room(stage.uri, {device.name: more})
        stage.reserved = {**here, device.name: here.get(device.name, 0) + more}
        await residency.unmapped()
        await _to_its_end(in_thread(_copy_all, device, stage, limits, fresh, manifests))
        stage.moving = None
        _check_movable(residency, stage)  # somebody may have leased it meanwhile
        for segment in stage.segments:
            residency.left_behind(stage, segment)
        fresh, stage.segments = stage.segments, fresh
        manifests, stage.manifests = stage.manifests, manifests
        stage.devices, stage.lent = (device.name,) * len(stage.segments), False
        here = {device.name: sum(segment.footprint for segment in stage.segments)}
        record.redeposit(deposits, stage)
    except BaseException as error:
        failure = error.with_traceback(None)  # whose frames hold views of what is to be closed
        failure.__context__ = failure.__cause__ = None
    finally:
        stage.moving = None
        stage.reserved = here if stage.segments else {}
        for segment in fresh:
            segment.close()
        for manifest in manifests:
            manifest.close()
        stage.notify()
        residency.changed()  # its time to live goes on
    if failure is not None:
        raise failure


async def _to_its_end(work: Awaitable[None]) -> None:
    """Wait for what a thread does, also where this is cancelled: it writes to what is closed then."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()  # heard
        raise cancelled
    task.result()


def _check_movable(residency: Residency, stage: Stage) -> None:
    if stage.state != "ready" or stage.moving or stage.revoked_until is not None:
        what = (
            f"being moved to {stage.moving}"
            if stage.moving
            else "being revoked"
            if stage.revoked_until
            else stage.state
        )
        raise NotMovable(f"stage {stage.id} is {what}: only a ready stage can be moved")
    residency.leases.check_none(stage)


def _copy_all(
    target: Device, stage: Stage, limits: FillLimits, fresh: list[Segment], manifests: list[SealedManifest]
) -> None:
    for index, segment in enumerate(stage.segments):
        copy = target.allocate(segment.nbytes, f"{stage.id}/{stage.infos[index].rank}", stage.request.handle)
        fresh.append(copy)
        try:
            copy_segment(segment, copy, limits)
            manifest, files = stage.manifests[index].read()
            entries = list(manifest)
            leaves = segment_leaves(stage, index)
            places = [(entry.offset, entry.nbytes) for entry in entries]
            for entry, leaf, digest in segment_digests(copy, places, limits.threads):
                if digest != leaves[entry][leaf]:
                    name = entries[entry].name
                    raise DigestMismatch(f"tensor {name!r}, leaf {leaf}: changed while it was moved", leaf=leaf)
        except CudaError as error:
            raise DeviceFailed(f"{stage.id} cannot be moved to {target.name}: {error}", device=target.name) from None
        copy.seal()
        manifests.append(SealedManifest.seal(replace(manifest, device=target.name), files))
