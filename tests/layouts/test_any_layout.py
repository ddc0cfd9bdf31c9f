"""Any layout that an engine may upload, from the wire to the segment, as torch would have made it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.filling.far import FarDevice
from tests.filling.fills import LIMITS, Filled, MiB, bring, leaves_of, prepared, store
from weightd.daemon.devices.cpu import CpuDevice
from weightd.daemon.layouts.casts import SOURCES, TARGETS
from weightd.daemon.layouts.extents import Demands
from weightd.daemon.layouts.recipe import Entry
from weightd.daemon.layouts.uploaded import parse_layout
from weightd.ipc.dtypes import DTYPES
from weightd.ipc.recipe import Box, Constant, Key, Move, Parameter, encode, headers_digest

torch = pytest.importorskip("torch", reason="layouts are compared with what torch makes: make test")

STORED = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2", "I16", "U8", "I64")
HELD = ("BF16", "F16", "F32", "I16", "U8", "I64")


def kind(dtype: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, str(DTYPES[dtype].torch))
    return found


class Case(NamedTuple):
    """A checkpoint's tensors, and for each rank what an engine uploads and what its segment has to hold."""

    tensors: dict[str, torch.Tensor]
    dtypes: dict[str, str]
    ranks: list[tuple[list[Parameter], list[Move], list[Constant], list[torch.Tensor]]]


