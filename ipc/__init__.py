"""weightd.ipc: what an engine needs to attach to weights that a weightd daemon holds.

Importing it costs no torch, no CUDA and no HTTP client: these come when a tensor, or the API, is first asked for.
"""

from weightd.ipc.client import Client
from weightd.ipc.errors import (
    AttachTimeout,
    CudaError,
    DaemonNotTrusted,
    DaemonUnavailable,
    DeviceUnavailable,
    DigestMismatch,
    ModelMismatch,
    NotReady,
    RequestRefused,
    StageFailed,
    UnsupportedDtype,
    WeightdError,
)
from weightd.ipc.manifest import Entry, Manifest
from weightd.ipc.runtime_dir import runtime_dir
from weightd.ipc.weights import Weights, attach

__all__ = [
    "AttachTimeout",
    "Client",
    "CudaError",
    "DaemonNotTrusted",
    "DaemonUnavailable",
    "DeviceUnavailable",
    "DigestMismatch",
    "Entry",
    "Manifest",
    "ModelMismatch",
    "NotReady",
    "RequestRefused",
    "StageFailed",
    "UnsupportedDtype",
    "WeightdError",
    "Weights",
    "attach",
    "runtime_dir",
]
