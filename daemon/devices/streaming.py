"""Which way bytes take to a GPU: through libstreamer's own CUDA backend, or through our pinned bounce buffers.

The backend is in the library's C ABI and in no documentation. So it is used only in the release series that the binding
was written for, and only on a GPU on which it has just been seen to bring every byte to its place.
"""

from __future__ import annotations

import ctypes
import os
import random
from typing import Literal, NamedTuple

from weightd.daemon.devices import libstreamer
from weightd.ipc.cuda import Gpu, call

_FILE_BYTES = 4 << 20
_TIMEOUT = 30.0
"""Seconds that the library may take to read a file of so few bytes."""


class FillPath(NamedTuple):
    """The way that was chosen, and why."""

    name: Literal["streamer", "ring"]
    reason: str


def choose(gpu: Gpu, wanted: str) -> FillPath:
    """The way for a GPU, by the setting and by the self-test; its context has to be current. Raises CudaError."""
    if wanted == "ring":
        return FillPath("ring", "WEIGHTD_CUDA_FILL says so")
    try:
        _test(gpu)
    except (libstreamer.StreamerUnavailable, OSError, _Wrong) as error:
        return FillPath("ring", f"libstreamer's CUDA backend failed its self-test: {error}")
    return FillPath("streamer", "libstreamer's CUDA backend passed its self-test")


class _Wrong(Exception):
    """Bytes did not come, or not where they belong."""


def _test(gpu: Gpu) -> None:
    """Read random bytes in pieces of odd sizes, from odd offsets, to odd addresses, and compare all there is."""
    rng = random.Random()
    data = rng.randbytes(_FILE_BYTES)
    expected = bytearray(_FILE_BYTES)
    pieces = []  # (offset in the file, bytes, offset in the buffer)
    position = 1
    while position < _FILE_BYTES // 2:
        nbytes = min(rng.choice((1, 3, 255, 4097, 65_537, 1_000_003)), _FILE_BYTES // 2 - position)
        offset = rng.randrange(_FILE_BYTES - nbytes)
        pieces.append((offset, nbytes, position))
        expected[position : position + nbytes] = data[offset : offset + nbytes]
        position += nbytes + rng.randrange(1, 4096)  # what lies between must stay as it was
    address = int(call("cuMemAlloc", _FILE_BYTES))
    try:
        call("cuMemsetD8", address, 0, _FILE_BYTES)
        call("cuCtxSynchronize")
        fd = os.memfd_create("weightd:self-test", os.MFD_CLOEXEC)  # a container may have no disk to write to
        try:
            os.write(fd, data)
            _read(gpu, f"/proc/self/fd/{fd}", pieces, address)
        finally:
            os.close(fd)
        found = ctypes.create_string_buffer(_FILE_BYTES)
        call("cuMemcpyDtoH", ctypes.addressof(found), address, _FILE_BYTES)
    finally:
        call("cuMemFree", address)
    if found.raw != bytes(expected):
        first = next(i for i, (a, b) in enumerate(zip(found.raw, expected, strict=True)) if a != b)
        raise _Wrong(f"byte {first} of the buffer is not what the file has")


def _read(gpu: Gpu, path: str, pieces: list[tuple[int, int, int]], address: int) -> None:
    streamer = libstreamer.Streamer()
    try:
        for offset, nbytes, position in pieces:
            streamer.submit(path, [offset], [nbytes], [address + position], gpu.ordinal)
        for _ in pieces:
            response = streamer.response(_TIMEOUT)
            if response is None:
                raise _Wrong(f"no answer within {_TIMEOUT:g} s")
            if response.code != libstreamer.SUCCESS:
                raise _Wrong(libstreamer.describe(response.code))
    finally:
        streamer.close(gpu.context)
