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

from weightd.daemon.devices.host_memory import address_of
from weightd.daemon.peers.moving.parts import PART

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

    def acquire(self, timeout: float = 0.0) -> int | None:
        """A slot's offset; None where none is free for so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._free, timeout)
            return self._free.pop() * SLOT if self._free else None

    def release(self, offset: int) -> None:
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
