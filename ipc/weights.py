"""Attaching: a lease on a segment, mapped into this process as tensors."""

from __future__ import annotations

import logging
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightd.ipc import wire
from weightd.ipc.cuda import gpu_by_name, gpu_by_uuid
from weightd.ipc.errors import (
    AttachTimeout,
    DaemonUnavailable,
    DeviceUnavailable,
    NotReady,
    RequestRefused,
    StageFailed,
)
from weightd.ipc.lease import LeaseConnection, socket_path
from weightd.ipc.manifest import Entry, Manifest
from weightd.ipc.mapping import CudaMapping, DeviceBytes, map_host
from weightd.ipc.mapping import Mapping as SegmentMapping
from weightd.ipc.report import Report

if TYPE_CHECKING:
    import cupy
    import torch

log = logging.getLogger(__name__)


def attach(
    model: str | os.PathLike[str] | None = None,
    *,
    device: str | Sequence[str] | None = None,
    wait: bool = True,
    timeout: float | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
    socket: str | os.PathLike[str] | None = None,
    stage: str | None = None,
    tp_rank: int | None = None,
    weights: str | Sequence[str] | None = None,
    layout: str | Sequence[str] | None = None,
    parallel: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
    expect_digest: str | Mapping[str, str] | None = None,
    strict: bool = False,
    private: bool = False,
) -> Weights:
    """Map a model's weights into this process, staging the model first where nobody has.

    ``model`` is a URI or a path, as in ``POST /v1/stage``; ``stage`` names a stage by its id instead. ``device`` is
    where to, ``cuda:N`` as this process counts its GPUs, or ``cpu``, or one for each of several segments; by default
    the node's own default. ``weights``, ``parallel``, ``tensors`` and ``expect_digest`` are as in that request;
    ``layout`` is the key of an engine's layout that the daemon has, or several, for a segment each. ``tp_rank`` picks
    one segment of a stage that has several; without ``parallel`` it finds the stage that somebody else asked for.
    ``wait=False`` returns as soon as there is memory, for ``Weights.stream()``. ``timeout`` in seconds bounds the
    waiting, during which ``progress`` is told the stage's ``state``, ``bytes_done`` and ``bytes_total`` about every
    second. ``socket`` is the lease socket, or the runtime directory that it is in (default: ``WEIGHTD_RUNTIME_DIR``).

    A write to host memory stays this process's own; with ``strict`` it is a segmentation fault. On a GPU there is no
    copy-on-write: weights are always mapped read-only, and a kernel that writes to them ends this process's CUDA
    context. Who wants to change weights there asks for a copy of its own with ``private``, which takes as much memory
    again.

    Raises DaemonUnavailable, DeviceUnavailable, CudaError, RequestRefused, StageFailed, DigestMismatch, AttachTimeout.

    >>> with attach("s3://models/llama-3-8b") as weights:
    ...     embedding = weights["model.embed_tokens.weight"]
    """
    if (model is None) == (stage is None):
        raise RequestRefused("name either a model or a stage", code="invalid_request")
    message: dict[str, Any] = {"op": "lease", "stage": stage, "tp_rank": tp_rank, "stream": not wait}
    if model is not None:
        request: dict[str, Any] = {"model": _uri(model), "device": _device(device)}
        if weights is not None:
            request["weights"] = weights if isinstance(weights, str) else list(weights)
        if layout is not None:
            request["layout"] = {"key": layout if isinstance(layout, str) else list(layout)}
        if parallel is not None:
            request["parallel"] = dict(parallel)
        if tensors is not None:
            request["tensors"] = dict(tensors)
        if expect_digest is not None:
            request["expect_digest"] = expect_digest if isinstance(expect_digest, str) else dict(expect_digest)
        message["request"] = request
    if private and not wait:
        raise RequestRefused("private=True copies weights that are ready: wait for them", code="invalid_request")
    connection = LeaseConnection(socket_path(socket), message)
    reply, fds = connection.acquire(timeout, progress)
    try:
        return Weights(connection, reply, fds, strict=strict, private=private)
    except BaseException:
        connection.close()
        raise


def _device(device: str | Sequence[str] | None) -> str | list[str] | None:
    if device is None:
        return None
    if not isinstance(device, str):
        return [str(_device(one)) for one in device]
    # The daemon may count GPUs differently.
    return gpu_by_name(device).uuid if device.partition(":")[0] == "cuda" else device


def _uri(model: str | os.PathLike[str]) -> str:
    text = os.fspath(model)
    return text if ":" in text.partition("/")[0] else os.path.abspath(text)


