"""A stage's segments while anybody reads them over S3: what was opened stays readable, whatever becomes of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from weightd.daemon.devices.base import Segment
from weightd.daemon.stages.stage import Stage


class Opened:
    """Descriptors of host segments, and mappings of their own of those on GPUs. Made and closed on the event loop."""

    def __init__(self, stage: Stage) -> None:
        """Raises OSError, CudaError."""
        self.users = 0
        self._fds: list[int] = []
        self._on_gpus: dict[int, Segment] = {}
        try:
            for index, segment in enumerate(stage.segments):
                fd = os.dup(segment.fd)
                self._fds.append(fd)
                if segment.device.uuid is not None:
                    self._on_gpus[index] = segment.device.adopt(os.dup(fd), segment.nbytes)
                    self._on_gpus[index].seal()
        except BaseException:
            self.close()
            raise

    def is_on_gpu(self, index: int) -> bool:
        """Whether a segment's bytes have to be copied before they can be sent."""
        return index in self._on_gpus

    def fd(self, index: int) -> int:
        """The descriptor of a host segment, for reading."""
        return self._fds[index]

    @contextlib.contextmanager
    def copied(self, index: int, offset: int, count: int, buffer_bytes: int) -> Iterator[memoryview]:
        """Up to ``buffer_bytes`` of a GPU's segment in pinned memory, for a while. Blocks. Raises CudaError."""
        segment = self._on_gpus[index]
        buffers = segment.device.buffers(buffer_bytes)
        buffer = buffers.acquire()
        try:
            with memoryview(buffer) as whole, whole[:count] as view:
                segment.read_into(offset, view)
                yield view
        finally:
            buffers.release(buffer)

    def close(self) -> None:
        for segment in self._on_gpus.values():
            segment.close()
        for fd in self._fds:
            os.close(fd)
        self._on_gpus, self._fds = {}, []
