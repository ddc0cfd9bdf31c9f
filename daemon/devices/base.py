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
    fd: int
    """Descriptor by which the memory can be deposited, and adopted by another process; -1 once closed."""

    buffered: bool
    """Whether its bytes are better read into a buffer and put there by ``write`` than read to ``address``."""

    @property
    def writable(self) -> bool:
        """Whether it can be filled: not once sealed, nor where it was lent before it was adopted."""

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

    def write(self, offset: int, data: memoryview) -> None:
        """Put bytes at ``offset``; only until ``seal``. Drops the GIL."""

    def read_into(self, offset: int, target: memoryview) -> None:
        """Copy its bytes from ``offset`` on; whether sealed or not. Drops the GIL."""

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

    def adopt(self, fd: int, nbytes: int) -> Segment:
        """The segment that another process has left, by its descriptor. Raises ValueError where it is none."""
