"""NVIDIA GPUs through the CUDA driver API: devices by UUID, contexts, errors, and memory mapped by descriptor.

Through NVIDIA's ``cuda-bindings``, imported when the first GPU is asked for. Every call runs in the device's primary
context, which is the one that the CUDA runtime, and so torch and CuPy, use as well.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from typing import Any

from weightd.ipc.errors import CudaError, DeviceUnavailable

log = logging.getLogger(__name__)

_entered = threading.local()
"""``gpu``: the GPU whose context this thread is in."""
_on_sticky: list[Callable[[CudaError], None]] = []


def on_sticky(callback: Callable[[CudaError], None]) -> None:
    """Have ``callback`` told of the first sticky error, in the thread that met it, before it is raised."""
    _on_sticky[:] = [callback]


def report(error: CudaError) -> CudaError:
    """Every error of the GPU passes here, whichever library met it. Returns it, to be raised."""
    if (gpu := getattr(_entered, "gpu", None)) is not None:
        error.uuid = gpu.uuid
    if error.sticky:
        for callback in _on_sticky:
            callback(error)
    return error


@cache
def driver() -> Any:
    """``cuda.bindings.driver``, initialised. Raises DeviceUnavailable with the remedy."""
    try:
        bindings = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise DeviceUnavailable(
            f"cuda-bindings is not installed ({error}): pip install 'weightd[cuda]'", code="no_cuda_bindings"
        ) from None
    try:
        (result,) = bindings.cuInit(0)
    except Exception as error:  # cuda-pathfinder has an exception of its own for a driver that is not there
        raise DeviceUnavailable(
            f"the CUDA driver, libcuda.so.1, cannot be loaded: {str(error).splitlines()[0]}: give the container the "
            "GPU (nvidia-container-toolkit, or a device plugin), or use device cpu",
            code="no_cuda_driver",
        ) from None
    if result:
        raise DeviceUnavailable(f"the CUDA driver does not start: {describe(bindings, result)}", code="no_cuda_driver")
    return bindings


def describe(bindings: Any, result: Any) -> str:
    """A ``CUresult`` in the driver's own words."""
    _, name = bindings.cuGetErrorName(result)
    _, text = bindings.cuGetErrorString(result)
    if not name:
        return f"error {int(result)}"
    return f"{name.decode()} ({int(result)}): {text.decode() if text else ''}"


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the driver; returns what it gives besides its result. Raises CudaError."""
    bindings = driver()
    result, *values = getattr(bindings, name)(*arguments)
    if result:
        raise report(CudaError(f"{name}: {describe(bindings, result)}", int(result)))
    return values[0] if len(values) == 1 else tuple(values) or None


def _text(buffer: bytes) -> str:
    return buffer.split(b"\0")[0].decode(errors="replace")


class Gpu:
    """One GPU (or MIG instance) that this process sees, under the number that it has here."""

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal
        self.device = call("cuDeviceGet", ordinal)
        # v2 tells MIG instances of one GPU apart; newer bindings have it under the plain name.
        by = "cuDeviceGetUuid_v2" if hasattr(driver(), "cuDeviceGetUuid_v2") else "cuDeviceGetUuid"
        number = uuid.UUID(bytes=bytes(call(by, self.device).bytes))
        self.name: str = _text(call("cuDeviceGetName", 100, self.device))
        self.uuid = f"{'MIG' if self.is_mig else 'GPU'}-{number}"
        self.total_bytes: int = call("cuDeviceTotalMem", self.device)
        self._lock = threading.Lock()
        self._context: Any = None

    @property
    def is_mig(self) -> bool:
        return " MIG " in f"{self.name} "

    def attribute(self, name: str) -> int:
        """A ``CU_DEVICE_ATTRIBUTE_*``; 0 where this driver does not know it."""
        member = getattr(driver().CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}", None)
        if member is None:
            return 0
        try:
            return int(call("cuDeviceGetAttribute", member, self.device))
        except CudaError as error:
            if error.sticky:
                raise
            return 0

    @property
    def pci_address(self) -> str:
        """Where it hangs, as ``/sys/bus/pci/devices`` has it."""
        return _text(call("cuDeviceGetPCIBusId", 32, self.device)).lower()

    @property
    def active(self) -> bool:
        """Whether this process has a context on it, which takes some of its memory."""
        return self._context is not None

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Make its primary context this thread's current one; the first use makes it, which takes a while."""
        outer, _entered.gpu = getattr(_entered, "gpu", None), self
        try:
            if self._context is None:
                with self._lock:
                    if self._context is None:
                        self._context = call("cuDevicePrimaryCtxRetain", self.device)
            call("cuCtxPushCurrent", self._context)
            try:
                yield
            except BaseException:
                with contextlib.suppress(CudaError):  # what failed inside says more
                    call("cuCtxPopCurrent")
                raise
            call("cuCtxPopCurrent")
        finally:
            _entered.gpu = outer

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes, whoever uses them."""
        with self.context():
            free, total = call("cuMemGetInfo")
        return int(free), int(total)

    @cached_property
    def location(self) -> Any:
        """This GPU's memory as a place for allocations and for rights of access."""
        location = driver().CUmemLocation()
        location.type = driver().CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = self.ordinal
        return location


