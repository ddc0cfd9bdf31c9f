"""Strided boxes of elements: what of one lies where in another, whether they lie apart, what they cover together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise, product
from math import prod

from weightd.ipc.recipe import Box

_RUNS = 1 << 16
"""Runs that are compared with one another to tell whether writes overlap."""


def through(origin: Box, view: Box) -> tuple[Box, list[tuple[int, ...]]] | None:
    """A view of a storage that holds ``origin``'s elements row by row, as a box of what these are of, and the sizes
    that each of its dimensions is in parts there, outermost first; None where it is no box there."""
    whole: list[tuple[int, ...]] = [(size,) for size in view.shape]
    if 0 in view.shape:
        return Box(0, view.shape, view.strides), whole
    rows = []
    step = 1
    for size in reversed(origin.shape):
        rows.append(step)
        step *= size
    rows.reverse()
    # Neighbouring dimensions that are one in the tensor as well are one here.
    dims: list[tuple[int, int, int]] = []  # size, stride in the storage, stride in the tensor
    for size, row, stride in zip(origin.shape, rows, origin.strides, strict=True):
        if size == 1:
            continue
        if dims and dims[-1][2] == size * stride:
            dims[-1] = (dims[-1][0] * size, row, stride)
        else:
            dims.append((size, row, stride))
    if len(dims) <= 1:
        stride = dims[0][2] if dims else 1
        strides = tuple(step * stride for step in view.strides)
        return Box(origin.offset + view.offset * stride, view.shape, strides), whole
    at, rest = [], view.offset
    for _, row, _ in dims:
        at.append(rest // row)
        rest %= row
    reach = list(at)
    parts: list[tuple[int, ...]] = []
    strides_there: list[int] = []
    for count, step in zip(view.shape, view.strides, strict=True):
        split = _split(dims, at, reach, count, step)
        if split is None:
            return None
        parts.append(tuple(size for size, _ in split))
        strides_there += [stride for _, stride in split]
    if any(last >= size for last, (size, _, _) in zip(reach, dims, strict=True)):
        return None
    offset = origin.offset + sum(index * stride for index, (_, _, stride) in zip(at, dims, strict=True))
    return Box(offset, tuple(size for part in parts for size in part), tuple(strides_there)), parts


def _split(
    dims: Sequence[tuple[int, int, int]], at: Sequence[int], reach: list[int], count: int, step: int
) -> list[tuple[int, int]] | None:
    """One dimension of a view as (size, stride) in the tensor, several where it goes on from one of ``dims`` (size,
    stride in the storage, stride in the tensor) to the one outside of it. ``at`` is where the view begins; ``reach``,
    how far it goes in each, is brought up to date."""
    inner: list[tuple[int, int]] = []
    for dim in range(len(dims) - 1, -1, -1):
        size, row, stride = dims[dim]
        if count == 1 or step == 0:
            break
        if step % row or step // row >= size:
            continue
        every = step // row
        here = count
        if at[dim] + (count - 1) * every >= size:
            here = size // every
            if size % every or at[dim] >= every or count % here:
                return None
        reach[dim] += (here - 1) * every
        inner.insert(0, (here, every * stride))
        count, step = count // here, row * size
    if count > 1 and step:
        return None
    return inner if inner and count == 1 else [(count, 0), *inner]


def parted(box: Box, parts: Sequence[tuple[int, ...]]) -> Box:
    """The same box with each dimension in parts, outermost first."""
    shape: list[int] = []
    strides: list[int] = []
    for part, stride in zip(parts, box.strides, strict=True):
        for position, size in enumerate(part):
            shape.append(size)
            strides.append(stride * prod(part[position + 1 :]))
    return Box(box.offset, tuple(shape), tuple(strides))


def blocks(source: Box, target: Box) -> int:
    """Into how many pieces a copy from one box to the other falls, each of them rows that are equally far apart, as a
    daemon moves it. The boxes have the same shape."""
    return prod(size for size, _, _ in _repeated(source.shape, source.strides, target.strides)[:-1])


def longest_rows(source: Box, target: Box) -> tuple[Box, Box]:
    """The same copy, in as few pieces as it can be: where elements are copied one by one, its longest dimension is the
    last one."""
    dims = _repeated(source.shape, source.strides, target.strides)
    longest = max(dims, default=(1, 0, 0))
    if len(dims) < 2 or longest[0] == dims[-1][0] or prod(size for size, _, _ in dims) != prod(source.shape):
        return source, target
    others = list(dims)
    others.remove(longest)
    shape, from_strides, to_strides = zip(*others, longest, strict=True)
    return Box(source.offset, shape, from_strides), Box(target.offset, shape, to_strides)


@lru_cache(maxsize=4096)  # a layer's boxes are like another's
def _repeated(
    shape: tuple[int, ...], from_strides: tuple[int, ...], to_strides: tuple[int, ...]
) -> tuple[tuple[int, int, int], ...]:
    """(size, stride in the source, stride in the target) of what runs of elements repeat over, outermost first, where
    dimensions that go on from one another in both are one."""
    found: list[tuple[int, int, int]] = []
    for size, from_stride, to_stride in zip(shape, from_strides, to_strides, strict=True):
        if size == 1:
            continue
        if found and found[-1][1] == size * from_stride and found[-1][2] == size * to_stride:
            size *= found.pop()[0]
        found.append((size, from_stride, to_stride))
    if found and found[-1][1:] == (1, 1):
        found.pop()
    return tuple(found)


def apart(boxes: Sequence[Box]) -> bool:
    """Whether no element is in two of the boxes, or twice in one."""
    if any(stride == 0 and size > 1 for box in boxes for size, stride in zip(box.shape, box.strides, strict=True)):
        return False
    spans = sorted(_span(box) for box in boxes)
    if all(a[1] <= b[0] for a, b in pairwise(spans)):
        return True
    runs = _listed(boxes)
    if runs is None:
        # Boxes that are alike, one beside the other in a row: as columns of a fused weight are.
        return _columns(boxes)
    return all(start + run <= following for (start, run), (following, _) in pairwise(runs))


def covered(boxes: Sequence[Box]) -> int | None:
    """Elements that are in any of the boxes; None where that is too much to tell."""
    runs = _listed(boxes)
    if runs is None:
        return None
    count, end = 0, 0
    for start, run in runs:
        count += max(0, start + run - max(start, end))
        end = max(end, start + run)
    return count


def _listed(boxes: Sequence[Box]) -> list[tuple[int, int]] | None:
    runs: list[tuple[int, int]] = []
    for box in boxes:
        found = _runs(box)
        if found is None:
            return None
        runs.extend(found)
        if len(runs) > 4 * _RUNS:
            return None
    return sorted(runs)


def _runs(box: Box) -> Iterator[tuple[int, int]] | None:
    """(first element, length) of each contiguous run; None where there are too many."""
    dims = [(size, stride) for size, stride in zip(box.shape, box.strides, strict=True) if size != 1]
    dims.sort(key=lambda dim: dim[1])
    run = 1
    while dims and dims[0][1] == run:
        run *= dims.pop(0)[0]
    if prod(size for size, _ in dims) > _RUNS:
        return None
    starts = (
        box.offset + sum(index * stride for index, (_, stride) in zip(at, dims, strict=True))
        for at in product(*(range(size) for size, _ in dims))
    )
    return ((start, run) for start in starts)


def _span(box: Box) -> tuple[int, int]:
    return box.offset, box.offset + 1 + sum((n - 1) * s for n, s in zip(box.shape, box.strides, strict=True))


def _columns(boxes: Sequence[Box]) -> bool:
    strides = {box.strides for box in boxes}
    if len(strides) != 1:
        return False
    outer = max(strides.pop(), default=0)
    rows = sorted((box.offset, box.offset + _width(box, outer)) for box in boxes)
    return all(a[1] <= b[0] for a, b in pairwise(rows)) and rows[-1][1] - rows[0][0] <= outer


def _width(box: Box, outer: int) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(box.shape, box.strides, strict=True) if s != outer)
