"""The ``checkpoint`` layout: the tensors as stored, whole or one rank's slice of each, as recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import translate
from re import compile as compile_pattern
from typing import Literal

from weightd.daemon.errors import InvalidRequest
from weightd.daemon.layouts.recipe import Box, Copy, Entry, Recipe, arrange, contiguous, validate
from weightd.daemon.tensors import TensorInfo
from weightd.ipc.dtypes import DTYPES

Split = int | Literal["replicate"]
"""Along which dimension a tensor is cut into equal parts, one for each rank; or every rank gets all of it."""


def checkpoint_layout(
    tensors: Sequence[TensorInfo],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    tp_size: int = 1,
    tp_ranks: Sequence[int] = (0,),
    splits: Mapping[str, Split] | None = None,
) -> list[Recipe]:
    """One recipe for each rank of ``tp_ranks``, entries in the order of the checkpoint's bytes.

    ``include`` and ``exclude`` are glob patterns over tensor names (none: all; exclude wins). ``splits`` maps glob
    patterns to a dimension (negative counts from the last) or ``"replicate"``; a tensor goes by the first that
    matches. Raises InvalidRequest where nothing is left, no pattern matches, or a dimension does not divide.
    """
    chosen = _choose(tensors, include, exclude)
    if tp_size == 1:
        recipes = [arrange([(_whole(tensors[i]), Copy(i, 0)) for i in chosen], rank) for rank in tp_ranks]
    else:
        split_of = _splitter(splits or {})
        cuts = [(i, split_of(tensors[i])) for i in chosen]
        recipes = [
            arrange([_slice(tensors[i], i, split, tp_size, rank) for i, split in cuts], rank) for rank in tp_ranks
        ]
    for recipe in recipes:
        validate(recipe, tensors)
    return recipes


def _whole(tensor: TensorInfo) -> Entry:
    return Entry(tensor.name, tensor.dtype, tensor.shape, 0, tensor.nbytes)


def _matcher(patterns: Sequence[str]) -> Callable[[str], object]:
    return compile_pattern("|".join(translate(pattern) for pattern in patterns)).match


def _choose(tensors: Sequence[TensorInfo], include: Sequence[str], exclude: Sequence[str]) -> Sequence[int]:
    if not include and not exclude:
        return range(len(tensors))
    wanted = _matcher(include or ["*"])
    unwanted = _matcher(exclude) if exclude else lambda name: None
    chosen = [i for i, tensor in enumerate(tensors) if wanted(tensor.name) and not unwanted(tensor.name)]
    if not chosen:
        raise InvalidRequest(
            f"tensors: include {list(include)} and exclude {list(exclude)} leave none of {len(tensors)} tensors"
        )
    return chosen


def _splitter(splits: Mapping[str, Split]) -> Callable[[TensorInfo], Split]:
    rules = [(compile_pattern(translate(pattern)).match, split) for pattern, split in splits.items()]

    def split_of(tensor: TensorInfo) -> Split:
        for matches, split in rules:
            if matches(tensor.name):
                return split
        raise InvalidRequest(
            f"parallel.map: no pattern matches tensor {tensor.name!r}: "
            'say its dimension, or "replicate"; {"*": "replicate"} at the end covers the rest'
        )

    return split_of


def _slice(tensor: TensorInfo, index: int, split: Split, tp_size: int, rank: int) -> tuple[Entry, Copy]:
    if split == "replicate":
        return _whole(tensor), Copy(index, 0)
    dim = split if split >= 0 else split + len(tensor.shape)
    if not 0 <= dim < len(tensor.shape):
        raise InvalidRequest(
            f"parallel.map: tensor {tensor.name!r} has no dimension {split}, its shape is {tensor.shape}"
        )
    size = tensor.shape[dim]
    if size % tp_size:
        raise InvalidRequest(
            f"parallel.map: tensor {tensor.name!r}: dimension {dim} has {size} elements, "
            f"which do not divide by tp_size {tp_size}"
        )
    part = size // tp_size
    whole = contiguous(tensor.shape)
    shape = (*tensor.shape[:dim], part, *tensor.shape[dim + 1 :])
    if tensor.nbytes % tp_size:
        raise InvalidRequest(
            f"parallel.map: tensor {tensor.name!r}: a slice of {tensor.dtype} ({DTYPES[tensor.dtype].bits} bits an "
            f"element) along dimension {dim} cuts through a byte: slice along another dimension, or replicate it"
        )
    entry = Entry(tensor.name, tensor.dtype, shape, 0, tensor.nbytes // tp_size)
    return entry, Copy(index, 0, source=Box(rank * part * whole.strides[dim], shape, whole.strides))
