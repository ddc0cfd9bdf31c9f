"""What is at a URI: its files, and which of them are the checkpoint's weights."""

from __future__ import annotations

import fnmatch
import hashlib
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weightd.daemon.checkpoints.header import is_path_trick, parse_object
from weightd.daemon.errors import CheckpointNotFound, InvalidCheckpoint
from weightd.daemon.sources.base import Source, SourceFile

INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 256 << 20

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


def list_checkpoint(uri: str, source: Source) -> Listing:
    """List the files at a URI and sort out which are the checkpoint's weights.

    With ``model.safetensors.index.json`` they are the shards that it names, else all top-level ``*.safetensors`` (less
    ``consolidated*``, a second copy that some publish). Raises CheckpointNotFound, InvalidCheckpoint.
    """
    files = source.list()
    try:
        weights, weight_map = _choose_weights(uri, files, source)
    except CheckpointNotFound:
        if not source.copies:
            raise
        files = source.list(anew=True)
        weights, weight_map = _choose_weights(uri, files, source)
    metadata = [file for file in files if not any(fnmatch.fnmatch(file.name, pattern) for pattern in _OTHER_WEIGHTS)]
    if weight_map is not None:
        metadata += [file for file in files if file.name == INDEX_NAME]
    state = hashlib.sha256(uri.encode())
    for file in [*weights, *metadata]:
        state.update(f"\0{file.name}\0{file.size}\0{file.version}".encode(errors="surrogateescape"))
    return Listing(uri, state.hexdigest()[:32], tuple(weights), weight_map, tuple(metadata))


def _choose_weights(
    uri: str, files: Sequence[SourceFile], source: Source
) -> tuple[list[SourceFile], Mapping[str, str] | None]:
    """The files that hold the weights, and where each tensor is, where an index says that."""
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
    return weights, weight_map


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
