"""A checkpoint: what is at a URI, listed, read and checked, before anything is allocated for it."""

from __future__ import annotations

import fnmatch
import hashlib
import posixpath
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from weightd.daemon.checkpoints.header import (
    TensorInfo,
    check_unique,
    header_length,
    is_path_trick,
    parse_header,
    parse_object,
)
from weightd.daemon.errors import CheckpointChanged, CheckpointNotFound, InvalidCheckpoint
from weightd.daemon.sources.base import Source, SourceFile

INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 256 << 20

_FIRST_READ = 64 << 10
"""Bytes of the first range read of a file: one round trip for all but the largest headers."""
_PARALLEL_READS = 64
_MAX_HEADERS_BYTES = 512 << 20
"""Bytes of all headers of one checkpoint together: 1,000,000 tensors with names of 300 bytes fit."""
_OTHER_WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.ot", "*.ckpt",
    "*.tflite", "*.npz", "*.safetensors.index.json", "*.bin.index.json",
)  # fmt: skip


@dataclass(frozen=True)
class Listing:
    """What a source holds of one checkpoint. ``identity`` changes whenever a file is added, removed or replaced."""

    uri: str
    identity: str
    weights: tuple[SourceFile, ...]
    weight_map: Mapping[str, str] | None
    """Tensor name → file, where there is an index."""
    metadata: tuple[SourceFile, ...]
    """Everything that is not weights: configuration, tokenizer."""


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


def list_checkpoint(uri: str, source: Source) -> Listing:
    """List the files at a URI and sort out which are the checkpoint's weights.

    With ``model.safetensors.index.json`` they are the shards that it names, else all top-level ``*.safetensors`` (less
    ``consolidated*``, a second copy that some publish). Raises CheckpointNotFound, InvalidCheckpoint.
    """
    files = source.list()
    by_name = {file.name: file for file in files}
    for name in by_name:
        if is_path_trick(name):
            raise InvalidCheckpoint(f"{uri}: a file is called {name!r}, a path that leaves its folder")
    index = by_name.get(INDEX_NAME)
    weight_map = None
    if index is not None:
        if index.size > MAX_INDEX_BYTES:
            raise InvalidCheckpoint(f"{INDEX_NAME}: {index.size} bytes, allowed are {MAX_INDEX_BYTES}")
        weight_map = read_index(INDEX_NAME, source.read(INDEX_NAME, 0, index.size))
        names = sorted(set(weight_map.values()))
        if missing := [name for name in names if name not in by_name]:
            raise CheckpointNotFound(
                f"{uri}: {INDEX_NAME} names {missing[0]!r}, which is not there"
                f" ({len(missing)} of {len(names)} shards are missing)",
                missing=[name.encode(errors="replace").decode() for name in missing[:100]],
            )
        weights = [by_name[name] for name in names]
    else:
        weights = [file for file in files if file.name.endswith(".safetensors") and "/" not in file.name]
        weights = [file for file in weights if not file.name.startswith("consolidated")] or weights
        if not weights:
            nested = sorted({posixpath.dirname(file.name) for file in files if file.name.endswith(".safetensors")})
            hint = f"; there are some in {', '.join(nested[:5])}: name one of these" if nested else ""
            raise CheckpointNotFound(f"{uri}: no .safetensors file at its top level{hint}")
    metadata = [file for file in files if not any(fnmatch.fnmatch(file.name, pattern) for pattern in _OTHER_WEIGHTS)]
    if index is not None:
        metadata.append(index)
    state = hashlib.sha256(uri.encode())
    for file in [*weights, *metadata]:
        state.update(f"\0{file.name}\0{file.size}\0{file.version}".encode(errors="surrogateescape"))
    return Listing(uri, state.hexdigest()[:32], tuple(weights), weight_map, tuple(metadata))


def read_index(name: str, text: bytes) -> dict[str, str]:
    """The weight map of an index file: tensor name → shard. Raises InvalidCheckpoint."""
    weight_map = parse_object(name, text).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidCheckpoint(f"{name}: weight_map must be an object from tensor name to file, and not empty")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or is_path_trick(shard) or not shard.endswith(".safetensors"):
            raise InvalidCheckpoint(
                f"{name}: weight_map: tensor {tensor[:200]!r} is said to be in {str(shard)[:200]!r}: "
                "must be a .safetensors file below the index's own folder"
            )
    return weight_map


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
