"""Segment manifests as descriptors: the daemon's side of ``weightd.ipc.manifest``."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Sequence

from weightd.daemon.errors import UnknownStage
from weightd.ipc.manifest import Manifest

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SealedManifest:
    """A manifest in a sealed memfd: its wire form, then what only the daemon wants to know again.

    ``nbytes`` is the length of the wire form; behind it, a list in JSON with the index of each tensor's file.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        """Take over a descriptor."""
        self.fd = fd
        self.nbytes = nbytes
        self._lock = threading.Lock()

    @classmethod
    def seal(cls, manifest: Manifest, files: Sequence[int] = ()) -> SealedManifest:
        """Write it down. Raises OSError."""
        text = manifest.encode()
        fd = os.memfd_create("weightd:manifest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            view = memoryview(text + json.dumps(list(files), separators=(",", ":")).encode())
            while view:
                view = view[os.write(fd, view) :]
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError:
            os.close(fd)
            raise
        return cls(fd, len(text))

    def read(self) -> tuple[Manifest, list[int]]:
        """The manifest, and the index of each tensor's file. Raises UnknownStage where it was closed meanwhile."""
        with contextlib.closing(self.again()) as own:
            text = os.pread(own.fd, os.fstat(own.fd).st_size, 0)
        return Manifest.decode(text[: self.nbytes]), json.loads(text[self.nbytes :])

    def again(self) -> SealedManifest:
        """The same by a descriptor of its own, for whoever uses it while the stage may go. Raises UnknownStage where it
        was closed meanwhile."""
        # A number that was closed may be another stage's by now.
        with self._lock:
            if self.fd < 0:
                raise UnknownStage("the stage has gone meanwhile: stage it again")
            return SealedManifest(os.dup(self.fd), self.nbytes)

    def close(self) -> None:
        """Let the descriptor go. Safe to call twice, and from any thread."""
        with self._lock:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1
