"""A ledger: how far a stage's bytes have come, in memory that outlives the process which writes it.

Layout, native byte order: ``leases`` u32, ``extents`` u32, ``last_used`` f64 (monotonic seconds), ``lent`` u32, the
plan's fingerprint (16 bytes), then a byte for each extent (1 once all of it has landed and is hashed, 2 where it came
from a peer), padding to 8 bytes, then the leaf digests (u64 each): those of all entries of all segments in their order,
then those of the checkpoint tensors that are hashed as such.

It needs no checksums: it is memory, which a killed process leaves as it was, and each mark is set after what it stands
for.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Sequence

import xxhash

from weightd.daemon.layouts.digests import leaf_count
from weightd.daemon.layouts.extents import Extent
from weightd.daemon.layouts.recipe import Recipe

_HEAD = struct.Struct("=IIdI16s")
_MARKS = b"2"
"""Changes with what a mark stands for: a ledger of a version before is another plan's. Since 2, a leaf is hashed with
the last extent that brings of it; before, with the entry's last one, which is the same where tensors are left whole."""


class Ledger:
    """One stage's ledger: made by ``Ledger.new`` or ``Ledger.private``, or adopted from its descriptor."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self.fd = fd
        """The memfd, -1 where it is private. The ledger's own until ``close``."""
        self._map = mmap.mmap(fd, nbytes)  # shared, which is the default

    @classmethod
    def new(cls, extents: int, leaves: int, fingerprint: bytes) -> Ledger:
        """An empty one that can be deposited."""
        nbytes = _leaves_at(extents) + 8 * leaves
        fd = os.memfd_create("weightd:ledger", os.MFD_CLOEXEC)
        os.ftruncate(fd, nbytes)
        return cls(fd, nbytes)._begun(extents, fingerprint)

    @classmethod
    def private(cls, extents: int, leaves: int) -> Ledger:
        """An empty one that ends with this process."""
        return cls(-1, _leaves_at(extents) + 8 * leaves)._begun(extents, bytes(16))

    def _begun(self, extents: int, fingerprint: bytes) -> Ledger:
        _HEAD.pack_into(self._map, 0, 0, extents, 0.0, 0, fingerprint)
        return self

    @classmethod
    def adopt(cls, fd: int) -> Ledger:
        """The one that another process has left. Raises ValueError where it is none."""
        nbytes = os.fstat(fd).st_size
        if nbytes < _HEAD.size:
            raise ValueError(f"a ledger of {nbytes} bytes")
        ledger = cls(fd, nbytes)
        if _leaves_at(ledger.extents) > nbytes:
            raise ValueError(f"a ledger of {nbytes} bytes says that it has {ledger.extents} extents")
        return ledger

    @property
    def extents(self) -> int:
        return int(_HEAD.unpack_from(self._map)[1])

    @property
    def fingerprint(self) -> bytes:
        return bytes(_HEAD.unpack_from(self._map)[4])

    @property
    def leases(self) -> int:
        """Leases held, as the process that wrote it last knew."""
        return int(_HEAD.unpack_from(self._map)[0])

    @property
    def last_used(self) -> float:
        """When a lease began or ended last, in monotonic seconds; 0 where none ever did."""
        return float(_HEAD.unpack_from(self._map)[2])

    @property
    def lent(self) -> bool:
        """Whether anybody was ever given a descriptor."""
        return bool(_HEAD.unpack_from(self._map)[3])

    def note(self, leases: int, last_used: float, *, lent: bool) -> None:
        """Note how many leases there are, and since when."""
        _HEAD.pack_into(self._map, 0, leases, self.extents, last_used, lent, self.fingerprint)

    @property
    def landed(self) -> memoryview:
        """A byte for each extent: 1 once it has landed."""
        return memoryview(self._map)[_HEAD.size : _HEAD.size + self.extents]

    def leaves(self, counts: Iterable[int], first: int = 0) -> list[memoryview]:
        """The leaf digests from ``first`` on, cut into arrays of so many each. Raises ValueError where it has fewer."""
        digests = memoryview(self._map)[_leaves_at(self.extents) :].cast("Q")
        found, position = [], first
        for count in counts:
            found.append(digests[position : position + count])
            position += count
        if position > len(digests):
            raise ValueError(f"a ledger with {len(digests)} leaf digests, expected are {position}")
        return found

    def close(self) -> None:
        """Let the descriptor go; memory goes when nobody holds a part of it. Safe to call twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _leaves_at(extents: int) -> int:
    return -(-(_HEAD.size + extents) // 8) * 8


def fingerprint(recipes: Sequence[Recipe], extents: Sequence[Extent]) -> bytes:
    """Tells one plan from another: which extents there are, where the segments' entries lie, by which layout."""
    copies = [copy for recipe in recipes for copy in recipe.copies]
    # Of tensors that are whole, and wanted once, what a version before has begun goes on.
    whole = all(copy.source is None and copy.target is None for copy in copies)
    once = whole and len({copy.tensor for copy in copies}) == len(copies)
    state = xxhash.xxh3_128(b"" if once else _MARKS)
    for extent in extents:
        rows = () if once else (extent.rows, extent.stride)
        state.update(struct.pack(f"={3 + len(rows)}Q", extent.file, extent.offset, extent.nbytes, *rows))
    for recipe in recipes:
        state.update(recipe.layout.encode())
        for entry in recipe.entries:
            state.update(f"{entry.name}\0{entry.dtype}{entry.shape}{entry.offset}\n".encode())
    return state.digest()


def leaf_counts(recipes: Sequence[Recipe]) -> list[int]:
    """Leaves of each entry of each segment, one after another."""
    return [leaf_count(entry.nbytes) for recipe in recipes for entry in recipe.entries]
