"""A recipe: how a checkpoint's tensors become one segment, as data.

Entries say what the segment holds and where; copies say from which strided box of which checkpoint tensor to which
strided box of which entry. The staging pipeline knows nothing but recipes: an unsliced checkpoint, one rank's shards
and an engine's own fused layout are all the same thing to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from weightd.daemon.errors import InvalidRequest
from weightd.daemon.layouts.casts import SOURCES, TARGETS, Cast
from weightd.daemon.tensors import TensorInfo
from weightd.ipc.boxes import blocks as blocks_between
from weightd.ipc.dtypes import DTYPES
from weightd.ipc.recipe import Box, Constant

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

ALIGNMENT = 256
"""Every entry starts on a multiple of this many bytes: what CUDA's own allocators give, and vector loads want."""

_MAX_RUNS = 1 << 22
_MAX_ALL_RUNS = 1 << 26
_MAX_BLOCKS = 1 << 20
_MAX_ALL_BLOCKS = 1 << 22


class Entry(NamedTuple):
    """One tensor of the segment, contiguous and row-major: ``offset`` and ``nbytes`` in bytes from the segment."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Copy(NamedTuple):
    """Elements of checkpoint tensor ``tensor`` (its index) that become elements of entry ``entry`` (its index).

    The boxes have the same number of elements; None stands for the whole tensor, the whole entry. Bits stay what they
    are, unless it is a ``cast``, which has boxes.
    """

    tensor: int
    entry: int
    source: Box | None = None
    target: Box | None = None
    cast: Cast | None = None


class Recipe(NamedTuple):
    """All of one segment. ``nbytes`` is its size; ``rank`` which rank, of those staged together, it is for.

    ``constants`` stand where no copy writes. ``layout`` is the digest of the layout that it was uploaded as; empty
    where it is the checkpoint's own.
    """

    entries: Sequence[Entry]
    copies: Sequence[Copy]
    nbytes: int
    rank: int
    constants: Sequence[Constant] = ()
    layout: str = ""


class Block(NamedTuple):
    """``rows`` runs of ``run`` bytes, ``source_stride`` apart in the tensor, ``target_stride`` apart in the entry.

    All in bytes, counted from the tensor's and the entry's first byte; of a cast, ``run`` is as in the tensor.
    """

    source: int
    source_stride: int
    target: int
    target_stride: int
    run: int
    rows: int


def _rows(view: memoryview, start: int, stride: int, block: Block) -> NDArray[numpy.uint8]:
    # Imported here: most stages never need it.
    import numpy

    return numpy.ndarray((block.rows, block.run), numpy.uint8, view, start, (stride, 1))


def copy_block(block: Block, source: memoryview, target: memoryview) -> None:
    """Copy a block of several rows in host memory. Drops the GIL."""
    import numpy

    # numpy's strided copy drops the GIL.
    numpy.copyto(
        _rows(target, block.target, block.target_stride, block),
        _rows(source, block.source, block.source_stride, block),
    )


def convert_block(block: Block, cast: Cast, source: memoryview) -> tuple[Block, memoryview]:
    """A block of what is to be cast as the block to copy instead, and the memory to copy it from, which is its own."""
    data = cast.convert(_rows(source, block.source, block.source_stride, block))
    run = cast.scaled(block.run)
    return block._replace(source=0, source_stride=run, run=run), data.reshape(-1).data


def gather_block(block: Block, source: memoryview, into: memoryview | None = None) -> tuple[Block, memoryview]:
    """A block as one whose rows lie one after another, in ``into``, or in memory of its own. Drops the GIL."""
    data = into or memoryview(bytearray(block.rows * block.run))
    copy_block(block._replace(target=0, target_stride=block.run), source, data)
    return block._replace(source=0, source_stride=block.run), data[: block.rows * block.run]


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
    from_bits, to_bits = DTYPES[tensor.dtype].bits, DTYPES[entry.dtype].bits
    dims = [
        (size, from_stride, to_stride)
        for size, from_stride, to_stride in zip(source.shape, source.strides, target.strides, strict=True)
        if size != 1
    ]
    run = 1
    while dims and dims[-1][1] == run and dims[-1][2] == run:
        run *= dims.pop()[0]
    merged: list[tuple[int, int, int]] = []
    for size, from_stride, to_stride in dims:
        if merged and merged[-1][1] == size * from_stride and merged[-1][2] == size * to_stride:
            size *= merged.pop()[0]
        merged.append((size, from_stride, to_stride))
    read = [run, source.offset, *(dim[1] for dim in merged)]
    written = [run, target.offset, *(dim[2] for dim in merged)]
    if any(number * from_bits % 8 for number in read) or any(number * to_bits % 8 for number in written):
        raise InvalidRequest(
            f"tensor {tensor.name!r}: a slice of {tensor.dtype} ({from_bits} bits an element) cuts through a byte: "
            "slice along an outer dimension, or replicate it"
        )
    count, from_step, to_step = merged.pop() if merged else (1, 0, 0)
    if prod(size for size, _, _ in merged) > _MAX_BLOCKS:
        raise InvalidRequest(f"entry {entry.name!r}: a copy falls into more than {_MAX_BLOCKS} blocks")
    for index in product(*(range(size) for size, _, _ in merged)):
        begins, ends = (
            start + sum(i * dim[axis] for i, dim in zip(index, merged, strict=True))
            for start, axis in ((source.offset, 1), (target.offset, 2))
        )
        yield Block(
            begins * from_bits // 8,
            from_step * from_bits // 8,
            ends * to_bits // 8,
            to_step * to_bits // 8,
            run * from_bits // 8,
            count,
        )


def _block_count(source: Box, target: Box) -> int:
    """Blocks that a copy comes to, where its boxes have one shape."""
    if source.shape != target.shape or 0 in source.shape:
        return 1
    return blocks_between(source, target)


def validate(recipe: Recipe, tensors: Sequence[TensorInfo]) -> None:
    """Check everything about a recipe before a byte is allocated: bounds, types, alignment, overlap, coverage, size.

    Raises InvalidRequest naming the entry, what was found and what is allowed.
    """
    _check_entries(recipe)
    total = 0
    for copy in recipe.copies:
        if not (0 <= copy.tensor < len(tensors) and 0 <= copy.entry < len(recipe.entries)):
            raise InvalidRequest(f"a copy names tensor {copy.tensor} and entry {copy.entry}, there are "
                                 f"{len(tensors)} and {len(recipe.entries)}")  # fmt: skip
        tensor, entry = tensors[copy.tensor], recipe.entries[copy.entry]
        _check_types(copy, tensor, entry)
        if copy.source is None and copy.target is None:
            if tensor.nbytes != entry.nbytes:
                raise InvalidRequest(
                    f"entry {entry.name!r} has {entry.nbytes} bytes, tensor {tensor.name!r} has {tensor.nbytes}"
                )
            continue
        source = copy.source or contiguous(tensor.shape)
        target = copy.target or contiguous(entry.shape)
        check_box(f"tensor {tensor.name!r}", source, tensor.shape)
        check_box(f"entry {entry.name!r}", target, entry.shape)
        if prod(source.shape) != prod(target.shape):
            raise InvalidRequest(f"entry {entry.name!r}: a copy's two boxes differ in their number of elements")
        next(blocks(copy, tensor, entry), None)  # it says what cannot be cut
        total += _block_count(source, target)
        if total > _MAX_ALL_BLOCKS:
            raise InvalidRequest(f"entry {entry.name!r}: with it, copies fall into more than {_MAX_ALL_BLOCKS} blocks")
    _check_writes(recipe)


def _check_types(copy: Copy, tensor: TensorInfo, entry: Entry) -> None:
    found, wanted = tensor.dtype, entry.dtype
    if copy.cast is None:
        if found != wanted and (not copy.source or DTYPES[found].bits != DTYPES[wanted].bits):
            raise InvalidRequest(f"entry {entry.name!r}: dtype is {wanted}, of tensor {tensor.name!r} {found}")
    elif copy.cast != (found, wanted) or found not in SOURCES or wanted not in TARGETS:
        raise InvalidRequest(
            f"entry {entry.name!r}: a cast of tensor {tensor.name!r} from {found} to {wanted}: casts go from "
            f"{', '.join(sorted(SOURCES))} to {', '.join(sorted(TARGETS))}"
        )


def check_targets(recipe: Recipe) -> None:
    """Check what a recipe says of its segment, whatever the checkpoint is: that its entries lie apart, and that every
    element of each is written once. Copies' boxes are inside their entries already. Raises InvalidRequest."""
    _check_entries(recipe)
    _check_writes(recipe)


