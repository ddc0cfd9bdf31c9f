"""Value identity: digests of bytes, never of names and shapes alone.

- leaf: XXH3-64, seed 0, of each 1 MiB piece of a tensor, counted from the tensor's start (the last may be shorter).
- tensor: XXH3-128 over ``"{dtype}|{d0},{d1},...|{nbytes}\\n"`` in UTF-8, then its leaves as little-endian uint64.
- checkpoint (and segment): XXH3-128 over ``"{name}\\0{tensor digest}\\n"`` of all tensors, sorted by name.

Tensor and checkpoint digests are written ``xxh3:`` and 32 hexadecimal digits. XXH3 (xxHash 0.8) finds corruption, not
forgery: against an adversary who controls the bytes, expect the SHA-256 of the files instead.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import TypeAlias

import xxhash

LEAF = 1 << 20
"""Bytes of a leaf."""

leaf_digest = xxhash.xxh3_64_intdigest
"""XXH3-64 of a buffer as an int; drops the GIL while it runs."""


def leaf_count(nbytes: int) -> int:
    """Leaves of a tensor of ``nbytes`` bytes; an empty tensor has none."""
    return -(-nbytes // LEAF)


Leaves: TypeAlias = "array[int] | memoryview"
"""Leaf digests, as uint64 each: ``array('Q')``, or a view of format Q."""


def tensor_digest(dtype: str, shape: tuple[int, ...], nbytes: int, leaves: Leaves) -> str:
    """Digest of one tensor from its leaf digests."""
    if sys.byteorder == "big":
        leaves = array("Q", leaves)
        leaves.byteswap()
    prefix = f"{dtype}|{','.join(map(str, shape))}|{nbytes}\n".encode()
    return "xxh3:" + xxhash.xxh3_128_hexdigest(prefix + leaves.tobytes())


def checkpoint_digest(tensors: Iterable[tuple[str, str]]) -> str:
    """Digest over (name, tensor digest) pairs, in any order."""
    state = xxhash.xxh3_128()
    for name, digest in sorted(tensors):
        state.update(f"{name}\0{digest}\n".encode())
    return "xxh3:" + str(state.hexdigest())
