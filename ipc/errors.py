"""What attaching can raise: one class per thing that the caller can do about it."""

from __future__ import annotations

from typing import Any


class WeightdError(Exception):
    """Base of everything that ``weightd.ipc`` raises. ``code`` is the daemon's, where the daemon said it."""

    def __init__(self, message: str, *, code: str = "", details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.details = details or {}


class DaemonUnavailable(WeightdError):
    """No daemon answers at the socket: start one, point at another, or load weights another way."""


class DaemonNotTrusted(DaemonUnavailable):
    """Somebody else listens where the daemon should be; nothing was said to them. The message says what to set."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="daemon_not_trusted")


class DeviceUnavailable(WeightdError):
    """This process cannot use the GPU that is meant: no driver, no bindings, or it does not see that one."""


class CudaError(WeightdError):
    """The CUDA driver refused a call. ``result`` is its ``CUresult``."""

    def __init__(self, message: str, result: int) -> None:
        super().__init__(message, code="cuda_error", details={"result": result})
        self.result = result
        self.uuid: str | None = None
        """Of the GPU whose context the thread was in, where it was in one."""

    @property
    def out_of_memory(self) -> bool:
        """Whether the GPU has no room: nothing else is wrong with it."""
        return self.result == _OUT_OF_MEMORY

    @property
    def sticky(self) -> bool:
        """Whether every further call of this process fails as well."""
        return self.result in _STICKY


_OUT_OF_MEMORY = 2
_STICKY = frozenset({214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999})
# CUDA driver API, what it says of CUresult: "the context cannot be used". Illegal address, launch timeout, destroyed
# context, assert, hardware stack, illegal instruction, misaligned address, invalid address space or program counter,
# launch failure, tensor memory leak, uncorrectable ECC and NVLink errors, a contained GPU, unknown.


class RequestRefused(WeightdError):
    """The daemon will not do it: the request is wrong, not allowed, or does not fit. ``code`` says which."""


class StageFailed(WeightdError):
    """The daemon tried and failed; the message is its reason."""


class DigestMismatch(StageFailed):
    """The bytes are not those that were expected."""


class NotReady(WeightdError):
    """A tensor of a stage that still loads is not verified yet: take it from ``stream()``, or ``wait()``."""


class AttachTimeout(WeightdError, TimeoutError):
    """The stage did not become ready in time. It goes on loading."""


class UnsupportedDtype(WeightdError, TypeError):
    """torch has no type that views this tensor; ``Weights.raw(name)`` gives its bytes."""


class ModelMismatch(WeightdError):
    """The weights are not those that a model's parameters want: names, shapes or dtypes differ."""
