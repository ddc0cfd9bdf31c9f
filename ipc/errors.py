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


class DeviceUnavailable(WeightdError):
    """This process cannot use the GPU that is meant: no driver, no bindings, or it does not see that one."""


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