class Weights(Mapping[str, "torch.Tensor"]):
    """A leased segment as a read-only mapping from tensor name to zero-copy torch tensor.

    Tensors are made when asked for. ``close()``, or the end of a ``with`` block, ends the lease; tensors stay valid,
    and their memory mapped, as long as anybody holds them. Made by ``attach``.
    """

    def __init__(
        self,
        connection: LeaseConnection,
        reply: dict[str, Any],
        fds: list[int],
        *,
        strict: bool = False,
        private: bool = False,
    ) -> None:
        self._connection = connection
        weakref.finalize(self, connection.close).atexit = False  # the kernel sees to that
        self._strict = strict
        self._private = private
        self.report: Report | None = None
        """What became of the parameters of the model that these were bound to, where they were."""
        self._callbacks: list[Callable[[float], None]] = []
        self._revoked: float | None = None
        self._lock = threading.Lock()
        self._take(reply, fds)
        self._index = {name: i for i, name in enumerate(self.manifest.names)}
        self._verified: list[bool] | None = None if self.ready else [False] * len(self.manifest)
        if self.ready:
            self._keep()

    def _take(self, reply: dict[str, Any], fds: list[int]) -> None:
        self.lease: str = reply["lease"]
        """The lease's id, as ``GET /v1/leases`` shows it."""
        self.ready: bool = reply["ready"]
        """Whether all of it is verified; while False, only what ``stream()`` has yielded is."""
        self.footprint: int = reply["footprint"] or reply["nbytes"]
        """Bytes of the device's memory that the segment takes."""
        try:
            segment, manifest = fds
            with mmap.mmap(manifest, reply["manifest_nbytes"], prot=mmap.PROT_READ) as text:
                self.manifest = Manifest.decode(text[:])
            self._mapping = self._map(segment, reply)
        finally:
            wire.close_all(fds)

    def _map(self, fd: int, reply: dict[str, Any]) -> SegmentMapping:
        if reply["gpu"] is None:
            return map_host(fd, reply["nbytes"], strict=self._strict)
        gpu = gpu_by_uuid(reply["gpu"])
        return CudaMapping(gpu, fd, reply["nbytes"], reply["footprint"], private=self._private)

    def _keep(self) -> None:
        """From now on a thread keeps the lease, over restarts of the daemon too."""
        renewal = {
            "op": "lease",
            "stage": self.manifest.stage,
            "tp_rank": self.manifest.tp_rank,
            "renews": {"lease": self.lease, "digest": self.manifest.digest},
        }
        # The thread must not keep this object alive: whoever forgets it has let go.
        itself = weakref.ref(self)

        def revoked(seconds: float) -> None:
            if weights := itself():
                weights._on_revoked(seconds)

        self._connection.watch(renewal, revoked)

    def _on_revoked(self, seconds: float) -> None:
        with self._lock:
            self._revoked = time.monotonic() + seconds
            callbacks = list(self._callbacks)
        for callback in callbacks:
            try:
                callback(seconds)
            except BaseException:  # one of them failing keeps neither the others from being told nor the lease
                log.exception("weightd: a callback of on_revoke has failed")

    def on_revoke(self, callback: Callable[[float], None]) -> None:
        """Call ``callback(seconds)`` when the lease is to be given up within so many seconds, by ``close``.

        It runs in the thread that keeps the lease, at once where that has been said already. What is mapped stays
        readable afterwards; the daemon counts it as free.
        """
        with self._lock:
            self._callbacks.append(callback)
            revoked = self._revoked
        if revoked is not None:
            callback(max(0.0, revoked - time.monotonic()))

    @property
    def digest(self) -> str | None:
        """Digest of the segment's values: of the checkpoint, where the segment is all of it. None until ready."""
        return self.manifest.digest

    @property
    def metadata(self) -> Path | None:
        """Folder with the checkpoint's configuration and tokenizer files, as the daemon sees it."""
        return Path(self.manifest.metadata) if self.manifest.metadata else None

    def entry(self, name: str) -> Entry:
        """Where a tensor lies. Raises KeyError."""
        return self.manifest.entry(self._index[name])

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor, sharing the segment's memory. Raises KeyError, UnsupportedDtype, NotReady while streaming."""
        return self._mapping.tensor(self._checked(name))

    def raw(self, name: str) -> memoryview | DeviceBytes:
        """The tensor's bytes, whatever its dtype: on a GPU an object with ``__cuda_array_interface__``."""
        found: memoryview | DeviceBytes = self._mapping.bytes(self._checked(name))
        return found

    def cupy(self) -> Mapping[str, cupy.ndarray]:
        """The same tensors as CuPy arrays, which share the segment's memory as well.

        Raises DeviceUnavailable where the weights are in host memory; the mapping, what this one raises.

        >>> norm = weights.cupy()["model.norm.weight"]
        """
        if not isinstance(self._mapping, CudaMapping):
            raise DeviceUnavailable("the weights are in host memory, where CuPy has no arrays", code="not_on_gpu")
        return _CupyArrays(self)

    def _cupy_array(self, name: str) -> Any:
        assert isinstance(self._mapping, CudaMapping)
        return self._mapping.cupy(self._checked(name))

    @property
    def device(self) -> str:
        """Where the tensors are, as torch names the device in this process."""
        return self._mapping.device

    def _checked(self, name: str) -> Entry:
        index = self._index[name]
        if self._verified is not None and not self._verified[index]:
            raise NotReady(f"tensor {name!r} is not verified yet: stream() yields tensors as they are")
        return self.manifest.entry(index)

    def aliases(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's memory is in the segment."""
        return self._mapping.holds(tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def __repr__(self) -> str:
        return (
            f"<Weights of {self.manifest.model}: {len(self)} tensors, {self.manifest.nbytes} bytes, lease {self.lease}>"
        )

    def stream(self, timeout: float | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) as tensors become verified, while later ones still load; each once.

        ``timeout`` in seconds bounds the whole. Raises StageFailed where the stage fails on the way (what was yielded
        stays what it is), AttachTimeout, DaemonUnavailable where the daemon goes away.
        """
        for name in self.verified(timeout):
            yield name, self[name]

    def verified(self, timeout: float | None = None) -> Iterator[str]:
        """Yield the names of tensors as they become verified, each once. Raises as ``stream`` does."""
        names = self.manifest.names
        deadline = None if timeout is None else time.monotonic() + timeout
        yielded = [False] * len(names)
        news: Sequence[int] = (
            range(len(names)) if self._verified is None else [i for i, done in enumerate(self._verified) if done]
        )
        while True:
            for index in news:
                if not yielded[index]:
                    yielded[index] = True
                    yield names[index]
            if self._verified is None:
                return
            news = self._advance(deadline, timeout)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until all of it is verified. Raises as ``stream`` does."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._verified is not None:
            self._advance(deadline, timeout)

    def _advance(self, deadline: float | None, timeout: float | None) -> Sequence[int]:
        """Take one message from the daemon; returns the tensors that it says are verified now."""
        assert self._verified is not None
        try:
            reply, fds = self._connection.receive(deadline)
        except TimeoutError:
            raise AttachTimeout(f"the stage was not ready within {timeout} s; it goes on loading") from None
        except OSError:
            return self._resume(deadline)
        wire.close_all(fds)
        news: list[int] = []
        if reply["type"] == "verified":
            for first, last in reply["entries"]:
                news += range(first, last + 1)
            for index in news:
                self._verified[index] = True
        elif reply["type"] == "ready":
            self.manifest = replace(self.manifest, digest=reply["digest"], checkpoint_digest=reply["checkpoint_digest"])
            news = self._all_ready()
        return news

    def _all_ready(self) -> list[int]:
        self._verified, self.ready = None, True
        self._keep()
        return list(range(len(self.manifest)))

    def _resume(self, deadline: float | None) -> Sequence[int]:
        """The daemon died while the stage was loading: go on with the next one, from the segment that it goes on with.

        Tensors that were handed out stay what they are, in the memory that they are in.
        """
        before = self.manifest
        self._verified = [False] * len(before)  # nothing is, in the memory that comes now
        left = None if deadline is None else max(0.001, deadline - time.monotonic())
        try:
            reply, fds = self._connection.acquire(left)
        except RequestRefused as error:
            raise DaemonUnavailable(f"the daemon went away while the stage was loading: {error}") from None
        self._take(reply, fds)
        if (self.manifest.names, self.manifest.offsets) != (before.names, before.offsets):
            raise StageFailed(f"stage {before.stage} came back with another layout: attach again")
        if self.ready:
            return self._all_ready()
        return []

    def close(self) -> None:
        """End the lease. Safe to call twice."""
        self._connection.close()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _CupyArrays(Mapping[str, "cupy.ndarray"]):
    """What ``Weights.cupy`` gives; keeps the lease, as the weights themselves do."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> cupy.ndarray:
        return self._weights._cupy_array(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
