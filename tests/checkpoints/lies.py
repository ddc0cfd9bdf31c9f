"""A true checkpoint file, and ways to make it lie: for the tests of headers and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.checkpoint_files import Tensor, header_of, raw_file, safetensors_bytes
from weightd.daemon.checkpoints.contents import Checkpoint, open_checkpoint
from weightd.daemon.checkpoints.listing import Listing, list_checkpoint
from weightd.daemon.sources.file import FileSource
from weightd.daemon.sources.uris import Allow

FILE = "model-00001-of-00001.safetensors"

SHORT = 10_000
"""Characters that an error message may have, however long what it complains about is."""

TRUE: dict[str, Tensor] = {
    "first.weight": ("F32", (2, 3), bytes(range(24))),
    "second.weight": ("BF16", (4,), bytes(range(8))),
    "third.weight": ("U8", (5,), bytes(range(5))),
}

DATA = b"".join(data for _, _, data in TRUE.values())


def listed(folder: Path, *weights: str) -> tuple[FileSource, Listing]:
    source = FileSource(folder, Allow())
    return source, list_checkpoint(f"file://{folder}", source, weights)


def opened(folder: Path, *weights: str) -> Checkpoint:
    return open_checkpoint(*listed(folder, *weights))


ALL = "*.safetensors"


def lie(tensor: str = "second.weight", **fields: Any) -> bytes:
    """The true file with fields of one tensor's entry replaced, its data as it was."""
    header = header_of(TRUE)
    header[tensor].update(fields)
    return raw_file(header, DATA)


def named(name: str) -> bytes:
    return safetensors_bytes({name: ("U8", (1,), b"x")})


def shaped(*shape: Any, dtype: str = "U8", data: bytes = b"") -> bytes:
    return raw_file({"t": {"dtype": dtype, "shape": list(shape), "data_offsets": [0, len(data)]}}, data)


def twice(text: str) -> bytes:
    """The first half of a header repeated: JSON that dictionaries could not express."""
    return raw_file(text.encode(), b"x")


def long(character: str = "k") -> str:
    return character * (1 << 20)
