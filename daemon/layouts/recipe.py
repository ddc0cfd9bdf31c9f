"""A recipe: how a checkpoint's tensors become one segment, as data.

Entries say what the segment holds and where; copies say from which strided box of which checkpoint tensor to which
strided box of which entry. The staging pipeline knows nothing but recipes: an unsliced checkpoint, one rank's shards
and an engine's own fused layout are all the same thing to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, product
from math import prod
from typing import NamedTuple

from weightd.daemon.errors import InvalidRequest
from weightd.daemon.tensors import TensorInfo
from weightd.ipc.dtypes import DTYPES

ALIGNMENT = 256
"""Every entry starts on a multiple of this many bytes: what CUDA's own allocators give, and vector loads want."""

_MAX_RUNS = 1 << 22
_MAX_BLOCKS = 1 << 20


class Box(NamedTuple):
    """A strided box of elements, as torch's ``as_strided`` has it: offset, sizes and strides, in elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Entry(NamedTuple):
    """One tensor of the segment, contiguous and row-major: ``offset`` and ``nbytes`` in bytes from the segment."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Copy(NamedTuple):
    """Bytes of checkpoint tensor ``tensor`` (its index) that become bytes of entry ``entry`` (its index).

    The boxes have the same number of elements; None stands for the whole tensor, the whole entry.
    """

    tensor: int
    entry: int
    source: Box | None = None
    target: Box | None = None


class Recipe(NamedTuple):
    """All of one segment. ``nbytes`` is its size; ``rank`` which tensor-parallel rank it is for."""

    entries: Sequence[Entry]
    copies: Sequence[Copy]
    nbytes: int
    rank: int


class Block(NamedTuple):
    """``rows`` runs of ``run`` bytes, ``source_stride`` apart in the tensor, ``target_stride`` apart in the entry.

    All in bytes, counted from the tensor's and the entry's first byte.
    """

    source: int
    source_stride: int
    target: int
    target_stride: int
    run: int
    rows: int


def copy_block(block: Block, source: memoryview, target: memoryview) -> None:
    """Copy a block of several rows in host memory. Drops the GIL."""
    # numpy's strided copy drops the GIL. Imported here: most stages never need it.
    import numpy
    from numpy.lib.stride_tricks import as_strided

    def rows(view: memoryview, start: int, stride: int) -> numpy.ndarray:
        flat = numpy.frombuffer(view, numpy.uint8)[start:]
        return as_strided(flat, (block.rows, block.run), (stride, 1))

    numpy.copyto(
        rows(target, block.target, block.target_stride),
        rows(source, block.source, block.source_stride),
    )


