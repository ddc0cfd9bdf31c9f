"""Host segments: whole, sealed, and out of reach of whoever borrows them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from weightd.daemon.devices import cpu
from weightd.daemon.devices.base import Segment
from weightd.daemon.devices.copying import copy_segment
from weightd.daemon.devices.cpu import CpuDevice, CpuSegment, held_bytes
from weightd.daemon.devices.discovery import open_devices
from weightd.daemon.errors import InsufficientCapacity
from weightd.daemon.limits import CudaLimits, FillLimits

F_SEAL_FUTURE_WRITE = 0x10
ALL_SEALS = (
    fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | F_SEAL_FUTURE_WRITE
)  # fmt: skip


@pytest.fixture
def segment() -> Iterator[CpuSegment]:
    segment = CpuDevice("cpu", 1 << 30).allocate(3 * mmap.PAGESIZE - 5, "test")
    segment.view[:5] = b"right"
    yield segment
    segment.close()


def refused(action: Callable[[], object]) -> bool:
    """Whether the kernel refuses it for want of permission."""
    try:
        action()
    except OSError as error:
        return error.errno in (errno.EPERM, errno.EACCES, errno.EBADF, errno.EINVAL)
    return False


def punch_hole(fd: int, offset: int, size: int) -> None:
    """fallocate(2) with FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE: zeroes bytes without writing."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, 0x02 | 0x01, ctypes.c_long(offset), ctypes.c_long(size)):
        raise OSError(ctypes.get_errno(), "fallocate")


def assert_nobody_can_write(fd: int) -> None:
    """Through the descriptor, or a writable one that is made of it (which root, at least, can open)."""
    page = mmap.PAGESIZE
    opened = [fd]
    with contextlib.suppress(PermissionError):
        opened.append(os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC))
    try:
        for each in opened:
            assert refused(lambda: os.pwrite(each, b"wrong", 0))  # noqa: B023
            assert refused(lambda: os.ftruncate(each, 0))  # noqa: B023
            assert refused(lambda: os.ftruncate(each, 100 * page))  # noqa: B023
            assert refused(lambda: punch_hole(each, 0, page))  # noqa: B023
            assert refused(lambda: mmap.mmap(each, page, mmap.MAP_SHARED, mmap.PROT_WRITE))  # noqa: B023
            assert refused(lambda: mmap.mmap(each, page, mmap.MAP_SHARED))  # noqa: B023
    finally:
        for each in opened[1:]:
            os.close(each)
    assert os.pread(fd, 5, 0) == b"right"


def test_a_segment_is_zeroed_and_whole_pages(segment: CpuSegment) -> None:
    assert segment.nbytes == 3 * mmap.PAGESIZE - 5
    assert segment.footprint == 3 * mmap.PAGESIZE
    assert not any(segment.view[5:])
    assert CpuDevice("cpu", 0).footprint(0) == mmap.PAGESIZE


@pytest.mark.parametrize("sealed", [False, True], ids=["while it loads", "once it is sealed"])
def test_nobody_who_is_lent_a_segment_can_write_to_it(segment: CpuSegment, sealed: bool) -> None:
    if sealed:
        segment.seal()
    fd = segment.lend()
    try:
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert_nobody_can_write(fd)
    finally:
        os.close(fd)