def _check_entries(recipe: Recipe) -> None:
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


def _check_writes(recipe: Recipe) -> None:
    written: list[list[Box]] = [[] for _ in recipe.entries]
    for copy in recipe.copies:
        written[copy.entry].append(copy.target or contiguous(recipe.entries[copy.entry].shape))
    constant: dict[int, list[Box]] = {}
    for value in recipe.constants:
        if not 0 <= value.entry < len(recipe.entries):
            raise InvalidRequest(f"a constant names entry {value.entry}, there are {len(recipe.entries)}")
        entry = recipe.entries[value.entry]
        if len(value.value) * 8 != DTYPES[entry.dtype].bits:
            raise InvalidRequest(f"entry {entry.name!r}: a constant of {len(value.value)} bytes is no {entry.dtype}")
        check_box(f"entry {entry.name!r}", value.target, entry.shape)
        constant.setdefault(value.entry, []).append(value.target)
    total = sum(
        prod(size for _, size in dims)
        for index in range(len(recipe.entries))
        for _, _, dims in _spans([*written[index], *constant.get(index, ())])
    )
    if total > _MAX_ALL_RUNS:
        raise InvalidRequest(f"boxes: they fall into more than {_MAX_ALL_RUNS} separate runs of elements")
    for index, entry in enumerate(recipe.entries):
        _check_written(entry, written[index], constant.get(index, ()))


