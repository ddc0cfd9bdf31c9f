"""Where parts that come from peers land."""

from __future__ import annotations

from collections.abc import Sequence

from weightd.daemon.devices.base import Segment
from weightd.daemon.peers.moving.movers import Mover
from weightd.daemon.peers.moving.parts import Part, packed
from weightd.daemon.peers.moving.window import Window


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

    def acquire(self, part: Part) -> bool:
        """Find the part a place; False where there is none now."""
        if self.window is not None and part.slot is None:
            part.slot = self.window.acquire()
        return self.window is None or part.slot is not None

    def release(self, part: Part) -> None:
        """Nothing is read from its place, or to it, any more."""
        if self.window is not None and part.slot is not None:
            self.window.release(part.slot)
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
        self.release(part)

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
