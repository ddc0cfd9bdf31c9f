"""What a device kind offers. A new kind of device is one new file that offers this, and a line in KINDS."""

from __future__ import annotations

from typing import Protocol


class Segment(Protocol):
    """One contiguous allocation on one device, owned by the daemon until ``close``."""

    nbytes: int
    """Bytes that the layout takes."""
    footprint: int
    """Bytes that the allocation takes of the device's capacity, padding included."""
    handle: str
    """Kind of handle that ``lend`` gives: ``fd``."""

    @property
    def address(self) -> int:
        """Where the daemon has it mapped for writing; only until ``seal``."""

    @property
    def view(self) -> memoryview:
        """Its bytes, writable until ``seal``."""

    def lend(self) -> int:
        """A descriptor through which another process can map it but never change what others see.

        The caller closes it. Works before ``seal`` too: what is lent then fills up in front of the borrower.
        """

    def seal(self) -> None:
        """Make it immutable for everybody, the daemon included."""

    def close(self) -> None:
        """Drop the daemon's side. Memory that others have mapped lives on until they unmap it. Safe to call twice."""


class Device(Protocol):
    """A pool of memory: ``name`` as in requests (``cpu``, ``cuda:0``), ``capacity`` in bytes."""

    name: str
    capacity: int

    def footprint(self, nbytes: int) -> int:
        """Bytes of capacity that a segment of ``nbytes`` takes."""

    def allocate(self, nbytes: int, label: str) -> Segment:
        """A zeroed segment. Raises InsufficientCapacity where the system refuses the memory."""
