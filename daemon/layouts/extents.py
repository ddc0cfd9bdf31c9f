"""Extents: recipes turned into as few and as large contiguous reads as they allow.

An extent is one contiguous range of one file together with where its bytes go. A *direct* extent lands at its final
address; a *bounced* one goes through a bounded buffer and is scattered from there, because its bytes are strided, or
wanted by several segments, or too scattered for the source to place by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from weightd.daemon.layouts.casts import Cast
from weightd.daemon.layouts.digests import LEAF
from weightd.daemon.layouts.recipe import Block, Copy, Recipe, blocks, uses
from weightd.daemon.tensors import TensorInfo

_SPREAD = 8 << 20


class Run(NamedTuple):
    """Contiguous bytes in a segment (its index)."""

    segment: int
    offset: int
    nbytes: int


class Piece(NamedTuple):
    """Bytes of one entry that an extent brings.

    ``leaf`` is the first leaf of the entry that they are, where they are whole leaves at ``offset`` in the segment
    and can be hashed as they land; -1 where the entry's leaves are hashed once all of it has landed.
    """

    segment: int
    entry: int
    offset: int
    nbytes: int
    leaf: int


class Scatter(NamedTuple):
    """One block from the bounce buffer (offsets in bytes from its start) to a segment (from the segment's start)."""

    segment: int
    block: Block
    cast: Cast | None = None


@dataclass(slots=True)
class Extent:
    """One contiguous range of one file (its index), ``offset`` and ``nbytes`` in bytes, and what becomes of it."""

    file: int
    offset: int
    nbytes: int = 0
    runs: list[Run] = field(default_factory=list)
    scatters: list[Scatter] | None = None
    pieces: list[Piece] = field(default_factory=list)
    tensor: tuple[int, int] | None = None
    """(tensor, leaf): a bounced extent that holds whole leaves of a checkpoint tensor, to be hashed as such."""
    index: int = 0
    """Its place in the plan."""
    attempts: int = 0
    first_failure: float = 0.0


class Demands(NamedTuple):
    """What a source and a request ask of the plan."""

    extent_bytes: int
    """Size that extents grow to; a multiple of the leaf."""
    max_runs: int
    """Destinations that the source can scatter one contiguous read over by itself."""
    min_range: int
    """Runs of at least so many bytes are read one by one; shorter ones together with what lies between them."""
    whole_tensors: bool = False
    """Every byte of every tensor is read and hashed as the checkpoint has it, wanted by a segment or not."""
    whole_files: Collection[int] = ()
    """Files of which every byte is read, in order."""


def plan_extents(tensors: Sequence[TensorInfo], recipes: Sequence[Recipe], demands: Demands) -> list[Extent]:
    """All reads of one stage. Together they bring every byte of every entry exactly once, in file order.

    ``tensors`` is in the order of the bytes (file by file), as a Checkpoint has it.
    """
    wanted = uses(recipes)
    plan: list[Extent] = []
    current: Extent | None = None
    extent_bytes, small = demands.extent_bytes, demands.extent_bytes // 2
    for index, tensor in enumerate(tensors):
        if not tensor.nbytes:
            continue
        takers = wanted.get(index, ())
        if len(takers) == 1 and takers[0][1].source is None and takers[0][1].target is None:
            segment, copy = takers[0]
            offset = recipes[segment].entries[copy.entry].offset
            if tensor.nbytes > small:
                current = None
                plan.extend(_chunks(tensor, 0, tensor.nbytes, segment, copy.entry, offset, extent_bytes))
                continue
            if (
                current is None
                or current.file != tensor.file
                or current.offset + current.nbytes != tensor.start
                or current.nbytes + tensor.nbytes > extent_bytes
            ):
                current = Extent(tensor.file, tensor.start)
                plan.append(current)
            current.nbytes += tensor.nbytes
            runs = current.runs
            if runs and runs[-1].segment == segment and runs[-1].offset + runs[-1].nbytes == offset:
                runs[-1] = Run(segment, runs[-1].offset, runs[-1].nbytes + tensor.nbytes)
            else:
                runs.append(Run(segment, offset, tensor.nbytes))
            current.pieces.append(Piece(segment, copy.entry, offset, tensor.nbytes, 0))
            continue
        current = None
        plan.extend(_general(index, tensor, takers, recipes, demands))
    for extent in plan:
        if len(extent.runs) > demands.max_runs:
            _bounce(extent)
    return plan


def _chunks(
    tensor: TensorInfo, source: int, nbytes: int, segment: int, entry: int, offset: int, extent_bytes: int
) -> Iterator[Extent]:
    """Read ``nbytes`` at ``source`` of the tensor to ``offset`` of the segment: all of one entry, from its start."""
    for done in range(0, nbytes, extent_bytes):
        size = min(extent_bytes, nbytes - done)
        extent = Extent(tensor.file, tensor.start + source + done, size)
        extent.runs.append(Run(segment, offset + done, size))
        extent.pieces.append(Piece(segment, entry, offset + done, size, done // LEAF))
        yield extent


def _general(
    index: int,
    tensor: TensorInfo,
    takers: Sequence[tuple[int, Copy]],
    recipes: Sequence[Recipe],
    demands: Demands,
) -> Iterator[Extent]:
    wanted = [
        (segment, copy.entry, recipes[segment].entries[copy.entry].offset, block, copy.cast)
        for segment, copy in takers
        for block in blocks(copy, tensor, recipes[segment].entries[copy.entry])
    ]
    whole = demands.whole_tensors or tensor.file in demands.whole_files
    if not whole and not wanted:
        return
    one_run = len(wanted) == 1 and wanted[0][3].rows == 1
    as_they_are = not any(cast for *_, cast in wanted)
    if not whole and as_they_are and (one_run or all(block.run >= demands.min_range for *_, block, _ in wanted)):
        rows = sorted(
            (
                block.source + i * block.source_stride,
                segment,
                entry,
                start,
                block.target + i * block.target_stride,
                block.run,
            )
            for segment, entry, start, block, _ in wanted
            for i in range(block.rows)
        )
        if all(row[0] + row[5] <= following[0] for row, following in pairwise(rows)):
            for source, segment, entry, start, target, run in rows:
                if run == recipes[segment].entries[entry].nbytes:
                    yield from _chunks(tensor, source, run, segment, entry, start, demands.extent_bytes)
                    continue
                for extent in _chunks(tensor, source, run, segment, entry, start + target, demands.extent_bytes):
                    extent.pieces = [piece._replace(leaf=-1) for piece in extent.pieces]
                    yield extent
            return
    low, high = 0, tensor.nbytes
    if not whole:
        low = min(block.source for *_, block, _ in wanted)
        high = max(block.source + (block.rows - 1) * block.source_stride + block.run for *_, block, _ in wanted)
    for begin in range(low, high, demands.extent_bytes):
        end = min(begin + demands.extent_bytes, high)
        extent = Extent(tensor.file, tensor.start + begin, end - begin, scatters=[])
        if low == 0 and high == tensor.nbytes:
            extent.tensor = (index, begin // LEAF)
        brought: dict[tuple[int, int], int] = {}
        for segment, entry, start, block, cast in wanted:
            for part in _clip(block, begin, end, cast):
                assert extent.scatters is not None
                extent.scatters.append(Scatter(segment, part._replace(target=start + part.target), cast))
                key = (segment, entry)
                nbytes = part.run * part.rows
                brought[key] = brought.get(key, 0) + (cast.scaled(nbytes) if cast else nbytes)
        extent.pieces = [Piece(segment, entry, -1, nbytes, -1) for (segment, entry), nbytes in brought.items()]
        yield extent


def _clip(block: Block, begin: int, end: int, cast: Cast | None) -> Iterator[Block]:
    """The part of a block whose source lies in [begin, end), with its source counted from ``begin``.

    Both lie between elements: they are whole MiB from the first byte that is wanted.
    """
    source, step, target, target_step, run, count = block
    overlap = count > 1 and step < run
    if overlap and step == 0:
        low, high = max(source, begin), min(source + run, end)
        if low < high:
            into = cast.scaled(low - source) if cast else low - source
            yield from _spread(Block(low - begin, 0, target + into, target_step, high - low, count))
        return
    pace = step or 1
    first = max(0, -((source + run - 1 - begin) // pace))  # the first row that ends after begin
    last = min(count - 1, (end - 1 - source) // pace)
    inner = max(first, -((source - begin) // pace))  # the first that begins there
    outer = min(last, (end - run - source) // pace)

    def cut(row: int) -> Block:
        start = source + row * step
        low, high = max(start, begin), min(start + run, end)
        into = cast.scaled(low - start) if cast else low - start
        return Block(low - begin, 0, target + row * target_step + into, 0, high - low, 1)

    for row in range(first, min(inner, last + 1)):
        yield cut(row)
    if inner <= outer:
        whole = Block(
            source + inner * step - begin, step, target + inner * target_step, target_step, run, outer - inner + 1
        )
        yield from _spread(whole) if overlap else (whole,)
    for row in range(max(inner, outer + 1), last + 1):
        yield cut(row)


def _spread(block: Block) -> Iterator[Block]:
    """Rows that overlap in the source, a bounce buffer's worth at a time: they come to more than was read."""
    step = max(1, _SPREAD // block.run)
    for row in range(0, block.rows, step):
        yield block._replace(
            source=block.source + row * block.source_stride,
            target=block.target + row * block.target_stride,
            rows=min(step, block.rows - row),
        )


def _bounce(extent: Extent) -> None:
    """Turn a direct extent into a bounced one; its entries still land whole, so pieces keep their leaves."""
    position = 0
    extent.scatters = []
    for run in extent.runs:
        extent.scatters.append(Scatter(run.segment, Block(position, 0, run.offset, 0, run.nbytes, 1)))
        position += run.nbytes
    extent.runs = []
