"""Leaf digests computed on the GPU, by the kernels of ``xxh3.cu``, of what lies in its memory. Needs CuPy."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from importlib import resources
from typing import Any

import cupy
import numpy

from weightd.daemon.layouts.digests import LEAF, leaf_digest
from weightd.ipc.cuda import Gpu, report
from weightd.ipc.errors import CudaError

_LANES_BLOCK = 32  # few leaves are then spread over all multiprocessors; the kernel takes 128 at most
_FINISH_BLOCK = 128
_LANES = 4  # threads a leaf
_WORDS = 8  # accumulators of a leaf, 8 bytes each


class GpuDigests:
    """Computes on a stream of its own. May be used by many threads, one after another."""

    def __init__(self, gpu: Gpu) -> None:
        """Compiles the kernels, where this process has not: CuPy keeps them on disk, too."""
        self._gpu = gpu
        self._lock = threading.Lock()
        source = resources.files("weightd.daemon.devices").joinpath("xxh3.cu").read_text()
        with gpu.context(), cupy.cuda.Device(gpu.ordinal):
            module = cupy.RawModule(code=source)
            self._accumulate = module.get_function("xxh3_lanes")
            self._finish = module.get_function("xxh3_finish")
            self._stream = cupy.cuda.Stream(non_blocking=True)

    def leaves(self, ranges: Sequence[tuple[int, int]]) -> Sequence[int]:
        count = len(ranges)
        if not count:
            return []
        table = numpy.array(ranges, numpy.uint64).reshape(count, 2)
        misaligned = int(((table[:, 0] % 16 != 0) & (table[:, 1] > 240)).sum())
        assert not misaligned, "the kernels load 16 bytes at once"
        try:
            # In its context first: CuPy would go back to device 0 afterwards, and make a context there.
            with self._lock, self._gpu.context(), cupy.cuda.Device(self._gpu.ordinal), self._stream:
                addresses = cupy.asarray(table[:, 0].copy())
                sizes = cupy.asarray(table[:, 1].astype(numpy.uint32))
                lanes = cupy.empty(count * _WORDS, cupy.uint64)
                digests = cupy.empty(count, cupy.uint64)
                number = numpy.uint32(count)
                blocks = -(-count * _LANES // _LANES_BLOCK)
                self._accumulate((blocks,), (_LANES_BLOCK,), (addresses, sizes, number, lanes))
                blocks = -(-count // _FINISH_BLOCK)
                self._finish((blocks,), (_FINISH_BLOCK,), (addresses, sizes, number, lanes, digests))
                found: list[int] = digests.get().tolist()  # waits for the stream
                return found
        except (cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError) as error:
            raise report(CudaError(f"digests on cuda:{self._gpu.ordinal}: {error}", _result(error))) from None

    def check(self) -> None:
        """Compare with the host on bytes of every length that the algorithm tells apart. Raises ValueError."""
        data = numpy.random.default_rng(0).integers(0, 256, LEAF, numpy.uint8)
        with self._gpu.context(), cupy.cuda.Device(self._gpu.ordinal):
            there = cupy.asarray(data)
            cupy.cuda.get_current_stream().synchronize()
            sizes = [1, 3, 8, 16, 17, 128, 129, 240, 241, 1024, 1025, 4097, LEAF - 1, LEAF]
            found = self.leaves([(int(there.data.ptr), size) for size in sizes])
        expected = [leaf_digest(data[:size].tobytes()) for size in sizes]
        if list(found) != expected:
            wrong = [size for size, a, b in zip(sizes, found, expected, strict=True) if a != b]
            raise ValueError(f"the GPU's digests of {wrong} bytes differ from the host's")

    def close(self) -> None:
        """The stream goes with this object."""


def _result(error: Any) -> int:
    """The ``CUresult``; the runtime's numbers are the driver's for all errors that end a process."""
    status: int = int(error.status)
    return status
