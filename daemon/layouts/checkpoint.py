"""The ``checkpoint`` layout: the tensors as stored, whole or one rank's slice of each, as recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from weightd.daemon.errors import Cancelled, InvalidRequest
from weightd.daemon.layouts.patterns import Patterns
from weightd.daemon.layouts.recipe import Copy, Entry, Recipe, arrange, contiguous, validate
from weightd.daemon.tensors import TensorInfo
from weightd.ipc.dtypes import DTYPES
from weightd.ipc.recipe import Box

Split = int | Literal["replicate"]
"""Along which dimension a tensor is cut into equal parts, one for each rank; or every rank gets all of it."""

MAX_ENTRIES = 2_000_000
"""Tensors times ranks of one request: half a GB of this process's memory."""


def checkpoint_layout(
    tensors: Sequence[TensorInfo],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    tp_size: int = 1,
    tp_ranks: Sequence[int] = (0,),
    splits: Mapping[str, Split] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[Recipe]:
    """One recipe for each rank of ``tp_ranks``, entries in the order of the checkpoint's bytes.

    ``include`` and ``exclude`` are glob patterns over tensor names (none: all; exclude wins). ``splits`` maps glob
    patterns to a dimension (negative counts from the last) or ``"replicate"``; a tensor goes by the first that
    matches. Raises InvalidRequest where nothing is left, no pattern matches, a dimension does not divide, or it is too
    much; Cancelled once ``cancelled`` says so.
    """
    chosen = _choose(tensors, include, exclude, cancelled)
    if len(chosen) * len(tp_ranks) > MAX_ENTRIES:
        raise InvalidRequest(
            f"parallel.tp_rank: {len(tp_ranks)} ranks of {len(chosen)} tensors each are {len(tp_ranks) * len(chosen)} "
            f"tensors, at most {MAX_ENTRIES} may be in one request: ask for fewer ranks at once, those of this node, "
            "or for fewer tensors"
        )
    cuts: list[tuple[int, Split]] = [(i, "replicate") for i in chosen]
    if tp_size > 1:
        split_of = _splitter(splits or {}, len(chosen), cancelled)
        cuts = [(i, split_of(tensors[i])) for i in chosen]
    recipes = []
    for rank in tp_ranks:
        if cancelled():
            raise Cancelled("the stage was cancelled while it was planned")
        recipes.append(arrange([_slice(tensors[i], i, split, tp_size, rank) for i, split in cuts], rank))
        validate(recipes[-1], tensors)
    return recipes


def _whole(tensor: TensorInfo) -> Entry:
    return Entry(tensor.name, tensor.dtype, tensor.shape, 0, tensor.nbytes)


def _choose(
    tensors: Sequence[TensorInfo], include: Sequence[str], exclude: Sequence[str], cancelled: Callable[[], bool]
) -> Sequence[int]:
    if not include and not exclude:
        return range(len(tensors))
    wanted = Patterns(include or ["*"], "tensors.include", len(tensors), cancelled)
    unwanted = Patterns(exclude, "tensors.exclude", len(tensors), cancelled)
    chosen = [
        i
        for i, tensor in enumerate(tensors)
        if wanted.first(tensor.name) is not None and unwanted.first(tensor.name) is None
    ]
    if not chosen:
        raise InvalidRequest(
            f"tensors: include {_shown(include)} and exclude {_shown(exclude)} leave none of {len(tensors)} tensors"
        )
    return chosen


def _shown(patterns: Sequence[str]) -> str:
    return f"{list(patterns[:10])}" + (f" and {len(patterns) - 10} more" if len(patterns) > 10 else "")


def _splitter(splits: Mapping[str, Split], names: int, cancelled: Callable[[], bool]) -> Callable[[TensorInfo], Split]:
    patterns, values = Patterns(list(splits), "parallel.map", names, cancelled), list(splits.values())

    def split_of(tensor: TensorInfo) -> Split:
        if (index := patterns.first(tensor.name)) is not None:
            return values[index]
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
