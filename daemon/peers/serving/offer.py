"""A stage's segments as peers can read them."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from weightd.daemon.devices.base import Segment
from weightd.daemon.peers.moving.movers import Mover, Offered
from weightd.daemon.peers.moving.parts import packed
from weightd.daemon.peers.moving.window import SLOT, Window


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
        slot = self.window.acquire(timeout)
        if slot is None:
            return None
        try:
            for (number, offset, nbytes), at in zip(pieces, offsets, strict=True):
                self._segments[number].read_into(offset, self.window.view[slot + at : slot + at + nbytes])
        except BaseException:
            self.window.release(slot)
            raise
        with self._lock:
            self._taken.setdefault(reader, set()).add(slot)
        return self.offered[0].address + slot

    def release(self, reader: str, addresses: Sequence[int] | None = None) -> None:
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
            self.window.release(slot)

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
