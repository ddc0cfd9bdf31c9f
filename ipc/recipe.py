"""A recipe as an engine uploads it: how checkpoint tensors become the engine's own parameters, as data.

Wire form: one JSON object, ``{"key": {...}, "entries": [[name, dtype, shape], ...], "boxes": [[shape, source strides,
target strides], ...], "copies": [[tensor, entry, box, source offset, target offset], ...], "casts": [index of a copy,
...], "constants": [[entry, value, offset, shape, strides], ...]}``. Numbers name places: a tensor's in the order of the
checkpoint's tensor names, an entry's and a box's in these lists; strides and offsets count elements. Boxes that many
copies share (a layer's like another's, an expert's like another's) are written once. A value is an element's bytes in
hexadecimal digits, little-endian.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


class Box(NamedTuple):
    """A strided box of elements, as torch's ``as_strided`` has it: offset, sizes and strides, in elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Parameter(NamedTuple):
    """What an engine wants to find in the segment: row-major and contiguous, ``dtype`` as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Move(NamedTuple):
    """Elements of checkpoint tensor ``tensor`` that become elements of the parameter ``entry`` (its index).

    The boxes have the same shape. With ``cast`` numbers are converted to the parameter's dtype, rounded to nearest,
    ties to even; without it bits are moved, and the two dtypes are equally wide.
    """

    tensor: str
    entry: int
    source: Box
    target: Box
    cast: bool = False


class Constant(NamedTuple):
    """One value in all elements of a box of the parameter ``entry``, except where a move writes: the move stands."""

    entry: int
    value: bytes
    target: Box


@dataclass(frozen=True)
class Key:
    """All that decides how an engine lays a model out. Equal keys, equal recipes; another version is another key."""

    headers: str
    """The checkpoint's ``headers_digest``."""
    engine: str
    version: str
    """The engine's own, and what else its layout hangs on (torch's, say)."""
    dtype: str
    """That the model is built in, as the engine names it."""
    config: str
    """SHA-256 of the model's configuration as the engine has it."""
    rank: int = 0
    """Which of the engine's processes, counted over its whole parallel plan."""
    parallel: Mapping[str, int] = field(default_factory=dict)
    """Sizes and ranks of the parallel plan, by their names."""
    backends: Sequence[str] = ()
    """What else the layout follows: quantisation, kernels, the device's architecture."""

    def document(self) -> dict[str, Any]:
        """As it is written."""
        return {**asdict(self), "parallel": dict(self.parallel), "backends": list(self.backends)}

    @property
    def digest(self) -> str:
        """What the recipe goes by: the SHA-256 of the document with its keys sorted, in hexadecimal digits."""
        return digest_of(self.document())


def digest_of(document: Any) -> str:
    """SHA-256 of a JSON value in its one spelling: keys sorted, no blanks, ASCII."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def headers_digest(tensors: Iterable[tuple[str, str, Sequence[int]]]) -> str:
    """Identity of what a checkpoint's headers say, its values left out: (name, dtype, shape) in the order of names."""
    return digest_of(sorted([name, dtype, list(shape)] for name, dtype, shape in tensors))


def encode(
    key: Key,
    tensors: Iterable[str],
    entries: Sequence[Parameter],
    moves: Iterable[Move],
    constants: Iterable[Constant] = (),
) -> dict[str, Any]:
    """The wire form of a recipe. ``tensors`` are the names of all of the checkpoint's tensors."""
    number = {name: index for index, name in enumerate(sorted(tensors))}
    boxes: dict[tuple[tuple[int, ...], ...], int] = {}
    copies, casts = [], []
    for index, move in enumerate(moves):
        shape = (move.source.shape, move.source.strides, move.target.strides)
        box = boxes.setdefault(shape, len(boxes))
        copies.append([number[move.tensor], move.entry, box, move.source.offset, move.target.offset])
        if move.cast:
            casts.append(index)
    return {
        "key": key.document(),
        "entries": [[entry.name, entry.dtype, list(entry.shape)] for entry in entries],
        "boxes": [[list(part) for part in box] for box in boxes],
        "copies": copies,
        "casts": casts,
        "constants": [
            [constant.entry, constant.value.hex(), constant.target.offset, list(constant.target.shape),
             list(constant.target.strides)]
            for constant in constants
        ],
    }  # fmt: skip
