"""Extents, by their numbers alone: which reads a recipe comes to, and that they bring what it says."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.layouts.recipes import entry, filled, infos, random_bytes, recipe_of
from weightd.daemon.layouts.checkpoint import checkpoint_layout
from weightd.daemon.layouts.digests import LEAF, leaf_count
from weightd.daemon.layouts.extents import Demands, Extent, Piece, Run, Scatter, plan_extents
from weightd.daemon.layouts.recipe import Block, Copy, Entry, Recipe, arrange, contiguous, validate
from weightd.daemon.tensors import TensorInfo
from weightd.ipc.recipe import Box, Constant

DEMANDS = Demands(extent_bytes=4 * LEAF, max_runs=8, min_range=100)


def carried(extents: Sequence[Extent], recipes: Sequence[Recipe], file: bytes) -> list[bytes]:
    """What segments hold once extents have come, byte by byte. Asserts that no byte comes twice."""
    segments = [bytearray(recipe.nbytes) for recipe in recipes]
    written = [bytearray(recipe.nbytes) for recipe in recipes]

    def put(segment: int, offset: int, data: bytes) -> None:
        assert len(data) > 0
        assert not any(written[segment][offset : offset + len(data)])
        segments[segment][offset : offset + len(data)] = data
        written[segment][offset : offset + len(data)] = b"\1" * len(data)

    for extent in extents:
        data = b"".join(file[start:stop] for start, stop in rows_of(extent))
        assert len(data) == extent.nbytes
        position = 0
        for run in extent.runs:
            put(run.segment, run.offset, data[position : position + run.nbytes])
            position += run.nbytes
        for segment, block, _ in extent.scatters or ():
            for row in range(block.rows):
                start, target = block.source + row * block.source_stride, block.target + row * block.target_stride
                assert 0 <= start <= start + block.run <= extent.nbytes
                put(segment, target, data[start : start + block.run])
    return [bytes(segment) for segment in segments]


def rows_of(extent: Extent) -> list[tuple[int, int]]:
    """Where in its file an extent's rows begin and end."""
    run = extent.nbytes // extent.rows
    starts = [extent.offset + row * extent.stride for row in range(extent.rows)]
    assert starts[-1] + run == extent.end
    return [(start, start + run) for start in starts]


def file_of(tensors: Sequence[TensorInfo], data: Sequence[bytes]) -> bytes:
    return bytes(tensors[0].start) + b"".join(data)


@st.composite
def boxed(draw: st.DrawFn) -> tuple[list[TensorInfo], list[Recipe]]:
    """A few small tensors, and segments whose entries are whole ones, and boxes of them with strides of any kind."""
    tensors = infos(*((f"t{i}", "U8", (draw(st.integers(0, 40)),)) for i in range(draw(st.integers(1, 4)))))
    recipes = []
    for rank in range(draw(st.integers(1, 2))):
        items: list[tuple[Entry, Copy]] = []
        for index, tensor in enumerate(tensors):
            kind = draw(st.sampled_from(["whole", "box", "none"]))
            if kind == "whole":
                items.append((Entry(tensor.name, "U8", tensor.shape, 0, tensor.nbytes), Copy(index, 0)))
            elif kind == "box" and tensor.nbytes:
                shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
                strides = [draw(st.integers(0, 9)) for _ in shape]
                while (reach := sum((n - 1) * s for n, s in zip(shape, strides, strict=True))) >= tensor.nbytes:
                    strides[strides.index(max(strides))] -= 1
                box = Box(draw(st.integers(0, tensor.nbytes - 1 - reach)), shape, tuple(strides))
                items.append((Entry(tensor.name, "U8", shape, 0, prod(shape)), Copy(index, 0, box)))
        recipes.append(arrange(items, rank))
    return tensors, recipes


demands = st.builds(
    Demands,
    extent_bytes=st.sampled_from([4, 7, 16, 1000]),
    max_runs=st.integers(1, 4),
    min_range=st.sampled_from([0, 2, 5, 1000]),
    min_gap=st.sampled_from([0, 1, 4]),
    whole_tensors=st.booleans(),
    whole_files=st.sampled_from([(), (0,)]),
)


