"""Casts, bit for bit as torch's own."""

from __future__ import annotations

import numpy
import pytest

from weightd.daemon.layouts.casts import SOURCES, TARGETS, Cast
from weightd.ipc.dtypes import DTYPES

torch = pytest.importorskip("torch", reason="layouts are compared with what torch makes: make test")

PAIRS = [(a, b) for a in sorted(SOURCES) for b in sorted(TARGETS) if a != b]


def torch_type(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, str(DTYPES[name].torch))
    return found


def values(dtype: str) -> torch.Tensor:
    """All of a narrow type, and of a wide one what rounds in every way that there is."""
    kind = torch_type(dtype)
    width = DTYPES[dtype].bits
    if width <= 16:
        bits = torch.arange(1 << width, dtype=torch.int32).to(torch.uint8 if width == 8 else torch.int16)
        return bits.view(kind)
    rng = numpy.random.default_rng(0)
    every = torch.from_numpy(rng.integers(0, 1 << width, 200_000, dtype=f"u{width // 8}").view(f"i{width // 8}"))
    exact = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(kind)
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).to(kind)
    ties = [torch.nextafter(exact, torch.full_like(exact, far)) for far in (-torch.inf, torch.inf)]
    between = [(some[:-1].double() + some[1:].double()).div(2).to(kind) for some in (exact, halves)]
    return torch.cat([every.view(kind), exact, halves, *ties, *between])


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_cast_rounds_as_torch_does(source: str, target: str) -> None:
    given = values(source)
    raw = given.view(torch.uint8).numpy().reshape(1, -1)
    found = torch.from_numpy(Cast(source, target).convert(raw).reshape(-1).copy()).view(torch_type(target))
    expected = given.to(torch_type(target))
    number = ~expected.isnan()
    width = torch.int16 if DTYPES[target].bits == 16 else torch.int32
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.view(width)[number], expected.view(width)[number])
    assert number.any()


def test_rows_are_cast_each_by_itself() -> None:
    given = torch.randn(5, 12)
    rows = given.view(torch.uint8).numpy().reshape(5, 48)[:, 16:32]  # as blocks of several rows are
    found = torch.from_numpy(Cast("F32", "BF16").convert(rows).copy()).view(torch.bfloat16)
    assert torch.equal(found, given[:, 4:8].to(torch.bfloat16))
    assert Cast("F32", "BF16").scaled(16) == 8


@pytest.mark.parametrize("target", ["BF16", "F16"])
def test_rows_that_lie_within_one_another_are_cast_each_by_itself(target: str) -> None:
    given = torch.randn(9)
    for step in (0, 1, 2):
        rows = numpy.lib.stride_tricks.as_strided(given.view(torch.uint8).numpy(), (4, 12), (4 * step, 1))
        found = torch.from_numpy(Cast("F32", target).convert(rows).copy()).view(torch_type(target))
        expected = torch.stack([given[step * row : step * row + 3] for row in range(4)])
        assert torch.equal(found, expected.to(torch_type(target))), step
