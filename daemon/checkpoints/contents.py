"""What a listed checkpoint holds: the headers of its files, read and checked before anything is allocated for it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from weightd.daemon.checkpoints.header import check_unique, header_length, parse_header
from weightd.daemon.checkpoints.listing import Listing
from weightd.daemon.errors import CheckpointChanged, InvalidCheckpoint
from weightd.daemon.sources.base import Source
from weightd.daemon.tensors import TensorInfo

_FIRST_READ = 64 << 10
"""Bytes of the first range read of a file: one round trip for all but the largest headers."""
_PARALLEL_READS = 64
_MAX_HEADERS_BYTES = 512 << 20
"""Bytes of all headers of one checkpoint together: 1,000,000 tensors with names of 300 bytes fit."""


@dataclass(frozen=True)
class Checkpoint:
    """A listing with its headers read. ``tensors`` are in the order of their bytes, file by file.

    Where there is an index, they are those that it names.
    """

    listing: Listing
    tensors: tuple[TensorInfo, ...]
    prefixes: tuple[bytes, ...]
    """The bytes in front of the first tensor of each file of ``listing.weights``: length and header."""
    gaps: frozenset[int] = frozenset()
    """Files that hold tensors which the index leaves out."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def open_checkpoint(source: Source, listing: Listing) -> Checkpoint:
    """Read and check the headers of all files at once, with one or two range reads each.

    Raises InvalidCheckpoint, CheckpointChanged, and what the source raises.
    """
    names = [file.name for file in listing.weights]
    workers = min(_PARALLEL_READS, len(names))
    parsing = threading.Lock()  # parsing holds the GIL anyway; one at a time bounds its memory
    nbytes = 0

    def read(index: int) -> tuple[list[TensorInfo], bytes]:
        nonlocal nbytes
        file = listing.weights[index]
        data = source.read(file.name, 0, min(_FIRST_READ, file.size))
        end = 8 + header_length(file.name, data, file.size)
        with parsing:
            nbytes += end
            if nbytes > _MAX_HEADERS_BYTES:
                raise InvalidCheckpoint(
                    f"{listing.uri}: the headers take {nbytes} bytes and more, allowed are {_MAX_HEADERS_BYTES}"
                )
        if end > len(data):
            data += source.read(file.name, len(data), end - len(data))
        if len(data) < end:
            raise CheckpointChanged(f"{file.name}: had {file.size} bytes when listed, ends at byte {len(data)} now")
        prefix = data[:end]
        with parsing:
            return parse_header(file.name, index, prefix[8:], file.size), prefix

    with ThreadPoolExecutor(workers, thread_name_prefix="header") as pool:
        results = list(pool.map(read, range(len(names))))
    held = [tensor for found, _ in results for tensor in found]
    tensors = held
    if listing.weight_map is not None:
        tensors = _as_indexed(listing, listing.weight_map, names, held)
    check_unique(names, tensors)
    taken = Counter(tensor.file for tensor in tensors)
    gaps = frozenset(file for file, count in Counter(tensor.file for tensor in held).items() if taken[file] != count)
    return Checkpoint(listing, tuple(tensors), tuple(prefix for _, prefix in results), gaps)


def _as_indexed(
    listing: Listing, weight_map: Mapping[str, str], files: Sequence[str], held: Sequence[TensorInfo]
) -> list[TensorInfo]:
    """Each tensor that the index names, from the file that it names. Raises InvalidCheckpoint where it is not there."""
    tensors = [tensor for tensor in held if weight_map.get(tensor.name) == files[tensor.file]]
    if len(tensors) < len(weight_map):
        there = {tensor.name for tensor in tensors}
        name = next(name for name in weight_map if name not in there)
        elsewhere = [files[tensor.file] for tensor in held if tensor.name == name]
        where = f"is in {elsewhere[0]}" if elsewhere else "is in none of the shards"
        raise InvalidCheckpoint(
            f"{listing.index}: tensor {name[:200]!r} should be in {weight_map[name]}, but {where}: upload the index "
            "and the shards of one save"
        )
    return tensors