def contiguous(shape: Sequence[int]) -> Box:
    """The box that a whole row-major tensor of this shape is."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return Box(0, tuple(shape), tuple(reversed(strides)))


def blocks(copy: Copy, tensor: TensorInfo, entry: Entry) -> Iterator[Block]:
    """One copy as the fewest runs of bytes. Raises InvalidRequest where a box cuts through a byte (F4, F6)."""
    if copy.source is None and copy.target is None:
        if entry.nbytes:
            yield Block(0, 0, 0, 0, entry.nbytes, 1)
        return
    source = copy.source or contiguous(tensor.shape)
    target = copy.target or contiguous(entry.shape)
    if source.shape != target.shape:
        # Different factorisations of the same elements: let the finer one lead where the other is contiguous.
        if target.strides == contiguous(target.shape).strides:
            target = contiguous(source.shape)._replace(offset=target.offset)
        elif source.strides == contiguous(source.shape).strides:
            source = contiguous(target.shape)._replace(offset=source.offset)
        else:
            raise InvalidRequest(
                f"entry {entry.name!r}: a copy's boxes have the shapes {source.shape} and {target.shape}, "
                "and neither is contiguous"
            )
    if 0 in source.shape:
        return
    bits = DTYPES[entry.dtype].bits
    dims = [
        (size, from_stride * bits, to_stride * bits)
        for size, from_stride, to_stride in zip(source.shape, source.strides, target.strides, strict=True)
        if size != 1
    ]
    run = bits
    while dims and dims[-1][1] == run and dims[-1][2] == run:
        run *= dims.pop()[0]
    merged: list[tuple[int, int, int]] = []
    for size, from_stride, to_stride in dims:
        if merged and merged[-1][1] == size * from_stride and merged[-1][2] == size * to_stride:
            size *= merged.pop()[0]
        merged.append((size, from_stride, to_stride))
    numbers = [run, source.offset * bits, target.offset * bits, *(s for dim in merged for s in dim[1:])]
    if any(number % 8 for number in numbers):
        raise InvalidRequest(
            f"tensor {tensor.name!r}: a slice of {entry.dtype} ({bits} bits an element) cuts through a byte: "
            "slice along an outer dimension, or replicate it"
        )
    run //= 8
    count, from_step, to_step = merged.pop() if merged else (1, 0, 0)
    if prod(size for size, _, _ in merged) > _MAX_BLOCKS:
        raise InvalidRequest(f"entry {entry.name!r}: a copy falls into more than {_MAX_BLOCKS} blocks")
    for index in product(*(range(size) for size, _, _ in merged)):
        offsets = [
            start + sum(i * dim[axis] for i, dim in zip(index, merged, strict=True))
            for start, axis in ((source.offset * bits, 1), (target.offset * bits, 2))
        ]
        yield Block(offsets[0] // 8, from_step // 8, offsets[1] // 8, to_step // 8, run, count)


def validate(recipe: Recipe, tensors: Sequence[TensorInfo]) -> None:
    """Check everything about a recipe before a byte is allocated: bounds, types, alignment, overlap, coverage, size.

    Raises InvalidRequest naming the entry, what was found and what is allowed.
    """
    end, previous = 0, "the start"
    for entry in sorted(recipe.entries, key=lambda entry: entry.offset):
        if entry.dtype not in DTYPES or min(entry.shape, default=0) < 0:
            raise InvalidRequest(f"entry {entry.name!r}: {entry.dtype}{entry.shape} is no type and shape of a tensor")
        if entry.offset % ALIGNMENT:
            raise InvalidRequest(f"entry {entry.name!r}: offset {entry.offset} is no multiple of {ALIGNMENT}")
        if entry.offset < end:
            raise InvalidRequest(
                f"entry {entry.name!r}: offset {entry.offset} overlaps {previous}, which ends at {end}"
            )
        if entry.nbytes * 8 != prod(entry.shape) * DTYPES[entry.dtype].bits:
            raise InvalidRequest(f"entry {entry.name!r}: {entry.nbytes} bytes do not hold {entry.dtype}{entry.shape}")
        end, previous = entry.offset + entry.nbytes, f"entry {entry.name!r}"
    if end > recipe.nbytes:
        raise InvalidRequest(f"{previous} ends at {end}, past the end of the segment at {recipe.nbytes}")
    if len({entry.name for entry in recipe.entries}) != len(recipe.entries):
        raise InvalidRequest("two entries of the recipe have the same name")
    several: dict[int, list[Copy]] = {}
    covered = [0] * len(recipe.entries)
    for copy in recipe.copies:
        if not (0 <= copy.tensor < len(tensors) and 0 <= copy.entry < len(recipe.entries)):
            raise InvalidRequest(f"a copy names tensor {copy.tensor} and entry {copy.entry}, there are "
                                 f"{len(tensors)} and {len(recipe.entries)}")  # fmt: skip
        tensor, entry = tensors[copy.tensor], recipe.entries[copy.entry]
        if tensor.dtype != entry.dtype:
            raise InvalidRequest(
                f"entry {entry.name!r}: dtype is {entry.dtype}, of tensor {tensor.name!r} {tensor.dtype}"
            )
        if copy.source is None and copy.target is None:
            if tensor.nbytes != entry.nbytes:
                raise InvalidRequest(
                    f"entry {entry.name!r} has {entry.nbytes} bytes, tensor {tensor.name!r} has {tensor.nbytes}"
                )
            covered[copy.entry] += entry.nbytes
        else:
            for what, box, shape in (
                (f"tensor {tensor.name!r}", copy.source, tensor.shape),
                (f"entry {entry.name!r}", copy.target, entry.shape),
            ):
                _check_box(what, box or contiguous(shape), shape)
            if prod((copy.source or contiguous(tensor.shape)).shape) != prod(
                (copy.target or contiguous(entry.shape)).shape
            ):
                raise InvalidRequest(f"entry {entry.name!r}: a copy's two boxes differ in their number of elements")
            covered[copy.entry] += sum(block.run * block.rows for block in blocks(copy, tensor, entry))
        several.setdefault(copy.entry, []).append(copy)
    for index, entry in enumerate(recipe.entries):
        if covered[index] != entry.nbytes:
            raise InvalidRequest(f"entry {entry.name!r}: copies write {covered[index]} bytes of {entry.nbytes}")
        copies = several.get(index, ())
        if len(copies) > 1 or (copies and copies[0].target is not None):
            _check_no_overlap(entry, copies, tensors)


def _check_box(what: str, box: Box, shape: Sequence[int]) -> None:
    if len(box.shape) != len(box.strides) or box.offset < 0 or min((*box.shape, *box.strides), default=0) < 0:
        raise InvalidRequest(f"{what}: box {box} is malformed: sizes, strides and offset are whole numbers from 0")
    if 0 in box.shape:
        return
    last = box.offset + sum((size - 1) * stride for size, stride in zip(box.shape, box.strides, strict=True))
    if last >= prod(shape):
        raise InvalidRequest(f"{what}: box {box} reaches element {last}, the last one is {prod(shape) - 1}")


def _check_no_overlap(entry: Entry, copies: Sequence[Copy], tensors: Sequence[TensorInfo]) -> None:
    # Coverage adds up already, so bytes that are written twice are the only way left to leave a hole.
    runs: list[tuple[int, int]] = []
    for copy in copies:
        for block in blocks(copy, tensors[copy.tensor], entry):
            if len(runs) + block.rows > _MAX_RUNS:
                raise InvalidRequest(f"entry {entry.name!r}: more than {_MAX_RUNS} separate runs of bytes")
            runs.extend((block.target + i * block.target_stride, block.run) for i in range(block.rows))
    runs.sort()
    for (start, run), (following, _) in pairwise(runs):
        if start + run > following:
            raise InvalidRequest(f"entry {entry.name!r}: byte {following} is written more than once")


def arrange(items: Sequence[tuple[Entry, Copy]], rank: int) -> Recipe:
    """Lay entries out one after the other, each on its boundary; the offsets that they come with are replaced."""
    entries, copies, offset = [], [], 0
    for index, (entry, copy) in enumerate(items):
        offset = -(-offset // ALIGNMENT) * ALIGNMENT
        entries.append(Entry(entry.name, entry.dtype, entry.shape, offset, entry.nbytes))
        copies.append(copy._replace(entry=index))
        offset += entry.nbytes
    return Recipe(entries, copies, offset, rank)


def uses(recipes: Sequence[Recipe]) -> Mapping[int, list[tuple[int, Copy]]]:
    """Which copies of which segment (its index) want each checkpoint tensor (its index)."""
    table: dict[int, list[tuple[int, Copy]]] = {}
    for segment, recipe in enumerate(recipes):
        for copy in recipe.copies:
            table.setdefault(copy.tensor, []).append((segment, copy))
    return table
