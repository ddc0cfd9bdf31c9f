"""What a device kind offers. A new kind of device is one new file that offers this, and a line in ``open_devices``."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from weightd.daemon.layouts.recipe import Block


class Segment(Protocol):
    """One contiguous allocation on one device, owned by the daemon until ``close``."""

    nbytes: int
    """Bytes that the layout takes."""
    footprint: int
    """Bytes that the allocation takes of the device's capacity, padding included."""
    handle: str
    """Kind of handle that it is lent by: ``fd`` or ``cuda_ipc``."""
    fd: int
    """Descriptor by which the memory can be deposited, and adopted by another process; -1 where there is none."""

    buffered: bool
    """Whether its bytes are better read into a buffer and put there by ``write`` than read to ``address``."""

    @property
    def device(self) -> Device:
        """Where it is."""

    @property
    def writable(self) -> bool:
        """Whether it can be filled: not once sealed, nor where lending it has ended that."""

    @property
    def address(self) -> int:
        """Where the daemon has it mapped for writing; only until ``seal``. On a GPU an address of the GPU."""

    @property
    def view(self) -> memoryview:
        """Its bytes, writable until ``seal``. In host memory only."""

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


class Mark(Protocol):
    """A point in a copier's work."""

    def wait(self) -> None:
        """Return once everything before it is done. Drops the GIL."""


class Copier(Protocol):
    """Copies to one device that go on by themselves, in the order in which they were asked for."""

    def put(self, address: int, block: Block, source: int) -> None:
        """Copy a block from host memory at ``source`` to device memory at ``address``; the block counts from both."""

    def fetch(self, target: int, address: int, nbytes: int) -> None:
        """Copy bytes from device memory at ``address`` to host memory at ``target``."""

    def holds(self, address: int, block: Block, source: int) -> bool:
        """Whether device memory has what ``put`` was told to copy there. Waits for it."""

    def mark(self) -> Mark:
        """After what was asked for so far. Waited for once."""

    def pin(self, address: int, nbytes: int, *, read_only: bool) -> AbstractContextManager[bool]:
        """Make host memory fit for copies that need no bounce buffer, for a while; yields whether that worked."""

    def leaves(self, ranges: Sequence[tuple[int, int]]) -> Sequence[int]:
        """Leaf digests of (address, bytes) in device memory, of what has been copied there."""

    def close(self) -> None:
        """End it, after what was asked for."""


class Buffers(Protocol):
    """Where bounce buffers come from."""

    def acquire(self) -> mmap.mmap:
        """One buffer."""

    def release(self, buffer: mmap.mmap) -> None:
        """Take back one that nothing uses any more."""


class Device(Protocol):
    """A pool of memory: ``name`` as in requests (``cpu``, ``cuda:0``), ``capacity`` in bytes."""

    name: str
    capacity: int

    @property
    def uuid(self) -> str | None:
        """The GPU's UUID; None for host memory."""

    @property
    def handles(self) -> Sequence[str]:
        """Kinds of handle that its segments can have."""

    def open(self) -> None:
        """Make it ready for segments, where that has not been done; may take a second.

        Raises DeviceFailed, InsufficientCapacity.
        """

    def available(self) -> int | None:
        """Bytes that an allocation may take now, whoever else uses the device; negative where they use of the reserve.

        None: only allocating tells.
        """

    def describe(self) -> dict[str, str | int | None]:
        """What the API says of it besides its capacity: the fields of ``DeviceRecord`` that only some kinds have."""

    def footprint(self, nbytes: int) -> int:
        """Bytes of capacity that a segment of ``nbytes`` takes."""

    def allocate(self, nbytes: int, label: str, handle: str = "fd") -> Segment:
        """A zeroed segment. Raises InsufficientCapacity where the system refuses the memory."""

    def adopt(self, fd: int, nbytes: int) -> Segment:
        """The segment that another process has left, by its descriptor, which this takes over; ValueError if none."""

    def buffers(self, nbytes: int) -> Buffers:
        """Bounce buffers of so many bytes each, on their way to this device."""

    def copier(self) -> Copier | None:
        """What brings bytes from host memory to its segments; None where they are host memory themselves."""

    def streams_into(self) -> int | None:
        """The number by which libstreamer knows it, where that can write to its segments by itself; else None."""

    def close(self) -> None:
        """Let go of everything but segments."""
