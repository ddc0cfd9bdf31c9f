"""Copying segments: between devices, and where memory that was lent too early has to be left behind."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from weightd.daemon import record
from weightd.daemon.deposits import Deposits
from weightd.daemon.devices import Device, Segment
from weightd.daemon.digests import LEAF, leaf_digest
from weightd.daemon.errors import DigestMismatch, NotMovable
from weightd.daemon.manifests import SealedManifest, segment_leaves
from weightd.daemon.residency import Residency
from weightd.daemon.stage import Stage
from weightd.ipc.manifest import Manifest

_CHUNK = 8 << 20


def copy_segment(source: Segment, target: Segment, threads: int) -> None:
    """Copy all bytes, in so many threads. Raises OSError."""

    def copy(offset: int) -> None:
        source.read_into(offset, target.view[offset : min(offset + _CHUNK, source.nbytes)])

    with ThreadPoolExecutor(threads, thread_name_prefix="copy") as pool:
        list(pool.map(copy, range(0, source.nbytes, _CHUNK)))


async def move_segments(
    residency: Residency,
    deposits: Deposits,
    stage: Stage,
    device: str,
    threads: int,
    in_thread: Callable[..., Awaitable[Any]],
) -> None:
    """Move a ready stage's segments to another device, verified on the way; the stage stays what it is until then.

    Raises NotMovable, StageLeased, InsufficientCapacity, DigestMismatch.
    """
    if stage.device == device:
        return
    _check_movable(residency, stage)
    residency.make_room(stage.uri, device, stage.footprint)
    stage.moving = device
    fresh: list[Segment] = []
    manifests: list[SealedManifest] = []
    failure: BaseException | None = None
    try:
        await in_thread(_copy_all, residency.devices[device], stage, device, threads, fresh, manifests)
        stage.moving = None
        _check_movable(residency, stage)  # somebody may have leased it meanwhile
        for segment in stage.segments:
            residency.left_behind(stage, segment)
        fresh, stage.segments = stage.segments, fresh
        manifests, stage.manifests = stage.manifests, manifests
        stage.device, stage.lent = device, False
        record.deposit(deposits, stage)
        stage.notify()
    except BaseException as error:
        failure = error.with_traceback(None)  # whose frames hold views of what is to be closed
        failure.__context__ = failure.__cause__ = None
    stage.moving = None
    for segment in fresh:
        segment.close()
    for manifest in manifests:
        manifest.close()
    if failure is not None:
        raise failure


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
    residency.check_unleased(stage)


def _copy_all(
    target: Device, stage: Stage, device: str, threads: int, fresh: list[Segment], manifests: list[SealedManifest]
) -> None:
    for index, segment in enumerate(stage.segments):
        copy = target.allocate(segment.nbytes, f"{stage.id}/{stage.infos[index].rank}")
        fresh.append(copy)
        copy_segment(segment, copy, threads)
        manifest, files = stage.manifests[index].read()
        _verify(copy, manifest, segment_leaves(stage, index), threads)
        copy.seal()
        manifests.append(SealedManifest.seal(replace(manifest, device=device), files))


def _verify(segment: Segment, manifest: Manifest, leaves: Sequence[memoryview], threads: int) -> None:
    def check(entry_index: int) -> None:
        entry = manifest.entry(entry_index)
        view = segment.view[entry.offset : entry.offset + entry.nbytes]
        for leaf, start in zip(itertools.count(), range(0, entry.nbytes, LEAF), strict=False):
            if leaf_digest(view[start : start + LEAF]) != leaves[entry_index][leaf]:
                raise DigestMismatch(f"tensor {entry.name!r}, leaf {leaf}: changed while it was moved", leaf=leaf)

    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        list(pool.map(check, range(len(manifest))))
