"""A segment's manifest: what lies where in it. The daemon hands it over beside the segment's own descriptor.

Wire form: one JSON object in a sealed memfd, a column per field rather than an object per tensor, because engines of
100,000 tensors wait for it to be parsed: ``{"format": 1, "stage", "model", "device", "tp_rank", "tp_size", "nbytes",
"digest", "checkpoint_digest", "metadata", "dtypes": [...], "names": [...], "types": [index into dtypes, ...],
"shapes": [[...], ...], "offsets": [...], "digests": [...] or null}``, and ``"layout"`` where it is not the checkpoint's
own. Offsets in bytes from the segment's start.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from weightd.ipc.dtypes import DTYPES

FORMAT = 1


class Entry(NamedTuple):
    """One tensor of a segment: row-major, ``offset`` and ``nbytes`` in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Manifest:
    """What a segment holds. Columns are parallel; ``digests`` is None while the segment still loads."""

    stage: str
    model: str
    device: str
    tp_rank: int
    tp_size: int
    nbytes: int
    digest: str | None
    checkpoint_digest: str | None
    metadata: str | None
    """Folder with the checkpoint's configuration and tokenizer files, on the daemon's file system."""
    names: Sequence[str]
    dtypes: Sequence[str]
    """Safetensors dtype of each tensor."""
    shapes: Sequence[Sequence[int]]
    offsets: Sequence[int]
    digests: Sequence[str] | None
    layout: str | None = None
    """Digest of the engine's own layout that it is in; None where it is the checkpoint's."""

    def __len__(self) -> int:
        return len(self.names)

    def entry(self, index: int) -> Entry:
        """One tensor by its position."""
        dtype, shape = self.dtypes[index], tuple(self.shapes[index])
        nbytes = prod(shape) * DTYPES[dtype].bits // 8
        return Entry(self.names[index], dtype, shape, self.offsets[index], nbytes)

    def __iter__(self) -> Iterator[Entry]:
        return map(self.entry, range(len(self.names)))

    def encode(self) -> bytes:
        """The wire form."""
        table = sorted(set(self.dtypes))
        number = {dtype: i for i, dtype in enumerate(table)}
        # Who knows nothing of other layouts never asks for one.
        apart = {"dtypes", "layout"} if self.layout is None else {"dtypes"}
        columns = {
            **{key: value for key, value in self.__dict__.items() if key not in apart},
            "format": FORMAT,
            "dtypes": table,
            "types": [number[dtype] for dtype in self.dtypes],
        }
        return json.dumps(columns, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, text: bytes) -> Manifest:
        """From the wire form. Raises ValueError for a format that is not known here."""
        columns: dict[str, Any] = json.loads(text)
        if columns.pop("format") != FORMAT:
            raise ValueError("the daemon speaks another manifest format: use the same release of weightd on both sides")
        table = columns.pop("dtypes")
        return cls(dtypes=[table[i] for i in columns.pop("types")], **columns)
