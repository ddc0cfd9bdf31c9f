"""Memory that copies go to by themselves, as a GPU's is: host memory that they reach only when they are waited for."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence

from weightd.daemon.devices.cpu import CpuDevice
from weightd.daemon.layouts.digests import leaf_digest
from weightd.daemon.layouts.recipe import Block


class FarDevice(CpuDevice):
    """``spoil`` may do something to the bytes of each copy, on their way."""

    uuid = "GPU-far"  # type: ignore[assignment]

    def __init__(self, name: str = "cuda:0", spoil: Callable[[bytearray], None] = lambda data: None) -> None:
        super().__init__(name, 1 << 40)
        self.spoil = spoil
        self.copiers: list[FarCopier] = []

    def copier(self) -> FarCopier:  # type: ignore[override]
        self.copiers.append(FarCopier(self))
        return self.copiers[-1]


class FarCopier:
    """Does what it was told when a mark after that is waited for."""

    def __init__(self, device: FarDevice) -> None:
        self._device = device
        self._told: list[tuple[int, Block, int]] = []
        self._done = 0
        self.closed = False

    def put(self, address: int, block: Block, source: int) -> None:
        self._told.append((address, block, source))

    def holds(self, address: int, block: Block, source: int) -> bool:
        return all(ctypes.string_at(to, block.run) == ctypes.string_at(start, block.run)
                   for to, start in _rows(address, block, source))  # fmt: skip

    def mark(self) -> FarMark:
        return FarMark(self, len(self._told))

    def do(self, count: int) -> None:
        while self._done < count:
            address, block, source = self._told[self._done]
            for to, start in _rows(address, block, source):
                data = bytearray(ctypes.string_at(start, block.run))
                self._device.spoil(data)
                ctypes.memmove(to, bytes(data), block.run)
            self._done += 1

    @contextlib.contextmanager
    def pin(self, address: int, nbytes: int, *, read_only: bool) -> Iterator[bool]:
        yield False

    def fetch(self, target: int, address: int, nbytes: int) -> None:
        ctypes.memmove(target, address, nbytes)

    def leaves(self, ranges: Sequence[tuple[int, int]]) -> list[int]:
        return [leaf_digest(ctypes.string_at(address, nbytes)) for address, nbytes in ranges]

    def close(self) -> None:
        self.closed = True


class FarMark:
    def __init__(self, copier: FarCopier, count: int) -> None:
        self._copier = copier
        self._count = count

    def wait(self) -> None:
        self._copier.do(self._count)


def _rows(address: int, block: Block, source: int) -> Iterator[tuple[int, int]]:
    """(target, source) of each run."""
    for row in range(block.rows):
        target = address + block.target + row * block.target_stride
        yield target, source + block.source + row * block.source_stride