@given(boxed(), demands)
@settings(deadline=None, max_examples=400)
def test_extents_bring_what_recipes_say_in_the_files_order_and_each_byte_of_it_once(
    case: tuple[list[TensorInfo], list[Recipe]], wanted: Demands
) -> None:
    tensors, recipes = case
    data = random_bytes(tensors)
    for recipe in recipes:
        validate(recipe, tensors)
    extents = plan_extents(tensors, recipes, wanted)
    expected = [filled(recipe, tensors, data) for recipe in recipes]
    assert carried(extents, recipes, file_of(tensors, data)) == expected
    ranges = sorted(place for extent in extents for place in rows_of(extent))
    assert all(place[1] <= following[0] for place, following in pairwise(ranges)), "no byte is read twice"
    if all(extent.rows == 1 for extent in extents):
        assert ranges == [place for extent in extents for place in rows_of(extent)], "they are in the file's order"
    for extent in extents:
        assert 0 < extent.nbytes <= wanted.extent_bytes
        assert len(extent.runs) <= wanted.max_runs
        assert bool(extent.runs) != (extent.scatters is not None)
    brought: dict[tuple[int, int], int] = {}
    for extent in extents:
        for piece in extent.pieces:
            key = (piece.segment, piece.entry)
            brought[key] = brought.get(key, 0) + piece.nbytes
            target = recipes[piece.segment].entries[piece.entry]
            if piece.shared:
                assert 0 <= piece.leaf < piece.leaf + piece.shared <= leaf_count(target.nbytes)
            else:
                assert (piece.offset, piece.nbytes) == (target.offset, target.nbytes), "none has more than a leaf"
    assert brought == {
        (segment, number): target.nbytes
        for segment, recipe in enumerate(recipes)
        for number, target in enumerate(recipe.entries)
        if target.nbytes
    }
    if wanted.whole_tensors or wanted.whole_files:
        assert sum(extent.nbytes for extent in extents) == sum(tensor.nbytes for tensor in tensors)


def test_tensors_of_up_to_half_an_extent_share_one_and_larger_ones_have_their_own() -> None:
    half = 2 * LEAF
    tensors = infos(("a", "U8", (half,)), ("b", "U8", (half,)), ("c", "U8", (256,)), ("d", "U8", (half + 1,)))
    extents = plan_extents(tensors, checkpoint_layout(tensors), DEMANDS)
    assert [(extent.offset, extent.nbytes) for extent in extents] == [
        (8, 2 * half),
        (8 + 2 * half, 256),
        (8 + 2 * half + 256, half + 1),
    ]
    assert extents[0].runs == [Run(0, 0, 2 * half)], "they follow each other in the segment too"
    assert extents[0].pieces == [Piece(0, 0, 0, half, 0), Piece(0, 1, half, half, 0)]


def test_tensors_share_an_extent_only_where_they_follow_each_other_in_one_file() -> None:
    first = infos(("a", "U8", (10,)), ("b", "U8", (10,)), ("c", "U8", (10,)))
    gap = [first[0], first[2]]
    files = [first[0], first[1]._replace(file=1)]
    assert len(plan_extents(first, checkpoint_layout(first), DEMANDS)) == 1
    assert [(e.file, e.offset) for e in plan_extents(gap, checkpoint_layout(gap), DEMANDS)] == [(0, 8), (0, 28)]
    assert [(e.file, e.offset) for e in plan_extents(files, checkpoint_layout(files), DEMANDS)] == [(0, 8), (1, 18)]
    (extent,) = plan_extents(first, checkpoint_layout(first), DEMANDS)
    assert extent.runs == [Run(0, 0, 10), Run(0, 256, 10), Run(0, 512, 10)]


