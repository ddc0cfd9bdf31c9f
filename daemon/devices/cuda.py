"""NVIDIA GPUs as devices: one allocation of the driver's per segment, filled through pinned memory.

``fd`` segments are driver VMM allocations (``cuMemCreate``), exported as POSIX descriptors, which the keeper holds and
engines import; ``cuda_ipc`` segments are plain ones (``cuMemAlloc``, what ``cudaMalloc`` calls), with the legacy handle
of 64 bytes. Neither can be exported the other way.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence

from weightd.daemon.devices import copier as copying
from weightd.daemon.devices import streaming
from weightd.daemon.devices.host_memory import address_of
from weightd.daemon.devices.pinned import PinnedBuffers
from weightd.daemon.errors import DeviceFailed, InsufficientCapacity
from weightd.daemon.limits import CudaLimits
from weightd.ipc.cuda import DeviceRange, Gpu, call, driver, gpus
from weightd.ipc.errors import CudaError, DeviceUnavailable

log = logging.getLogger(__name__)

_LARGE_PAGE = 2 << 20
_FREEING_SECONDS = 1.0
"""Seconds after which memory that was let go of is free: the keeper's descriptor of it is closed a moment later."""
IPC_HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
_REFUSALS = frozenset({1, 800, 801})  # invalid value, not permitted, not supported


def discover(capacity: Mapping[str, int], limits: CudaLimits) -> list[CudaDevice]:
    """The GPUs that this process sees, as ``cuda:0`` and so on; which cannot be used is said in the log."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []  # no driver here: not worth a word, nor the time to import anything
    found = []
    try:
        for gpu in gpus():
            try:
                found.append(CudaDevice(gpu, capacity.get(f"cuda:{gpu.ordinal}"), limits))
            except CudaError as error:
                log.warning("cuda:%d is not used: %s", gpu.ordinal, error)
    except (DeviceUnavailable, CudaError) as error:
        log.warning("GPUs are not used: %s", error)
    return found


class _HandleKinds(int):
    """A set of kinds, of which the bindings' enumeration has single ones only; some releases ask for its ``value``."""

    value = property(int)


