"""A lease connection, from the client's side: asking, waiting, and coming back after a restart of the daemon."""

from __future__ import annotations

import contextlib
import logging
import os
import socket as sockets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weightd.ipc import trust, wire
from weightd.ipc.absence import Absence
from weightd.ipc.errors import (
    AttachTimeout,
    DaemonUnavailable,
    DigestMismatch,
    RequestRefused,
    StageFailed,
    WeightdError,
)
from weightd.ipc.runtime_dir import LEASE_SOCKET, runtime_dir

log = logging.getLogger(__name__)

_REFUSED = frozenset(
    {
        "invalid_request", "not_allowed", "insufficient_capacity", "unknown_stage", "peer_not_allowed", "lease_limit",
        "queue_full", "stage_revoked", "credentials_refused", "unknown_layout",
    }
)  # fmt: skip


def socket_path(socket: str | os.PathLike[str] | None) -> Path:
    """The lease socket: as given, or in the runtime directory that is given, or in the default one."""
    path = Path(socket) if socket is not None else runtime_dir()
    return path / LEASE_SOCKET if path.is_dir() or (not path.exists() and path.suffix != ".sock") else path


class LeaseConnection:
    """One lease: ``acquire``, then ``receive`` while it is not ready, then ``watch``. Closing it ends the lease."""

    def __init__(self, path: Path, message: dict[str, Any]) -> None:
        self._path = path
        self._message = message
        self._socket: sockets.socket | None = None
        self._closed = False
        self._pid = os.getpid()
        self._lock = threading.Lock()

    # ------------------------------------------------------------------ asking

    def acquire(
        self, timeout: float | None, progress: Callable[[dict[str, Any]], None] | None = None
    ) -> tuple[dict[str, Any], list[int]]:
        """Ask for the lease and wait for it; returns the daemon's answer and its descriptors, which the caller closes.

        ``progress`` is called with what the daemon says meanwhile.

        A daemon that dies meanwhile is waited for. Raises DaemonUnavailable, DaemonNotTrusted, RequestRefused,
        StageFailed, DigestMismatch, AttachTimeout.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        absence = Absence(met=False)
        while True:
            try:
                self._connect(deadline)
                absence.connected()
                while True:
                    reply, fds = self.receive(deadline)
                    if reply["type"] == "lease":
                        return reply, fds
                    wire.close_all(fds)
                    absence.answered()
                    if progress is not None:
                        progress(reply)
            except TimeoutError:
                self.close()
                raise AttachTimeout(f"the stage was not ready within {timeout} s; it goes on loading") from None
            except OSError as error:
                if not absence.may_end(error):
                    self.close()
                    raise self._unavailable(error) from None
                if deadline is not None and time.monotonic() > deadline:
                    self.close()
                    raise AttachTimeout(f"the stage was not ready within {timeout} s; the daemon is away") from None
            except BaseException:
                self.close()
                raise

    def _unavailable(self, error: OSError) -> DaemonUnavailable:
        return DaemonUnavailable(
            f"no daemon answers at {self._path}: {error}: start one with 'weightd serve', or set WEIGHTD_RUNTIME_DIR "
            "to its runtime directory"
        )

    def _connect(self, deadline: float | None) -> None:
        connection = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM | sockets.SOCK_CLOEXEC)
        try:
            connection.settimeout(_left(deadline))
            connection.connect(str(self._path))
            trust.check(connection, self._path)
            with contextlib.suppress(BrokenPipeError):  # the daemon may refuse before it has heard everything
                wire.send(connection, self._message)
        except BaseException:
            connection.close()
            raise
        with self._lock:
            old, self._socket = self._socket, connection
            if old is not None:
                old.close()
            if self._closed:
                connection.close()

    def receive(self, deadline: float | None) -> tuple[dict[str, Any], list[int]]:
        """The daemon's next message. Raises TimeoutError at the deadline (monotonic seconds), OSError, and what the
        daemon says went wrong."""
        connection = self._socket
        if connection is None or self._closed:
            raise wire.Closed("the lease was ended")
        connection.settimeout(_left(deadline))
        reply, fds = wire.receive(connection)
        if reply["type"] != "error":
            return reply, fds
        wire.close_all(fds)
        raise _error(reply)

    # ------------------------------------------------------------------ keeping

    def watch(self, renewal: dict[str, Any], on_revoked: Callable[[float], None]) -> None:
        """In a thread of its own, keep the lease until it is closed or lost.

        ``renewal`` is the message that leases the same again from a daemon that was restarted.
        """
        self._message = renewal
        threading.Thread(target=self._watch, args=(on_revoked,), name="weightd-lease", daemon=True).start()

    def _watch(self, on_revoked: Callable[[float], None]) -> None:
        while not self._closed:
            try:
                reply, fds = self.receive(None)
                wire.close_all(fds)
            except (OSError, WeightdError):
                if self._closed or not self._renew():
                    return
                continue
            if reply["type"] == "revoked":
                try:
                    on_revoked(float(reply["seconds"]))
                except BaseException:  # it is somebody else's code, and this thread is what keeps the lease
                    log.exception("weightd: what was to be done when the lease is revoked has failed")

    def _renew(self) -> bool:
        """Lease the same again once a daemon is back; whether that worked."""
        absence = Absence(met=True)
        while not self._closed:
            try:
                self._connect(absence.end)
                reply, fds = self.receive(absence.end)
                while reply["type"] != "lease":
                    wire.close_all(fds)
                    reply, fds = self.receive(absence.end)
                wire.close_all(fds)
                return True
            except WeightdError as error:
                log.warning("weightd: the lease is lost, what is mapped stays: %s", error)
                return False
            except OSError as error:
                if not absence.may_end(error):
                    log.warning("weightd: the lease is lost, no daemon is back, what is mapped stays: %s", error)
                    return False
        return False

    def close(self) -> None:
        """End the lease. Safe to call twice, and from any thread."""
        with self._lock:
            self._closed = True
            if self._socket is not None:
                if self._pid == os.getpid():  # a forked child lets go of its copy, the lease is its parent's
                    # Closing alone would leave a thread that reads from it waiting, and the connection open.
                    with contextlib.suppress(OSError):
                        self._socket.shutdown(sockets.SHUT_RDWR)
                self._socket.close()


def _left(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _error(reply: dict[str, Any]) -> WeightdError:
    code = reply["code"]
    kind: type[WeightdError] = StageFailed
    if code == "digest_mismatch":
        kind = DigestMismatch
    elif code in _REFUSED:
        kind = RequestRefused
    return kind(reply["message"], code=code, details=reply.get("details"))
