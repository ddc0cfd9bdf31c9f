"""Bounce buffers of one fill: where bytes wait that cannot land at their final address at once."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weightd.daemon.devices.base import Buffers


class Slots:
    """At most ``count`` buffers, taken when first needed and used again.

    The last one is only for whoever will give it back without waiting for others (``urgent``): ranges that wait for
    their turn in a file's SHA-256 keep theirs meanwhile, and must not starve the one that they wait for.
    """

    def __init__(self, count: int, buffers: Buffers) -> None:
        self._left = count
        self._buffers = buffers
        self._all: list[mmap.mmap] = []  # a native reader may write to a slot after its Python thread has failed
        self._free: list[mmap.mmap] = []
        self._changed = threading.Condition()

    def acquire(self, wait: bool, stop: threading.Event, urgent: Callable[[], bool]) -> mmap.mmap | None:
        """One buffer; None where none is free and waiting is not wanted, or is over because of ``stop``."""
        with self._changed:
            while len(self._free) + self._left <= (0 if urgent() else 1):
                if not wait or stop.is_set():
                    return None
                self._changed.wait()
            if not self._free:
                self._left -= 1
                self._all.append(self._buffers.acquire())
                self._free.append(self._all[-1])
            return self._free.pop()

    def release(self, slot: mmap.mmap) -> None:
        """Nothing uses it any more."""
        with self._changed:
            self._free.append(slot)
            self._changed.notify_all()

    def wake(self) -> None:
        """What decides who may have one has changed."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Give them all back. Nothing may use any of them any more."""
        with self._changed:
            for buffer in self._all:
                self._buffers.release(buffer)
            self._all.clear()
            self._free.clear()
