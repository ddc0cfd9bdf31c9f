"""Host memory between GPUs and peers, for segments that peers cannot read where they are.

A GPU's memory would have to be registered by a process that has a context there, which takes some hundred MiB of each
GPU, and how UCX carries memory of the driver's VMM differs with driver and fabric. Slots of host memory go by every
transport: the serving daemon copies what a peer asks for into one, the reading daemon reads into one of its own and
copies on from there.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import threading
from collections.abc import Sequence

from weightd.daemon.devices.base import Segment
from weightd.daemon.devices.host_memory import address_of
from weightd.daemon.peers.moving.movers import Mover, Offered
from weightd.daemon.peers.pulling.groups import PART, Part

SLOT = PART + (64 << 10)
"""Bytes of a slot: a part, each of its spans at an address of its own."""


class Window:
    """Slots of host memory that a mover process has mapped as well."""

    def __init__(self, slots: int) -> None:
        """Raises OSError where the system refuses the memory."""
        self.nbytes = slots * SLOT
        self.fd = os.memfd_create("weightd:window", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, self.nbytes)
            self._map = mmap.mmap(self.fd, self.nbytes)
        except OSError:
            os.close(self.fd)
            raise
        self.address = address_of(self._map)
        self.view = memoryview(self._map)
        self._free = list(range(slots))
        self._changed = threading.Condition()

    def take(self, timeout: float = 0.0) -> int | None:
        """A slot's offset; None where none is free for so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._free, timeout)
            return self._free.pop() * SLOT if self._free else None

    def give(self, offset: int) -> None:
        """Nothing uses the slot any more."""
        with self._changed:
            self._free.append(offset // SLOT)
            self._changed.notify()

    def close(self) -> None:
        """Let go of it, and of its memory. Nothing may use any slot any more."""
        self.view.release()
        try:
            self._map.close()
        except BufferError:  # a traceback or a cycle still holds a slice of it
            gc.collect()
            with contextlib.suppress(BufferError):  # then it goes with the last one
                self._map.close()
        finally:
            os.close(self.fd)


def packed(sizes: Sequence[int]) -> list[int]:
    """Where spans of so many bytes lie in a slot, one after another."""
    offsets, at = [], 0
    for nbytes in sizes:
        offsets.append(at)
        at += -(-nbytes // 256) * 256
    return offsets


class Offer:
    """What the segments of a stage are offered to peers as: themselves, or a window beside them."""

    def __init__(self, mover: Mover, segments: Sequence[Segment], *, slots: int = 16) -> None:
        """Blocks. Raises MoverFailed, OSError."""
        self.mover = mover
        self.window: Window | None = None
        self.offered: list[Offered] = []
        self._segments = list(segments)
        self._taken: dict[str, set[int]] = {}
        """Reader → slots that it has not given back."""
        self._lock = threading.Lock()
        try:
            if any(segment.device.uuid is not None for segment in segments):
                self.window = Window(slots)
                self.offered.append(self._offer(self.window.fd, self.window.nbytes))
            else:
                for segment in segments:
                    self.offered.append(self._offer(segment.fd, segment.footprint))
        except BaseException:
            self.close()
            raise

    def _offer(self, fd: int, nbytes: int) -> Offered:
        # Opened for reading only: a mapping through it could never be made writable, so that segments can be sealed.
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return self.mover.offer(own, nbytes)
        finally:
            os.close(own)

    def fetch(self, reader: str, pieces: Sequence[tuple[int, int, int]], timeout: float) -> int | None:
        """Copy pieces of segments, each (segment, offset, bytes), to a slot: where it lies at the mover.

        Blocks; None where no slot is free within so many seconds. Raises ValueError for what is not in the segments,
        and CudaError.
        """
        assert self.window is not None
        offsets = packed([nbytes for _, _, nbytes in pieces])
        for (number, offset, nbytes), at in zip(pieces, offsets, strict=True):
            if number >= len(self._segments) or offset + nbytes > self._segments[number].nbytes or at + nbytes > SLOT:
                raise ValueError(f"{nbytes} bytes at {offset} of segment {number} are not there, or too many at once")
        slot = self.window.take(timeout)
        if slot is None:
            return None
        try:
            for (number, offset, nbytes), at in zip(pieces, offsets, strict=True):
                self._segments[number].read_into(offset, self.window.view[slot + at : slot + at + nbytes])
        except BaseException:
            self.window.give(slot)
            raise
        with self._lock:
            self._taken.setdefault(reader, set()).add(slot)
        return self.offered[0].address + slot

    def give(self, reader: str, addresses: Sequence[int] | None = None) -> None:
        """A reader has read these slots; None: it is gone, and with it all that it had."""
        if self.window is None:
            return
        with self._lock:
            taken = self._taken.get(reader, set())
            given = set(taken) if addresses is None else {at - self.offered[0].address for at in addresses} & taken
            taken -= given
            if addresses is None:
                self._taken.pop(reader, None)
        for slot in given:
            self.window.give(slot)

    def close(self) -> None:
        """Unmap it all at the mover. Blocks; raises MoverFailed, with everything closed here."""
        try:
            for offered in self.offered:
                self.mover.close_region(offered.region)
        finally:
            self.offered = []
            if self.window is not None:
                self.window.close()
                self.window = None


class Inlet:
    """Where parts are read to: a slot, from where they are copied on to their segment, or their final address in it.

    Through a slot they go to a GPU, and to host memory whose pages are small: a page that the mover reads into is
    zeroed and faulted in first, in the one thread that it reads in, which costs several times the copy.
    """

    def __init__(self, segments: Sequence[Segment], *, slots: int = 16) -> None:
        """Raises OSError."""
        self._segments = segments
        self.on_device = any(segment.device.uuid is not None for segment in segments)
        through_slots = self.on_device or any(segment.buffered for segment in segments)
        self.window = Window(slots) if through_slots else None
        self._regions: list[int] = []

    def connect(self, mover: Mover) -> None:
        """Let another mover process write there. Raises MoverFailed."""
        if self.window is not None:
            self._regions = [mover.into(self.window.fd, self.window.nbytes)]
        else:
            self._regions = [mover.into(segment.fd, segment.footprint) for segment in self._segments]

    def take(self, part: Part) -> bool:
        """Find the part a place; False where there is none now."""
        if self.window is not None and part.slot is None:
            part.slot = self.window.take()
        return self.window is None or part.slot is not None

    def give(self, part: Part) -> None:
        """Nothing is read from its place, or to it, any more."""
        if self.window is not None and part.slot is not None:
            self.window.give(part.slot)
        part.slot = None

    def places(self, part: Part) -> list[tuple[int, int]]:
        """For each span of a part, the mover's region and the offset in it."""
        if self.window is None:
            return [(self._regions[span.segment], span.offset) for span in part.spans]
        assert part.slot is not None
        return [(self._regions[0], part.slot + at) for at in packed([span.nbytes for span in part.spans])]

    def settle(self, part: Part) -> None:
        """Copy a part that has come to where it belongs in host memory, and free its place. Drops the GIL."""
        if self.window is None or self.on_device:
            return
        for span, view in zip(part.spans, self._slot_views(part), strict=True):
            self._segments[span.segment].write(span.offset, view)
        self.give(part)

    def views(self, part: Part) -> list[memoryview]:
        """The bytes of each span of a part that has settled; in its slot where they are on the way to a GPU."""
        if self.on_device:
            return self._slot_views(part)
        return [self._segments[span.segment].view[span.offset : span.offset + span.nbytes] for span in part.spans]

    def _slot_views(self, part: Part) -> list[memoryview]:
        assert self.window is not None
        assert part.slot is not None
        starts = [part.slot + at for at in packed([span.nbytes for span in part.spans])]
        return [self.window.view[at : at + span.nbytes] for at, span in zip(starts, part.spans, strict=True)]

    def close(self) -> None:
        """Let go. No mover may have it mapped, and no copy be on its way from it, any more."""
        if self.window is not None:
            self.window.close()
