"""Messages of the lease socket: a 4-byte little-endian length, then so many bytes of JSON, descriptors alongside.

A lease connection, from the client's side::

    → {"op": "lease", "stage": id or null, "request": stage request or null, "tp_rank": int or null, "stream": bool}
    ← {"type": "progress", "stage", "state", "bytes_done", "bytes_total"}       any number, while waiting
    ← {"type": "lease", "lease", "stage", "nbytes", "manifest_nbytes", "ready", "gpu", "footprint"}
                                                                                + descriptors: segment, manifest
    ← {"type": "verified", "entries": [[first, last], ...]}                     any number, where not ready yet
    ← {"type": "ready", "digest", "checkpoint_digest"}                          where it was not ready yet
    ← {"type": "revoked", "seconds"}                                            it is to be given up within that time
    ← {"type": "error", "code", "message", "details"}                           instead of any of these; then the end

``gpu`` is the UUID of the GPU whose memory the segment's descriptor stands for, null for host memory; ``footprint`` the
bytes of the allocation behind it, which is mapped whole.

After a restart of the daemon a client leases the same again, with ``"renews": {"lease", "digest"}`` beside ``stage``
and ``tp_rank``: the id that the lease had, and the segment's digest, without which it is refused.

The lease lasts until the client closes the connection, which the kernel does for it when it dies.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

LENGTH = struct.Struct("<I")
MAX_REQUEST_BYTES = 16 << 20
"""Longest message that a daemon takes: a parallel map with many patterns is the largest honest one."""
MAX_REPLY_BYTES = 64 << 20
MAX_FDS = 4


class Closed(ConnectionError):
    """The other side closed the connection between two messages."""


def encode(message: dict[str, Any]) -> bytes:
    """One message as it goes over the wire."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return LENGTH.pack(len(body)) + body


def decode(body: bytes) -> dict[str, Any]:
    """A message's body. Raises ValueError where it is no JSON object."""
    try:
        message = json.loads(body)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(message, dict):
        raise ValueError(f"expected a JSON object, found {type(message).__name__}")
    return message


def send(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Send one message from a blocking socket."""
    data = encode(message)
    sent = socket.send_fds(sock, [data], fds) if fds else 0
    sock.sendall(data[sent:])


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Receive one message on a blocking socket, and the descriptors that came with it, which the caller closes.

    Raises Closed at the end of the connection, TimeoutError as the socket's timeout says, ConnectionError otherwise.
    """
    head, fds = _receive_head(sock)
    try:
        (length,) = LENGTH.unpack(head)
        if length > MAX_REPLY_BYTES:
            raise ConnectionError(f"a message of {length} bytes, allowed are {MAX_REPLY_BYTES}")
        body = bytearray(length)
        view = memoryview(body)
        while view:
            count = sock.recv_into(view)
            if not count:
                raise ConnectionError("the connection ended within a message")
            view = view[count:]
        return decode(bytes(body)), fds
    except BaseException:
        close_all(fds)
        raise


def _receive_head(sock: socket.socket) -> tuple[bytes, list[int]]:
    # Like socket.recv_fds, which does not let one set the close-on-exec flag.
    head, fds = b"", array.array("i")
    while len(head) < LENGTH.size:
        data, ancillary, _, _ = sock.recvmsg(
            LENGTH.size - len(head), socket.CMSG_SPACE(MAX_FDS * fds.itemsize), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        if not data:
            close_all(list(fds))
            if head:
                raise ConnectionError("the connection ended within a message")
            raise Closed("the connection was closed")
        head += data
    return head, list(fds)


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that nobody took."""
    for fd in fds:
        os.close(fd)