def test_what_is_lent_while_it_loads_fills_up_in_front_of_the_borrower(segment: CpuSegment) -> None:
    fd = segment.lend()
    with mmap.mmap(fd, segment.nbytes, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped:
        os.close(fd)
        assert mapped[:5] == b"right"
        segment.view[1000:1005] = b"later"
        assert mapped[1000:1005] == b"later"
        segment.seal()
        assert mapped[1000:1005] == b"later"


@pytest.mark.parametrize("lent", [False, True], ids=["lent by nobody", "lent meanwhile"])
def test_threads_that_write_at_once_all_find_their_way(lent: bool) -> None:
    size, count = (1 << 20) + 3, 16
    parts = [bytes([number]) * size for number in range(count)]
    segment = CpuDevice("cpu", 1 << 30).allocate(size * count, "test")
    with ThreadPoolExecutor(4) as pool:
        written = [pool.submit(segment.write, n * size, memoryview(bytearray(part))) for n, part in enumerate(parts)]
        if lent:
            written[0].result()
            os.close(segment.lend())
    for each in written:
        each.result()
    for number, part in enumerate(parts):
        assert segment.view[number * size : (number + 1) * size] == part
    segment.close()


@pytest.mark.parametrize("lent", [False, True], ids=["lent by nobody", "lent before"])
def test_a_sealed_segment_has_every_seal(segment: CpuSegment, lent: bool) -> None:
    if lent:
        os.close(segment.lend())
    segment.seal()
    fd = segment.lend()
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == ALL_SEALS
    os.close(fd)
    with pytest.raises(AssertionError, match="sealed"):
        _ = segment.view
    with pytest.raises(AssertionError, match="sealed"):
        _ = segment.address


def test_a_borrower_who_seals_the_seals_spoils_nothing(segment: CpuSegment) -> None:
    lent = segment.lend()
    os.fchmod(lent, 0o600)  # the owner may, which is the same user here
    writable = os.open(f"/proc/self/fd/{lent}", os.O_RDWR | os.O_CLOEXEC)
    fcntl.fcntl(writable, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
    os.close(writable)
    again = segment.lend()
    segment.seal()
    for fd in (lent, again):
        assert_nobody_can_write(fd)
        os.close(fd)


def test_what_a_borrower_writes_to_a_private_mapping_stays_its_own(segment: CpuSegment) -> None:
    segment.seal()
    fd = segment.lend()
    with (
        mmap.mmap(fd, segment.nbytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mine,
        mmap.mmap(fd, segment.nbytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as other,
    ):
        mine[:5] = b"wrong"
        assert (mine[:5], other[:5], os.pread(fd, 5, 0)) == (b"wrong", b"right", b"right")
    os.close(fd)


def test_memory_that_is_mapped_outlives_the_segment(segment: CpuSegment) -> None:
    segment.seal()
    fd = segment.lend()
    segment.close()
    segment.close()
    assert os.pread(fd, 5, 0) == b"right"
    os.close(fd)


def test_a_segment_can_be_sealed_while_a_cycle_still_holds_a_slice_of_it(segment: CpuSegment) -> None:
    cycle: list[Any] = [segment.view[:5]]
    cycle.append(cycle)
    del cycle
    segment.seal()


def test_more_memory_than_there_is_is_refused_with_the_number() -> None:
    with pytest.raises(InsufficientCapacity, match=str(1 << 56)) as refusal:
        CpuDevice("cpu", 1 << 60).allocate(1 << 56, "test")
    assert refusal.value.details == {"device": "cpu", "needed_bytes": 1 << 56}


def test_a_segment_is_what_the_protocol_says(segment: CpuSegment) -> None:
    assert isinstance(segment.address, int)
    allocated: Segment = segment
    assert allocated.handle == "fd"


def test_a_copy_takes_memory_only_where_the_original_does() -> None:
    device = CpuDevice("cpu", 1 << 30)
    size = 64 << 20
    limits = FillLimits(threads=2, in_flight_bytes=1 << 20, extent_bytes=1 << 20, bounce_buffers=2, retry_deadline=1.0)
    with contextlib.closing(device.allocate(size - 5, "original")) as original:
        for at in (0, 9 << 20, size - 10):
            original.view[at : at + 5] = b"right"
        with contextlib.closing(device.allocate(size - 5, "copy")) as copy:
            copy_segment(original, copy, limits)
            assert held_bytes([copy.fd]) == held_bytes([original.fd]) < size // 4
            assert all(bytes(copy.view[at : at + 5]) == b"right" for at in (0, 9 << 20, size - 10))


def test_the_default_capacity_is_the_same_for_a_daemon_that_adopts(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [10 << 30]
    monkeypatch.setattr(cpu, "available_memory", lambda: free[0])
    first = open_devices({}, CudaLimits(0, "auto"))["cpu"]
    with contextlib.closing(first.allocate(3 * mmap.PAGESIZE, "held")) as held:
        for at in range(0, held.nbytes, mmap.PAGESIZE):
            held.view[at : at + 1] = b"x"
        taken = held_bytes([held.fd])
        assert taken >= held.nbytes
        free[0] -= taken
        assert open_devices({}, CudaLimits(0, "auto"), held=taken)["cpu"].capacity == first.capacity
        assert open_devices({"cpu": 7}, CudaLimits(0, "auto"), held=taken)["cpu"].capacity == 7
