"""Copies between pinned host memory and one GPU, on streams of their own, and digests of what lies on it."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from importlib import util
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from weightd.daemon.devices.host_memory import address_of
from weightd.daemon.devices.pinned import PinnedBuffers, pinned
from weightd.daemon.layouts.digests import LEAF, leaf_digest
from weightd.daemon.layouts.recipe import Block
from weightd.ipc.cuda import Gpu, call, driver

if TYPE_CHECKING:
    from weightd.daemon.devices.gpu_digests import GpuDigests

_NON_BLOCKING = 0x1  # CU_STREAM_NON_BLOCKING: does not wait for the legacy default stream
_NO_TIMING = 0x2  # CU_EVENT_DISABLE_TIMING
_BLOCKING_SYNC = 0x1  # CU_EVENT_BLOCKING_SYNC: who waits sleeps instead of spinning


class Stream:
    """One stream of a GPU."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        with gpu.context():
            self.handle = call("cuStreamCreate", _NON_BLOCKING)

    def close(self) -> None:
        """Wait for all of it, and let the stream go."""
        with self.gpu.context():
            call("cuStreamSynchronize", self.handle)
            call("cuStreamDestroy", self.handle)


class Event:
    """A point in a stream, to be waited for once."""

    def __init__(self, stream: Stream) -> None:
        self._gpu = stream.gpu
        with self._gpu.context():
            self._event = call("cuEventCreate", _NO_TIMING | _BLOCKING_SYNC)
            call("cuEventRecord", self._event, stream.handle)

    def wait(self) -> None:
        with self._gpu.context():
            try:
                call("cuEventSynchronize", self._event)
            finally:
                call("cuEventDestroy", self._event)


class CudaCopier:
    """One stream for copies; digests are computed beside it. May be used by many threads at once."""

    def __init__(self, gpu: Gpu, buffers: Callable[[int], PinnedBuffers], digests: str) -> None:
        """``buffers(nbytes)`` gives the GPU's bounce buffers of so many bytes; ``digests`` is a DigestPath's name."""
        self._gpu = gpu
        self._path = digests
        self._buffers = buffers
        self._stream = Stream(gpu)
        self._digests: GpuDigests | HostDigests | None = None

    def put(self, address: int, block: Block, source: int) -> None:
        with self._gpu.context():
            if block.rows == 1:
                call("cuMemcpyHtoDAsync", address + block.target, source + block.source, block.run, self._stream.handle)
                return
            copy = _rows(block.run, block.rows)
            _host_side(copy, "src", source + block.source, block.source_stride)
            _device_side(copy, "dst", address + block.target, block.target_stride)
            call("cuMemcpy2DAsync", copy, self._stream.handle)

    def holds(self, address: int, block: Block, source: int) -> bool:
        import numpy
        from numpy.lib.stride_tricks import as_strided

        found = numpy.empty((block.rows, block.run), numpy.uint8)
        copy = _rows(block.run, block.rows)
        _device_side(copy, "src", address + block.target, block.target_stride or block.run)
        _host_side(copy, "dst", found.ctypes.data, block.run)
        with self._gpu.context():
            call("cuMemcpy2DAsync", copy, self._stream.handle)
            call("cuStreamSynchronize", self._stream.handle)
        span = (block.rows - 1) * block.source_stride + block.run
        sent = numpy.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(source + block.source))
        return bool(numpy.array_equal(found, as_strided(sent, found.shape, (block.source_stride, 1))))

    def fetch(self, target: int, address: int, nbytes: int) -> None:
        with self._gpu.context():
            call("cuMemcpyDtoHAsync", target, address, nbytes, self._stream.handle)

    def mark(self) -> Event:
        return Event(self._stream)

    def pin(self, address: int, nbytes: int, *, read_only: bool) -> AbstractContextManager[bool]:
        return pinned(self._gpu, address, nbytes, read_only=read_only)

    def leaves(self, ranges: Sequence[tuple[int, int]]) -> Sequence[int]:
        if self._digests is None:
            if self._path == "gpu":
                from weightd.daemon.devices.gpu_digests import GpuDigests

                self._digests = GpuDigests(self._gpu)
            else:
                self._digests = HostDigests(self._gpu, self._buffers(_READ_BACK))
        return self._digests.leaves(ranges)

    def close(self) -> None:
        if self._digests is not None:
            self._digests.close()
        self._stream.close()


