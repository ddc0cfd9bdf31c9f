"""Host memory as a device: one sealed memfd per segment."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import mmap
import os
import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from weightd.daemon import control_groups
from weightd.daemon.errors import InsufficientCapacity

_SEALS_AT_BIRTH = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
F_SEAL_FUTURE_WRITE = 0x0010  # linux/fcntl.h; not in Python's fcntl module
_SEALS_WHEN_READY = F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_SEALS_THAT_COUNT = _SEALS_AT_BIRTH | F_SEAL_FUTURE_WRITE
"""With no writable mapping left, these alone keep every byte as it is."""

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")

DEFAULT_SHARE = 0.5
"""Share of the memory that is available when the daemon starts, taken as capacity where no setting says more."""


class CpuDevice:
    """The host's memory, as far as ``capacity`` bytes of it."""

    uuid = None
    quarantined = ""
    handles = ("fd",)

    def __init__(self, name: str, capacity: int | None, fill: str = "auto", held: int = 0) -> None:
        """``fill``: ``direct`` or ``buffered``, or ``auto``, which looks whether pages are huge.

        ``held``: bytes that are taken already by what is to be adopted, where no setting says the capacity.
        """
        self.name = name
        self._fill = fill
        self.capacity = int((available_memory() + held) * DEFAULT_SHARE) if capacity is None else capacity

    def open(self) -> None:
        """It always is."""

    def available(self) -> None:
        return None

    def describe(self) -> dict[str, str | int | None]:
        return {}

    def buffers(self, nbytes: int) -> HostBuffers:
        return HostBuffers(nbytes)

    def copier(self) -> None:
        return None

    def streams_into(self) -> int | None:
        return None

    def close(self) -> None:
        """There is nothing."""

    def footprint(self, nbytes: int) -> int:
        return max(1, -(-nbytes // mmap.PAGESIZE)) * mmap.PAGESIZE

    @property
    def buffered(self) -> bool:
        """Whether its segments are filled by way of buffers."""
        # Reading to a page of its own zeroes it and faults it in first, which costs several times the copy; write(2)
        # does neither. Where pages are huge, faults are few, and the way through a buffer is the longer one.
        return not huge_pages() if self._fill == "auto" else self._fill == "buffered"

    def allocate(self, nbytes: int, label: str, handle: str = "fd") -> CpuSegment:
        assert handle in self.handles
        try:
            return CpuSegment(self, _create(self.footprint(nbytes), label), nbytes)
        except OSError as error:
            if error.errno not in (errno.ENOMEM, errno.ENOSPC, errno.EFBIG, errno.EMFILE, errno.ENFILE):
                raise
            raise InsufficientCapacity(
                f"the system refused {nbytes} bytes of shared memory on {self.name}: {error.strerror}",
                device=self.name,
                needed_bytes=nbytes,
            ) from None

    def adopt(self, fd: int, nbytes: int) -> CpuSegment:
        if os.fstat(fd).st_size != self.footprint(nbytes):
            raise ValueError(f"a segment of {os.fstat(fd).st_size} bytes, expected are {self.footprint(nbytes)}")
        return CpuSegment(self, fd, nbytes)


class HostBuffers:
    """Bounce buffers in this process's memory."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes

    def acquire(self) -> mmap.mmap:
        return mmap.mmap(-1, self._nbytes, mmap.MAP_PRIVATE)

    def release(self, buffer: mmap.mmap) -> None:
        """It goes when its last view does."""


def _create(footprint: int, label: str) -> int:
    fd = os.memfd_create(f"weightd:{label}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, footprint)
        os.fchmod(fd, 0o400)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS_AT_BIRTH)
    except OSError:
        os.close(fd)
        raise
    return fd


class CpuSegment:
    """One memfd. The daemon's mapping is the only writable one there ever is.

    Nobody who gets a descriptor can write: it is opened read-only, and the first time that one is lent the memfd is
    sealed against new writable mappings and write calls, which a reopening through /proc would otherwise allow.
    """

    handle = "fd"

    def __init__(self, device: CpuDevice, fd: int, nbytes: int) -> None:
        """Take over a memfd, new or adopted; it is closed where that fails. Raises OSError."""
        self.device = device
        self.fd = fd
        self.nbytes = nbytes
        self.buffered = device.buffered
        self._map: mmap.mmap | None = None
        self._view: memoryview | None = None
        self._address = 0
        self._lock = threading.Lock()  # lending while still loading races with sealing
        try:
            self.footprint = os.fstat(fd).st_size
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            self._sealed = bool(seals & fcntl.F_SEAL_WRITE)
            self._lent = bool(seals & F_SEAL_FUTURE_WRITE)
            if not seals & (fcntl.F_SEAL_WRITE | F_SEAL_FUTURE_WRITE):
                self._map = mmap.mmap(fd, self.footprint, mmap.MAP_SHARED)
        except OSError:
            os.close(fd)
            raise
        if self._map is not None:
            self._map.madvise(mmap.MADV_HUGEPAGE)
            self._view = memoryview(self._map)
            self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    @property
    def writable(self) -> bool:
        return self._map is not None

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
                self._lent = True
                self._add_seals(F_SEAL_FUTURE_WRITE)
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def seal(self) -> None:
        self._unmap()  # a memfd with a writable mapping refuses the seal
        with self._lock:
            self._add_seals(_SEALS_WHEN_READY)
            self._sealed = True

    def _add_seals(self, seals: int) -> None:
        try:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
        except PermissionError:
            # A borrower of the daemon's own user may have sealed the seals: a nuisance, no danger.
            if fcntl.fcntl(self.fd, fcntl.F_GET_SEALS) & _SEALS_THAT_COUNT != _SEALS_THAT_COUNT:
                raise

    def write(self, offset: int, data: memoryview) -> None:
        while data and not self._lent:
            try:
                count = os.pwrite(self.fd, data, offset)
            except PermissionError:  # it has been lent meanwhile
                break
            offset, data = offset + count, data[count:]
        if data:
            assert self._map is not None, "the segment is sealed"
            source = ctypes.addressof(ctypes.c_char.from_buffer(data))
            ctypes.memmove(self._address + offset, source, len(data))

    def read_into(self, offset: int, target: memoryview) -> None:
        while target:
            count = os.preadv(self.fd, [target], offset)
            if not count:
                raise ValueError(f"the segment ends at byte {offset}")
            offset, target = offset + count, target[count:]

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
        if self.fd >= 0:
            try:
                self._unmap()
            finally:
                os.close(self.fd)
                self.fd = -1


def discover(capacity: Mapping[str, int], fill: str = "auto", held: int = 0) -> list[CpuDevice]:
    """``cpu``, and ``cpu:0`` and so on, there where ``capacity`` says how large they are."""
    further = [name for name in capacity if re.fullmatch(r"cpu:\d{1,4}", name)]
    return [CpuDevice(name, capacity.get(name), fill, held) for name in ("cpu", *sorted(further))]


def held_bytes(fds: Iterable[int]) -> int:
    """Bytes of host memory that the files behind these descriptors take."""
    return sum(512 * os.fstat(fd).st_blocks for fd in fds)


def huge_pages() -> bool:
    """Whether the kernel gives shared memory huge pages where it is asked to."""
    try:
        text = HUGE_PAGES.read_text()
    except OSError:
        return False
    return "[never]" not in text and "[deny]" not in text


def available_memory() -> int:
    """Bytes that new allocations can take: what the kernel has, and what this process's control groups leave."""
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":", 1) for line in file)
    available = int(lines["MemAvailable"].split()[0]) * 1024
    left = control_groups.memory_left()
    return available if left is None else min(available, left)
