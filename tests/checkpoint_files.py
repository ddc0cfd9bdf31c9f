"""Safetensors files built byte by byte, so that tests can build wrong ones as easily as right ones.

The format (safetensors 0.8): header length N as 8 bytes little-endian, N bytes of JSON, the tensors' bytes. This module
knows nothing of weightd's own parser: what the two agree on, they agree on by the format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

Tensor = tuple[str, tuple[int, ...], bytes]
"""(dtype, shape, row-major bytes) of one tensor."""

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits of one element of each dtype of the format."""

INDEX = "model.safetensors.index.json"


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; its bits must come to whole bytes."""
    bits = prod(shape) * BITS[dtype]
    assert bits % 8 == 0, (dtype, shape)
    return bits // 8


def raw_file(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file from its header (``bytes`` as they are, anything else as JSON) and data; ``length`` lies about it."""
    text = header if isinstance(header, bytes) else json.dumps(header, ensure_ascii=False).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def header_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The true header of tensors that follow each other in the mapping's order: a base to lie from."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata is not None else {}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
        position += len(data)
    return header


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A true file that holds the tensors in the mapping's order, packed without alignment."""
    return raw_file(header_of(tensors, metadata), b"".join(data for _, _, data in tensors.values()))


def write_index(folder: Path) -> None:
    """Write the true index of all .safetensors files of a folder."""
    weight_map = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        weight_map |= {tensor: path.name for tensor in header if tensor != "__metadata__"}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_checkpoint(
    folder: Path, shards: Mapping[str, Mapping[str, Tensor]], *, index: bool | Mapping[str, str] = False
) -> Path:
    """Write file name → tensors into ``folder``; returns it.

    ``index`` adds an index file: True for the true one, or a weight map (tensor name → file name) as it is to be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in shards.items():
        (folder / name).write_bytes(safetensors_bytes(tensors))
    if index is not False:
        true_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": true_map if index is True else index}))
    return folder