def check_box(what: str, box: Box, shape: Sequence[int]) -> None:
    """Raise InvalidRequest where a box is not inside a tensor of that shape."""
    if len(box.shape) != len(box.strides) or box.offset < 0 or min((*box.shape, *box.strides), default=0) < 0:
        raise InvalidRequest(f"{what}: box {box} is malformed: sizes, strides and offset are whole numbers from 0")
    if 0 in box.shape:
        return
    last = box.offset + sum((size - 1) * stride for size, stride in zip(box.shape, box.strides, strict=True))
    if last >= prod(shape):
        raise InvalidRequest(f"{what}: box {box} reaches element {last}, the last one is {prod(shape) - 1}")


def _check_written(entry: Entry, copied: Sequence[Box], constant: Sequence[Box]) -> None:
    count = prod(entry.shape)
    found = sum(prod(box.shape) for box in copied)
    whole = contiguous(entry.shape)
    if not constant and found == count and len(copied) <= 1 and all(box == whole for box in copied):
        return
    import numpy

    bits = DTYPES[entry.dtype].bits
    starts, ends = _runs(entry, copied)
    if len(twice := numpy.flatnonzero(ends[:-1] > starts[1:])):
        raise InvalidRequest(
            f"entry {entry.name!r}: byte {int(starts[twice[0] + 1]) * bits // 8} is written more than once"
        )
    if constant and found < count:
        starts, ends = _runs(entry, [*copied, *constant])
        reached = numpy.maximum.accumulate(ends)
        before = numpy.concatenate([numpy.zeros(1, numpy.int64), reached[:-1]])
        found = int(numpy.maximum(0, ends - numpy.maximum(starts, before)).sum())
    if found != count:
        raise InvalidRequest(f"entry {entry.name!r}: {found * bits // 8} bytes of {entry.nbytes} are written")


def _spans(boxes: Sequence[Box]) -> Iterator[tuple[Box, int, list[tuple[int, int]]]]:
    """Boxes that hold anything, the elements of their contiguous runs, and (stride, size) of what these repeat over."""
    for box in boxes:
        if 0 in box.shape:
            continue
        dims = sorted((stride, size) for size, stride in zip(box.shape, box.strides, strict=True) if size != 1)
        run = 1
        while dims and dims[0][0] == run:
            run *= dims.pop(0)[1]
        yield box, run, dims


def _runs(entry: Entry, boxes: Sequence[Box]) -> tuple[NDArray[numpy.int64], NDArray[numpy.int64]]:
    """First element of each contiguous run, sorted, and the one behind its last. Raises InvalidRequest where there are
    too many."""
    import numpy

    starts, sizes, total = [numpy.zeros(0, numpy.int64)], [numpy.zeros(0, numpy.int64)], 0
    for box, run, dims in _spans(boxes):
        total += prod(size for _, size in dims)
        if total > _MAX_RUNS:
            raise InvalidRequest(f"entry {entry.name!r}: more than {_MAX_RUNS} separate runs of elements")
        begins: NDArray[numpy.int64] = numpy.full(1, box.offset, numpy.int64)
        for stride, size in reversed(dims):
            begins = numpy.add.outer(begins, numpy.arange(size, dtype=numpy.int64) * stride).reshape(-1)
        starts.append(begins)
        sizes.append(numpy.full(len(begins), run, numpy.int64))
    first, lengths = numpy.concatenate(starts), numpy.concatenate(sizes)
    order = numpy.argsort(first, kind="stable")
    return first[order], first[order] + lengths[order]


def arrange(items: Sequence[tuple[Entry, Copy]], rank: int) -> Recipe:
    """Lay entries out one after the other, each on its boundary; the offsets that they come with are replaced."""
    entries, copies, offset = [], [], 0
    for index, (entry, copy) in enumerate(items):
        offset = -(-offset // ALIGNMENT) * ALIGNMENT
        entries.append(Entry(entry.name, entry.dtype, entry.shape, offset, entry.nbytes))
        copies.append(copy._replace(entry=index))
        offset += entry.nbytes
    return Recipe(entries, copies, offset, rank)


def brought(recipe: Recipe) -> list[int]:
    """Bytes that copies bring to each of its entries: all, but for constants."""
    if not recipe.constants:
        return [entry.nbytes for entry in recipe.entries]
    found = [0] * len(recipe.entries)
    for copy in recipe.copies:
        entry = recipe.entries[copy.entry]
        count = prod(copy.target.shape if copy.target else entry.shape)
        found[copy.entry] += count * DTYPES[entry.dtype].bits // 8
    return found


def uses(recipes: Sequence[Recipe]) -> Mapping[int, list[tuple[int, Copy]]]:
    """Which copies of which segment (its index) want each checkpoint tensor (its index)."""
    table: dict[int, list[tuple[int, Copy]]] = {}
    for segment, recipe in enumerate(recipes):
        for copy in recipe.copies:
            table.setdefault(copy.tensor, []).append((segment, copy))
    return table