class CudaDevice:
    """One GPU, as far as ``capacity`` bytes of it: all but the reserve, where nothing else is said.

    Nothing is taken of its memory before it is opened: a context alone takes some hundred MB.
    """

    def __init__(self, gpu: Gpu, capacity: int | None, limits: CudaLimits) -> None:
        self.gpu = gpu
        self.name = f"cuda:{gpu.ordinal}"
        self.uuid: str | None = gpu.uuid
        self.capacity = max(0, gpu.total_bytes - limits.reserve) if capacity is None else capacity
        by_descriptor = gpu.attribute("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED") and gpu.attribute(
            "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED"
        )
        self.handles: Sequence[str] = ("fd", "cuda_ipc") if by_descriptor else ("cuda_ipc",)
        self.quarantined = ""
        self._fabric = bool(gpu.attribute("HANDLE_TYPE_FABRIC_SUPPORTED"))
        self._limits = limits
        self._lock = threading.Lock()
        self._buffers: dict[int, PinnedBuffers] = {}
        self._path: streaming.FillPath | None = None
        self._digests: copying.DigestPath | None = None
        self._granularity = 0
        self.freed_at = float("-inf")
        """When a segment was closed last, in monotonic seconds."""

    def open(self) -> None:
        if self.quarantined:
            raise DeviceFailed(
                f"{self.name} ({self.uuid}) is in quarantine: {self.quarantined}: mend it, then 'weightd reload' tries "
                "it again; or stage on another device",
                device=self.name,
            )
        with self._lock:
            if self._path is not None:
                return
            try:
                with self.gpu.context():
                    path = streaming.choose(self.gpu, self._limits.fill_path)
                    self._digests = copying.choose_digests(self.gpu)
            except CudaError as error:
                kind = InsufficientCapacity if error.out_of_memory else DeviceFailed
                raise kind(f"{self.name} ({self.uuid}) cannot be opened: {error}", device=self.name) from None
            self._path = path
            log.info("%s (%s): filled by %s: %s; digests on the %s: %s",
                     self.name, self.uuid, path.name, path.reason, *self._digests)  # fmt: skip

    def available(self) -> int | None:
        if not self.gpu.active:
            return None
        free, _ = self.gpu.memory()
        return free - self._limits.reserve

    def describe(self) -> dict[str, str | int | None]:
        path, available = self._path, self.available()
        return {
            "uuid": self.uuid,
            "total_bytes": self.gpu.total_bytes,
            "reserve_bytes": self._limits.reserve,
            "available_bytes": None if available is None else max(0, available),
            "fill_path": path.name if path else None,
            "digest_path": self._digests.name if self._digests else None,
        }

    def footprint(self, nbytes: int) -> int:
        if not self._granularity:
            minimum = driver().CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
            self._granularity = _LARGE_PAGE  # of plain allocations, where there are no others
            if "fd" in self.handles:
                self._granularity = int(call("cuMemGetAllocationGranularity", self._properties(False), minimum))
        return max(1, -(-nbytes // self._granularity)) * self._granularity

    def allocate(self, nbytes: int, label: str, handle: str = "fd") -> FdSegment | IpcSegment:
        footprint = self.footprint(nbytes)
        while True:
            try:
                if handle == "cuda_ipc":
                    return IpcSegment(self, nbytes, footprint)
                return FdSegment.new(self, nbytes, footprint)
            except CudaError as error:
                if not error.out_of_memory:
                    raise DeviceFailed(f"{self.name} cannot hold {label}: {error}", device=self.name) from None
            free, total = self.gpu.memory()
            if time.monotonic() < self.freed_at + _FREEING_SECONDS:
                time.sleep(0.02)
                continue
            raise InsufficientCapacity(
                f"{self.name} has no {footprint} bytes left: {free} of {total} are free, others use the rest",
                device=self.name,
                needed_bytes=footprint,
                free_bytes=free,
            )

    def adopt(self, fd: int, nbytes: int) -> FdSegment:
        try:
            return FdSegment.adopted(self, fd, nbytes, self.footprint(nbytes))
        except CudaError as error:
            os.close(fd)
            raise ValueError(f"{self.name} cannot import it: {error}") from None

    def buffers(self, nbytes: int) -> PinnedBuffers:
        with self._lock:
            return self._buffers.setdefault(nbytes, PinnedBuffers(self.gpu, nbytes))

    def copier(self) -> copying.CudaCopier:
        return copying.CudaCopier(self.gpu, self.buffers, self._digests.name if self._digests else "host")

    def streams_into(self) -> int | None:
        return self.gpu.ordinal if self._path is not None and self._path.name == "streamer" else None

    def close(self) -> None:
        for buffers in self._buffers.values():
            buffers.close()
        self._buffers.clear()

    # ------------------------------------------------------------------ allocating

    def create(self, footprint: int) -> object:
        """A new VMM allocation's handle. Raises CudaError."""
        try:
            return call("cuMemCreate", footprint, self._properties(self._fabric), 0)
        except CudaError as error:
            if not self._fabric or error.result not in _REFUSALS:
                raise
            # The attribute speaks for the GPU; whether this container may, its IMEX channels decide.
            self._fabric = False
            return call("cuMemCreate", footprint, self._properties(False), 0)

    def _properties(self, fabric: bool) -> object:
        cuda = driver()
        kinds = cuda.CUmemAllocationHandleType
        wanted = int(kinds.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)
        if fabric:
            wanted |= int(kinds.CU_MEM_HANDLE_TYPE_FABRIC)
        properties = cuda.CUmemAllocationProp()
        properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location = self.gpu.location
        properties.requestedHandleTypes = _HandleKinds(wanted)
        properties.allocFlags.gpuDirectRDMACapable = int(
            bool(self.gpu.attribute("GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED"))
        )
        return properties


class _CudaSegment:
    """What both kinds have in common: bytes at an address of one GPU."""

    buffered = False
    writable = True  # engines map it read-only: what was lent can still be filled

    def __init__(self, device: CudaDevice, nbytes: int, footprint: int, address: int) -> None:
        self.device = device
        self.nbytes = nbytes
        self.footprint = footprint
        self.address = address

    @property
    def view(self) -> memoryview:
        raise TypeError("GPU memory has no view")

    def _zero(self) -> None:
        with self.device.gpu.context():
            call("cuMemsetD8", self.address, 0, self.footprint)
            call("cuCtxSynchronize")  # a memset returns before it is done

    def write(self, offset: int, data: memoryview) -> None:
        source = address_of(data)
        with self.device.gpu.context():
            call("cuMemcpyHtoD", self.address + offset, source, len(data))

    def read_into(self, offset: int, target: memoryview) -> None:
        if target:
            place = address_of(target)
            with self.device.gpu.context():
                call("cuMemcpyDtoH", place, self.address + offset, len(target))


class FdSegment(_CudaSegment):
    """A VMM allocation, mapped for writing here until it is sealed, and read-only by engines always."""

    handle = "fd"

    def __init__(self, device: CudaDevice, nbytes: int, fd: int, memory: DeviceRange) -> None:
        super().__init__(device, nbytes, memory.nbytes, memory.address)
        self.fd = fd
        self._memory = memory

    @classmethod
    def new(cls, device: CudaDevice, nbytes: int, footprint: int) -> FdSegment:
        """A zeroed one. Raises CudaError."""
        kind = driver().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        with device.gpu.context():
            allocation = device.create(footprint)
            try:
                fd = int(call("cuMemExportToShareableHandle", allocation, kind, 0))
            except CudaError:
                call("cuMemRelease", allocation)
                raise
        os.set_inheritable(fd, False)
        try:
            segment = cls(device, nbytes, fd, DeviceRange(device.gpu, allocation, footprint, writable=True))
        except CudaError:
            os.close(fd)
            raise
        try:
            segment._zero()
        except CudaError:
            segment.close()
            raise
        return segment

    @classmethod
    def adopted(cls, device: CudaDevice, fd: int, nbytes: int, footprint: int) -> FdSegment:
        """From the descriptor that the keeper held. Raises CudaError."""
        return cls(device, nbytes, fd, DeviceRange.imported(device.gpu, fd, footprint, writable=True))

    def lend(self) -> int:
        return os.dup(self.fd)

    def seal(self) -> None:
        try:
            self._memory.allow(writable=False)
        except CudaError as error:
            # It would have guarded against ourselves. Engines map it read-only in any case.
            log.warning("%s: a segment stays writable to the daemon: %s", self.device.name, error)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self.device.freed_at = time.monotonic()
            try:
                self._memory.close()
            except CudaError as error:
                log.error("%s: a segment cannot be unmapped: %s", self.device.name, error)


class IpcSegment(_CudaSegment):
    """A plain allocation with a legacy handle: writable by who opens it, and gone with this process."""

    handle = "cuda_ipc"
    fd = -1

    def __init__(self, device: CudaDevice, nbytes: int, footprint: int) -> None:
        with device.gpu.context():
            super().__init__(device, nbytes, footprint, int(call("cuMemAlloc", footprint)))
        self._open = True
        try:
            self._zero()
            self.ipc_handle, self.ipc_offset = self._exported()
        except CudaError:
            self.close()
            raise

    def _exported(self) -> tuple[bytes, int]:
        """The handle, and where in what it opens the segment begins: the driver may have put it into a larger block."""
        with self.device.gpu.context():
            base, _ = call("cuMemGetAddressRange", self.address)
            handle = call("cuIpcGetMemHandle", self.address)
        return ctypes.string_at(handle.getPtr(), IPC_HANDLE_BYTES), self.address - int(base)

    def lend(self) -> int:
        raise TypeError("a legacy handle is no descriptor")

    def seal(self) -> None:
        """There is nothing that would hold whoever opens it."""

    def close(self) -> None:
        if self._open:
            self._open = False
            with contextlib.suppress(CudaError), self.device.gpu.context():
                call("cuCtxSynchronize")
                call("cuMemFree", self.address)
