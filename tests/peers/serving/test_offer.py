"""What peers read of a stage: its segments themselves, or of what is on a GPU a window that pieces are put into."""

from __future__ import annotations

import fcntl
import os
from typing import Any, cast

import pytest

from tests.filling.far import FarDevice
from tests.filling.fills import noise
from weightd.daemon.devices.cpu import CpuDevice, CpuSegment
from weightd.daemon.peers.moving.movers import Mover, Offered
from weightd.daemon.peers.moving.window import SLOT
from weightd.daemon.peers.serving.offer import Offer

BASE = (1 << 40) + (1 << 16)


class Mapping:
    """A mover's side: what was mapped there, and is."""

    def __init__(self, fails_at: int = -1) -> None:
        self.mapped: list[tuple[int, int, bool]] = []
        """(inode, bytes, whether for writing)."""
        self.open: set[int] = set()
        self._fails_at = fails_at

    def offer(self, fd: int, nbytes: int) -> Offered:
        if len(self.mapped) == self._fails_at:
            raise OSError("no room")
        writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        self.mapped.append((os.fstat(fd).st_ino, nbytes, writable))
        region = len(self.mapped)
        self.open.add(region)
        return Offered(region, BASE * region, b"metadata")

    def close_region(self, region: int) -> None:
        self.open.remove(region)


def made(mover: Mapping, *segments: CpuSegment, slots: int = 2) -> Offer:
    return Offer(cast(Mover, mover), cast(Any, segments), slots=slots)


def test_segments_in_host_memory_are_mapped_themselves_for_reading_only() -> None:
    device, mover = CpuDevice("cpu", 1 << 30), Mapping()
    segments = [device.allocate(nbytes, "test") for nbytes in (10, 5000)]
    before = len(os.listdir("/proc/self/fd"))
    offer = made(mover, *segments)
    assert mover.mapped == [(os.fstat(s.fd).st_ino, s.footprint, False) for s in segments]
    assert ([offered.region for offered in offer.offered], offer.window) == ([1, 2], None)
    offer.release("anybody")
    offer.close()
    assert (mover.open, offer.offered) == (set(), [])
    assert len(os.listdir("/proc/self/fd")) == before
    for segment in segments:
        segment.close()


def test_where_one_cannot_be_mapped_none_stays_so() -> None:
    device, mover = CpuDevice("cpu", 1 << 30), Mapping(fails_at=1)
    segments = [device.allocate(10, "test") for _ in range(2)]
    with pytest.raises(OSError, match="no room"):
        made(mover, *segments)
    assert mover.open == set()
    for segment in segments:
        segment.close()


@pytest.fixture
def far() -> list[CpuSegment]:
    device = FarDevice()
    segments = [device.allocate(nbytes, "test") for nbytes in (10_000, SLOT + 10)]
    for index, segment in enumerate(segments):
        segment.view[: segment.nbytes] = noise(segment.nbytes, index)
    return segments


def test_pieces_of_what_is_on_a_gpu_are_put_into_a_slot_each_on_a_boundary(far: list[CpuSegment]) -> None:
    mover = Mapping()
    offer = made(mover, *far)
    assert offer.window is not None
    assert [(nbytes, writable) for _, nbytes, writable in mover.mapped] == [(2 * SLOT, False)]
    at = offer.fetch("one", [(0, 100, 300), (1, 5, 256), (0, 9_000, 1000)], 0.0)
    assert at is not None
    slot = at - BASE
    assert slot in (0, SLOT)
    for start, (segment, offset, nbytes) in zip(
        (0, 512, 768), [(0, 100, 300), (1, 5, 256), (0, 9_000, 1000)], strict=True
    ):
        found = bytes(offer.window.view[slot + start : slot + start + nbytes])
        assert found == noise(far[segment].nbytes, segment)[offset : offset + nbytes]
    other = offer.fetch("one", [(1, 3, 1 << 20), (1, 9, 100_000)], 0.0)
    assert other is not None
    assert {slot, other - BASE} == {0, SLOT}
    for start, offset, nbytes in ((0, 3, 1 << 20), (1 << 20, 9, 100_000)):
        at = other - BASE + start
        assert bytes(offer.window.view[at : at + nbytes]) == noise(far[1].nbytes, 1)[offset : offset + nbytes]
    offer.close()


def test_slots_are_given_back_by_who_has_them_and_all_of_who_is_gone(far: list[CpuSegment]) -> None:
    offer = made(Mapping(), *far)
    one, two = offer.fetch("one", [(0, 0, 1)], 0.0), offer.fetch("two", [(0, 0, 1)], 0.0)
    assert one is not None
    assert two is not None
    assert offer.fetch("one", [(0, 0, 1)], 0.0) is None, "there are two"
    offer.release("two", [one])
    offer.release("nobody", [one, two])
    assert offer.fetch("two", [(0, 0, 1)], 0.0) is None, "what is another's cannot be given back"
    offer.release("one", [one, one, 5])
    assert offer.fetch("two", [(0, 0, 1)], 0.0) == one
    offer.release("two")
    assert {offer.fetch("three", [(0, 0, 1)], 0.0) for _ in range(2)} == {one, two}
    offer.close()


def test_what_is_not_in_the_segments_or_too_much_is_refused_and_takes_no_slot(far: list[CpuSegment]) -> None:
    offer = made(Mapping(), *far, slots=1)
    for piece in ((2, 0, 1), (3, 0, 1), (0, 10_000, 1), (0, 9_999, 2), (1, 0, SLOT + 1)):
        with pytest.raises(ValueError, match=f"{piece[2]} bytes at {piece[1]} of segment {piece[0]} are not there"):
            offer.fetch("one", [piece], 0.0)
    with pytest.raises(ValueError, match="too many at once"):
        offer.fetch("one", [(1, 0, SLOT - 256), (0, 0, 257)], 0.0)
    far[1].nbytes += 1 << 20  # it says that it has more than it has
    with pytest.raises(ValueError, match="the segment ends"):
        offer.fetch("one", [(1, SLOT + 8192, 8192)], 0.0)
    for piece in ((1, 0, SLOT), (0, 9_999, 1)):
        assert offer.fetch("one", [piece], 0.0) is not None
        offer.release("one")
    offer.close()
