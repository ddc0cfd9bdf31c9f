"""Attaching: a lease on a segment, mapped into this process as tensors."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket as sockets
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightd.ipc import wire
from weightd.ipc.errors import (
    AttachTimeout,
    DaemonUnavailable,
    DigestMismatch,
    NotReady,
    RequestRefused,
    StageFailed,
    WeightdError,
)
from weightd.ipc.manifest import Entry, Manifest
from weightd.ipc.mapping import HostMapping
from weightd.ipc.runtime_dir import LEASE_SOCKET, runtime_dir

if TYPE_CHECKING:
    import torch

_REFUSED = frozenset(
    {"invalid_request", "not_allowed", "insufficient_capacity", "unknown_stage", "peer_not_allowed", "lease_limit"}
)


def attach(
    model: str | os.PathLike[str] | None = None,
    *,
    device: str | None = "cpu",
    wait: bool = True,
    timeout: float | None = None,
    socket: str | os.PathLike[str] | None = None,
    stage: str | None = None,
    tp_rank: int | None = None,
    parallel: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
    expect_digest: str | Mapping[str, str] | None = None,
    strict: bool = False,
) -> Weights:
    """Map a model's weights into this process, staging the model first where nobody has.

    ``model`` is a URI or a path, as in ``POST /v1/stage``; ``stage`` names a stage by its id instead. ``parallel``,
    ``tensors`` and ``expect_digest`` are as in that request. ``tp_rank`` picks one segment of a stage that has several;
    without ``parallel`` it finds the stage that somebody else asked for. ``wait=False`` returns as soon as there is
    memory, for ``Weights.stream()``. ``timeout`` in seconds bounds the waiting. ``socket`` is the lease socket, or the
    runtime directory that it is in (default: ``WEIGHTD_RUNTIME_DIR``). ``strict`` maps the weights read-only: a stray
    write is then a segmentation fault, where it else stays this process's own.

    Raises DaemonUnavailable, RequestRefused, StageFailed, DigestMismatch, AttachTimeout.

    >>> with attach("s3://models/llama-3-8b") as weights:
    ...     embedding = weights["model.embed_tokens.weight"]
    """
    if (model is None) == (stage is None):
        raise RequestRefused("name either a model or a stage", code="invalid_request")
    message: dict[str, Any] = {"op": "lease", "stage": stage, "tp_rank": tp_rank, "stream": not wait}
    if model is not None:
        request: dict[str, Any] = {"model": _uri(model), "device": device}
        if parallel is not None:
            request["parallel"] = dict(parallel)
        if tensors is not None:
            request["tensors"] = dict(tensors)
        if expect_digest is not None:
            request["expect_digest"] = expect_digest if isinstance(expect_digest, str) else dict(expect_digest)
        message["request"] = request
    return _lease(message, _socket_path(socket), timeout, strict=strict)


def _uri(model: str | os.PathLike[str]) -> str:
    text = os.fspath(model)
    return text if ":" in text.partition("/")[0] else os.path.abspath(text)


def _socket_path(socket: str | os.PathLike[str] | None) -> Path:
    path = Path(socket) if socket is not None else runtime_dir()
    return path / LEASE_SOCKET if path.is_dir() or (not path.exists() and path.suffix != ".sock") else path


def _lease(message: dict[str, Any], path: Path, timeout: float | None, *, strict: bool) -> Weights:
    deadline = None if timeout is None else time.monotonic() + timeout
    connection = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM | sockets.SOCK_CLOEXEC)
    try:
        try:
            connection.settimeout(timeout)
            connection.connect(str(path))
            with contextlib.suppress(BrokenPipeError):  # the daemon may refuse before it has heard everything
                wire.send(connection, message)
            while True:
                reply, fds = _receive(connection, deadline)
                if reply["type"] == "lease":
                    return Weights(connection, reply, fds, strict=strict)
                wire.close_all(fds)
        except TimeoutError:
            raise AttachTimeout(f"the stage was not ready within {timeout} s; it goes on loading") from None
        except OSError as error:
            raise DaemonUnavailable(
                f"no daemon answers at {path}: {error}: start one with 'weightd serve', or set WEIGHTD_RUNTIME_DIR to "
                "its runtime directory"
            ) from None
    except BaseException:
        connection.close()
        raise


def _receive(connection: sockets.socket, deadline: float | None) -> tuple[dict[str, Any], list[int]]:
    left = None if deadline is None else deadline - time.monotonic()
    if left is not None and left <= 0:
        raise TimeoutError
    connection.settimeout(left)
    reply, fds = wire.receive(connection)
    if reply["type"] != "error":
        return reply, fds
    wire.close_all(fds)
    code, text, details = reply["code"], reply["message"], reply.get("details")
    kind: type[WeightdError] = StageFailed
    if code == "digest_mismatch":
        kind = DigestMismatch
    elif code in _REFUSED:
        kind = RequestRefused
    raise kind(text, code=code, details=details)


class Weights(Mapping[str, "torch.Tensor"]):
    """A leased segment as a read-only mapping from tensor name to zero-copy torch tensor.

    Tensors are made when asked for. ``close()``, or the end of a ``with`` block, ends the lease; tensors stay valid,
    and their memory mapped, as long as anybody holds them. Made by ``attach``.
    """

    def __init__(self, connection: sockets.socket, reply: dict[str, Any], fds: list[int], *, strict: bool) -> None:
        self._connection = connection
        weakref.finalize(self, connection.close)
        self.lease: str = reply["lease"]
        """The lease's id, as ``GET /v1/leases`` shows it."""
        self.ready: bool = reply["ready"]
        """Whether all of it is verified; while False, only what ``stream()`` has yielded is."""
        try:
            segment, manifest = fds
            with mmap.mmap(manifest, reply["manifest_nbytes"], prot=mmap.PROT_READ) as text:
                self.manifest = Manifest.decode(text[:])
            self._mapping = HostMapping(segment, reply["nbytes"], strict=strict)
        finally:
            wire.close_all(fds)
        self._index = {name: i for i, name in enumerate(self.manifest.names)}
        self._verified: list[bool] | None = None if self.ready else [False] * len(self.manifest)

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

    def raw(self, name: str) -> memoryview:
        """The tensor's bytes, whatever its dtype."""
        return self._mapping.bytes(self._checked(name))

    def _checked(self, name: str) -> Entry:
        index = self._index[name]
        if self._verified is not None and not self._verified[index]:
            raise NotReady(f"tensor {name!r} is not verified yet: stream() yields tensors as they are")
        return self.manifest.entry(index)

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
                    yield names[index], self[names[index]]
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
            reply, fds = _receive(self._connection, deadline)
        except TimeoutError:
            raise AttachTimeout(f"the stage was not ready within {timeout} s; it goes on loading") from None
        except OSError as error:
            raise DaemonUnavailable(f"the daemon went away while the stage was loading: {error}") from None
        wire.close_all(fds)
        news: list[int] = []
        if reply["type"] == "verified":
            for first, last in reply["entries"]:
                news += range(first, last + 1)
            for index in news:
                self._verified[index] = True
        elif reply["type"] == "ready":
            news += range(len(self.manifest))
            self._verified, self.ready = None, True
            self.manifest = replace(self.manifest, digest=reply["digest"], checkpoint_digest=reply["checkpoint_digest"])
        return news

    def close(self) -> None:
        """End the lease. Safe to call twice."""
        with contextlib.suppress(OSError):
            self._connection.close()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
