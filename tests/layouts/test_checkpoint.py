"""Checkpoint layouts: the tensors as stored, whole, chosen by name, or cut for one rank."""

from __future__ import annotations

import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoint_files import BITS
from tests.layouts.recipes import PACKED, dtypes, filled, from_bits, held, info, infos, random_bytes, to_bits
from weightd.daemon.errors import Cancelled, InvalidRequest
from weightd.daemon.layouts import checkpoint
from weightd.daemon.layouts import patterns as patterns_module
from weightd.daemon.layouts.checkpoint import Split, checkpoint_layout
from weightd.daemon.layouts.patterns import MAX_COMPARED, MAX_COMPARISONS, Patterns
from weightd.daemon.layouts.recipe import ALIGNMENT, blocks, validate
from weightd.daemon.tensors import TensorInfo
from weightd.ipc.recipe import Box


def cut(data: bytes, tensor: TensorInfo, dim: int, size: int, rank: int) -> bytes:
    """One rank's slice by numpy alone."""
    part = tensor.shape[dim] // size
    index = (*[slice(None)] * dim, slice(rank * part, (rank + 1) * part))
    return from_bits(to_bits(data, tensor.dtype, tensor.shape)[index])


@st.composite
def table(draw: st.DrawFn, sizes: st.SearchStrategy[int] = st.integers(0, 5)) -> list[TensorInfo]:  # noqa: B008
    found = []
    for index in range(draw(st.integers(1, 6))):
        dtype = draw(dtypes)
        shape = tuple(draw(st.lists(sizes, max_size=4)))
        if prod(shape) * BITS[dtype] % 8:
            shape = (*shape, 4)  # four elements of any dtype are whole bytes
        found.append((f"{draw(st.sampled_from(['a', 'b', 'a.b', 'A']))}.{index}", dtype, shape))
    return infos(*found)


# ---------------------------------------------------------------------------- whole tensors


