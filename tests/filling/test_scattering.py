"""What is cut, fused, turned or cast on its way: by way of buffers and straight into memory, the same bytes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.filling.fills import DEFAULTS, KiB, MiB, assert_filled, bring, prepared, roomy, sliced, store, tensor
from weightd.daemon.devices.cpu import CpuDevice
from weightd.daemon.layouts.casts import Cast
from weightd.daemon.layouts.checkpoint import Split, checkpoint_layout
from weightd.daemon.layouts.recipe import Copy, Entry, Recipe, arrange, validate
from weightd.ipc.recipe import Box

TOGETHER = DEFAULTS._replace(min_range=1 << 40)
"""Runs are read with what lies between them, however long they are."""


@pytest.fixture(params=["buffered", "direct"])
def device(request: pytest.FixtureRequest) -> CpuDevice:
    return CpuDevice("cpu", 1 << 40, request.param)


@pytest.mark.parametrize("ranks", ["all", "one"])
@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [
        pytest.param("U8", (MiB + 5, 2), 2, id="rows of one byte"),
        pytest.param("BF16", (1000, 7 * 301), 7, id="rows that extents and leaves cut through"),
        pytest.param("U8", (3, 2 * (MiB + 13)), 2, id="rows longer than a leaf"),
        pytest.param("U8", (2, 2 * (3 * MiB + 1)), 2, id="rows longer than a buffer"),
        pytest.param("U8", (2, 2 * MiB), 2, id="rows of a leaf"),
        pytest.param("BF16", (300, 64 * 40), 64, id="many ranks"),
        pytest.param("F64", (1, 8), 8, id="a single row"),
    ],
)
def test_columns_land_byte_for_byte(
    dtype: str, shape: tuple[int, ...], size: int, ranks: str, device: CpuDevice, tmp_path: Path
) -> None:
    stored = store(tmp_path, {"before": tensor("U8", (100,)), "t": tensor(dtype, shape, 3)})
    splits: dict[str, Split] = {"before": "replicate", "t": 1}
    recipes = checkpoint_layout(
        stored.checkpoint.tensors, tp_size=size, tp_ranks=range(size) if ranks == "all" else [size - 1], splits=splits
    )
    for demands in (TOGETHER, TOGETHER._replace(min_gap=1), DEFAULTS, DEFAULTS._replace(extent_bytes=4 * MiB)):
        read = assert_filled(stored, recipes, sliced(stored, splits, size), demands, roomy(demands, 3), device)
        assert read <= stored.checkpoint.nbytes
        assert ranks == "one" or read == stored.checkpoint.nbytes


def test_of_columns_that_are_less_than_half_nothing_else_is_read(device: CpuDevice, tmp_path: Path) -> None:
    stored = store(tmp_path, {"t": tensor("BF16", (1000, 8 * 700), 3), "narrow": tensor("U8", (5000, 8), 4)})
    recipes = checkpoint_layout(stored.checkpoint.tensors, tp_size=8, tp_ranks=[5], splits={"*": 1})
    demands = DEFAULTS._replace(min_gap=7 * 1400)
    read = assert_filled(stored, recipes, sliced(stored, {"t": 1, "narrow": 1}, 8), demands, roomy(demands, 3), device)
    assert read == 1000 * 1400 + 4999 * 8 + 1, "the narrow ones are read with their gaps"


def test_columns_of_fused_tensors_land_beside_and_within_each_other(device: CpuDevice, tmp_path: Path) -> None:
    """Rows that take turns are no neighbours where they land; rows of one tensor after the other's are."""
    one, two = tensor("BF16", (700, 1200), 1), tensor("BF16", (700, 1200), 2)
    stored = store(tmp_path, {"one": one, "two": two})
    arrays = [numpy.frombuffer(data, "u2").reshape(shape) for _, shape, data in (one, two)]
    recipes, expected = [], []
    for rank in range(3):
        box = Box(400 * rank, (700, 400), (1200, 1))
        names = [Entry(name, "BF16", (1400, 400), 0, 1400 * 400 * 2) for name in ("turns", "after")]
        placed = arrange([(entry, Copy(0, 0)) for entry in names], rank)
        copies = [Copy(tensor, 0, box, Box(400 * tensor, (700, 400), (800, 1))) for tensor in range(2)]
        copies += [Copy(tensor, 1, box, Box(700 * 400 * tensor, (700, 400), (400, 1))) for tensor in range(2)]
        recipes.append(Recipe(placed.entries, copies, placed.nbytes, rank))
        validate(recipes[-1], stored.checkpoint.tensors)
        parts = [array[:, 400 * rank : 400 * rank + 400] for array in arrays]
        expected.append({"turns": numpy.stack(parts, 1).tobytes(), "after": numpy.concatenate(parts).tobytes()})
    for demands in (TOGETHER, DEFAULTS):
        assert_filled(
            stored,
            recipes,
            lambda recipe, entry: expected[recipe.rank][entry.name],
            demands,
            roomy(demands, 3),
            device,
        )


