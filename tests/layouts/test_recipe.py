"""Recipes: what a strided box says lands where, byte for byte; what is impossible is refused by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from random import Random

import numpy
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.checkpoint_files import BITS
from tests.layouts.recipes import (
    PACKED,
    dtypes,
    entry,
    filled,
    from_bits,
    held,
    info,
    infos,
    random_bytes,
    recipe_of,
    to_bits,
)
from weightd.daemon.errors import InvalidRequest
from weightd.daemon.layouts.recipe import Block, Copy, Recipe, blocks, contiguous, uses, validate
from weightd.daemon.tensors import TensorInfo
from weightd.ipc.recipe import Box

# ---------------------------------------------------------------------------- validation

TENSORS = infos(
    ("six", "U8", (2, 3)), ("four", "U8", (4,)), ("pairs", "F4", (4, 2)), ("wide", "F32", (2,)), ("none", "U8", (0,))
)


ROW = Box(0, (3,), (1,))


REFUSED: dict[str, tuple[Recipe, str]] = {
    "an offset off the boundary": (recipe_of([entry(offset=128)], [Copy(0, 0)]), r"'e'.*offset 128.*256"),
    "a negative offset": (recipe_of([entry(offset=-256)], [Copy(0, 0)]), r"'e'.*-256"),
    "two entries at the same offset": (
        recipe_of([entry("a"), entry("b")], [Copy(0, 0), Copy(0, 1)]),
        r"'b'.*offset 0 overlaps.*'a'.*ends at 6",
    ),
    "an entry that reaches into the next": (
        recipe_of([entry("b", offset=256), entry("a", shape=(300,))], [Copy(0, 0), Copy(0, 1)]),
        r"'b'.*offset 256 overlaps.*'a'.*ends at 300",
    ),
    "an entry past the end of the segment": (
        recipe_of([entry(offset=256)], [Copy(0, 0)], 261),
        r"'e'.*ends at 262.*261",
    ),
    "a size that does not hold the shape": (
        recipe_of([entry()._replace(nbytes=7)], [Copy(0, 0)]),
        r"'e'.*7 bytes.*U8\(2, 3\)",
    ),
    "negative sizes that multiply to the right one": (recipe_of([entry(shape=(-2, -3))], [Copy(0, 0)]), r"'e'.*-2"),
    "a negative size beside a 0": (recipe_of([entry(shape=(0, -3))], []), r"'e'.*-3"),
    "a negative number of bytes": (recipe_of([entry(shape=(-6,))], []), "'e'.*-6"),
    "an unknown dtype": (recipe_of([entry(dtype="F33")], [Copy(0, 0)]), r"'e'.*F33"),
    "another dtype than the tensor's": (
        recipe_of([entry(dtype="I8")], [Copy(0, 0)]),
        r"'e'.*I8.*'six'.*U8",
    ),
    "two entries of one name": (
        recipe_of([entry("a"), entry("a", offset=256)], [Copy(0, 0), Copy(0, 1)]),
        r"two entries.*same name",
    ),
    "a tensor that is not there": (recipe_of([entry()], [Copy(5, 0)]), r"tensor 5.*5"),
    "a negative tensor": (recipe_of([entry()], [Copy(-1, 0)]), r"tensor -1"),
    "an entry that is not there": (recipe_of([entry()], [Copy(0, 1)]), r"entry 1.*1"),
    "a negative entry": (recipe_of([entry()], [Copy(0, -1)]), r"entry -1"),
    "a whole copy of another size": (recipe_of([entry()], [Copy(1, 0)]), r"'e' has 6 bytes.*'four' has 4"),
    "an entry without a copy": (recipe_of([entry()], []), r"'e'.*0 bytes of 6"),
    "an entry written by half": (recipe_of([entry()], [Copy(0, 0, ROW, ROW)]), r"'e'.*3 bytes of 6"),
    "an entry written twice as whole": (
        recipe_of([entry()], [Copy(0, 0), Copy(0, 0)]),
        r"'e'.*byte 0 .*more than once",
    ),
    "bytes written twice, and others never": (
        recipe_of([entry()], [Copy(0, 0, ROW, ROW), Copy(0, 0, ROW, Box(1, (3,), (1,)))]),
        r"'e'.*byte 1 .*more than once",
    ),
    "a target whose rows overlap": (
        recipe_of([entry()], [Copy(0, 0, None, Box(0, (2, 3), (2, 1)))]),
        r"'e'.*byte 2 .*more than once",
    ),
    "a target that is one element": (
        recipe_of([entry()], [Copy(0, 0, None, Box(0, (2, 3), (0, 0)))]),
        r"'e'.*byte 0 .*more than once",
    ),
    "a source past the end of the tensor": (
        recipe_of([entry()], [Copy(0, 0, Box(1, (2, 3), (3, 1)))]),
        r"'six'.*element 6.*last one is 5",
    ),
    "a target past the end of the entry": (
        recipe_of([entry()], [Copy(0, 0, None, Box(1, (2, 3), (3, 1)))]),
        r"'e'.*element 6.*last one is 5",
    ),
    "a negative source offset": (recipe_of([entry()], [Copy(0, 0, Box(-1, (2, 3), (3, 1)))]), r"'six'.*malformed"),
    "a negative stride": (recipe_of([entry()], [Copy(0, 0, Box(5, (6,), (-1,)))]), r"'six'.*malformed"),
    "a negative box": (recipe_of([entry()], [Copy(0, 0, Box(0, (-2, -3), (3, 1)))]), r"'six'.*malformed"),
    "fewer strides than sizes": (recipe_of([entry()], [Copy(0, 0, Box(0, (2, 3), (1,)))]), r"'six'.*malformed"),
    "boxes of different numbers of elements": (
        recipe_of([entry()], [Copy(0, 0, ROW, Box(0, (2, 3), (3, 1)))]),
        r"'e'.*differ in their number of elements",
    ),
    "a source box smaller than the entry": (recipe_of([entry()], [Copy(0, 0, ROW)]), r"'e'.*differ"),
    "a box that cuts a byte": (
        recipe_of(
            [entry(dtype="F4", shape=(4, 2))],
            [Copy(2, 0, Box(0, (4,), (2,)), Box(0, (4,), (1,))), Copy(2, 0, Box(1, (4,), (2,)), Box(4, (4,), (1,)))],
        ),
        r"'pairs'.*F4.*through a byte",
    ),
    "a source box on an empty tensor": (
        recipe_of([entry(shape=(1,))], [Copy(4, 0, Box(0, (1,), (1,)))]),
        r"'none'.*element 0.*last one is -1",
    ),
}
"""What is wrong → (recipe over TENSORS, pattern of the message)."""


@pytest.mark.parametrize("what", REFUSED)
def test_a_recipe_is_refused_for(what: str) -> None:
    recipe, message = REFUSED[what]
    with pytest.raises(InvalidRequest) as refusal:
        validate(recipe, TENSORS)
    assert re.search(message, str(refusal.value)), refusal.value


def test_an_entry_without_bytes_needs_no_copy() -> None:
    validate(recipe_of([entry(shape=(0, 3)), entry("f", offset=0)], [Copy(0, 1)]), TENSORS)


@pytest.mark.timeout(5)
@pytest.mark.parametrize("several", [False, True], ids=["one copy", "two copies"])
def test_a_recipe_of_endless_single_bytes_is_refused_at_once(several: bool) -> None:
    size = 1 << 14
    tensor = info("cube", "U8", (size, size, size))
    boxes = [Box(0, (size, size, size), (1, size, size * size))]
    targets: list[Box | None] = [None]
    if several:
        half = (size // 2, size, size)
        boxes = [Box(0, half, (1, size, size * size)), Box(size // 2, half, (1, size, size * size))]
        strides = contiguous(tensor.shape).strides
        targets = [Box(0, half, strides), Box(size**3 // 2, half, strides)]
    copies = [Copy(0, 0, box, target) for box, target in zip(boxes, targets, strict=True)]
    with pytest.raises(InvalidRequest, match=r"'(e|cube)'"):
        validate(Recipe([entry(shape=tensor.shape)], copies, tensor.nbytes, 0), [tensor])


# ---------------------------------------------------------------------------- boxes


def indices(box: Box) -> NDArray[numpy.int64]:
    """The elements of a box, row-major."""
    found = numpy.full(box.shape, box.offset, numpy.int64)
    for axis, (size, stride) in enumerate(zip(box.shape, box.strides, strict=True)):
        found += (numpy.arange(size) * stride).reshape(-1, *[1] * (len(box.shape) - axis - 1))
    return found.reshape(-1)


def expected(recipe: Recipe, tensors: Sequence[TensorInfo], data: Sequence[bytes]) -> dict[str, bytes]:
    """What a recipe says, element by element: the n-th of a source box becomes the n-th of its target box."""
    found = [numpy.zeros((prod(target.shape), BITS[target.dtype]), numpy.uint8) for target in recipe.entries]
    for copy in recipe.copies:
        tensor, target = tensors[copy.tensor], recipe.entries[copy.entry]
        elements = to_bits(data[copy.tensor], tensor.dtype, (prod(tensor.shape),))
        source_box, target_box = copy.source or contiguous(tensor.shape), copy.target or contiguous(target.shape)
        found[copy.entry][indices(target_box)] = elements[indices(source_box)]
    return {target.name: from_bits(bits) for target, bits in zip(recipe.entries, found, strict=True)}


def assert_means_what_it_says(recipe: Recipe, tensors: Sequence[TensorInfo]) -> None:
    validate(recipe, tensors)
    data = random_bytes(tensors)
    assert held(recipe, filled(recipe, tensors, data)) == expected(recipe, tensors, data)


def test_q_k_and_v_fuse_into_one_entry() -> None:
    tensors = infos(("q", "BF16", (8, 6)), ("k", "BF16", (4, 6)), ("v", "BF16", (4, 6)))
    fused = entry("qkv", "BF16", (16, 6))
    copies = [
        Copy(i, 0, None, Box(start * 6, (rows, 6), (6, 1))) for i, (start, rows) in enumerate([(0, 8), (8, 4), (12, 4)])
    ]
    recipe = recipe_of([fused], copies)
    assert_means_what_it_says(recipe, tensors)
    data = random_bytes(tensors)
    assert held(recipe, filled(recipe, tensors, data)) == {"qkv": b"".join(data)}


def test_one_ranks_rows_of_gate_and_up_fuse_into_one_entry() -> None:
    tensors = infos(("gate", "F32", (8, 3)), ("up", "F32", (8, 3)))
    fused = entry("gate_up", "F32", (8, 3))
    copies = [Copy(i, 0, Box(4 * 3, (4, 3), (3, 1)), Box(i * 4 * 3, (4, 3), (3, 1))) for i in range(2)]
    recipe = recipe_of([fused], copies)
    assert_means_what_it_says(recipe, tensors)
    data = random_bytes(tensors)
    assert held(recipe, filled(recipe, tensors, data)) == {"gate_up": data[0][48:] + data[1][48:]}


def test_experts_stack_into_one_entry_transposed() -> None:
    tensors = infos(*((f"experts.{i}", "F16", (3, 5)) for i in range(4)))
    copies = [Copy(i, 0, Box(0, (5, 3), (1, 5)), Box(i * 15, (5, 3), (3, 1))) for i in range(4)]
    recipe = recipe_of([entry("experts", "F16", (4, 5, 3))], copies)
    assert_means_what_it_says(recipe, tensors)
    data = random_bytes(tensors)
    stacked = numpy.stack([numpy.frombuffer(value, numpy.uint16).reshape(3, 5).T for value in data])
    assert held(recipe, filled(recipe, tensors, data)) == {"experts": stacked.tobytes()}


def test_columns_of_two_tensors_interleave() -> None:
    tensors = infos(("even", "U16", (4, 3)), ("odd", "U16", (4, 3)))
    copies = [Copy(i, 0, None, Box(i, (4, 3), (6, 2))) for i in range(2)]
    assert_means_what_it_says(recipe_of([entry("both", "U16", (4, 6))], copies), tensors)


def test_one_tensor_feeds_several_entries_and_itself_is_broadcast() -> None:
    tensors = infos(("row", "F32", (4,)))
    entries = [entry("plain", "F32", (4,)), entry("rows", "F32", (3, 4), 256), entry("reversed", "F32", (2, 2), 512)]
    copies = [Copy(0, 0), Copy(0, 1, Box(0, (3, 4), (0, 1))), Copy(0, 2, Box(0, (2, 2), (1, 2)))]
    recipe = recipe_of(entries, copies)
    assert_means_what_it_says(recipe, tensors)
    assert uses([recipe, recipe]) == {0: [(segment, copy) for segment in (0, 1) for copy in copies]}


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (Box(0, (3, 2), (1, 3)), Box(6, (6,), (1,))),
        (Box(0, (6,), (1,)), Box(6, (3, 2), (1, 3))),
        (Box(0, (3, 2), (1, 3)), Box(6, (2, 3), (1, 2))),
        (None, Box(6, (6,), (1,))),
        (Box(5, (6, 1), (0, 1)), Box(6, (6,), (1,))),
        (Box(0, (2, 3), (3, 1)), Box(6, (6,), (1,))),
    ],
    ids=["flat target", "flat source", "neither flat", "whole source", "broadcast", "plain source"],
)
def test_boxes_of_different_shapes_mean_what_they_say_or_are_refused(source: Box | None, target: Box) -> None:
    tensors = infos(("t", "U8", (2, 3)), ("half", "U8", (6,)))
    recipe = recipe_of([entry(shape=(12,))], [Copy(1, 0, None, Box(0, (6,), (1,))), Copy(0, 0, source, target)])
    try:
        validate(recipe, tensors)
    except InvalidRequest:
        return
    assert_means_what_it_says(recipe, tensors)


@given(dtypes, st.lists(st.integers(0, 4), max_size=4), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=200)
def test_any_transpose_is_what_numpy_makes_of_it(dtype: str, shape: list[int], random: Random) -> None:
    assume(prod(shape) * BITS[dtype] % 8 == 0)
    order = random.sample(range(len(shape)), len(shape))
    tensor = info("t", dtype, tuple(shape))
    whole = contiguous(tensor.shape)
    box = Box(0, tuple(shape[i] for i in order), tuple(whole.strides[i] for i in order))
    recipe = Recipe([entry(dtype=dtype, shape=box.shape)], [Copy(0, 0, box)], tensor.nbytes, 0)
    try:
        validate(recipe, [tensor])
    except InvalidRequest as error:
        message = str(error)
    else:
        (data,) = random_bytes([tensor])
        bits = to_bits(data, dtype, tensor.shape).transpose(*order, len(order))
        assert filled(recipe, [tensor], [data]) == from_bits(bits)
        return
    assert dtype in PACKED
    assert "through a byte" in message


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...], within: int) -> Box:
    """A box of this shape, mostly inside of ``within`` elements."""
    strides = tuple(draw(st.integers(0, 4)) for _ in shape)
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return Box(draw(st.integers(0, max(0, within - 1 - reach))), shape, strides)


@st.composite
def recipes(draw: st.DrawFn) -> tuple[Recipe, list[TensorInfo]]:
    """An entry cut along its first dimension into parts that several boxes fill; sometimes with a wrong number."""
    dtype = draw(st.sampled_from(["U8", "U16", "F32", "F4"]))
    tensors = infos(*((f"t{i}", dtype, (draw(st.integers(1, 6)), draw(st.sampled_from([2, 4])))) for i in range(2)))
    parts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    inner = (draw(st.sampled_from([2, 4])), draw(st.integers(1, 2)))
    row = prod(inner)
    copies, start = [], 0
    for part in parts:
        shape = (part, *inner)
        number = draw(st.integers(0, 1))
        shapes = [shape, (part * row,), (part, row), (part * inner[0], inner[1]), (inner[1], part * inner[0])]
        source: Box | None = draw(boxes(draw(st.sampled_from(shapes)), prod(tensors[number].shape)))
        if draw(st.integers(0, 9)) == 0:
            source = None
        target = contiguous(draw(st.sampled_from(shapes)))._replace(offset=start * row)
        if draw(st.integers(0, 9)) == 0:
            target = draw(boxes(target.shape, sum(parts) * row))
        copies.append(Copy(number, 0, source, target))
        start += part
    fused = entry("fused", dtype, (start, *inner))
    return Recipe([fused], copies, fused.nbytes + draw(st.integers(0, 3)), 0), tensors


@given(recipes())
@settings(deadline=None, max_examples=500)
def test_any_boxes_are_refused_or_stay_inside_write_each_byte_once_and_mean_what_they_say(
    case: tuple[Recipe, list[TensorInfo]],
) -> None:
    recipe, tensors = case
    try:
        validate(recipe, tensors)
    except InvalidRequest as error:
        message = str(error)
    else:
        assert_means_what_it_says(recipe, tensors)
        return
    assert re.search("'(fused|t0|t1)'", message)


def test_a_whole_tensor_is_one_block() -> None:
    tensor = info("t", "F32", (4, 5))
    assert list(blocks(Copy(0, 0), tensor, entry(dtype="F32", shape=(20,)))) == [Block(0, 0, 0, 0, 80, 1)]
    assert list(blocks(Copy(0, 0), info("t", "F32", (0, 5)), entry(dtype="F32", shape=(0,)))) == []


def test_all_of_a_recipe_falls_into_a_bounded_number_of_blocks_and_runs() -> None:
    tensors = infos(("t", "U8", (1 << 23,)))
    half, size = 1 << 19, 1 << 20
    apart = [Copy(0, index, Box(0, (half, 2), (3, 5)), Box(0, (half, 2), (2, 1))) for index in range(9)]
    entries = [entry(f"e{index}", shape=(size,), offset=index * size) for index in range(9)]
    validate(recipe_of(entries[:8], apart[:8], 8 * size), tensors)
    with pytest.raises(InvalidRequest, match="more than 4194304 blocks"):
        validate(recipe_of(entries, apart, 9 * size), tensors)
    combs = [
        Copy(0, index, Box(0, (half,), (1,)), Box(first, (half,), (2,))) for index in range(65) for first in (0, 1)
    ]
    entries = [entry(f"e{index}", shape=(size,), offset=index * size) for index in range(65)]
    with pytest.raises(InvalidRequest, match="more than 67108864 separate runs"):
        validate(recipe_of(entries, combs, 65 * size), tensors)
