"""Pinned host memory, which a GPU reads and writes by itself: bounce buffers, and other memory for a while."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from weightd.daemon.devices.host_memory import address_of
from weightd.ipc.cuda import Gpu, call
from weightd.ipc.errors import CudaError

log = logging.getLogger(__name__)

_PORTABLE = 0x1  # CU_MEMHOSTREGISTER_PORTABLE: pinned for every context
_READ_ONLY = 0x8  # CU_MEMHOSTREGISTER_READ_ONLY


class PinnedBuffers:
    """Bounce buffers of ``nbytes`` beside a GPU, pinned once and kept for the next stage.

    Where they cannot be pinned they are plain memory, which works, and copies of it hold the copying thread up.
    """

    def __init__(self, gpu: Gpu, nbytes: int) -> None:
        self._gpu = gpu
        self._nbytes = nbytes
        self._cpus = cpus_near(gpu)
        self._idle: list[mmap.mmap] = []
        self._pinned: dict[int, mmap.mmap] = {}
        """Those that are pinned, by address."""
        self._lock = threading.Lock()

    def acquire(self) -> mmap.mmap:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        # Pages lie on the NUMA node of the processor that touches them first: one beside the GPU.
        with ThreadPoolExecutor(1) as beside:
            buffer = beside.submit(self._touched).result()
        address = address_of(buffer)
        try:
            with self._gpu.context():
                call("cuMemHostRegister", address, self._nbytes, _PORTABLE)
        except CudaError as error:
            if not self._pinned:
                log.warning("cuda:%d: bounce buffers cannot be pinned, which makes copies slow: %s "
                            "(see weightd doctor: memlock)", self._gpu.ordinal, error)  # fmt: skip
            return buffer
        with self._lock:
            self._pinned[address] = buffer
        return buffer

    def _touched(self) -> mmap.mmap:
        if self._cpus:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, self._cpus)
        return mmap.mmap(-1, self._nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)

    def release(self, buffer: mmap.mmap) -> None:
        with self._lock:
            self._idle.append(buffer)

    def close(self) -> None:
        """Unpin all of them; none may be in use."""
        with self._lock, self._gpu.context():
            for address in self._pinned:
                call("cuMemHostUnregister", address)
            self._pinned.clear()
            self._idle.clear()


@contextlib.contextmanager
def pinned(gpu: Gpu, address: int, nbytes: int, *, read_only: bool) -> Iterator[bool]:
    """Pin memory that is there already; yields whether that could be done. Pages that it shares stay where they are."""
    first = address - address % mmap.PAGESIZE
    size = -(-(address + nbytes - first) // mmap.PAGESIZE) * mmap.PAGESIZE
    flags = _PORTABLE | (_READ_ONLY if read_only else 0)
    with gpu.context():
        try:
            call("cuMemHostRegister", first, size, flags)
        except CudaError as error:
            if error.sticky:
                raise
            yield False
            return
    try:
        yield True
    finally:
        with gpu.context():
            call("cuMemHostUnregister", first)


def cpus_near(gpu: Gpu) -> set[int]:
    """Processors on the GPU's NUMA node that this process may use; empty where that is not known."""
    node = numa_node(gpu)
    if node is None:
        return set()
    try:
        text = Path(f"/sys/devices/system/node/node{node}/cpulist").read_text()
    except OSError:
        return set()
    near: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            near.update(range(int(first), int(last or first) + 1))
    return near & os.sched_getaffinity(0)


def numa_node(gpu: Gpu) -> int | None:
    """The NUMA node that the GPU hangs on, by its PCI address."""
    try:
        node = int(Path(f"/sys/bus/pci/devices/{gpu.pci_address}/numa_node").read_text())
    except (CudaError, OSError, ValueError):
        return None
    return node if node >= 0 else None