def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """All elements of a tensor, cut into boxes that do not overlap, some of them turned."""
    steps = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    parts = [[(0, size, 1) for size in shape]]  # first, count, every so many
    for _ in range(draw(st.integers(0, 3))):
        part = parts.pop(draw(st.integers(0, len(parts) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        first, count, every = part[axis]
        if count < 2:
            parts.append(part)
        elif draw(st.booleans()):
            at = draw(st.integers(1, count - 1))
            halves = (first, at, every), (first + at * every, count - at, every)
            parts += [[*part[:axis], half, *part[axis + 1 :]] for half in halves]
        else:
            combs = (first, -(-count // 2), every * 2), (first + every, count // 2, every * 2)
            parts += [[*part[:axis], comb, *part[axis + 1 :]] for comb in combs]
    found = []
    for part in parts:
        order = draw(st.permutations(range(len(shape))))
        found.append(
            Box(
                sum(first * step for (first, _, _), step in zip(part, steps, strict=True)),
                tuple(part[axis][1] for axis in order),
                tuple(part[axis][2] * steps[axis] for axis in order),
            )
        )
    return found


def reached(draw: st.DrawFn, shape: tuple[int, ...], elements: int) -> Box:
    """A box of that shape within so many elements: any strides, those of broadcasts among them."""
    strides = [draw(st.integers(0, 12)) for _ in shape]
    if draw(st.booleans()):
        strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    while (reach := sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))) >= elements:
        longest = max(range(len(shape)), key=lambda axis: (shape[axis] - 1) * strides[axis])
        strides[longest] -= 1
    return Box(draw(st.integers(0, elements - 1 - reach)), shape, tuple(strides))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    tensors, dtypes = {}, {}
    for number in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(STORED))
        shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
        name = f"t{draw(st.integers(0, 9))}{number}"
        if kind(dtype).is_floating_point:
            tensors[name] = torch.randn(shape, generator=generator).mul(3).to(kind(dtype))
        else:
            tensors[name] = torch.randint(0, 127, shape, generator=generator).to(kind(dtype))
        dtypes[name] = dtype
    ranks = []
    for _ in range(draw(st.integers(1, 2))):
        entries: list[Parameter] = []
        moves: list[Move] = []
        constants: list[Constant] = []
        expected: list[torch.Tensor] = []
        for index in range(draw(st.integers(1, 3))):
            name = draw(st.sampled_from(sorted(tensors)))
            if draw(st.integers(0, 4)) == 0:
                entries.append(Parameter(f"p{index}", dtypes[name], tuple(tensors[name].shape)))
                expected.append(tensors[name])
                moves.append(Move(name, index, *[Box(0, tuple(tensors[name].shape), tensors[name].stride())] * 2))
                continue
            dtype = draw(st.sampled_from(HELD))
            shape = tuple(draw(st.lists(st.integers(1, 8), min_size=1, max_size=3)))
            value = torch.zeros(shape, dtype=kind(dtype))
            entries.append(Parameter(f"p{index}", dtype, shape))
            expected.append(value)
            below = [Box(0, shape, value.stride())] if draw(st.booleans()) else []
            below += [
                reached(draw, (draw(st.integers(1, 4)),) * 2, value.numel()) for _ in range(draw(st.integers(0, 2)))
            ]
            under: list[Constant] = []
            over: list[Move] = []
            for box in boxes(draw, shape):
                fitting = [
                    (other, cast)
                    for other, found in dtypes.items()
                    for cast in (False, True)
                    if (found in SOURCES and dtype in TARGETS if cast else DTYPES[found].bits == DTYPES[dtype].bits)
                ]
                if not fitting or draw(st.integers(0, 2)) == 0:
                    under.append(Constant(index, b"", box))
                    continue
                other, cast = draw(st.sampled_from(fitting))
                over.append(Move(other, index, reached(draw, box.shape, tensors[other].numel()), box, cast))
            for box in [*below, *(constant.target for constant in under)]:
                number = torch.tensor(draw(st.sampled_from([0, 1, 5])), dtype=kind(dtype))
                constants.append(Constant(index, number.reshape(1).view(torch.uint8).numpy().tobytes(), box))
                places = torch.arange(value.numel()).as_strided(box.shape, box.strides, box.offset)
                value.view(-1)[places.reshape(-1)] = number
            for move in over:
                part = tensors[move.tensor].as_strided(move.source.shape, move.source.strides, move.source.offset)
                into = value.as_strided(move.target.shape, move.target.strides, move.target.offset)
                into.copy_(part.to(kind(dtype)) if move.cast else part.contiguous().view(kind(dtype)))
            moves += over
        ranks.append((entries, moves, constants, expected))
    return Case(tensors, dtypes, ranks)


demands = st.builds(
    Demands,
    extent_bytes=st.sampled_from([8, 24, 64, MiB]),
    max_runs=st.integers(1, 4),
    min_range=st.sampled_from([0, 2, 8, 1000]),
    min_gap=st.sampled_from([0, 1, 100]),
    whole_tensors=st.booleans(),
    whole_files=st.sampled_from([(), (0,)]),
)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def holds(
    filled: Filled, segment: int, entries: Sequence[Entry], expected: Sequence[torch.Tensor], whole_leaves: bool
) -> None:
    for index, (entry, value) in enumerate(zip(entries, expected, strict=True)):
        assert filled.held(segment, entry) == raw(value), entry
        if whole_leaves:
            assert list(filled.fill.account.leaves[segment][index]) == leaves_of(raw(value)), entry


@given(cases(), demands, st.sampled_from([CpuDevice("cpu", 1 << 40), FarDevice()]))
@settings(deadline=None, max_examples=150)
def test_any_layout_holds_what_torch_makes_of_the_checkpoint(case: Case, wanted: Demands, device: CpuDevice) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stored = store(
            Path(folder),
            {name: (case.dtypes[name], tuple(tensor.shape), raw(tensor)) for name, tensor in case.tensors.items()},
        )
        headers = headers_digest((name, case.dtypes[name], tensor.shape) for name, tensor in case.tensors.items())
        recipes = []
        for rank, (entries, moves, constants, _) in enumerate(case.ranks):
            key = Key(headers, "tests", "1", "bfloat16", "0" * 64, rank)
            layout = parse_layout(key.digest, encode(key, case.tensors, entries, moves, constants))
            recipes.append(layout.recipe_for(stored.checkpoint.tensors, rank))
        with prepared(stored, recipes, wanted, LIMITS, device=device) as filled:
            filled.fill.write_constants()
            bring(stored, filled.fill)
            filled.fill.finish()
            filled.fill.account.check_complete()
            for segment, (recipe, (*_, expected)) in enumerate(zip(recipes, case.ranks, strict=True)):
                holds(filled, segment, recipe.entries, expected, wanted.extent_bytes == MiB)
                assert sorted(filled.verified[segment]) == list(range(len(recipe.entries))), "each once"
            filled.fill.close()
