"""Copying segments from device to device: through memory that a GPU can reach by itself, wherever one is involved."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

from weightd.daemon.devices.base import Copier, Segment
from weightd.daemon.devices.host_memory import RawMapping, address_of
from weightd.daemon.layouts.digests import LEAF, leaf_digest
from weightd.daemon.layouts.recipe import Block
from weightd.daemon.limits import FillLimits

_CHUNK = 8 << 20
_PIN = 64 << 20
"""Bytes of a host segment that are pinned at once, by each thread."""


def copy_segment(source: Segment, target: Segment, limits: FillLimits) -> None:
    """Copy all bytes to a segment that has none yet. Raises OSError, CudaError."""
    if source.device.uuid is None and target.device.uuid is None:
        # What was never written takes no memory there, and is to take none here.
        _in_threads(limits.threads, _written(source), _CHUNK, lambda at, size: _host_to_host(source, target, at, size))
    elif target.device.uuid is None:
        _to_or_from_gpu(source, target, limits, to_gpu=False)
    elif source.device.uuid is None:
        _to_or_from_gpu(target, source, limits, to_gpu=True)
    else:
        _gpu_to_gpu(source, target, limits)


def _in_threads(threads: int, ranges: Iterable[tuple[int, int]], step: int, work: Callable[[int, int], None]) -> None:
    """Run ``work(at, size)`` over ranges, each (start, end), in parts of ``step`` bytes."""
    parts = [(at, min(step, end - at)) for start, end in ranges for at in range(start, end, step)]
    with ThreadPoolExecutor(threads, thread_name_prefix="copy") as pool:
        for done in [pool.submit(work, at, size) for at, size in parts]:
            done.result()


def _written(segment: Segment) -> Iterator[tuple[int, int]]:
    """Where a host segment has memory: (start, end) of what was ever written, by whole pages."""
    at = 0
    while at < segment.nbytes:
        try:
            start = os.lseek(segment.fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # there is none from here on
        at = os.lseek(segment.fd, start, os.SEEK_HOLE)
        yield start, min(at, segment.nbytes)


def _host_to_host(source: Segment, target: Segment, at: int, size: int) -> None:
    source.read_into(at, target.view[at : at + size])


def _to_or_from_gpu(gpu: Segment, host: Segment, limits: FillLimits, *, to_gpu: bool) -> None:
    """The GPU reads or writes the host's segment itself where it can be pinned; else through bounce buffers."""
    buffers = gpu.device.buffers(limits.extent_bytes)

    def copy(at: int, size: int) -> None:
        copier = gpu.device.copier()
        assert copier is not None
        try:
            with copier.pin(host_address + at, size, read_only=to_gpu) as pinned:
                if pinned:
                    _cross(copier, host_address + at, gpu.address + at, size, to_gpu=to_gpu)
                    return
            for start in range(at, at + size, limits.extent_bytes):
                part = min(limits.extent_bytes, at + size - start)
                buffer = buffers.acquire()
                try:
                    with memoryview(buffer) as view, view[:part] as bytes_of_it:
                        if to_gpu:
                            host.read_into(start, bytes_of_it)
                        _cross(copier, address_of(buffer), gpu.address + start, part, to_gpu=to_gpu)
                        if not to_gpu:
                            host.write(start, bytes_of_it)
                finally:
                    buffers.release(buffer)
        finally:
            copier.close()

    with ExitStack() as stack:
        host_address = stack.enter_context(_mapped(host)) if to_gpu else host.address
        _in_threads(min(4, limits.threads), [(0, gpu.nbytes)], _PIN, copy)


def _cross(copier: Copier, host: int, gpu: int, nbytes: int, *, to_gpu: bool) -> None:
    if to_gpu:
        copier.put(gpu, Block(0, 0, 0, 0, nbytes, 1), host)
    else:
        copier.fetch(host, gpu, nbytes)
    copier.mark().wait()


@contextmanager
def _mapped(host: Segment) -> Iterator[int]:
    """A sealed host segment's address, for reading. It is unmapped without Python ever having had a view of it."""
    mapping = RawMapping(host.fd, host.footprint)
    try:
        yield mapping.address
    finally:
        mapping.close()


def _gpu_to_gpu(source: Segment, target: Segment, limits: FillLimits) -> None:
    buffers = source.device.buffers(limits.extent_bytes)

    def copy(at: int, size: int) -> None:
        buffer = buffers.acquire()
        try:
            with memoryview(buffer) as view, view[:size] as part:
                source.read_into(at, part)
                target.write(at, part)
        finally:
            buffers.release(buffer)

    _in_threads(min(4, limits.threads), [(0, source.nbytes)], limits.extent_bytes, copy)


def segment_digests(
    segment: Segment, entries: Sequence[tuple[int, int]], threads: int
) -> Iterator[tuple[int, int, int]]:
    """Leaf digests of entries, each (offset, bytes), as (entry, leaf, digest), of what the segment's memory holds."""
    places = [
        (entry, leaf, offset + start, min(LEAF, nbytes - start))
        for entry, (offset, nbytes) in enumerate(entries)
        for leaf, start in enumerate(range(0, nbytes, LEAF))
    ]
    copier = segment.device.copier()
    if copier is None:
        with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
            found = pool.map(lambda place: leaf_digest(segment.view[place[2] : place[2] + place[3]]), places)
            yield from ((entry, leaf, digest) for (entry, leaf, _, _), digest in zip(places, found, strict=True))
        return
    try:
        on_gpu = copier.leaves([(segment.address + at, nbytes) for _, _, at, nbytes in places])
    finally:
        copier.close()
    yield from ((entry, leaf, digest) for (entry, leaf, _, _), digest in zip(places, on_gpu, strict=True))
