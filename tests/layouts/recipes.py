"""Tensors and recipes to test with, and what a recipe makes of bytes, run by run."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.checkpoint_files import BITS, nbytes
from weightd.daemon.layouts.recipe import Copy, Entry, Recipe, blocks
from weightd.daemon.tensors import TensorInfo

Bits = NDArray[numpy.uint8]
"""A tensor as an array of single bits: its shape, and one dimension more for the bits of an element."""

PACKED = ("F4", "F6_E2M3", "F6_E3M2")

dtypes = st.sampled_from(sorted(BITS))


def info(name: str, dtype: str, shape: tuple[int, ...], start: int = 0) -> TensorInfo:
    return TensorInfo(name, dtype, shape, 0, start, nbytes(dtype, shape))


def infos(*table: tuple[str, str, tuple[int, ...]]) -> list[TensorInfo]:
    """Tensors that follow each other in one file, which starts with 8 bytes of something else."""
    found: list[TensorInfo] = []
    for name, dtype, shape in table:
        found.append(info(name, dtype, shape, found[-1].start + found[-1].nbytes if found else 8))
    return found


def random_bytes(tensors: Sequence[TensorInfo], seed: int = 0) -> list[bytes]:
    rng = numpy.random.default_rng(seed)
    return [rng.bytes(tensor.nbytes) for tensor in tensors]


def to_bits(data: bytes, dtype: str, shape: tuple[int, ...]) -> Bits:
    flat = numpy.unpackbits(numpy.frombuffer(data, numpy.uint8), bitorder="little")
    return flat.reshape(*shape, BITS[dtype])


def from_bits(bits: Bits) -> bytes:
    return numpy.packbits(bits.reshape(-1), bitorder="little").tobytes()


def filled(recipe: Recipe, tensors: Sequence[TensorInfo], data: Sequence[bytes]) -> bytes:
    """The segment that a recipe describes, run by run. Asserts that runs stay inside, and write each byte once."""
    segment = numpy.zeros(recipe.nbytes, numpy.uint8)
    written = numpy.zeros(recipe.nbytes, numpy.uint8)
    for copy in recipe.copies:
        tensor, entry = tensors[copy.tensor], recipe.entries[copy.entry]
        source = numpy.frombuffer(data[copy.tensor], numpy.uint8)
        for block in blocks(copy, tensor, entry):
            for row in range(block.rows):
                begin = block.source + row * block.source_stride
                target = block.target + row * block.target_stride
                assert begin >= 0
                assert begin + block.run <= tensor.nbytes
                assert target >= 0
                assert target + block.run <= entry.nbytes
                target += entry.offset
                segment[target : target + block.run] = source[begin : begin + block.run]
                written[target : target + block.run] += 1
    for entry in recipe.entries:
        assert (written[entry.offset : entry.offset + entry.nbytes] == 1).all()
    assert written.sum() == sum(entry.nbytes for entry in recipe.entries)
    return segment.tobytes()


def held(recipe: Recipe, segment: bytes) -> dict[str, bytes]:
    return {entry.name: segment[entry.offset : entry.offset + entry.nbytes] for entry in recipe.entries}


def recipe_of(entries: Sequence[Entry], copies: Sequence[Copy], size: int = 1024) -> Recipe:
    return Recipe(entries, copies, size, 0)


def entry(name: str = "e", dtype: str = "U8", shape: tuple[int, ...] = (2, 3), offset: int = 0) -> Entry:
    return Entry(name, dtype, shape, offset, prod(shape) * BITS.get(dtype, 8) // 8)
