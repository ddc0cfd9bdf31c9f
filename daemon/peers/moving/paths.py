"""Which way bytes go between two nodes, and which better way there would have been.

NIXL does not say by what it moves bytes, and hides the endpoints of UCX that it has. UCX keeps a tree of all its
objects, meant for ``ucx_vfs``: there an agent's endpoints are found, and UCX tells of what transports each is made.
Which of them leads to a peer shows in NIXL's estimate for a transfer, which is what UCX says of that very endpoint.
Nothing of this writes logs or needs a setting. Where any of it fails, the transport is ``unknown``.

What remains: between being found and being asked, some µs, an endpoint can go with its peer, and the process with it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

UNKNOWN = "unknown"

_SHARED_MEMORY = frozenset({"cma", "sysv", "posix", "xpmem", "knem"})
_RDMA = re.compile(r"(rc|dc|ud|srd|gga|ib)(_.*)?")

_SETTINGS = {
    "rdma": {"ib", "rc", "rc_v", "rc_x", "rc_verbs", "rc_mlx5", "dc", "dc_x", "dc_mlx5", "srd"},
    "shm": {"sm", "shm", "cma", "xpmem", "knem"},
    "cuda_ipc": {"cuda", "cuda_ipc"},
}
"""What UCX_TLS calls them."""


def transport_of(names: Collection[str], *, gpus: int = 0) -> str:
    """By what an endpoint made of UCX's transports ``names`` reads much: rdma, cuda_ipc, shm, tcp or unknown.

    An endpoint has some only for small messages (TCP beside CMA), or for memory of another kind (cuda_ipc, where
    not both memories are GPUs').
    """
    if gpus == 2 and "cuda_ipc" in names:
        return "cuda_ipc"
    if any(_RDMA.fullmatch(name) for name in names):
        return "rdma"
    if not _SHARED_MEMORY.isdisjoint(names):
        return UNKNOWN if gpus else "shm"  # it does not reach a GPU's memory: through copies on the way, or TCP
    return "tcp" if "tcp" in names else UNKNOWN


class _Transport(ctypes.Structure):
    """``ucp_transport_entry_t``"""

    _fields_ = [("transport", ctypes.c_char_p), ("device", ctypes.c_char_p)]


class _Attributes(ctypes.Structure):
    """``ucp_ep_attr_t``"""

    _fields_ = [
        ("fields", ctypes.c_uint64),
        ("name", ctypes.c_char * 32),
        ("local", ctypes.c_char * 128),
        ("remote", ctypes.c_char * 128),
        ("transports", ctypes.POINTER(_Transport)),
        ("count", ctypes.c_uint),
        ("size", ctypes.c_size_t),
        ("user_data", ctypes.c_void_p),
    ]


class _Transfer(ctypes.Structure):
    """``ucp_ep_evaluate_perf_param_t``"""

    _fields_ = [("fields", ctypes.c_uint64), ("nbytes", ctypes.c_size_t)]


class _Estimate(ctypes.Structure):
    """``ucp_ep_evaluate_perf_attr_t``"""

    _fields_ = [("fields", ctypes.c_uint64), ("seconds", ctypes.c_double)]


_TRANSPORTS = 1 << 3
_MAX_TRANSPORTS = 64


class _UCX:
    """The libraries that NIXL has loaded. Raises OSError, AttributeError or ValueError where they are others."""

    def __init__(self) -> None:
        paths = {line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()}
        (ucs,) = (path for path in paths if re.search(r"/libucs[-.][^/]*$", path))
        (ucp,) = (path for path in paths if re.search(r"/libucp[-.][^/]*$", path))
        self._list: Any = ctypes.CDLL(ucs).ucs_vfs_path_list_dir
        self._query: Any = ctypes.CDLL(ucp).ucp_ep_query
        self._evaluate: Any = ctypes.CDLL(ucp).ucp_ep_evaluate_perf
        self._libc = ctypes.CDLL(None)
        self._libc.open_memstream.restype = ctypes.c_void_p

    def endpoints(self, agent: str) -> list[int]:
        """Addresses of an agent's endpoints."""
        worker = f"/ucp/context/{agent}/worker/{agent}:0"
        self._names(worker)  # which has UCX list its endpoints anew
        return [int(address, 16) for address in self._names(f"{worker}/ep").split("0x")[1:]]

    def _names(self, path: str) -> str:
        """What is in a folder of UCX's tree, one name after the other."""
        buffer, length = ctypes.c_void_p(), ctypes.c_size_t()
        file = ctypes.c_void_p(self._libc.open_memstream(ctypes.byref(buffer), ctypes.byref(length)))
        if not file:
            raise OSError("no memory")
        # The tree is locked meanwhile; a function in Python would wait for the GIL, which can wait for the tree.
        self._list(path.encode(), self._libc.fputs, file)
        self._libc.fclose(file)
        names = ctypes.string_at(buffer, length.value)
        self._libc.free(buffer)
        return names.decode()

    def microseconds(self, endpoint: int, nbytes: int) -> int:
        """The estimate for a transfer, as NIXL gives it; -1 where there is none."""
        estimate = _Estimate(1)
        if self._evaluate(ctypes.c_void_p(endpoint), ctypes.byref(_Transfer(1, nbytes)), ctypes.byref(estimate)):
            return -1
        return int(estimate.seconds * 1e6)

    def transports(self, endpoint: int) -> frozenset[str]:
        """What an endpoint is made of."""
        entries = (_Transport * _MAX_TRANSPORTS)()
        attributes = _Attributes(
            fields=_TRANSPORTS, transports=entries, count=_MAX_TRANSPORTS, size=ctypes.sizeof(_Transport)
        )
        if self._query(ctypes.c_void_p(endpoint), ctypes.byref(attributes)):
            return frozenset()
        return frozenset(entry.transport.decode() for entry in entries[: attributes.count] if entry.transport)


@functools.cache
def _ucx() -> _UCX:
    return _UCX()


def transport(agent: str, nbytes: int, microseconds: int, *, gpus: int = 0) -> str:
    """By what an agent reads from the peer for which NIXL estimates ``microseconds`` for ``nbytes``. Never raises."""
    try:
        ucx = _ucx()
        found = {
            transport_of(ucx.transports(endpoint), gpus=gpus)
            for endpoint in ucx.endpoints(agent)
            if abs(ucx.microseconds(endpoint, nbytes) - microseconds) <= 1
        }
    except (OSError, AttributeError, ValueError):
        return UNKNOWN
    return found.pop() if len(found) == 1 else UNKNOWN


class Missed(NamedTuple):
    """A better way than was taken."""

    path: str
    """rdma, shm or cuda_ipc"""
    reason: str
    """Why it may not have been taken, and what to do about it."""


def better_path(
    transport: str,
    *,
    same_host: bool,
    gpus: int = 0,
    environment: Mapping[str, str] = os.environ,
    root: Path = Path("/"),
) -> Missed | None:
    """What would have been better than TCP, as far as this machine shows; None where it was not TCP, or nothing is.

    ``same_host``: the peer is on this machine. ``gpus``: of the two memories, how many are GPUs'. Whether the *peer*
    has RDMA cannot be seen from here: in a fleet where only some nodes have it, this speaks up on those that do.
    """
    if transport != "tcp":
        return None
    if same_host and gpus != 1:
        path, ports = ("cuda_ipc" if gpus else "shm"), list[str]()
    else:
        path, ports = "rdma", _active_ports(root)
        if not ports:
            return None
    return Missed(path, _chosen(path, ports, environment) or _reason(path, ports, root))


def _active_ports(root: Path) -> list[str]:
    """RDMA devices' ports that are up, as UCX names them: ``mlx5_0:1``."""
    active = []
    for state in sorted(root.glob("sys/class/infiniband/*/ports/*/state")):
        try:
            if "ACTIVE" in state.read_text().split():  # "4: ACTIVE"
                active.append(f"{state.parts[-4]}:{state.parts[-2]}")
        except OSError:
            continue
    return active


def _chosen(path: str, ports: list[str], environment: Mapping[str, str]) -> str:
    """The setting that rules it out; empty where none does."""
    tls = environment.get("UCX_TLS", "all").strip()
    named = {name.strip().lstrip("\\").split(":")[0] for name in tls.removeprefix("^").split(",")}
    if tls.startswith("^"):
        out = bool(named & {"rdma": {"ib"}, "shm": {"sm", "shm", "cma"}}.get(path, _SETTINGS[path]))
    else:
        out = not named & (_SETTINGS[path] | {"all"})
    if out:
        return f"UCX_TLS={tls} leaves it out: unset it"
    devices = environment.get("UCX_NET_DEVICES", "all").strip()
    allowed = {name.strip() for name in devices.split(",")}
    if path == "rdma" and "all" not in allowed and not allowed & {*ports, *(port.split(":")[0] for port in ports)}:
        return f"UCX_NET_DEVICES={devices} leaves out {', '.join(ports)}: unset it, or add them"
    return ""


def _reason(path: str, ports: list[str], root: Path) -> str:
    if path == "shm":
        return (
            "the two processes may not read each other's memory: run them in one PID namespace and as one user, and "
            "allow process_vm_readv (kernel.yama.ptrace_scope, seccomp, CAP_SYS_PTRACE)"
        )
    if path == "cuda_ipc":
        return "the GPU's memory cannot be shared: run the two processes in one IPC namespace, with both GPUs visible"
    if not any(root.glob("dev/infiniband/uverbs*")):
        return f"{', '.join(ports)} is up, but /dev/infiniband is not there: give the container the RDMA devices"
    return (
        f"{', '.join(ports)} is up: see that the peer has RDMA too and that the networks reach each other, that memory "
        "may be locked (ulimit -l), and run with UCX_LOG_LEVEL=info"
    )
