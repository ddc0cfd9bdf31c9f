"""What is at a URI: its files, and which of them are the checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weightd.daemon.checkpoints.selection import (
    CONFIG_NAME,
    LeftOut,
    is_weights,
    left_out,
    select,
)
from weightd.daemon.errors import (
    AmbiguousCheckpoint,
    CheckpointNotFound,
    DaemonError,
    InvalidCheckpoint,
    InvalidRequest,
    SourceFailed,
)
from weightd.daemon.sources.base import Source, SourceFile

MAX_INDEX_BYTES = 256 << 20
MAX_CONFIG_BYTES = 16 << 20


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
    index: str | None = None
    """The file that says so."""
    rule: str = ""
    """Why these are the weights."""
    left_out: tuple[LeftOut, ...] = ()
    """Files with weights that were not taken."""


def list_checkpoint(uri: str, source: Source, wanted: Sequence[str] = ()) -> Listing:
    """List the files at a URI and sort out which are the checkpoint, by the rule of ``checkpoints.selection``.

    ``wanted`` names them instead. Raises CheckpointNotFound, AmbiguousCheckpoint, InvalidCheckpoint, InvalidRequest,
    SourceFailed, and what the source raises.
    """
    files = source.list()
    by_name = {file.name: file for file in files}
    if source.single and wanted:
        raise InvalidRequest(f"weights: {uri} is one file already: name the folder that it is in, or leave weights out")

    def read(name: str) -> bytes:
        size = by_name[name].size
        if size > MAX_INDEX_BYTES:
            raise InvalidCheckpoint(f"{name}: {size} bytes, allowed are {MAX_INDEX_BYTES}")
        return source.read(name, 0, size)

    try:
        if source.single:
            chosen = select(uri, list(by_name), None, read, [source.single], by="the URI")
        else:
            config = None if wanted else _config(source, by_name.get(CONFIG_NAME))
            chosen = select(uri, list(by_name), config, read, wanted)
    except (CheckpointNotFound, AmbiguousCheckpoint) as error:
        where = str(error) if str(error).startswith(uri) else f"{uri}: {error}"
        if source.partial:
            raise SourceFailed(f"{where}; {source.partial}", **error.details) from None
        raise type(error)(where, **error.details) from None
    if source.partial and not chosen.certain:
        raise SourceFailed(f"{uri}: {chosen.rule}, but there may be more: {source.partial}")
    metadata = [file for file in files if not is_weights(file.name)]
    if chosen.index is not None:
        metadata.append(by_name[chosen.index])
    weights = tuple(by_name[name] for name in chosen.weights)
    state = hashlib.sha256(uri.encode())
    for file in [*weights, *metadata]:
        state.update(f"\0{file.name}\0{file.size}\0{file.version}".encode(errors="surrogateescape"))
    return Listing(
        uri,
        state.hexdigest()[:32],
        weights,
        chosen.weight_map,
        tuple(metadata),
        chosen.index,
        chosen.rule,
        tuple(left_out(chosen, by_name)),
    )


def _config(source: Source, file: SourceFile | None) -> bytes | None:
    """What config.json holds; None where there is none, or none that could be read by anybody."""
    if file is None or file.size > MAX_CONFIG_BYTES:
        return None
    try:
        return source.read(file.name, 0, file.size)
    except SourceFailed:
        raise  # what it says would decide
    except DaemonError:
        return None  # it is left out of the configuration files as well, and the reason is in the record
