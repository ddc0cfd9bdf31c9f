"""Descriptors as memory, and memory as torch tensors. torch is imported when the first tensor is asked for."""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from typing import TYPE_CHECKING

from weightd.ipc.dtypes import DTYPES
from weightd.ipc.errors import UnsupportedDtype
from weightd.ipc.manifest import Entry

if TYPE_CHECKING:
    import torch


def map_segment(fd: int, nbytes: int, *, strict: bool) -> HostMapping:
    """The mapping of a segment, the one that this process has already where it has one. The caller keeps ``fd``."""
    status = os.fstat(fd)
    key = (status.st_dev, status.st_ino, strict)
    with _lock:
        mapping = _mapped.get(key)
        if mapping is None:
            mapping = _mapped[key] = HostMapping(fd, nbytes, strict=strict)
        return mapping


class HostMapping:
    """One segment mapped from its memfd: zero-copy, and private, so that a stray write stays this process's own.

    ``strict`` maps it read-only instead: a stray write is a segmentation fault in the process that made it. The memory
    stays mapped as long as this object or any tensor made from it lives.
    """

    def __init__(self, fd: int, nbytes: int, *, strict: bool = False) -> None:
        protection = mmap.PROT_READ if strict else mmap.PROT_READ | mmap.PROT_WRITE
        self._map = mmap.mmap(fd, max(nbytes, 1), flags=mmap.MAP_PRIVATE, prot=protection)
        self._strict = strict
        self._nbytes = nbytes
        self._typed: dict[str, torch.Tensor] = {}

    def bytes(self, entry: Entry) -> memoryview:
        """The entry's bytes, with no type."""
        return memoryview(self._map)[entry.offset : entry.offset + entry.nbytes]

    def tensor(self, entry: Entry) -> torch.Tensor:
        """The entry as a tensor that shares this memory. Raises UnsupportedDtype."""
        typed = self._typed.get(entry.dtype)
        if typed is None:
            typed = self._typed[entry.dtype] = self._whole(entry)
        shape = entry.shape
        if entry.dtype == "F4":
            shape = _packed_f4(entry)
        step, strides = 1, [0] * len(shape)
        for dim in range(len(shape) - 1, -1, -1):
            strides[dim] = step
            step *= shape[dim]
        # One call a tensor: every entry starts at a multiple of its element size, as entries are aligned to 256 bytes.
        return typed.as_strided(shape, strides, entry.offset // typed.element_size())

    def _whole(self, entry: Entry) -> torch.Tensor:
        """All of the segment as a flat tensor of the entry's type."""
        import warnings

        import torch

        name = DTYPES[entry.dtype].torch
        dtype = getattr(torch, name, None) if name else None
        if dtype is None:
            raise UnsupportedDtype(
                f"tensor {entry.name!r} is {entry.dtype}, for which torch {torch.__version__} has no type: "
                "raw(name) gives its bytes"
            )
        size = self._nbytes // dtype.itemsize
        if not size:
            return torch.empty(0, dtype=dtype)
        with warnings.catch_warnings():
            # torch warns of buffers that are not writable; with strict=True that is what was asked for.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(self._map, dtype=dtype, count=size)


def _packed_f4(entry: Entry) -> tuple[int, ...]:
    if not entry.shape or entry.shape[-1] % 2:
        raise UnsupportedDtype(
            f"tensor {entry.name!r} is F4 with shape {entry.shape}: torch packs pairs along the last dimension, "
            "which is odd here: raw(name) gives its bytes"
        )
    return (*entry.shape[:-1], entry.shape[-1] // 2)


_lock = threading.Lock()
_mapped: weakref.WeakValueDictionary[tuple[int, int, bool], HostMapping] = weakref.WeakValueDictionary()
