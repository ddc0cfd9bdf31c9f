"""What one agent tells another of its memory: NIXL's own form, in a frame that shows whether it is intact."""

from __future__ import annotations

import hashlib
import re
import struct

_MAGIC = b"weightd-nixl-1\n"
_MAX_METADATA = 1 << 20
NAME = re.compile(rb"[0-9A-Za-z._-]{1,64}")
"""What an agent of weightd may be called."""
_HEAD = b"nixlSerDes|Agent"  # what NIXL's own metadata begins with; then the name's length and the name


def pack(blob: bytes) -> bytes:
    """NIXL's own metadata, framed."""
    return _MAGIC + hashlib.sha256(blob).digest() + blob


def unpack(metadata: bytes) -> tuple[str, bytes]:
    """The agent's name and NIXL's own metadata. Raises ValueError.

    The digest is for accidents. NIXL has none, and reads past the end, or keeps half of it, of what is damaged.
    """
    if not len(_MAGIC) + 32 < len(metadata) <= _MAX_METADATA or not metadata.startswith(_MAGIC):
        raise ValueError(f"{len(metadata)} bytes that are not metadata of a weightd agent")
    digest, blob = metadata[len(_MAGIC) : len(_MAGIC) + 32], metadata[len(_MAGIC) + 32 :]
    if hashlib.sha256(blob).digest() != digest:
        raise ValueError("the metadata is damaged")
    start = len(_HEAD) + 8
    if not blob.startswith(_HEAD) or len(blob) < start:
        raise ValueError("metadata of another version of NIXL")
    (length,) = struct.unpack_from("<Q", blob, len(_HEAD))
    name = blob[start : start + length]
    if not NAME.fullmatch(name):
        raise ValueError("the metadata has no name that an agent of weightd could have")
    return name.decode(), blob