@pytest.mark.parametrize("width", [3, 1000])
def test_columns_that_are_cast_land_as_what_they_become(width: int, device: CpuDevice, tmp_path: Path) -> None:
    rows = 2 * MiB // width // 4
    values = numpy.random.default_rng(1).standard_normal((rows, 4 * width)).astype(numpy.float32)
    stored = store(tmp_path, {"t": ("F32", values.shape, values.tobytes())})
    recipes, expected = [], []
    for rank in range(4):
        target = Entry("t", "F16", (rows, width), 0, rows * width * 2)
        box = Box(width * rank, (rows, width), (4 * width, 1))
        recipes.append(
            Recipe(
                [target],
                [Copy(0, 0, box, Box(0, (rows, width), (width, 1)), Cast("F32", "F16"))],
                target.nbytes,
                rank,
            )
        )
        validate(recipes[-1], stored.checkpoint.tensors)
        expected.append(values[:, width * rank : width * (rank + 1)].astype(numpy.float16).tobytes())
    demands = TOGETHER._replace(extent_bytes=MiB)
    assert_filled(stored, recipes, lambda recipe, _: expected[recipe.rank], demands, roomy(demands, 3), device)


def test_what_is_fused_row_by_row_is_hashed_leaf_by_leaf_wherever_its_parts_begin(
    device: CpuDevice, tmp_path: Path
) -> None:
    shapes = {"q": (3, 700 * KiB + 1), "k": (3, 10), "v": (3, 2 * MiB)}
    parts = {name: tensor("U8", shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    stored = store(tmp_path, parts)
    number = {info.name: index for index, info in enumerate(stored.checkpoint.tensors)}
    recipes, expected = [], []
    for rank in range(3):
        copies, held = [], b""
        for name, (_, (_, width), data) in parts.items():
            copies.append(Copy(number[name], 0, Box(rank * width, (width,), (1,)), Box(len(held), (width,), (1,))))
            held += data[rank * width : (rank + 1) * width]
        recipes.append(Recipe([Entry("qkv", "U8", (len(held),), 0, len(held))], copies, len(held), rank))
        validate(recipes[-1], stored.checkpoint.tensors)
        expected.append(held)
    for demands in (DEFAULTS, DEFAULTS._replace(min_range=0, extent_bytes=4 * MiB), TOGETHER):
        limits: Any = roomy(demands, 3)
        read = assert_filled(stored, recipes, lambda recipe, _: expected[recipe.rank], demands, limits, device)
        assert read == stored.checkpoint.nbytes


def test_columns_land_in_memory_that_is_lent_already(tmp_path: Path) -> None:
    """Nothing can be written to it by its descriptor any more."""
    stored = store(tmp_path, {"t": tensor("BF16", (3000, 400), 3)})
    recipes = checkpoint_layout(stored.checkpoint.tensors, tp_size=2, tp_ranks=(0, 1), splits={"*": 1})
    with prepared(stored, recipes, TOGETHER, device=CpuDevice("cpu", 1 << 40, "buffered")) as filled:
        lent = [segment.lend() for segment in filled.segments]
        try:
            bring(stored, filled.fill)
        finally:
            for fd in lent:
                os.close(fd)
        for index, recipe in enumerate(recipes):
            want = sliced(stored, {"t": 1}, 2)(recipe, recipe.entries[0])
            assert filled.held(index, recipe.entries[0]) == want
