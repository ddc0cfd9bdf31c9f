"""What ``weightd doctor`` says of GPUs. Looks at them from a process of its own, contexts and self-tests included."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from importlib import util

from weightd.daemon.devices import streaming
from weightd.daemon.devices.copier import choose_digests
from weightd.daemon.devices.pinned import numa_node
from weightd.daemon.doctor.report import Finding
from weightd.ipc.cuda import Gpu, call, gpus
from weightd.ipc.errors import CudaError, DeviceUnavailable

_INITIAL_NAMESPACES = {"pid": 0xEFFFFFFC, "ipc": 0xEFFFFFFF}
"""Inodes of the namespaces that the system started with: include/linux/proc_ns.h."""


def examine_gpus() -> Iterator[Finding]:
    """The driver, every GPU that is seen, and what decides over legacy handles. Raises CudaError."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        wanted = os.environ.get("NVIDIA_VISIBLE_DEVICES") not in (None, "", "void", "none") or any(
            name.startswith("nvidia") for name in os.listdir("/dev")
        )
        if wanted:
            yield Finding(
                "CUDA driver", "error", "GPUs are meant to be here, libcuda.so.1 is not",
                "run the container with the NVIDIA runtime (runtimeClassName: nvidia), with the capability compute",
            )  # fmt: skip
        else:
            yield Finding("CUDA driver", "ok", "none, so that segments live in host memory")
        return
    try:
        found = gpus()
    except DeviceUnavailable as error:
        yield Finding("CUDA driver", "error", str(error), "mend that, or use device cpu")
        return
    version = call("cuDriverGetVersion")
    yield Finding("CUDA driver", "ok", f"{_dotted(version)}{_runtime()}, {len(found)} GPUs")
    for ordinal in sorted(set(range(call("cuDeviceGetCount"))) - {gpu.ordinal for gpu in found}):
        yield Finding(
            f"cuda:{ordinal}", "error", "does not answer, and is not used",
            "look for its Xid in the kernel's log and reset or replace it; the others are served meanwhile",
        )  # fmt: skip
    for gpu in found:
        yield from _gpu(gpu)
    yield from _namespaces()


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _runtime() -> str:
    if util.find_spec("cupy") is None:
        return ""
    import cupy

    return f", CuPy {cupy.__version__} with runtime {_dotted(cupy.cuda.runtime.runtimeGetVersion())}"


def _gpu(gpu: Gpu) -> Iterator[Finding]:
    name = f"cuda:{gpu.ordinal}"
    node = numa_node(gpu)
    kind = "MIG instance" if gpu.is_mig else "GPU"
    yield Finding(name, "ok", f"{kind} {gpu.name}, {gpu.uuid}, {gpu.total_bytes} bytes"
                  + (f", NUMA node {node}" if node is not None else ""))  # fmt: skip
    if gpu.attribute("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED") and gpu.attribute(
        "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED"
    ):
        yield Finding(f"{name} handles", "ok", "fd (virtual memory management, POSIX descriptors), cuda_ipc")
    else:
        yield Finding(
            f"{name} handles", "error", "no virtual memory management with POSIX descriptors",
            'stage with "handle": "cuda_ipc"; a virtual GPU gets it from a licensed profile, WSL and old drivers never',
        )  # fmt: skip
    if gpu.attribute("HANDLE_TYPE_FABRIC_SUPPORTED"):
        yield Finding(f"{name} fabric", "ok", "fabric handles, where an IMEX channel is given to the container")
    else:
        yield Finding(f"{name} fabric", "ok", "no fabric handles: they need NVLink switches across nodes")
    rdma = gpu.attribute("GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED")
    reach = "reach segments (GPUDirect RDMA with VMM)" if rdma else "do not reach segments"
    yield Finding(
        f"{name} RDMA", "ok" if rdma else "warning",
        f"network adapters {reach}",
        "" if rdma else "use the driver's open kernel modules, or load nvidia-peermem; else peers go through the host",
    )  # fmt: skip
    yield from _paths(gpu, name)


def _paths(gpu: Gpu, name: str) -> Iterator[Finding]:
    try:
        free, _ = gpu.memory()
        with gpu.context():
            path = streaming.choose(gpu, "auto")
    except CudaError as error:
        yield Finding(f"{name} memory", "error", str(error), "free memory on it: a context takes some hundred MB")
        return
    yield Finding(f"{name} memory", "ok", f"{free} bytes free now")
    if path.name == "streamer":
        yield Finding(f"{name} fill path", "ok", path.reason)
    else:
        yield Finding(
            f"{name} fill path", "warning", f"pinned bounce buffers: {path.reason}",
            "they are correct too; pip install 'weightd[daemon]' brings the streamer's release that has been tried",
        )  # fmt: skip
    with gpu.context():
        digests = choose_digests(gpu)
    if digests.name == "gpu":
        yield Finding(f"{name} digests", "ok", f"computed on the GPU: {digests.reason}")
    else:
        yield Finding(
            f"{name} digests", "warning", f"computed on the host, of bytes that are read back: {digests.reason}",
            "pip install 'weightd[cuda13]', or cuda12 with an older driver",
        )  # fmt: skip


def _namespaces() -> Iterator[Finding]:
    own = [kind for kind, inode in _INITIAL_NAMESPACES.items() if os.stat(f"/proc/self/ns/{kind}").st_ino != inode]
    if own:
        yield Finding(
            "cuda_ipc", "warning",
            f"legacy handles open only in processes that share this one's {' and '.join(own)} namespace",
            'share them (shareProcessNamespace: true in the Pod), or use handles of kind "fd", which need neither',
        )  # fmt: skip
    else:
        yield Finding("cuda_ipc", "ok", "the system's own namespaces: legacy handles open in every process of it")
