"""What every room knows of a checkpoint's tensors."""

from __future__ import annotations

from typing import NamedTuple


class TensorInfo(NamedTuple):
    """One tensor of a checkpoint: where its bytes lie.

    ``shape`` in elements, row-major; ``start`` counts bytes from the start of the file; ``file`` is the index of the
    file in its checkpoint.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    start: int
    nbytes: int