def test_a_large_tensor_is_read_extent_by_extent_of_whole_leaves() -> None:
    tensors = infos(("small", "U8", (3,)), ("t", "U8", (9 * LEAF + 5,)))
    extents = plan_extents(tensors, checkpoint_layout(tensors), DEMANDS)[1:]
    assert [(e.offset - 11, e.nbytes, e.runs, e.pieces) for e in extents] == [
        (start, nbytes, [Run(0, 256 + start, nbytes)], [Piece(0, 1, 256 + start, nbytes, start // LEAF)])
        for start, nbytes in ((0, 4 * LEAF), (4 * LEAF, 4 * LEAF), (8 * LEAF, LEAF + 5))
    ]
    assert [extent.tensor for extent in extents] == [None] * 3


def test_slices_are_read_run_by_run_and_hashed_as_they_come_where_they_are_whole_leaves() -> None:
    tensors = infos(("t", "U8", (4, 3 * LEAF)))
    (rows,) = checkpoint_layout(tensors, tp_size=2, tp_ranks=[1], splits={"*": 0})
    (columns,) = checkpoint_layout(tensors, tp_size=3, tp_ranks=[1], splits={"*": 1})
    extents = plan_extents(tensors, [rows], DEMANDS)
    assert [(e.offset - 8, e.nbytes, e.pieces[0].leaf) for e in extents] == [
        (6 * LEAF, 4 * LEAF, 0),
        (10 * LEAF, 2 * LEAF, 4),
    ]
    extents = plan_extents(tensors, [columns], DEMANDS)
    assert [(e.offset - 8, e.nbytes, e.runs) for e in extents] == [
        (row * 3 * LEAF + LEAF, LEAF, [Run(0, row * LEAF, LEAF)]) for row in range(4)
    ]
    assert [e.pieces for e in extents] == [[Piece(0, 0, row * LEAF, LEAF, row)] for row in range(4)]


def test_what_is_fused_is_cut_where_its_entry_has_its_leaves_and_short_runs_side_by_side_are_read_together() -> None:
    q, k = 3 * LEAF // 2, LEAF // 4
    tensors = infos(("q", "U8", (2 * q,)), ("k", "U8", (2 * k,)), ("v", "U8", (2 * 5 * LEAF,)))
    fused = entry(shape=(q + k + 5 * LEAF,))
    recipes = [
        recipe_of(
            [fused],
            [
                Copy(0, 0, Box(rank * q, (q,), (1,)), Box(0, (q,), (1,))),
                Copy(1, 0, Box(rank * k, (k,), (1,)), Box(q, (k,), (1,))),
                Copy(2, 0, Box(rank * 5 * LEAF, (5 * LEAF,), (1,)), Box(q + k, (5 * LEAF,), (1,))),
            ],
            fused.nbytes,
        )
        for rank in range(2)
    ]
    extents = plan_extents(tensors, recipes, DEMANDS)
    assert [(e.offset - 8, e.runs, e.pieces) for e in extents[:2]] == [
        (
            0,
            [Run(rank, 0, q) for rank in range(2)],
            [
                piece
                for rank in range(2)
                for piece in (Piece(rank, 0, 0, LEAF, 0), Piece(rank, 0, LEAF, LEAF // 2, 1, 1))
            ],
        ),
        (2 * q, [Run(rank, q, k) for rank in range(2)], [Piece(rank, 0, q, k, 1, 1) for rank in range(2)]),
    ]
    of_v = [extent for extent in extents[2:] if extent.runs[0].segment == 1]
    start = 8 + 2 * q + 2 * k + 5 * LEAF
    quarter = LEAF // 4
    assert [(e.offset - start, e.nbytes, e.pieces) for e in of_v] == [
        (
            0,
            2 * LEAF + quarter,
            [Piece(1, 0, q + k, quarter, 1, 1), Piece(1, 0, 2 * LEAF, 2 * LEAF, 2)],
        ),
        (2 * LEAF + quarter, 2 * LEAF + 3 * quarter, [Piece(1, 0, 4 * LEAF, 2 * LEAF + 3 * quarter, 4)]),
    ]


def test_columns_that_all_ranks_want_come_to_the_leaves_of_each() -> None:
    tensors = infos(("t", "U8", (LEAF // 16, 64)))
    recipes = checkpoint_layout(tensors, tp_size=2, tp_ranks=(0, 1), splits={"*": 1})
    (extent,) = plan_extents(tensors, recipes, DEMANDS)
    assert extent.pieces == [Piece(rank, 0, 0, 2 * LEAF, 0) for rank in range(2)]
    extents = plan_extents(tensors, recipes, DEMANDS._replace(extent_bytes=LEAF))
    half = LEAF // 2
    assert [e.pieces for e in extents] == [
        [Piece(rank, 0, part * half, half, part // 2, 1) for rank in range(2)] for part in range(4)
    ]


def test_rows_with_wide_gaps_are_read_without_them_where_the_source_can() -> None:
    rows, run = 3 * LEAF // 64, 64
    tensors = infos(("t", "U8", (rows, 8 * run)))

    def read_by(*ranks: int, gap: int = 4 * run) -> list[Extent]:
        recipes = checkpoint_layout(tensors, tp_size=8, tp_ranks=ranks, splits={"*": 1})
        return plan_extents(tensors, recipes, Demands(2 * LEAF, 8, 100, gap))

    step = 2 * LEAF // run
    assert [(e.offset - 8, e.nbytes, e.rows, e.stride, e.end - 8) for e in read_by(5)] == [
        (5 * run, 2 * LEAF, step, 8 * run, (step - 1) * 8 * run + 6 * run),
        (5 * run + step * 8 * run, LEAF, step // 2, 8 * run, (rows - 1) * 8 * run + 6 * run),
    ]
    assert [e.runs + e.pieces for e in read_by(5)] == [
        [Run(0, 0, 2 * LEAF), Piece(0, 0, 0, 2 * LEAF, 0)],
        [Run(0, 2 * LEAF, LEAF), Piece(0, 0, 2 * LEAF, LEAF, 2)],
    ]
    assert [(e.offset - 8, e.runs[0].segment) for e in read_by(5, 1)[::2]] == [(5 * run, 0), (run, 1)]
    assert all(e.rows > 1 for e in read_by(0, 3, 4, 7)), "half of it is left out"
    assert all(e.rows == 1 for e in read_by(0, 1, 2, 3, 4)), "most of it is wanted"
    assert all(e.rows == 1 for e in read_by(5, gap=7 * run + 1)), "the gaps are too narrow"
    assert all(e.rows == 1 for e in read_by(5, gap=0)), "the source cannot"
    assert all(e.rows == 1 for e in read_by(5, 5)), "no byte is read twice"


def test_what_is_not_side_by_side_in_its_entry_belongs_to_all_leaves_that_it_may_be_in() -> None:
    side = 1 << 11
    tensors = infos(("t", "U8", (side, side)))
    turned = entry(shape=(side, side))
    recipe = recipe_of([turned], [Copy(0, 0, Box(0, (side, side), (1, side)))], turned.nbytes)
    extents = plan_extents(tensors, [recipe], DEMANDS._replace(extent_bytes=LEAF))
    assert [e.pieces for e in extents] == [[Piece(0, 0, -1, LEAF, 0, 4)]] * 4


def test_leaves_of_an_entry_with_constants_are_hashed_together() -> None:
    tensors = infos(("t", "U8", (2 * LEAF,)), ("u", "U8", (4, 8)))
    padded, wide = entry(shape=(4 * LEAF,)), entry("wide", "U8", (4, 6), 4 * LEAF)
    recipe = recipe_of(
        [padded, wide],
        [
            Copy(0, 0, Box(0, (2 * LEAF,), (1,)), Box(0, (2 * LEAF,), (1,))),
            Copy(1, 1, Box(0, (4, 4), (8, 1)), Box(0, (4, 4), (6, 1))),
        ],
        wide.offset + wide.nbytes,
    )._replace(constants=[Constant(0, b"\0", Box(0, (4 * LEAF,), (1,))), Constant(1, b"\0", Box(0, (24,), (1,)))])
    validate(recipe, tensors)
    extents = plan_extents(tensors, [recipe], DEMANDS._replace(extent_bytes=LEAF))
    assert [e.pieces for e in extents] == [
        [Piece(0, 0, 0, LEAF, 0, 4)],
        [Piece(0, 0, LEAF, LEAF, 0, 4)],
        [Piece(0, 1, -1, 16, 0, 1)],
    ]


@pytest.mark.parametrize(("run", "together"), [(99, True), (100, False), (101, False)])
def test_short_runs_are_read_with_what_lies_between_from_the_first_to_the_last(run: int, together: bool) -> None:
    tensors = infos(("t", "U8", (5, 3 * run)))
    (recipe,) = checkpoint_layout(tensors, tp_size=3, tp_ranks=[1], splits={"*": 1})
    extents = plan_extents(tensors, [recipe], DEMANDS)
    if not together:
        assert [(e.offset - 8, e.nbytes) for e in extents] == [(row * 3 * run + run, run) for row in range(5)]
        return
    (extent,) = extents
    assert (extent.offset - 8, extent.nbytes) == (run, 12 * run + run)
    assert extent.scatters == [Scatter(0, Block(0, 3 * run, 0, run, run, 5))]
    assert extent.pieces == [Piece(0, 0, 0, 5 * run, 0)], "it is all of the entry"
    assert extent.tensor is None, "it is not all of the tensor"


def test_rows_that_overlap_are_read_once_however_long_they_are() -> None:
    tensors = infos(("t", "U8", (1000,)))
    target = entry(shape=(3, 400))
    recipe = recipe_of([target], [Copy(0, 0, Box(50, (3, 400), (200, 1)))], target.nbytes)
    (extent,) = plan_extents(tensors, [recipe], DEMANDS)
    assert (extent.offset - 8, extent.nbytes, extent.runs) == (50, 800, [])
    side_by_side = recipe_of([target], [Copy(0, 0, Box(0, (3, 400), (300, 1)))], target.nbytes)
    assert len(plan_extents(tensors, [side_by_side], DEMANDS)) == 1
    apart = recipe_of([entry(shape=(2, 400))], [Copy(0, 0, Box(0, (2, 400), (600, 1)))], 800)
    assert [e.nbytes for e in plan_extents(tensors, [apart], DEMANDS)] == [400, 400]
    touching = recipe_of([entry(shape=(2, 2, 200))], [Copy(0, 0, Box(0, (2, 2, 200), (200, 400, 1)))], 800)
    (extent,) = plan_extents(tensors, [touching], DEMANDS)
    assert extent.runs == [Run(0, target, 200) for target in (0, 400, 200, 600)], "they are no neighbours any more"


def test_what_is_hashed_as_the_checkpoint_has_it_is_read_whole_and_says_which_leaves_it_is() -> None:
    tensors = infos(("t", "U8", (2, 3 * LEAF)), ("other", "U8", (5,)))
    recipes = checkpoint_layout(tensors, include=["t"], tp_size=2, tp_ranks=[0], splits={"*": 1})
    extents = plan_extents(tensors, recipes, DEMANDS._replace(whole_tensors=True))
    assert [(e.offset - 8, e.nbytes, e.tensor) for e in extents] == [
        (0, 4 * LEAF, (0, 0)),
        (4 * LEAF, 2 * LEAF, (0, 4)),
        (6 * LEAF, 5, (1, 0)),
    ]
    assert [e.pieces for e in extents] == [
        [Piece(0, 0, 0, 2 * LEAF, 0), Piece(0, 0, 2 * LEAF, LEAF // 2, 2, 1)],
        [Piece(0, 0, 5 * LEAF // 2, LEAF // 2, 2, 1)],
        [],
    ]
    by_file = plan_extents(tensors, recipes, DEMANDS._replace(whole_files=[0]))
    assert [(e.offset, e.tensor) for e in by_file] == [(e.offset, e.tensor) for e in extents]
    others = plan_extents(tensors, recipes, DEMANDS._replace(whole_files=[1]))
    assert 5 not in [extent.nbytes for extent in others]


def test_more_destinations_than_a_source_can_scatter_over_go_through_a_buffer() -> None:
    tensors = infos(*((f"t{i}", "U8", (10 + i,)) for i in range(9)))
    recipes = checkpoint_layout(tensors[:8])
    (extent,) = plan_extents(tensors[:8], recipes, DEMANDS)
    assert (len(extent.runs), extent.scatters) == (8, None)
    (extent,) = plan_extents(tensors, checkpoint_layout(tensors), DEMANDS)
    assert extent.runs == []
    starts = [sum(10 + before for before in range(i)) for i in range(9)]
    assert extent.scatters == [Scatter(0, Block(starts[i], 0, 256 * i, 0, 10 + i, 1)) for i in range(9)]
    assert [piece.leaf for piece in extent.pieces] == [0] * 9, "each is whole, and hashed as it lands"


def test_what_several_segments_want_is_read_once_and_scattered() -> None:
    tensors = infos(("t", "U8", (300,)))
    recipes = checkpoint_layout(tensors, tp_size=2, tp_ranks=[0, 1], splits={"*": "replicate"})
    (extent,) = plan_extents(tensors, recipes, DEMANDS)
    assert extent.scatters == [Scatter(segment, Block(0, 0, 0, 0, 300, 1)) for segment in (0, 1)]
    assert (extent.tensor, contiguous((300,))) == ((0, 0), Box(0, (300,), (1,)))
    assert extent.pieces == [Piece(segment, 0, 0, 300, 0) for segment in (0, 1)]


@pytest.mark.parametrize(("run", "stride"), [(1, 0), (3, 0), (4, 1), (4, 3)])
def test_rows_that_overlap_in_the_source_stay_together_and_come_to_a_bounded_number_of_bytes(
    run: int, stride: int
) -> None:
    rows = 1 << 20
    tensors = infos(("t", "U8", ((rows - 1) * stride + run,)))
    target = entry(shape=(rows, run))
    recipe = recipe_of([target], [Copy(0, 0, Box(0, (rows, run), (stride, 1)))], target.nbytes)
    validate(recipe, tensors)
    extents = plan_extents(tensors, [recipe], DEMANDS)
    found = [scatter.block for extent in extents for scatter in extent.scatters or ()]
    assert len(found) < 10
    assert sum(block.rows * block.run for block in found) == target.nbytes
    assert max(block.rows * block.run for block in found) <= 8 * LEAF
