"""SHA-256 of files that are read in parallel."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable


class OrderedHash:
    """SHA-256 of a file whose ranges land in any order: each waits, in its place, for those before it."""

    def __init__(self, prefix: bytes) -> None:
        self._hash = hashlib.sha256(prefix)
        self.position = len(prefix)
        """Where in the file the next range begins."""
        self._waiting: dict[int, tuple[int, list[memoryview], Callable[[], None]]] = {}
        self._busy = False
        self._lock = threading.Lock()

    def add(self, offset: int, nbytes: int, views: list[memoryview], release: Callable[[], None]) -> None:
        with self._lock:
            self._waiting[offset] = (nbytes, views, release)
            if self._busy:
                return
            self._busy = True
        while True:
            with self._lock:
                item = self._waiting.pop(self.position, None)
                if item is None:
                    self._busy = False
                    return
            size, parts, done = item
            for part in parts:
                self._hash.update(part)
            parts.clear()
            self.position += size
            done()

    def clear(self) -> None:
        """Forget what waits: no more comes."""
        with self._lock:
            self._waiting.clear()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
