"""Extents: recipes turned into as few and as large contiguous reads as they allow.

An extent is one contiguous range of one file together with where its bytes go; of sources that can skip what lies
between, so many rows of it. A *direct* extent lands at its final address; a *bounced* one goes through a bounded buffer
and is scattered from there, because its bytes are strided, or wanted by several segments, or too scattered for the
source to place by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from weightd.daemon.layouts.casts import Cast
from weightd.daemon.layouts.digests import LEAF, leaf_count
from weightd.daemon.layouts.recipe import Block, Copy, Entry, Recipe, blocks, uses
from weightd.daemon.tensors import TensorInfo

_SPREAD = 8 << 20


class Run(NamedTuple):
    """Contiguous bytes in a segment (its index)."""

    segment: int
    offset: int
    nbytes: int


class Piece(NamedTuple):
    """Bytes of one entry that an extent brings, from its leaf ``leaf`` on.

    Either whole leaves, at ``offset`` in the segment, which can be hashed as they land; or, where ``shared`` is not 0,
    parts of so many leaves, each of which is hashed once all extents that bring of it have landed.
    """

    segment: int
    entry: int
    offset: int
    """-1 where they are not all that lies between the first and the last of them."""
    nbytes: int
    leaf: int
    shared: int = 0


class Scatter(NamedTuple):
    """One block from the bounce buffer (offsets in bytes from its start) to a segment (from the segment's start)."""

    segment: int
    block: Block
    cast: Cast | None = None


@dataclass(slots=True)
class Extent:
    """One contiguous range of one file (its index), ``offset`` and ``nbytes`` in bytes, and what becomes of it.

    With more than one of ``rows`` it is so many equal runs, ``stride`` bytes apart, ``nbytes`` together, to one place.
    """

    file: int
    offset: int
    nbytes: int = 0
    rows: int = 1
    stride: int = 0
    runs: list[Run] = field(default_factory=list)
    scatters: list[Scatter] | None = None
    pieces: list[Piece] = field(default_factory=list)
    tensor: tuple[int, int] | None = None
    """(tensor, leaf): a bounced extent that holds whole leaves of a checkpoint tensor, to be hashed as such."""
    index: int = 0
    """Its place in the plan."""
    attempts: int = 0
    first_failure: float = 0.0

    @property
    def end(self) -> int:
        """Where in the file the last of it ends."""
        return self.offset + (self.rows - 1) * self.stride + self.nbytes // self.rows


class Demands(NamedTuple):
    """What a source and a request ask of the plan."""

    extent_bytes: int
    """Size that extents grow to; a multiple of the leaf."""
    max_runs: int
    """Destinations that the source can scatter one contiguous read over by itself."""
    min_range: int
    """Runs of at least so many bytes are read one by one; shorter ones together with what lies between them."""
    min_gap: int = 0
    """Bytes between equal runs that are worth leaving out of a read; 0: the source reads but contiguous ranges."""
    whole_tensors: bool = False
    """Every byte of every tensor is read and hashed as the checkpoint has it, wanted by a segment or not."""
    whole_files: Collection[int] = ()
    """Files of which every byte is read, in order."""


def plan_extents(tensors: Sequence[TensorInfo], recipes: Sequence[Recipe], demands: Demands) -> list[Extent]:
    """All reads of one stage. Together they bring every byte of every entry exactly once, in the order of tensors.

    ``tensors`` is in the order of the bytes (file by file), as a Checkpoint has it.
    """
    wanted, targets = uses(recipes), _Targets(recipes)
    plan: list[Extent] = []
    current: Extent | None = None
    extent_bytes, small = demands.extent_bytes, demands.extent_bytes // 2
    all_known = True
    for index, tensor in enumerate(tensors):
        if not tensor.nbytes:
            continue
        takers = wanted.get(index, ())
        if len(takers) == 1 and takers[0][1].source is None and takers[0][1].target is None:
            segment, copy = takers[0]
            offset = targets.entry(segment, copy.entry).offset
            if tensor.nbytes > small:
                current = None
                plan.extend(_direct(tensor, [(0, segment, copy.entry, 0, tensor.nbytes)], targets, extent_bytes))
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
        parts = list(_general(index, tensor, takers, targets, demands))
        all_known = all_known and bool(parts) and parts[0].tensor is not None
        plan.extend(parts)
    for extent in plan:
        if not all_known and not demands.whole_tensors and extent.file not in demands.whole_files:
            extent.tensor = None  # without those of all others, there is no use for its digest
        if len(extent.runs) > demands.max_runs:
            _bounce(extent)
    return plan


class _Targets:
    """Where bytes go: entries of recipes, and what of an entry is a piece."""

    def __init__(self, recipes: Sequence[Recipe]) -> None:
        self._recipes = recipes
        self._mixed = [{constant.entry for constant in recipe.constants} for recipe in recipes]
        """Entries that hold constants as well, which no extent brings: all of their leaves are hashed together."""

    def entry(self, segment: int, number: int) -> Entry:
        return self._recipes[segment].entries[number]

    def pieces(self, segment: int, number: int, at: int, nbytes: int) -> Iterator[Piece]:
        """``nbytes`` bytes of an entry from ``at`` on: whole leaves, and parts of those before and behind them."""
        entry, end = self.entry(segment, number), at + nbytes
        if number in self._mixed[segment]:
            yield Piece(segment, number, entry.offset + at, nbytes, 0, leaf_count(entry.nbytes))
            return
        first = leaf_count(at)
        last = leaf_count(end) if end == entry.nbytes else end // LEAF
        if first >= last:
            yield Piece(segment, number, entry.offset + at, nbytes, at // LEAF, leaf_count(end) - at // LEAF)
            return
        begin, stop = first * LEAF, min(last * LEAF, end)
        if at < begin:
            yield Piece(segment, number, entry.offset + at, begin - at, first - 1, 1)
        yield Piece(segment, number, entry.offset + begin, stop - begin, first)
        if stop < end:
            yield Piece(segment, number, entry.offset + stop, end - stop, last, 1)

    def apart(self, segment: int, number: int, first: int, stop: int, nbytes: int) -> Piece:
        """``nbytes`` bytes of an entry that lie between ``first`` and ``stop``, but are not all that lies there."""
        count = leaf_count(self.entry(segment, number).nbytes)
        leaf, end = first // LEAF, leaf_count(stop)
        if number in self._mixed[segment]:
            leaf, end = 0, count
        return Piece(segment, number, -1, nbytes, leaf, end - leaf)


def _direct(
    tensor: TensorInfo, runs: Iterable[tuple[int, int, int, int, int]], targets: _Targets, extent_bytes: int
) -> list[Extent]:
    """Read runs to where they belong: each (offset in the tensor, segment, entry, offset in the entry, bytes), in the
    tensor's order, apart from each other. Short ones that follow one another are read together."""
    plan: list[Extent] = []
    current: Extent | None = None
    small = extent_bytes // 2
    for source, segment, number, target, run in runs:
        entry = targets.entry(segment, number)
        done = 0
        while done < run:
            # Up to where an extent of the whole entry would end: its leaves are whole, wherever the run begins.
            size = min(run - done, extent_bytes - (target + done) % extent_bytes)
            start = tensor.start + source + done
            if (
                current is None
                or current.offset + current.nbytes != start
                or max(size, current.runs[-1].nbytes) > small
                or current.nbytes + size > extent_bytes
            ):
                current = Extent(tensor.file, start)
                plan.append(current)
            current.nbytes += size
            current.runs.append(Run(segment, entry.offset + target + done, size))
            current.pieces.extend(targets.pieces(segment, number, target + done, size))
            done += size
    return plan


def _lie_apart(blocks: Sequence[Block], demands: Demands) -> bool:
    """Whether what is wanted is less than half of what it lies in, with gaps that are worth leaving out, in rows that
    become neighbours."""
    first, *_ = ordered = sorted(blocks)
    wanted = sum(block.run for block in ordered)
    return (
        all(block.source_stride == first.source_stride and block.rows > 1 for block in ordered)
        and all(block.target_stride == block.run <= demands.extent_bytes for block in ordered)
        and all(block.source + block.run <= following.source for block, following in pairwise(ordered))
        and ordered[-1].source + ordered[-1].run <= first.source + first.source_stride
        and first.source_stride - wanted >= max(wanted, demands.min_gap)
    )


def _in_rows(
    tensor: TensorInfo, wanted: Sequence[tuple[int, int, Block]], targets: _Targets, extent_bytes: int
) -> Iterator[Extent]:
    """Read the rows of blocks, each (segment, entry, block), without what lies between."""
    for segment, number, block in wanted:
        step = extent_bytes // block.run
        for row in range(0, block.rows, step):
            rows = min(step, block.rows - row)
            start = tensor.start + block.source + row * block.source_stride
            extent = Extent(tensor.file, start, rows * block.run, rows, block.source_stride)
            target = block.target + row * block.run
            extent.runs.append(Run(segment, targets.entry(segment, number).offset + target, extent.nbytes))
            extent.pieces.extend(targets.pieces(segment, number, target, extent.nbytes))
            yield extent


def _general(
    index: int,
    tensor: TensorInfo,
    takers: Sequence[tuple[int, Copy]],
    targets: _Targets,
    demands: Demands,
) -> Iterator[Extent]:
    wanted = [
        (segment, copy.entry, block, copy.cast)
        for segment, copy in takers
        for block in blocks(copy, tensor, targets.entry(segment, copy.entry))
    ]
    whole = demands.whole_tensors or tensor.file in demands.whole_files
    if not whole and not wanted:
        return
    one_run = len(wanted) == 1 and wanted[0][2].rows == 1
    as_they_are = not any(cast for *_, cast in wanted)
    if not whole and as_they_are and (one_run or all(block.run >= demands.min_range for *_, block, _ in wanted)):
        runs = sorted(
            (block.source + i * block.source_stride, segment, entry, block.target + i * block.target_stride, block.run)
            for segment, entry, block, _ in wanted
            for i in range(block.rows)
        )
        if all(run[0] + run[-1] <= following[0] for run, following in pairwise(runs)):
            yield from _direct(tensor, runs, targets, demands.extent_bytes)
            return
    if not whole and as_they_are and demands.min_gap and _lie_apart([block for *_, block, _ in wanted], demands):
        yield from _in_rows(
            tensor, [(segment, number, block) for segment, number, block, _ in wanted], targets, demands.extent_bytes
        )
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
        brought: dict[tuple[int, int], tuple[int, int, int]] = {}
        for segment, number, block, cast in wanted:
            start = targets.entry(segment, number).offset
            for part in _clip(block, begin, end, cast):
                assert extent.scatters is not None
                extent.scatters.append(Scatter(segment, part._replace(target=start + part.target), cast))
                run = cast.scaled(part.run) if cast else part.run
                stop = part.target + (part.rows - 1) * part.target_stride + run
                before, first, last = brought.get((segment, number), (0, part.target, stop))
                brought[segment, number] = (before + run * part.rows, min(first, part.target), max(last, stop))
        for (segment, number), (nbytes, first, last) in brought.items():
            if nbytes == last - first:
                extent.pieces.extend(targets.pieces(segment, number, first, nbytes))
            else:
                extent.pieces.append(targets.apart(segment, number, first, last, nbytes))
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
