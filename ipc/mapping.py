"""Segments mapped into this process, and their tensors. torch is imported when the first tensor is asked for."""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from weightd.ipc.cuda import DeviceRange, Gpu, call
from weightd.ipc.dtypes import DTYPES
from weightd.ipc.errors import UnsupportedDtype
from weightd.ipc.manifest import Entry

if TYPE_CHECKING:
    import torch


class Mapping:
    """One segment of ``nbytes`` in this process. Its memory stays as long as this or any tensor made from it lives."""

    device: str
    """Where it is, as torch names it here."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._typed: dict[str, torch.Tensor] = {}

    def bytes(self, entry: Entry) -> Any:
        """The entry's bytes, with no type."""
        raise NotImplementedError

    def flat(self, dtype: torch.dtype, count: int) -> torch.Tensor:
        """The first ``count`` elements of the segment, taken for that type; ``count`` is not 0."""
        raise NotImplementedError

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

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor begins in this memory."""
        import torch

        if not self.nbytes or str(tensor.device) != self.device:
            return False
        start = self.flat(torch.uint8, self.nbytes).data_ptr()
        return start <= tensor.data_ptr() < start + self.nbytes

    def _whole(self, entry: Entry) -> torch.Tensor:
        import torch

        name = DTYPES[entry.dtype].torch
        dtype = getattr(torch, name, None) if name else None
        if dtype is None:
            raise UnsupportedDtype(
                f"tensor {entry.name!r} is {entry.dtype}, for which torch {torch.__version__} has no type: "
                "raw(name) gives its bytes"
            )
        count = self.nbytes // dtype.itemsize
        return self.flat(dtype, count) if count else torch.empty(0, dtype=dtype, device=self.device)


def _packed_f4(entry: Entry) -> tuple[int, ...]:
    if not entry.shape or entry.shape[-1] % 2:
        raise UnsupportedDtype(
            f"tensor {entry.name!r} is F4 with shape {entry.shape}: torch packs pairs along the last dimension, "
            "which is odd here: raw(name) gives its bytes"
        )
    return (*entry.shape[:-1], entry.shape[-1] // 2)


# ---------------------------------------------------------------------- host memory


def map_host(fd: int, nbytes: int, *, strict: bool) -> HostMapping:
    """The mapping of a segment, the one that this process has already where it has one. The caller keeps ``fd``."""
    status = os.fstat(fd)
    key = (status.st_dev, status.st_ino, strict)
    with _lock:
        mapping = _mapped.get(key)
        if mapping is None:
            mapping = _mapped[key] = HostMapping(fd, nbytes, strict=strict)
        return mapping


class HostMapping(Mapping):
    """One segment mapped from its memfd: zero-copy, and private, so that a stray write stays this process's own.

    ``strict`` maps it read-only instead: a stray write is a segmentation fault in the process that made it.
    """

    device = "cpu"

    def __init__(self, fd: int, nbytes: int, *, strict: bool = False) -> None:
        super().__init__(nbytes)
        protection = mmap.PROT_READ if strict else mmap.PROT_READ | mmap.PROT_WRITE
        self._map = mmap.mmap(fd, max(nbytes, 1), flags=mmap.MAP_PRIVATE, prot=protection)

    def bytes(self, entry: Entry) -> memoryview:
        return memoryview(self._map)[entry.offset : entry.offset + entry.nbytes]

    def flat(self, dtype: torch.dtype, count: int) -> torch.Tensor:
        import warnings

        import torch

        with warnings.catch_warnings():
            # torch warns of buffers that are not writable; with strict=True that is what was asked for.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(self._map, dtype=dtype, count=count)


_lock = threading.Lock()
_mapped: weakref.WeakValueDictionary[tuple[int, int, bool], HostMapping] = weakref.WeakValueDictionary()


# ---------------------------------------------------------------------- GPU memory


class DeviceMemory:
    """What keeps a GPU's memory at an address; ``let_go`` is called when nobody holds this any more."""

    def __init__(self, address: int, let_go: Callable[..., None], *arguments: Any) -> None:
        self.address = address
        # Not at the process's end: the kernel sees to that, and the driver may be gone by then.
        weakref.finalize(self, let_go, *arguments).atexit = False


class DeviceBytes:
    """Untyped bytes on a GPU, for whoever takes ``__cuda_array_interface__``: torch, CuPy, Numba, RAPIDS.

    The memory stays mapped as long as this lives, or whatever took it over from here.
    """

    def __init__(self, memory: DeviceMemory, offset: int, nbytes: int) -> None:
        self._memory = memory
        self.address = memory.address + offset
        self.nbytes = nbytes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        # torch takes nothing that says it is read-only. That it is so is the GPU's to enforce.
        return {
            "shape": (self.nbytes,),
            "typestr": "|u1",
            "data": (self.address if self.nbytes else 0, False),
            "strides": None,
            "stream": None,
            "version": 3,
        }


class CudaMapping(Mapping):
    """One segment mapped from its CUDA descriptor, read-only for the GPU: a kernel that writes to it faults.

    ``allocation`` is what the memory behind it measures, in bytes. With ``private``, this process's own copy of it,
    which it may write to; it takes as much memory again.
    """

    def __init__(self, gpu: Gpu, fd: int, nbytes: int, allocation: int, *, private: bool = False) -> None:
        """The caller keeps ``fd``. Raises CudaError."""
        super().__init__(nbytes)
        self.gpu = gpu
        self.device = f"cuda:{gpu.ordinal}"
        shared = DeviceRange.imported(gpu, fd, allocation, writable=False)
        if private:
            try:
                copy = _copied(gpu, shared.address, nbytes)
            finally:
                shared.close()
            self._memory = DeviceMemory(copy, _free, gpu, copy)
        else:
            self._memory = DeviceMemory(shared.address, shared.close)

    def bytes(self, entry: Entry) -> DeviceBytes:
        return DeviceBytes(self._memory, entry.offset, entry.nbytes)

    def flat(self, dtype: torch.dtype, count: int) -> torch.Tensor:
        import torch

        # As bytes first: the interface knows neither bfloat16 nor any float of 8 bits.
        whole = torch.as_tensor(DeviceBytes(self._memory, 0, count * dtype.itemsize), device=self.device)
        return whole.view(dtype)

    def cupy(self, entry: Entry) -> Any:
        """The entry as a CuPy array that shares this memory. Raises UnsupportedDtype."""
        import cupy

        name = DTYPES[entry.dtype].torch
        try:
            dtype = cupy.dtype("bool" if name == "bool" else name or "")
        except TypeError:
            raise UnsupportedDtype(
                f"tensor {entry.name!r} is {entry.dtype}, for which CuPy {cupy.__version__} has no type: "
                "raw(name) gives its bytes"
            ) from None
        memory = cupy.cuda.UnownedMemory(self._memory.address, max(self.nbytes, 1), self._memory, self.gpu.ordinal)
        return cupy.ndarray(entry.shape, dtype, cupy.cuda.MemoryPointer(memory, entry.offset))


def _copied(gpu: Gpu, address: int, nbytes: int) -> int:
    with gpu.context():
        copy = int(call("cuMemAlloc", max(nbytes, 1)))
        try:
            if nbytes:
                call("cuMemcpyDtoD", copy, address, nbytes)
                call("cuCtxSynchronize")  # copies within a device return before they are done
        except BaseException:
            call("cuMemFree", copy)
            raise
    return copy


def _free(gpu: Gpu, address: int) -> None:
    with gpu.context():
        call("cuMemFree", address)