@cache
def gpus() -> Sequence[Gpu]:
    """The GPUs that this process sees, in its own order, without those that do not answer. Raises DeviceUnavailable."""
    found = []
    for ordinal in range(call("cuDeviceGetCount")):
        try:
            found.append(Gpu(ordinal))
        except CudaError as error:
            log.warning("cuda:%d is not used: %s", ordinal, error)
    return found


def gpu_by_uuid(wanted: str) -> Gpu:
    """The GPU with a UUID, whatever number it has here. Raises DeviceUnavailable."""
    for gpu in gpus():
        if gpu.uuid == wanted:
            return gpu
    seen = ", ".join(gpu.uuid for gpu in gpus()) or "none"
    raise DeviceUnavailable(
        f"the weights are on {wanted}, which this process does not see (it sees {seen}): give it that GPU too, by "
        "CUDA_VISIBLE_DEVICES or the container's device request, or stage them on one that it sees",
        code="device_not_visible",
    )


def gpu_by_name(name: str) -> Gpu:
    """The GPU that this process knows as ``cuda`` or ``cuda:N``. Raises DeviceUnavailable."""
    number = name.partition(":")[2] or "0"
    for gpu in gpus():
        if str(gpu.ordinal) == number:
            return gpu
    seen = ", ".join(f"cuda:{gpu.ordinal}" for gpu in gpus()) or "none"
    raise DeviceUnavailable(
        f"{name} is not here, or does not answer: this process sees {seen}", code="device_not_visible"
    )


class DeviceRange:
    """A range of addresses on a GPU with one allocation's memory behind it; closing it takes the memory away.

    ``allocation`` is the driver's handle, which this takes over: the memory lives on as long as any handle, range or
    exported descriptor of it, in any process.
    """

    def __init__(self, gpu: Gpu, allocation: Any, nbytes: int, *, writable: bool) -> None:
        """Raises CudaError; the handle is released then, too."""
        self.gpu = gpu
        self.nbytes = nbytes
        self.address = 0
        self._reserved = self._mapped = False
        try:
            with gpu.context():
                self.address = int(call("cuMemAddressReserve", nbytes, 0, 0, 0))
                self._reserved = True
                call("cuMemMap", self.address, nbytes, 0, allocation, 0)
                self._mapped = True
                self.allow(writable=writable)
        except BaseException:
            self.close()
            raise
        finally:
            call("cuMemRelease", allocation)

    @classmethod
    def imported(cls, gpu: Gpu, fd: int, nbytes: int, *, writable: bool) -> DeviceRange:
        """The memory behind a descriptor that another process exported; the caller keeps ``fd``. Raises CudaError."""
        kind = driver().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        with gpu.context():
            allocation = call("cuMemImportFromShareableHandle", fd, kind)
        return cls(gpu, allocation, nbytes, writable=writable)

    def allow(self, *, writable: bool) -> None:
        """Set what this process may do with it; anything else is a fault that ends the process's context."""
        flags = driver().CUmemAccess_flags
        access = driver().CUmemAccessDesc()
        access.location = self.gpu.location
        access.flags = flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE if writable else flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        with self.gpu.context():
            call("cuMemSetAccess", self.address, self.nbytes, [access], 1)

    def close(self) -> None:
        """Unmap it, once nothing on the GPU uses it any more. Safe to call twice."""
        if not self._reserved:
            return
        self._reserved, mapped, self._mapped = False, self._mapped, False
        with self.gpu.context():
            if mapped:
                call("cuCtxSynchronize")
                call("cuMemUnmap", self.address, self.nbytes)
            call("cuMemAddressFree", self.address, self.nbytes)
