"""What a listed checkpoint holds: the headers of its files, read and checked before anything is allocated for it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from weightd.daemon.checkpoints.header import check_unique, header_length, parse_header
from weightd.daemon.checkpoints.listing import INDEX_NAME, Listing
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
    """A listing with its headers read. ``tensors`` are in the order of their bytes, file by file."""

    listing: Listing
    tensors: tuple[TensorInfo, ...]
    prefixes: tuple[bytes, ...]
    """The bytes in front of the first tensor of each file of ``listing.weights``: length and header."""

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
    tensors = [tensor for found, _ in results for tensor in found]
    check_unique(names, tensors)
    if listing.weight_map is not None:
        _check_index(listing.weight_map, names, tensors)
    return Checkpoint(listing, tuple(tensors), tuple(prefix for _, prefix in results))


def _check_index(weight_map: Mapping[str, str], files: Sequence[str], tensors: Sequence[TensorInfo]) -> None:
    found = {tensor.name: files[tensor.file] for tensor in tensors}
    for name, shard in weight_map.items():
        if found.get(name) != shard:
            where = f"is in {found[name]}" if name in found else "is in none of the shards"
            raise InvalidCheckpoint(f"{INDEX_NAME}: tensor {name[:200]!r} should be in {shard}, but {where}")
