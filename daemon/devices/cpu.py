"""Host memory as a device: one sealed memfd per segment."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import mmap
import os
import threading

from weightd.daemon.errors import InsufficientCapacity

_SEALS_AT_BIRTH = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
F_SEAL_FUTURE_WRITE = 0x0010  # linux/fcntl.h; not in Python's fcntl module
_SEALS_WHEN_READY = F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_SEALS_THAT_COUNT = _SEALS_AT_BIRTH | F_SEAL_FUTURE_WRITE
"""With no writable mapping left, these alone keep every byte as it is."""

DEFAULT_SHARE = 0.5
"""Share of the memory that is available when the daemon starts, taken as capacity where no setting says more."""


class CpuDevice:
    """The host's memory, as far as ``capacity`` bytes of it."""

    def __init__(self, name: str, capacity: int | None) -> None:
        self.name = name
        self.capacity = int(available_memory() * DEFAULT_SHARE) if capacity is None else capacity

    def footprint(self, nbytes: int) -> int:
        return max(1, -(-nbytes // mmap.PAGESIZE)) * mmap.PAGESIZE

    def allocate(self, nbytes: int, label: str) -> CpuSegment:
        try:
            return CpuSegment(nbytes, self.footprint(nbytes), label)
        except OSError as error:
            if error.errno not in (errno.ENOMEM, errno.ENOSPC, errno.EFBIG):
                raise
            raise InsufficientCapacity(
                f"the system refused {nbytes} bytes of shared memory on {self.name}: {error.strerror}",
                device=self.name,
                needed_bytes=nbytes,
            ) from None


class CpuSegment:
    """One memfd. The daemon's mapping is the only writable one there ever is.

    Nobody who gets a descriptor can write: it is opened read-only, and the first time that one is lent the memfd is
    sealed against new writable mappings and write calls, which a reopening through /proc would otherwise allow.
    """

    handle = "fd"

    def __init__(self, nbytes: int, footprint: int, label: str) -> None:
        self.nbytes = nbytes
        self.footprint = footprint
        self._fd = os.memfd_create(f"weightd:{label}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, footprint)
            os.fchmod(self._fd, 0o400)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS_AT_BIRTH)
            self._map: mmap.mmap | None = mmap.mmap(self._fd, footprint, mmap.MAP_SHARED)
        except OSError:
            os.close(self._fd)
            raise
        # A no-op where /sys/kernel/mm/transparent_hugepage/shmem_enabled is never; twice the speed where it is advise.
        self._map.madvise(mmap.MADV_HUGEPAGE)
        self._view: memoryview | None = memoryview(self._map)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._sealed = False
        self._lock = threading.Lock()  # lending while still loading races with sealing

    @property
    def address(self) -> int:
        assert self._map is not None, "the segment is sealed"
        return self._address

    @property
    def view(self) -> memoryview:
        assert self._view is not None, "the segment is sealed"
        return self._view

    def lend(self) -> int:
        with self._lock:
            if not self._sealed:
                self._add_seals(F_SEAL_FUTURE_WRITE)
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    def seal(self) -> None:
        self._unmap()  # a memfd with a writable mapping refuses the seal
        with self._lock:
            self._add_seals(_SEALS_WHEN_READY)
            self._sealed = True

    def _add_seals(self, seals: int) -> None:
        try:
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, seals)
        except PermissionError:
            # A borrower of the daemon's own user may have sealed the seals: a nuisance, no danger.
            if fcntl.fcntl(self._fd, fcntl.F_GET_SEALS) & _SEALS_THAT_COUNT != _SEALS_THAT_COUNT:
                raise

    def _unmap(self) -> None:
        if self._map is None:
            return
        assert self._view is not None
        self._view.release()
        self._view = None
        try:
            self._map.close()
        except BufferError:
            # A traceback or a cycle still holds a slice of the view.
            gc.collect()
            self._map.close()
        self._map = None

    def close(self) -> None:
        if self._fd >= 0:
            self._unmap()
            os.close(self._fd)
            self._fd = -1


def available_memory() -> int:
    """Bytes that new allocations can take: what the kernel has, and what this control group may still use."""
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":", 1) for line in file)
    available = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        with open("/proc/self/cgroup") as file:
            path = next(line.split("::", 1)[1].strip() for line in file if line.startswith("0::"))
        folder = f"/sys/fs/cgroup{path}".rstrip("/")
        with open(f"{folder}/memory.max") as limit, open(f"{folder}/memory.current") as used:
            text = limit.read().strip()
            if text != "max":
                available = min(available, int(text) - int(used.read()))
    except (OSError, StopIteration, ValueError):
        pass  # no control group of version 2, or the root one: no limit to respect
    return max(0, available)
