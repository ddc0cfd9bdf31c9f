"""What a source's reader brings bytes to."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from weightd.daemon.layouts.extents import Extent


class Landing:
    """Where one extent's bytes go: host memory at ``address``, as ``views`` in order, or device memory there.

    ``device`` is the GPU's number, as libstreamer counts them; None for host memory.
    """

    __slots__ = ("address", "device", "holders", "slot", "views")

    def __init__(
        self, views: list[memoryview], address: int, slot: mmap.mmap | None = None, device: int | None = None
    ) -> None:
        self.views = views
        self.address = address
        self.slot = slot
        self.device = device
        self.holders = 1
        """Who still reads from it: what puts its bytes to their places, and the file's SHA-256 in its turn."""


class Sink(Protocol):
    """Extents to bring, and where their bytes go. Methods may be called from any thread.

    A reader takes extents by ``next`` until there is none, asks for each one's ``landing``, writes its bytes there, and
    says ``landed``; what fails goes through ``failed``.
    """

    threads: int
    """Reading threads, for sources that read in threads."""
    in_flight_bytes: int
    """Bytes asked of an object store and not yet landed, at most."""
    extent_bytes: int
    """Bytes that extents have at most."""

    @property
    def stopped(self) -> bool:
        """Whether readers are to give up."""

    def stop(self) -> None:
        """Make readers give up soon."""

    def next(self) -> Extent | None:
        """The next extent to read, in order; None when there is no more, or readers are to give up."""

    def landing(self, extent: Extent, *, wait: bool = True) -> Landing | None:
        """Where the extent's bytes go; None where no bounce buffer is free and waiting is not wanted (any more)."""

    def landed(self, extent: Extent, landing: Landing) -> None:
        """All bytes of the extent are where ``landing`` said. Raises DigestMismatch."""

    def abandon(self, landing: Landing) -> None:
        """Give a landing back that nothing writes to any more."""

    def wait(self, seconds: float, phase: str = "source") -> None:
        """Sleep, but no longer than until readers are to give up; what is waited for is a phase."""

    def failed(self, extent: Extent, where: str, why: str) -> float:
        """A read failed. Returns the seconds to wait before the next try; raises SourceFailed past the deadline."""

    def check_stall(self, last_progress: float, where: Sequence[str]) -> None:
        """Raise SourceFailed where nothing has landed for the deadline; ``where`` names what is in flight."""

    def phase(self, name: str, source: str = "") -> AbstractContextManager[None]:
        """Count the time inside towards a phase, in thread-seconds; ``source``: where it is not the stage's own."""


class Share(Sink):
    """One reader's share of a sink: it stops with it, and by itself."""

    def __init__(self, whole: Sink) -> None:
        self.threads = whole.threads
        self.in_flight_bytes = whole.in_flight_bytes
        self.extent_bytes = whole.extent_bytes
        self._whole = whole
        self._stop = threading.Event()

    @property
    def stopped(self) -> bool:
        return self._stop.is_set() or self._whole.stopped

    def stop(self) -> None:
        self._stop.set()

    def next(self) -> Extent | None:
        return None if self.stopped else self._whole.next()

    def landing(self, extent: Extent, *, wait: bool = True) -> Landing | None:
        return self._whole.landing(extent, wait=wait)

    def landed(self, extent: Extent, landing: Landing) -> None:
        self._whole.landed(extent, landing)

    def abandon(self, landing: Landing) -> None:
        self._whole.abandon(landing)

    def wait(self, seconds: float, phase: str = "source") -> None:
        self._whole.wait(seconds, phase)

    def failed(self, extent: Extent, where: str, why: str) -> float:
        return self._whole.failed(extent, where, why)

    def check_stall(self, last_progress: float, where: Sequence[str]) -> None:
        self._whole.check_stall(last_progress, where)

    def phase(self, name: str, source: str = "") -> AbstractContextManager[None]:
        return self._whole.phase(name, source)