@given(table())
@settings(deadline=None, max_examples=100)
def test_a_whole_layout_holds_every_tensor_as_stored_on_256_byte_boundaries(tensors: list[TensorInfo]) -> None:
    (recipe,) = checkpoint_layout(tensors)
    data = random_bytes(tensors)
    assert [(entry.name, entry.dtype, entry.shape, entry.nbytes) for entry in recipe.entries] == [
        (tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in tensors
    ]
    assert [entry.offset % ALIGNMENT for entry in recipe.entries] == [0] * len(tensors)
    assert recipe.entries[0].offset == 0
    for entry, following in pairwise(recipe.entries):
        assert 0 <= following.offset - (entry.offset + entry.nbytes) < ALIGNMENT
    assert recipe.nbytes == recipe.entries[-1].offset + recipe.entries[-1].nbytes
    assert list(held(recipe, filled(recipe, tensors, data)).values()) == data


def test_entries_start_where_cuda_would_have_put_them() -> None:
    assert ALIGNMENT == 256
    (recipe,) = checkpoint_layout(infos(("a", "U8", (1,)), ("b", "U8", (0,)), ("c", "U8", (256,)), ("d", "U8", (257,))))
    assert [entry.offset for entry in recipe.entries] == [0, 256, 256, 512]
    assert recipe.nbytes == 512 + 257


patterns = st.lists(
    st.sampled_from(["*", "a*", "*.0", "*.[12]", "a.b.?", "b.[!0]", "A*", "[", "*|*", ".*", ""]), max_size=3
)


@given(table(), patterns, patterns)
@settings(deadline=None, max_examples=200)
def test_include_and_exclude_choose_by_name_as_the_shell_does(
    tensors: list[TensorInfo], include: list[str], exclude: list[str]
) -> None:
    chosen = [
        tensor.name
        for tensor in tensors
        if (not include or any(fnmatchcase(tensor.name, pattern) for pattern in include))
        and not any(fnmatchcase(tensor.name, pattern) for pattern in exclude)
    ]
    if not chosen:
        with pytest.raises(InvalidRequest, match=f"leave none of {len(tensors)} tensors") as refusal:
            checkpoint_layout(tensors, include=include, exclude=exclude)
        assert str(list(include)) in str(refusal.value)
        assert str(list(exclude)) in str(refusal.value)
        return
    (recipe,) = checkpoint_layout(tensors, include=include, exclude=exclude)
    assert [entry.name for entry in recipe.entries] == chosen
    data = random_bytes(tensors)
    wanted = {tensor.name: value for tensor, value in zip(tensors, data, strict=True) if tensor.name in chosen}
    assert held(recipe, filled(recipe, tensors, data)) == wanted


# ---------------------------------------------------------------------------- slices


@st.composite
def sliced(draw: st.DrawFn) -> tuple[TensorInfo, int, int]:
    """A tensor, a dimension, and how many ranks that divides by."""
    dtype = draw(dtypes)
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    dim = draw(st.integers(0, len(shape) - 1))
    size = draw(st.integers(2, 4))
    shape[dim] *= size
    if prod(shape) * BITS[dtype] % 8:
        shape[-1 if dim != len(shape) - 1 else dim] *= 4
    return info("t", dtype, tuple(shape), 100), dim, size


@given(sliced(), st.booleans())
@settings(deadline=None, max_examples=400)
def test_a_rank_gets_its_slice_along_any_dimension_of_any_shape_and_dtype(
    case: tuple[TensorInfo, int, int], negative: bool
) -> None:
    tensor, dim, size = case
    split = dim - len(tensor.shape) if negative else dim
    run = tensor.shape[dim] // size * prod(tensor.shape[dim + 1 :]) * BITS[tensor.dtype]
    if tensor.nbytes and run % 8:
        with pytest.raises(InvalidRequest, match="'t'"):
            checkpoint_layout([tensor], tp_size=size, tp_ranks=range(size), splits={"t": split})
        return
    recipes = checkpoint_layout([tensor], tp_size=size, tp_ranks=range(size), splits={"t": split})
    (data,) = random_bytes([tensor])
    assert [recipe.rank for recipe in recipes] == list(range(size))
    for rank, recipe in enumerate(recipes):
        (entry,) = recipe.entries
        assert entry.shape == (*tensor.shape[:dim], tensor.shape[dim] // size, *tensor.shape[dim + 1 :])
        assert entry.nbytes == recipe.nbytes == tensor.nbytes // size
        assert filled(recipe, [tensor], [data]) == cut(data, tensor, dim, size, rank)
        # The fewest runs there are: one for the outermost dimension that has anything outside it, one a row for others.
        found = list(blocks(recipe.copies[0], tensor, entry))
        assert [block.rows for block in found] == ([prod(tensor.shape[:dim])] if entry.nbytes else [])


@given(table(st.sampled_from([0, 2, 4])), st.data())
@settings(deadline=None, max_examples=100)
def test_ranks_that_are_asked_for_come_as_asked_and_hold_slices_and_replicas_together(
    tensors: list[TensorInfo], data: st.DataObject
) -> None:
    splits: dict[str, Split] = {}
    for tensor in tensors:
        dims = [dim for dim, size in enumerate(tensor.shape) if size % 2 == 0 and tensor.dtype not in PACKED]
        splits[tensor.name] = data.draw(st.sampled_from(["replicate", *dims]))
    ranks = data.draw(st.sampled_from([(0,), (1,), (0, 1), (1, 0)]))
    recipes = checkpoint_layout(tensors, tp_size=2, tp_ranks=ranks, splits=splits)
    values = random_bytes(tensors)
    assert tuple(recipe.rank for recipe in recipes) == ranks
    for rank, recipe in zip(ranks, recipes, strict=True):
        validate(recipe, tensors)
        for tensor, value, found in zip(
            tensors, values, held(recipe, filled(recipe, tensors, values)).values(), strict=True
        ):
            split = splits[tensor.name]
            assert found == (value if split == "replicate" else cut(value, tensor, split, 2, rank))


def test_the_first_pattern_that_matches_decides() -> None:
    tensors = infos(("q.weight", "U8", (2, 2)), ("q.bias", "U8", (2,)), ("norm", "U8", (3,)))
    (recipe,) = checkpoint_layout(
        tensors, tp_size=2, splits={"q.weight": 1, "q.*": 0, "*": "replicate", "norm": 0}, tp_ranks=[1]
    )
    assert [entry.shape for entry in recipe.entries] == [(2, 1), (1,), (3,)]


def test_a_tensor_that_no_pattern_matches_is_named_with_the_remedy() -> None:
    tensors = infos(("q.weight", "U8", (2, 2)), ("norm", "U8", (2,)))
    with pytest.raises(InvalidRequest, match=r"'norm'.*\"\*\": \"replicate\""):
        checkpoint_layout(tensors, tp_size=2, splits={"q.*": 0})


def test_a_tensor_that_is_not_chosen_needs_no_pattern() -> None:
    tensors = infos(("q.weight", "U8", (2, 2)), ("norm", "U8", (2,)))
    (recipe,) = checkpoint_layout(tensors, include=["q.*"], tp_size=2, splits={"q.*": 0})
    assert [entry.name for entry in recipe.entries] == ["q.weight"]


@pytest.mark.parametrize(
    ("dtype", "shape", "split", "words"),
    [
        ("U8", (3, 4), 0, ("'t'", "dimension 0", "3", "tp_size 2")),
        ("U8", (4, 3), -1, ("'t'", "dimension 1", "3", "tp_size 2")),
        ("U8", (4, 4), 2, ("'t'", "dimension 2", "(4, 4)")),
        ("U8", (4, 4), -3, ("'t'", "dimension -3", "(4, 4)")),
        ("U8", (), 0, ("'t'", "dimension 0", "()")),
        ("U8", (), -1, ("'t'", "dimension -1", "()")),
        ("F4", (4, 2), 1, ("'t'", "F4", "4 bits", "through a byte", "replicate")),
        ("F4", (4, 6), 1, ("'t'", "F4", "4 bits", "through a byte", "replicate")),
        ("F4", (2,), 0, ("'t'", "F4", "4 bits", "through a byte", "replicate")),
        ("F4", (3, 2), 1, ("'t'", "F4", "4 bits", "through a byte", "replicate")),
        ("F6_E2M3", (4, 4), 1, ("'t'", "F6_E2M3", "6 bits", "through a byte", "replicate")),
    ],
)
def test_a_dimension_that_cannot_be_cut_is_named_with_its_numbers(
    dtype: str, shape: tuple[int, ...], split: int, words: Sequence[str]
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        checkpoint_layout([info("t", dtype, shape)], tp_size=2, splits={"*": split})
    assert [word for word in words if word not in str(refusal.value)] == [], refusal.value


def test_packed_elements_are_cut_where_bytes_end() -> None:
    tensors = infos(("f4", "F4", (3, 8)), ("f6", "F6_E3M2", (3, 8)))
    data = random_bytes(tensors)
    for rank, recipe in enumerate(checkpoint_layout(tensors, tp_size=2, tp_ranks=(0, 1), splits={"*": -1})):
        assert held(recipe, filled(recipe, tensors, data)) == {
            "f4": b"".join(data[0][4 * row + 2 * rank :][:2] for row in range(3)),
            "f6": b"".join(data[1][6 * row + 3 * rank :][:3] for row in range(3)),
        }


@pytest.mark.parametrize("rank", [-1, 2, 1000])
def test_a_rank_that_the_plan_does_not_have_is_refused(rank: int) -> None:
    with pytest.raises(InvalidRequest):
        checkpoint_layout([info("t", "U8", (4, 4))], tp_size=2, tp_ranks=[rank], splits={"*": 0})


# ---------------------------------------------------------------------------- many


glob = st.text("ab.*?[]!", min_size=1, max_size=6)


@given(st.lists(glob, max_size=8), st.lists(st.text("ab.*[", max_size=6), max_size=8))
@settings(deadline=None, max_examples=300)
def test_the_first_pattern_that_matches_is_found_as_fnmatch_would_find_it(
    patterns: list[str], names: list[str]
) -> None:
    found = Patterns(patterns, "x", len(names))
    for name in names:
        expected = next((i for i, pattern in enumerate(patterns) if fnmatchcase(name, pattern)), None)
        assert found.first(name) == expected


def test_patterns_without_a_wildcard_inside_may_be_as_many_as_a_request_takes() -> None:
    names = [f"layers.{i}.w" for i in range(50_000)]
    start = time.monotonic()
    patterns = [pattern for name in names[:25_000] for pattern in (f"*{name}", f"{name}*", name)]
    found = Patterns(patterns, "parallel.map", len(names))
    assert sum(found.first(name) is not None for name in names) >= 25_000
    assert time.monotonic() - start < 30, "one by one it would be an hour"


@pytest.mark.parametrize(("count", "tensors"), [(MAX_COMPARED + 1, 1), (1001, MAX_COMPARISONS // 1000)])
def test_patterns_that_have_to_be_compared_are_bounded(count: int, tensors: int) -> None:
    patterns = [f"a*{i}" for i in range(count)]
    with pytest.raises(InvalidRequest, match=rf"parallel.map: {count} patterns, 'a\*0' .* {tensors} tensors, at most"):
        Patterns(patterns, "parallel.map", tensors)
    Patterns(patterns[:10], "parallel.map", tensors)


def test_ranks_times_tensors_are_bounded_before_anything_is_made() -> None:
    tensors = infos(*((f"w{i}", "U8", (1,)) for i in range(92_000)))
    start = time.monotonic()
    with pytest.raises(
        InvalidRequest, match=r"1024 ranks of 92000 tensors each are 94208000 .* at most 2000000 .* fewer ranks"
    ):
        checkpoint_layout(tensors, tp_size=1024, tp_ranks=range(1024), splits={"*": "replicate"})
    assert time.monotonic() - start < 30
    assert len(checkpoint_layout(tensors[:1000], tp_size=1024, tp_ranks=range(4), splits={"*": "replicate"})) == 4


def test_planning_looks_at_cancellation_while_it_compares_and_between_ranks() -> None:
    tensors = infos(*((f"w{i}", "U8", (1,)) for i in range(1000)))
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 1

    with pytest.raises(Cancelled):
        checkpoint_layout(tensors, include=["w*", "*[0-9]"], cancelled=cancelled)
    asked = 0
    with pytest.raises(Cancelled):
        checkpoint_layout(tensors[:1], tp_ranks=range(3), cancelled=cancelled)
    assert asked == 2


def test_as_many_tensors_times_ranks_as_are_allowed_are_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_ENTRIES", 6)
    tensors = infos(*((f"w{i}", "U8", (1,)) for i in range(3)))
    assert len(checkpoint_layout(tensors, tp_size=4, tp_ranks=[0, 3], splits={"*": "replicate"})) == 2
    with pytest.raises(InvalidRequest, match=r"3 ranks of 3 tensors each are 9 tensors, at most 6"):
        checkpoint_layout(tensors, tp_size=4, tp_ranks=[0, 1, 3], splits={"*": "replicate"})


def test_the_rank_is_0_where_none_is_said() -> None:
    tensors = infos(("t", "U8", (4,)))
    assert [recipe.rank for recipe in checkpoint_layout(tensors)] == [0]
    (recipe,) = checkpoint_layout(tensors, tp_size=2, splits={"t": 0})
    assert (recipe.rank, recipe.copies[0].source) == (0, Box(0, (2,), (1,)))


@pytest.mark.parametrize(("count", "more"), [(1, ""), (10, ""), (11, " and 1 more"), (14, " and 4 more")])
def test_of_many_patterns_that_leave_nothing_the_first_ten_are_shown(count: int, more: str) -> None:
    patterns = [f"p{i}" for i in range(count)]
    with pytest.raises(InvalidRequest) as refusal:
        checkpoint_layout(infos(("t", "U8", (4,))), include=patterns)
    assert f"include {patterns[:10]}{more} and exclude [] leave none" in str(refusal.value)


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("a?*", "abc", "a"),
        ("*?a", "bca", "a"),
        ("[ab]*", "bx", "[ab]x"),
        ("*[ab]", "xb", "x[ab]"),
        ("a*b", "aab", "a*"),
    ],
)
def test_a_pattern_with_a_wildcard_elsewhere_too_is_compared(pattern: str, yes: str, no: str) -> None:
    found = Patterns([pattern], "x", 2)
    assert (found.first(yes), found.first(no)) == (0, None)


def test_as_many_patterns_may_be_compared_as_are_allowed_and_the_message_says_how_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patterns_module, "MAX_COMPARED", 5)
    monkeypatch.setattr(patterns_module, "MAX_COMPARISONS", 20)
    compared = [f"*{i}*" for i in range(9)]
    assert Patterns(compared[:5], "x", 4).first("a4b") == 4
    assert Patterns(compared[:2], "x", 10).first("a1b") == 1
    assert Patterns(compared[:5], "x", 0).first("a") is None
    for count, names, most in ((6, 1, 5), (6, 0, 5), (5, 5, 4), (3, 8, 2)):
        with pytest.raises(
            InvalidRequest, match=rf"x: {count} patterns, '\*0\*' .* each of {names} .* most {most} may"
        ):
            Patterns(compared[:count], "x", names)