def _rows(run: int, rows: int) -> Any:
    """A copy of so many rows, whose two sides are still to be said."""
    copy = driver().CUDA_MEMCPY2D()
    copy.WidthInBytes, copy.Height = run, rows
    return copy


def _host_side(copy: Any, side: str, address: int, pitch: int) -> None:
    setattr(copy, f"{side}MemoryType", driver().CUmemorytype.CU_MEMORYTYPE_HOST)
    setattr(copy, f"{side}Host", address)
    setattr(copy, f"{side}Pitch", pitch)


def _device_side(copy: Any, side: str, address: int, pitch: int) -> None:
    setattr(copy, f"{side}MemoryType", driver().CUmemorytype.CU_MEMORYTYPE_DEVICE)
    setattr(copy, f"{side}Device", driver().CUdeviceptr(address))
    setattr(copy, f"{side}Pitch", pitch)


class HostDigests:
    """Digests computed on the host, of bytes that are read back from the GPU: where CuPy is not there."""

    def __init__(self, gpu: Gpu, buffers: PinnedBuffers) -> None:
        self._gpu = gpu
        self._buffers = buffers
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="digest")
        self._own = threading.local()
        self._taken: list[tuple[mmap.mmap, Stream]] = []

    def leaves(self, ranges: Sequence[tuple[int, int]]) -> Sequence[int]:
        return [leaf for part in self._pool.map(self._some, _lots(ranges)) for leaf in part]

    def _some(self, ranges: Sequence[tuple[int, int]]) -> list[int]:
        """Leaf digests of ranges that fit into one buffer together."""
        if not hasattr(self._own, "stream"):
            self._own.buffer, self._own.stream = self._buffers.acquire(), Stream(self._gpu)
            self._taken.append((self._own.buffer, self._own.stream))
        buffer, stream = self._own.buffer, self._own.stream
        target = address_of(buffer)
        with self._gpu.context():
            position = 0
            for address, nbytes in ranges:
                call("cuMemcpyDtoHAsync", target + position, address, nbytes, stream.handle)
                position += nbytes
        Event(stream).wait()
        found, position = [], 0
        with memoryview(buffer) as view:
            for _, nbytes in ranges:
                with view[position : position + nbytes] as leaf:
                    found.append(leaf_digest(leaf))
                position += nbytes
        return found

    def close(self) -> None:
        self._pool.shutdown()
        for buffer, stream in self._taken:
            stream.close()
            self._buffers.release(buffer)


_READ_BACK = 8 * LEAF


def _lots(ranges: Sequence[tuple[int, int]]) -> Iterator[Sequence[tuple[int, int]]]:
    """Ranges in lots of at most ``_READ_BACK`` bytes."""
    lot: list[tuple[int, int]] = []
    nbytes = 0
    for item in ranges:
        if lot and nbytes + item[1] > _READ_BACK:
            yield lot
            lot, nbytes = [], 0
        lot.append(item)
        nbytes += item[1]
    if lot:
        yield lot


class DigestPath(NamedTuple):
    """Where digests of a GPU's memory are computed, and why."""

    name: Literal["gpu", "host"]
    reason: str


def choose_digests(gpu: Gpu) -> DigestPath:
    """On the GPU, where CuPy is there and computes there what the host computes; else on the host."""
    # find_spec of a top-level package reads no code of it: importing CuPy takes half a second and 100 MB.
    if util.find_spec("cupy") is None:
        return DigestPath("host", "CuPy is not installed")
    try:
        from weightd.daemon.devices.gpu_digests import GpuDigests

        GpuDigests(gpu).check()
    except Exception as error:  # CuPy, NVRTC and the CUDA runtime have exceptions of their own for what is missing
        return DigestPath("host", f"CuPy cannot: {type(error).__name__}: {error}")
    return DigestPath("gpu", "CuPy passed its self-test")
