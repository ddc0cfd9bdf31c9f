"""From files to segments: every byte lands where it belongs, is read once, and is hashed; failures are told apart."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import itertools
import mmap
import os
import random
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from tests.checkpoints import BITS, Tensor, nbytes, write_checkpoint
from weightd.daemon.checkpoint import Checkpoint, list_checkpoint, open_checkpoint
from weightd.daemon.devices import Segment
from weightd.daemon.devices.cpu import CpuDevice, CpuSegment
from weightd.daemon.digests import LEAF, checkpoint_digest, leaf_count, leaf_digest, tensor_digest
from weightd.daemon.errors import CheckpointChanged, DaemonError, DigestMismatch, InsufficientCapacity, SourceFailed
from weightd.daemon.extents import Demands, Extent, plan_extents
from weightd.daemon.fill import PHASES, Fill, FillLimits, Landing
from weightd.daemon.layout import Split, checkpoint_layout
from weightd.daemon.recipe import Box, Copy, Entry, Recipe, arrange, contiguous, validate
from weightd.daemon.sources import Allow
from weightd.daemon.sources.file import FileSource

MiB = 1 << 20
KiB = 1 << 10

_NOISE = random.Random(7).randbytes(8 * MiB)

DEFAULTS = Demands(extent_bytes=MiB, max_runs=1024, min_range=64 * KiB)
LIMITS = FillLimits(threads=3, in_flight_bytes=MiB, extent_bytes=MiB, bounce_buffers=3, retry_deadline=60.0)


def noise(size: int, seed: int) -> bytes:
    """Bytes that differ between seeds; repeats every 8 MiB."""
    start = seed * 7919 % len(_NOISE)
    doubled = _NOISE[start : start + size]
    while len(doubled) < size:
        doubled += _NOISE[: size - len(doubled)]
    return doubled


def tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return dtype, shape, noise(nbytes(dtype, shape), seed)


def leaves_of(data: bytes) -> list[int]:
    return [int(xxhash.xxh3_64_intdigest(data[start : start + MiB])) for start in range(0, len(data), MiB)]


class Stored(NamedTuple):
    """A checkpoint on disk, and what its tensors hold."""

    source: FileSource
    checkpoint: Checkpoint
    data: dict[str, bytes]

    def files(self) -> list[Path]:
        folder = Path(self.checkpoint.listing.uri.removeprefix("file://"))
        return [folder / file.name for file in self.checkpoint.listing.weights]

    def reader(self) -> Any:
        return self.source.reader(self.checkpoint.listing.weights)


def store(folder: Path, *shards: Mapping[str, Tensor]) -> Stored:
    write_checkpoint(folder, {f"{index}.safetensors": shard for index, shard in enumerate(shards)})
    source = FileSource(folder, Allow())
    checkpoint = open_checkpoint(source, list_checkpoint(f"file://{folder}", source))
    return Stored(source, checkpoint, {name: data for shard in shards for name, (_, _, data) in shard.items()})


def cut(data: bytes, dtype: str, shape: tuple[int, ...], dim: int, size: int, rank: int) -> bytes:
    """One rank's slice by numpy alone."""
    part = shape[dim] // size
    elements = numpy.frombuffer(data, numpy.uint8).reshape(*shape, BITS[dtype] // 8)
    return elements[(*[slice(None)] * dim, slice(rank * part, (rank + 1) * part))].tobytes()


def in_time(action: Callable[[], object], fill: Fill, seconds: float = 60) -> None:
    """Run it in a thread and raise what it raises; where it hangs, stop the fill and fail."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    hangs = thread.is_alive()
    if hangs:
        fill.stop()
        thread.join(20)
    assert not hangs, f"nothing has happened for {seconds} s"
    if raised:
        raise raised[0]


class Filled(NamedTuple):
    fill: Fill
    segments: list[CpuSegment]
    extents: list[Extent]
    verified: list[list[int]]

    def held(self, segment: int, entry: Entry) -> bytes:
        return bytes(self.segments[segment].view[entry.offset : entry.offset + entry.nbytes])


@contextlib.contextmanager
def prepared(
    stored: Stored,
    recipes: Sequence[Recipe],
    demands: Demands = DEFAULTS,
    limits: FillLimits = LIMITS,
    kind: type[Fill] = Fill,
    on_verified: Callable[[int, list[int]], None] | None = None,
    **options: Any,
) -> Iterator[Filled]:
    """Segments and a fill for them, nothing read yet."""
    device = CpuDevice("cpu", 1 << 40)
    segments = [device.allocate(recipe.nbytes, f"test/{recipe.rank}") for recipe in recipes]
    verified: list[list[int]] = [[] for _ in recipes]
    try:
        extents = plan_extents(stored.checkpoint.tensors, recipes, demands)
        fill = kind(
            stored.checkpoint.tensors,
            recipes,
            segments,
            extents,
            limits,
            on_verified=on_verified or (lambda segment, entries: verified[segment].extend(entries)),
            **options,
        )
        yield Filled(fill, segments, extents, verified)
    finally:
        with contextlib.suppress(BufferError):
            for segment in segments:
                segment.close()


def bring(stored: Stored, fill: Fill) -> None:
    reader = stored.reader()
    try:
        in_time(lambda: reader.run(fill), fill)
    finally:
        reader.close()


def assert_a_sound_plan(stored: Stored, recipes: Sequence[Recipe], extents: Sequence[Extent], demands: Demands) -> None:
    """Extents lie in their files, never overlap, come in order, and bring every byte of every entry once."""
    sizes = [file.size for file in stored.checkpoint.listing.weights]
    starts = [len(prefix) for prefix in stored.checkpoint.prefixes]
    brought = [numpy.zeros(recipe.nbytes, numpy.uint8) for recipe in recipes]
    pieces: dict[tuple[int, int], int] = {}
    for extent, following in pairwise(extents):
        assert (extent.file, extent.offset + extent.nbytes) <= (following.file, following.offset) or (
            extent.file < following.file
        )
    for extent in extents:
        assert 0 < extent.nbytes <= demands.extent_bytes
        assert starts[extent.file] <= extent.offset
        assert extent.offset + extent.nbytes <= sizes[extent.file]
        if extent.scatters is None:
            assert 0 < len(extent.runs) <= demands.max_runs
            assert sum(run.nbytes for run in extent.runs) == extent.nbytes
            for run in extent.runs:
                brought[run.segment][run.offset : run.offset + run.nbytes] += 1
        else:
            assert not extent.runs
            for scatter in extent.scatters:
                block = scatter.block
                assert min(block) >= 0
                assert block.source + (block.rows - 1) * block.source_stride + block.run <= extent.nbytes
                assert (
                    block.target + (block.rows - 1) * block.target_stride + block.run <= recipes[scatter.segment].nbytes
                )
                rows = as_strided(
                    brought[scatter.segment][block.target :], (block.rows, block.run), (block.target_stride, 1)
                )
                rows += 1
        for piece in extent.pieces:
            key = (piece.segment, piece.entry)
            pieces[key] = pieces.get(key, 0) + piece.nbytes
    for segment, recipe in enumerate(recipes):
        for index, entry in enumerate(recipe.entries):
            assert (brought[segment][entry.offset : entry.offset + entry.nbytes] == 1).all()
            assert pieces.get((segment, index), 0) == entry.nbytes
        assert brought[segment].sum() == sum(entry.nbytes for entry in recipe.entries)


def assert_filled(
    stored: Stored,
    recipes: Sequence[Recipe],
    expected: Callable[[Recipe, Entry], bytes],
    demands: Demands = DEFAULTS,
    limits: FillLimits = LIMITS,
) -> int:
    """Fill, and compare everything with the reference; returns the bytes that were read."""
    tensors = stored.checkpoint.tensors
    prefixes = {file: stored.checkpoint.prefixes[file] for file in demands.whole_files}
    with prepared(stored, recipes, demands, limits, sha256_prefixes=prefixes) as filled:
        fill = filled.fill
        assert_a_sound_plan(stored, recipes, filled.extents, demands)
        bring(stored, fill)
        assert fill.next() is None
        for index, recipe in enumerate(recipes):
            digests = []
            for number, entry in enumerate(recipe.entries):
                want = expected(recipe, entry)
                assert filled.held(index, entry) == want, entry
                assert list(fill.leaves[index][number]) == leaves_of(want), entry
                digests.append(tensor_digest(entry.dtype, entry.shape, len(want), array("Q", leaves_of(want))))
            assert fill.digests(index) == digests
            assert sorted(filled.verified[index]) == list(range(len(recipe.entries)))
            for before, after in pairwise(recipe.entries):
                assert not any(filled.segments[index].view[before.offset + before.nbytes : after.offset])
        for number, leaves in fill.tensor_leaves.items():
            assert list(leaves) == leaves_of(stored.data[tensors[number].name])
        if demands.whole_tensors:
            hashed = set(fill.tensor_leaves)
            hashed |= {
                copy.tensor for recipe in recipes for copy in recipe.copies if copy.source is copy.target is None
            }
            assert hashed >= {number for number, info in enumerate(tensors) if info.nbytes}
        for file, path in enumerate(stored.files()):
            if file in demands.whole_files:
                assert fill.sha256[file].hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
        assert fill.bytes_read == sum(extent.nbytes for extent in filled.extents)
        assert fill.retries == 0
        return fill.bytes_read


# ---------------------------------------------------------------------------- any checkpoint, any layout

SHAPES: Sequence[tuple[str, tuple[int, ...]]] = (
    # tiny
    ("F32", ()), ("U8", (0,)), ("U8", (1,)), ("U8", (7,)), ("BF16", (4, 4)), ("F32", (8, 0, 4)), ("F64", (4, 5, 8)),
    # small
    ("BF16", (128, 256)), ("U8", (4, 16411)), ("F32", (4, 8, 1000)),
    # around a leaf, an extent, and half of one
    ("U8", (MiB // 2,)), ("U8", (MiB // 2 + 1,)), ("U8", (MiB - 1,)), ("F32", (4, 64 * KiB)), ("U8", (MiB + 1,)),
    # large
    ("BF16", (1000, 1004)), ("U8", (4, 4, 99991)), ("F32", (512, 1028)), ("U8", (5 * MiB - 3,)), ("F32", (8, 4, 40000)),
)  # fmt: skip


@st.composite
def shards(draw: st.DrawFn) -> list[dict[str, Tensor]]:
    found: list[dict[str, Tensor]] = []
    seed = itertools.count(draw(st.integers(0, 1000)))
    for shard in range(draw(st.integers(1, 3))):
        kinds = draw(st.lists(st.sampled_from(SHAPES), max_size=7))
        found.append({f"{shard}.{index}": tensor(*kind, next(seed)) for index, kind in enumerate(kinds)})
    if not any(found):
        found[0]["0.0"] = tensor("U8", (7,))
    return found


demands = st.builds(
    Demands,
    extent_bytes=st.sampled_from([MiB, 2 * MiB, 8 * MiB]),
    max_runs=st.sampled_from([1, 2, 1024]),
    min_range=st.sampled_from([0, 64 * KiB, MiB, 1 << 30]),
    whole_tensors=st.booleans(),
    whole_files=st.just(frozenset()),
)


def roomy(wanted: Demands, threads: int) -> FillLimits:
    """Limits with as many bounce buffers as there can be extents."""
    return FillLimits(threads, MiB, wanted.extent_bytes, 1000, 60.0)


@given(shards(), demands, st.integers(1, 4), st.data())
@settings(deadline=None, max_examples=25)
def test_a_whole_checkpoint_is_read_once_and_lands_byte_for_byte(
    tensors: list[dict[str, Tensor]], wanted: Demands, threads: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stored = store(Path(folder), *tensors)
        wanted = wanted._replace(whole_files=data.draw(st.frozensets(st.integers(0, len(tensors) - 1))))
        recipes = checkpoint_layout(stored.checkpoint.tensors)
        read = assert_filled(stored, recipes, lambda _, entry: stored.data[entry.name], wanted, roomy(wanted, threads))
        assert read == stored.checkpoint.nbytes


@given(shards(), demands, st.integers(1, 4), st.data())
@settings(deadline=None, max_examples=25)
def test_chosen_tensors_land_byte_for_byte_and_others_are_read_only_where_asked(
    tensors: list[dict[str, Tensor]], wanted: Demands, threads: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stored = store(Path(folder), *tensors)
        whole_files = data.draw(st.frozensets(st.integers(0, len(tensors) - 1)))
        wanted = wanted._replace(whole_files=whole_files)
        names = data.draw(st.sets(st.sampled_from(sorted(stored.data)), min_size=1))
        recipes = checkpoint_layout(stored.checkpoint.tensors, include=sorted(names))
        read = assert_filled(stored, recipes, lambda _, entry: stored.data[entry.name], wanted, roomy(wanted, threads))
        assert read == sum(
            info.nbytes
            for info in stored.checkpoint.tensors
            if info.name in names or wanted.whole_tensors or info.file in whole_files
        )


def splits_for(stored: Stored, size: int, draw: Callable[[st.SearchStrategy[Any]], Any]) -> dict[str, Split]:
    found: dict[str, Split] = {}
    for info in stored.checkpoint.tensors:
        dims = [dim for dim, length in enumerate(info.shape) if length % size == 0]
        found[info.name] = draw(st.sampled_from([*dims, "replicate"]))
    return found


def sliced(stored: Stored, splits: Mapping[str, Split], size: int) -> Callable[[Recipe, Entry], bytes]:
    shapes = {info.name: (info.dtype, info.shape) for info in stored.checkpoint.tensors}

    def expected(recipe: Recipe, entry: Entry) -> bytes:
        split = splits[entry.name]
        data = stored.data[entry.name]
        return data if split == "replicate" else cut(data, *shapes[entry.name], split, size, recipe.rank)

    return expected


@given(shards(), demands, st.integers(1, 4), st.sampled_from([2, 4]), st.data())
@settings(deadline=None, max_examples=40)
def test_all_ranks_together_read_every_byte_once(
    tensors: list[dict[str, Tensor]], wanted: Demands, threads: int, size: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stored = store(Path(folder), *tensors)
        wanted = wanted._replace(whole_files=data.draw(st.frozensets(st.integers(0, len(tensors) - 1))))
        splits = splits_for(stored, size, data.draw)
        recipes = checkpoint_layout(stored.checkpoint.tensors, tp_size=size, tp_ranks=range(size), splits=splits)
        read = assert_filled(stored, recipes, sliced(stored, splits, size), wanted, roomy(wanted, threads))
        assert read == stored.checkpoint.nbytes


@given(shards(), demands, st.integers(1, 4), st.sampled_from([2, 4]), st.data())
@settings(deadline=None, max_examples=40)
def test_some_ranks_get_their_slices_along_any_dimension(
    tensors: list[dict[str, Tensor]], wanted: Demands, threads: int, size: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stored = store(Path(folder), *tensors)
        wanted = wanted._replace(whole_files=data.draw(st.frozensets(st.integers(0, len(tensors) - 1))))
        splits = splits_for(stored, size, data.draw)
        ranks = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size - 1, unique=True))
        recipes = checkpoint_layout(stored.checkpoint.tensors, tp_size=size, tp_ranks=ranks, splits=splits)
        read = assert_filled(stored, recipes, sliced(stored, splits, size), wanted, roomy(wanted, threads))
        assert read <= stored.checkpoint.nbytes


@pytest.mark.parametrize("rows", [4, 400, 64 * KiB, 5 * MiB - 4, 40 * MiB // 8])
@pytest.mark.parametrize("rank", range(4))
def test_a_rank_cut_along_the_first_dimension_reads_only_its_own_bytes(rows: int, rank: int, tmp_path: Path) -> None:
    stored = store(
        tmp_path, {"before": tensor("U8", (100,)), "t": tensor("U8", (rows, 1)), "after": tensor("U8", (9,))}
    )
    recipes = checkpoint_layout(stored.checkpoint.tensors, include=["t"], tp_size=4, tp_ranks=[rank], splits={"*": 0})
    assert assert_filled(stored, recipes, sliced(stored, {"t": 0}, 4)) == rows // 4


@pytest.mark.parametrize("buffers", [1, 2])
def test_few_bounce_buffers_serve_many_extents(buffers: int, tmp_path: Path) -> None:
    stored = store(tmp_path, {f"t{i}": tensor("BF16", (500, 1500), i) for i in range(4)})
    splits: dict[str, Split] = {f"t{i}": 1 for i in range(4)}
    recipes = checkpoint_layout(stored.checkpoint.tensors, tp_size=2, tp_ranks=(0, 1), splits=splits)
    limits = FillLimits(4, MiB, MiB, buffers, 60.0)
    assert_filled(stored, recipes, sliced(stored, splits, 2), DEFAULTS, limits)


def test_many_tensors_side_by_side_are_one_read(tmp_path: Path) -> None:
    tensors = {f"t{i:03}": tensor("U8", (256 * (1 + i % 3),), i) for i in range(500)}
    stored = store(tmp_path, tensors)
    extents = plan_extents(stored.checkpoint.tensors, checkpoint_layout(stored.checkpoint.tensors), DEFAULTS)
    assert len(extents) == 1
    assert len(extents[0].runs) == 1  # multiples of 256 bytes follow each other in the segment as in the file


# ---------------------------------------------------------------------------- any recipe


def test_fused_stacked_transposed_and_repeated_tensors_land_byte_for_byte(tmp_path: Path) -> None:
    one = {
        "q": tensor("BF16", (640, 512), 1),
        "k": tensor("BF16", (128, 512), 2),
        "wide": tensor("F32", (700, 900), 4),
    }
    two = {"v": tensor("BF16", (128, 512), 3), "row": tensor("U8", (1000,), 5), "bytes": tensor("U8", (37, 41, 43), 6)}
    stored = store(tmp_path, one, two)
    number = {info.name: index for index, info in enumerate(stored.checkpoint.tensors)}

    def arrayed(name: str) -> Any:
        dtype, shape, data = (one | two)[name]
        return numpy.frombuffer(data, {"BF16": "u2", "F32": "u4", "U8": "u1"}[dtype]).reshape(shape)

    fused = numpy.concatenate([arrayed("q"), arrayed("k"), arrayed("v")])
    first: dict[str, Any] = {
        "qkv": fused,
        "wide.T": arrayed("wide").T,
        "rows": numpy.broadcast_to(arrayed("row")[10:510], (300, 500)),
        "windows": numpy.lib.stride_tricks.sliding_window_view(arrayed("row"), 300)[:500],
        "bytes.T": arrayed("bytes").transpose(2, 0, 1),
    }
    second: dict[str, Any] = {"wide": arrayed("wide"), "corner": arrayed("wide")[100:300, 50:60], "row": arrayed("row")}

    def entries(table: Mapping[str, Any]) -> list[Entry]:
        names = {1: "U8", 2: "BF16", 4: "F32"}
        items = [(Entry(name, names[a.itemsize], a.shape, 0, a.nbytes), Copy(0, 0)) for name, a in table.items()]
        return list(arrange(items, 0).entries)

    a, b = entries(first), entries(second)
    copies = [
        Copy(number["q"], 0, None, Box(0, (640, 512), (512, 1))),
        Copy(number["k"], 0, None, Box(640 * 512, (128, 512), (512, 1))),
        Copy(number["v"], 0, None, Box(768 * 512, (128, 512), (512, 1))),
        Copy(number["wide"], 1, Box(0, (900, 700), (1, 900))),
        Copy(number["row"], 2, Box(10, (300, 500), (0, 1))),
        Copy(number["row"], 3, Box(0, (500, 300), (1, 1))),
        Copy(number["bytes"], 4, Box(0, (43, 37, 41), (1, 41 * 43, 43))),
    ]
    others = [Copy(number["wide"], 0), Copy(number["wide"], 1, Box(90050, (200, 10), (900, 1))), Copy(number["row"], 2)]
    recipes = [Recipe(a, copies, a[-1].offset + a[-1].nbytes, 0), Recipe(b, others, b[-1].offset + b[-1].nbytes, 1)]
    for recipe in recipes:
        validate(recipe, stored.checkpoint.tensors)
    for wanted in (
        DEFAULTS,
        DEFAULTS._replace(min_range=0, extent_bytes=2 * MiB),
        DEFAULTS._replace(whole_tensors=True),
    ):
        read = assert_filled(
            stored,
            recipes,
            lambda recipe, entry: (first, second)[recipe.rank][entry.name].tobytes(),
            wanted,
            roomy(wanted, 2),
        )
        assert read == stored.checkpoint.nbytes


@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.randoms(use_true_random=False), st.booleans())
@settings(deadline=None, max_examples=60)
def test_strided_boxes_of_a_large_tensor_land_byte_for_byte_across_extents(
    shape: list[int], rng: random.Random, transpose: bool
) -> None:
    """A tensor of 3 to 5 MiB, so that extents and leaves end within rows."""
    inner = rng.randrange(3 * MiB, 5 * MiB) // prod(shape)
    source = ("U8", (*shape, inner))
    order = [*range(len(shape))]
    if transpose:
        rng.shuffle(order)
    steps = [rng.choice([1, 1, 2, 3]) for _ in shape]
    whole = contiguous(source[1])
    begin = rng.randrange(inner)
    length = rng.randrange(1, inner - begin + 1)
    sizes = [-(-shape[dim] // steps[dim]) for dim in order]
    box = Box(begin, (*sizes, length), (*(whole.strides[dim] * steps[dim] for dim in order), 1))
    entry = Entry("e", "U8", box.shape, 0, prod(box.shape))
    recipes = [Recipe([entry], [Copy(0, 0, box)], entry.nbytes, 0)]
    wanted = DEFAULTS._replace(min_range=rng.choice([0, 64 * KiB, 1 << 30]), whole_tensors=rng.random() < 0.3)
    with tempfile.TemporaryDirectory() as folder:
        stored = store(Path(folder), {"t": tensor(*source)})
        validate(recipes[0], stored.checkpoint.tensors)
        elements = numpy.frombuffer(stored.data["t"], numpy.uint8).reshape(source[1])
        index = (*(slice(None, None, step) for step in steps), slice(begin, begin + length))
        want = elements[index].transpose(*order, len(shape)).tobytes()
        assert_filled(stored, recipes, lambda *_: want, wanted, roomy(wanted, 2))


# ---------------------------------------------------------------------------- digests


def test_leaf_digests_are_xxh3() -> None:
    assert MiB == LEAF
    assert leaf_digest(b"") == 0x2D06800538D394C2  # XXH3_64bits of nothing, from xxHash's own test vectors
    assert leaf_digest(memoryview(b"weights")) == xxhash.xxh3_64(b"weights", seed=0).intdigest()
    assert [leaf_count(size) for size in (0, 1, MiB - 1, MiB, MiB + 1, 5 * MiB)] == [0, 1, 1, 1, 2, 5]


@pytest.mark.parametrize(
    ("dtype", "shape", "prefix"),
    [
        ("F32", (), b"F32||4\n"),
        ("U8", (0,), b"U8|0|0\n"),
        ("BF16", (3, 5), b"BF16|3,5|30\n"),
        ("U8", (3, MiB), b"U8|3,1048576|3145728\n"),
        ("F4", (3, 2), b"F4|3,2|3\n"),
    ],
)
def test_a_tensor_digest_is_over_dtype_shape_length_and_little_endian_leaves(
    dtype: str, shape: tuple[int, ...], prefix: bytes
) -> None:
    data = noise(nbytes(dtype, shape), 3)
    leaves = leaves_of(data)
    text = prefix + b"".join(leaf.to_bytes(8, "little") for leaf in leaves)
    found = tensor_digest(dtype, shape, len(data), array("Q", leaves))
    assert found == "xxh3:" + xxhash.xxh3_128(text, seed=0).hexdigest()


def test_a_checkpoint_digest_is_over_names_and_tensor_digests_sorted_by_name() -> None:
    pairs = [("b", "xxh3:" + "1" * 32), ("a", "xxh3:" + "2" * 32), ("é", "xxh3:" + "3" * 32)]
    text = f"a\0xxh3:{'2' * 32}\nb\0xxh3:{'1' * 32}\né\0xxh3:{'3' * 32}\n".encode()
    want = "xxh3:" + xxhash.xxh3_128(text, seed=0).hexdigest()
    assert {checkpoint_digest(order) for order in itertools.permutations(pairs)} == {want}
    assert checkpoint_digest([]) == "xxh3:99aa06d3014798d86001c324468d497f"  # XXH3_128bits of nothing


def test_digests_stay_what_they_were_in_the_first_release() -> None:
    digest = tensor_digest("F32", (2, 2), 16, array("Q", leaves_of(bytes(range(16)))))
    assert digest == "xxh3:29a0b9683faf36e23acfe21f08ed5699"
    assert checkpoint_digest([("w", digest)]) == "xxh3:34a180c1d00b1fbeffeea112334a7ca5"


def test_the_same_bytes_under_another_dtype_or_shape_are_another_value() -> None:
    leaves = array("Q", leaves_of(bytes(16)))
    found = {tensor_digest(*identity, 16, leaves) for identity in (("F32", (4,)), ("I32", (4,)), ("F32", (2, 2)))}
    assert len(found) == 3


@pytest.mark.parametrize("expect", ["right", "wrong"])
@pytest.mark.parametrize("way", ["direct", "grouped", "bounced", "sliced", "unwanted"])
def test_a_leaf_that_is_not_the_expected_one_fails_the_fill_and_is_named(way: str, expect: str, tmp_path: Path) -> None:
    large, small = tensor("U8", (4, 2 * MiB), 1), tensor("U8", (1000,), 2)
    stored = store(tmp_path, {"first": tensor("U8", (10,)), "large": large, "small": small, "last": small})
    name, leaf = ("small", 0) if way == "grouped" else ("large", 5)
    known = {key: array("Q", leaves_of(stored.data[key])) for key in stored.data}
    if expect == "wrong":
        known[name][leaf] ^= 1 << 17
    wanted = DEFAULTS._replace(whole_tensors=way in ("sliced", "unwanted"))
    include = [key for key in stored.data if way != "unwanted" or key != "large"]
    ranks, size = {"bounced": ((0, 1), 2), "sliced": ((1,), 2)}.get(way, ((0,), 1))
    splits: dict[str, Split] = {"large": "replicate" if way == "bounced" else 1, "*": "replicate"}
    recipes = checkpoint_layout(stored.checkpoint.tensors, include=include, tp_size=size, tp_ranks=ranks, splits=splits)
    with prepared(stored, recipes, wanted, expected_leaves=known) as filled:
        if expect == "right":
            bring(stored, filled.fill)
            assert sorted(filled.verified[0]) == list(range(len(include)))
            return
        with pytest.raises(DigestMismatch) as mismatch:
            bring(stored, filled.fill)
        message = str(mismatch.value)
        right = leaves_of(stored.data[name])[leaf]
        for word in (f"tensor {name!r}", f"leaf {leaf} ", f"{leaf * MiB} ", f"{right:016x}", f"{right ^ 1 << 17:016x}"):
            assert word in message
        assert mismatch.value.details == {"tensor": name, "leaf": leaf}
        assert filled.fill.stopped
        for segment, recipe in enumerate(recipes):
            names = [recipe.entries[index].name for index in filled.verified[segment]]
            assert name not in names


@pytest.mark.parametrize("direction", ["forwards", "backwards", "shuffled"])
def test_sha256_is_that_of_the_file_in_whatever_order_its_ranges_land(direction: str, tmp_path: Path) -> None:
    stored = store(tmp_path, {f"t{i}": tensor("U8", (MiB * 3 // 2 + i,), i) for i in range(5)})
    content = stored.files()[0].read_bytes()
    recipes = checkpoint_layout(stored.checkpoint.tensors, tp_size=2, tp_ranks=(0, 1), splits={"*": "replicate"})
    wanted = DEFAULTS._replace(whole_files={0})
    prefixes = {0: stored.checkpoint.prefixes[0]}
    with prepared(stored, recipes, wanted, roomy(wanted, 1), sha256_prefixes=prefixes) as filled:
        extents = list(iter(filled.fill.next, None))
        if direction == "backwards":
            extents.reverse()
        elif direction == "shuffled":
            random.Random(1).shuffle(extents)
        for extent in extents:
            land(filled.fill, extent, content)
        assert filled.fill.sha256[0].hexdigest() == hashlib.sha256(content).hexdigest()


def land(fill: Fill, extent: Extent, content: bytes) -> None:
    """Bring one extent by hand."""
    landing = fill.landing(extent)
    assert landing is not None
    place(landing, content[extent.offset : extent.offset + extent.nbytes])
    fill.landed(extent, landing)


def place(landing: Landing, data: bytes) -> None:
    for view in landing.views:
        view[:] = data[: len(view)]
        data = data[len(view) :]
    assert not data


class LateFill(Fill):
    """Its first extent asks for its bounce buffer only after two others have landed, as a busy machine may have it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.first: Extent | None = None
        self.others = threading.Semaphore(0)

    def next(self) -> Extent | None:
        extent = super().next()
        self.first = self.first or extent
        return extent

    def landing(self, extent: Extent, *, wait: bool = True) -> Landing | None:
        if extent is self.first:
            self.others.acquire(timeout=0.5)
            self.others.acquire(timeout=0.5)
        return super().landing(extent, wait=wait)

    def landed(self, extent: Extent, landing: Landing) -> None:
        super().landed(extent, landing)
        self.others.release()


def test_ranges_that_wait_for_their_turn_in_a_files_sha256_never_starve_the_one_they_wait_for(tmp_path: Path) -> None:
    stored = store(tmp_path, {"t": tensor("U8", (6 * MiB,), 1)})
    recipes = checkpoint_layout(stored.checkpoint.tensors, tp_size=2, tp_ranks=(0, 1), splits={"*": "replicate"})
    wanted = DEFAULTS._replace(whole_files={0})
    limits = FillLimits(3, MiB, MiB, 2, 60.0)
    with prepared(
        stored, recipes, wanted, limits, LateFill, sha256_prefixes={0: stored.checkpoint.prefixes[0]}
    ) as filled:
        reader = stored.reader()
        in_time(lambda: reader.run(filled.fill), filled.fill, 6)
        reader.close()
        digest = hashlib.sha256(stored.files()[0].read_bytes()).hexdigest()
        assert filled.fill.sha256[0].hexdigest() == digest


# ---------------------------------------------------------------------------- changed files


def appended(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def touched(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def replaced(path: Path) -> None:
    stamp = path.stat().st_mtime_ns
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    os.utime(other, ns=(0, stamp))
    other.rename(path)


def halved(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("change", [appended, touched, replaced, halved, os.unlink, fifo])
@pytest.mark.parametrize("way", ["direct", "bounced"])
def test_a_file_that_changes_between_planning_and_reading_is_noticed(
    change: Callable[[Path], None], way: str, tmp_path: Path
) -> None:
    stored = store(tmp_path, {"t": tensor("U8", (3 * MiB,))})
    size = 1 if way == "direct" else 2
    recipes = checkpoint_layout(
        stored.checkpoint.tensors, tp_size=size, tp_ranks=range(size), splits={"*": "replicate"}
    )
    change(stored.files()[0])
    with prepared(stored, recipes) as filled:
        with pytest.raises(DaemonError, match=r"0\.safetensors") as error:
            bring(stored, filled.fill)
        assert isinstance(error.value, CheckpointChanged) or change is fifo
        assert filled.verified == [[] for _ in recipes]
        assert filled.fill.bytes_read == 0


def test_nothing_is_read_from_a_file_before_it_is_known_to_be_the_planned_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = store(tmp_path, {f"t{i}": tensor("U8", (MiB,), i) for i in range(6)})
    touched(stored.files()[0])
    fstat, calls, landed = os.fstat, itertools.count(), threading.Event()

    def slow(fd: int) -> os.stat_result:
        # The thread that opens the file is held up while it looks at what it has opened.
        if next(calls) == 1:
            landed.wait(0.5)
        return fstat(fd)

    monkeypatch.setattr(os, "fstat", slow)
    with prepared(stored, checkpoint_layout(stored.checkpoint.tensors), on_verified=lambda *_: landed.set()) as filled:
        with pytest.raises(CheckpointChanged):
            bring(stored, filled.fill)
        assert not landed.is_set()
        assert filled.fill.bytes_read == 0


@pytest.mark.parametrize("change", [None, touched, fifo])
def test_a_closed_reader_leaves_no_descriptor_open(change: Callable[[Path], None] | None, tmp_path: Path) -> None:
    stored = store(tmp_path, {"a": tensor("U8", (MiB,))}, {"b": tensor("U8", (MiB,))})
    if change:
        change(stored.files()[1])
    with prepared(stored, checkpoint_layout(stored.checkpoint.tensors)) as filled:
        before = os.listdir("/proc/self/fd")
        with contextlib.suppress(DaemonError):
            bring(stored, filled.fill)
        assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_file_cut_short_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    stored = store(tmp_path, {f"t{i}": tensor("U8", (MiB,), i) for i in range(4)})
    path = stored.files()[0]
    size = path.stat().st_size
    limits = FillLimits(1, MiB, MiB, 1, 60.0)
    with prepared(
        stored,
        checkpoint_layout(stored.checkpoint.tensors),
        limits=limits,
        on_verified=lambda *_: os.truncate(path, size - MiB - 100),
    ) as filled:
        with pytest.raises(
            CheckpointChanged, match=rf"0\.safetensors: ends at byte {size - MiB - 100}, had {size} bytes"
        ):
            bring(stored, filled.fill)
        assert filled.fill.bytes_read == 2 * MiB


# ---------------------------------------------------------------------------- failing reads


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come at once."""
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.0)


def flaky(monkeypatch: pytest.MonkeyPatch, failures: int, code: int = errno.EIO) -> None:
    """Every place of every file fails so many times before it can be read."""
    preadv, failed = os.preadv, dict[tuple[int, int], int]()

    def read(fd: int, buffers: Any, offset: int) -> int:
        count = failed.get((fd, offset), 0)
        failed[fd, offset] = count + 1
        if count < failures:
            raise OSError(code, os.strerror(code))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_reads_that_fail_are_tried_again_until_they_succeed(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = store(tmp_path, {f"t{i}": tensor("U8", (4, 300 * KiB), i) for i in range(3)})
    splits: dict[str, Split] = {"t0": 0, "t1": 1, "t2": "replicate"}
    recipes = checkpoint_layout(stored.checkpoint.tensors, tp_size=2, tp_ranks=(0, 1), splits=splits)
    flaky(monkeypatch, 3, code)
    with prepared(stored, recipes) as filled:
        bring(stored, filled.fill)
        assert filled.fill.retries == 3 * len(filled.extents)
        expected = sliced(stored, splits, 2)
        for index, recipe in enumerate(recipes):
            for entry in recipe.entries:
                assert filled.held(index, entry) == expected(recipe, entry)


def test_reads_that_never_succeed_are_given_up_with_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = store(tmp_path, {"t": tensor("U8", (1000,))})
    flaky(monkeypatch, 10**9)
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.01)
    limits = FillLimits(2, MiB, MiB, 1, 0.05)
    with prepared(stored, checkpoint_layout(stored.checkpoint.tensors), limits=limits) as filled:
        with pytest.raises(SourceFailed, match=os.strerror(errno.EIO)) as failure:
            bring(stored, filled.fill)
        attempts = failure.value.details["attempts"]
        assert attempts == filled.fill.retries > 1
        start = filled.extents[0].offset
        for words in (
            "0.safetensors",
            f"bytes {start} to {start + 1000}",
            f"{attempts} tries",
            "WEIGHTD_RETRY_DEADLINE",
        ):
            assert words in str(failure.value)
        assert filled.verified == [[]]


def test_an_extent_is_given_up_at_the_deadline_counted_from_its_first_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = store(tmp_path, {"a": tensor("U8", (MiB,)), "b": tensor("U8", (MiB,))})
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with prepared(stored, checkpoint_layout(stored.checkpoint.tensors)) as filled:
        first, second = filled.extents
        delays = []
        for _ in range(20):
            delays.append(filled.fill.failed(first, "here", "broken"))
            clock[0] += 2.9
        assert all(0.05 <= delay <= min(10, 0.1 * 2 ** (i + 1)) for i, delay in enumerate(delays))
        clock[0] = 1060.0
        filled.fill.failed(second, "here", "broken")
        with pytest.raises(SourceFailed, match=r"^here: .*broken; given up after 21 tries in 60\.0 s"):
            filled.fill.failed(first, "here", "broken")
        assert filled.fill.retries == 22
        filled.fill.check_stall(1000.0, ["here", "there"])
        clock[0] = 1060.5
        with pytest.raises(SourceFailed, match=r"^here: no byte of 2 requests in flight has come for 60\.5 s"):
            filled.fill.check_stall(1000.0, ["here", "there"])


def test_reads_that_stop_short_are_continued_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = store(tmp_path, {f"t{i}": tensor("U8", (1 + 97 * i % 1000,), i) for i in range(300)})
    preadv, rng = os.preadv, random.Random(3)

    def short(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        left, some = rng.randrange(1, 5000), []
        for buffer in buffers:
            if left:
                some.append(buffer[:left])
                left -= len(some[-1])
        return preadv(fd, some, offset)

    monkeypatch.setattr(os, "preadv", short)
    assert_filled(stored, checkpoint_layout(stored.checkpoint.tensors), lambda _, entry: stored.data[entry.name])


@pytest.mark.usefixtures("impatient")
def test_a_file_that_fails_to_open_for_a_while_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = store(tmp_path, {"t": tensor("U8", (1000,))})
    really_open, calls = os.open, itertools.count()

    def failing(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if str(path).endswith(".safetensors") and next(calls) < 2:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return really_open(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", failing)
    with prepared(stored, checkpoint_layout(stored.checkpoint.tensors)) as filled:
        bring(stored, filled.fill)
        assert filled.fill.retries == 2


def test_what_goes_wrong_in_one_thread_ends_them_all(tmp_path: Path) -> None:
    stored = store(tmp_path, {f"t{i}": tensor("U8", (MiB,), i) for i in range(30)})

    def verified(segment: int, entries: list[int]) -> None:
        raise ZeroDivisionError

    with prepared(stored, checkpoint_layout(stored.checkpoint.tensors), on_verified=verified) as filled:
        with pytest.raises(ZeroDivisionError):
            bring(stored, filled.fill)
        assert filled.fill.stopped
        assert filled.fill.bytes_read <= LIMITS.threads * MiB


# ---------------------------------------------------------------------------- stopping


def test_a_fill_that_is_stopped_before_it_runs_reads_nothing(tmp_path: Path) -> None:
    stored = store(tmp_path, {"t": tensor("U8", (3 * MiB,))})
    with prepared(stored, checkpoint_layout(stored.checkpoint.tensors)) as filled:
        filled.fill.stop()
        bring(stored, filled.fill)
        assert (filled.fill.bytes_read, filled.verified) == (0, [[]])


def test_a_fill_that_is_stopped_on_the_way_takes_no_further_extent(tmp_path: Path) -> None:
    stored = store(tmp_path, {f"t{i:02}": tensor("U8", (MiB,), i) for i in range(20)})
    fills: list[Fill] = []
    with prepared(
        stored, checkpoint_layout(stored.checkpoint.tensors), on_verified=lambda *_: fills[0].stop()
    ) as filled:
        fills.append(filled.fill)
        bring(stored, filled.fill)
        assert MiB <= filled.fill.bytes_read <= LIMITS.threads * MiB


def test_stopping_wakes_threads_that_wait_for_a_bounce_buffer(tmp_path: Path) -> None:
    stored = store(tmp_path, {"t": tensor("U8", (5 * MiB,))})
    recipes = checkpoint_layout(stored.checkpoint.tensors, tp_size=2, tp_ranks=(0, 1), splits={"*": "replicate"})
    with prepared(stored, recipes, limits=FillLimits(4, MiB, MiB, 1, 60.0)) as filled:
        fill = filled.fill
        first = fill.next()
        assert first is not None
        assert fill.landing(first) is not None
        assert fill.landing(first, wait=False) is None
        got: list[Landing | None] = []
        thread = threading.Thread(target=lambda: got.append(fill.landing(first)), daemon=True)
        thread.start()
        deadline = time.monotonic() + 20
        while not is_waiting(thread):
            assert time.monotonic() < deadline
        fill.stop()
        thread.join(20)
        assert got == [None]
        bring(stored, fill)
        assert fill.bytes_read == 0


def is_waiting(thread: threading.Thread) -> bool:
    """Whether it blocks on a lock of the threading module."""
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is not None and frame.f_code.co_filename == threading.__file__ and frame.f_code.co_name == "wait"


def test_stopping_ends_the_wait_for_the_next_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = store(tmp_path, {"t": tensor("U8", (1000,))})
    flaky(monkeypatch, 10**9)
    waiting = threading.Event()

    def uniform(low: float, high: float) -> float:
        waiting.set()
        return 1000.0

    monkeypatch.setattr(random, "uniform", uniform)
    with prepared(stored, checkpoint_layout(stored.checkpoint.tensors)) as filled:
        reader = stored.reader()
        thread = threading.Thread(target=reader.run, args=(filled.fill,), daemon=True)
        thread.start()
        assert waiting.wait(10)
        filled.fill.stop()
        thread.join(10)
        assert not thread.is_alive()
        reader.close()


def test_a_bounce_buffer_that_is_given_back_is_used_again(tmp_path: Path) -> None:
    stored = store(tmp_path, {"t": tensor("U8", (3 * MiB,))})
    recipes = checkpoint_layout(stored.checkpoint.tensors, tp_size=2, tp_ranks=(0, 1), splits={"*": "replicate"})
    with prepared(stored, recipes, limits=FillLimits(1, MiB, MiB, 1, 60.0)) as filled:
        landing = filled.fill.landing(filled.extents[0])
        assert landing is not None
        address = landing.address
        filled.fill.abandon(landing)
        again = filled.fill.landing(filled.extents[1], wait=False)
        assert again is not None
        assert again.address == address


@pytest.mark.parametrize("end", ["mismatch", "stopped", "failed"])
@pytest.mark.parametrize("sha256", [False, True], ids=["", "with sha256"])
def test_memory_can_be_freed_after_a_fill_that_came_to_nothing_while_its_record_lives(
    end: str, sha256: bool, tmp_path: Path
) -> None:
    stored = store(tmp_path, {f"t{i}": tensor("U8", (MiB,), i) for i in range(4)})
    content = stored.files()[0].read_bytes()
    recipes = checkpoint_layout(stored.checkpoint.tensors)
    known = {"t2": array("Q", [0])} if end == "mismatch" else {}
    segment = CpuDevice("cpu", 1 << 40).allocate(recipes[0].nbytes, "test")
    fill = Fill(
        stored.checkpoint.tensors,
        recipes,
        [segment],
        plan_extents(stored.checkpoint.tensors, recipes, DEFAULTS),
        LIMITS,
        expected_leaves=known,
        sha256_prefixes={0: stored.checkpoint.prefixes[0]} if sha256 else {},
    )
    first = fill.next()
    assert first is not None  # it never lands: those after it wait for their turn in the file's SHA-256
    second, third = fill.next(), fill.next()
    assert second is not None
    assert third is not None
    kept: list[BaseException] = []
    land(fill, second, content)
    try:
        land(fill, third, content)
        if end == "failed":
            os.preadv(-1, [], 0)
    except (DigestMismatch, OSError) as error:
        kept.append(error.with_traceback(None))  # as a stage's record keeps it
    assert bool(kept) == (end != "stopped")
    fill.stop()
    segment.close()


def test_entries_without_bytes_are_verified_from_the_start_and_others_when_all_of_them_has_landed(
    tmp_path: Path,
) -> None:
    stored = store(tmp_path, {"a": tensor("U8", (0,)), "b": tensor("U8", (2 * MiB + 5,)), "c": tensor("U8", (5,))})
    content = stored.files()[0].read_bytes()
    with prepared(stored, checkpoint_layout(stored.checkpoint.tensors)) as filled:
        seen = [list(filled.verified[0])]
        for extent in reversed(filled.extents):
            land(filled.fill, extent, content)
            seen.append(list(filled.verified[0]))
        assert seen == [[0], [0, 2], [0, 2], [0, 2], [0, 2, 1]]


def test_time_is_counted_by_what_it_went_into(tmp_path: Path) -> None:
    stored = store(tmp_path, {"t": tensor("BF16", (1000, 2000))})
    recipes = checkpoint_layout(stored.checkpoint.tensors, tp_size=2, tp_ranks=(0, 1), splits={"*": 1})
    with prepared(stored, recipes) as filled:
        assert filled.fill.seconds == dict.fromkeys(PHASES, 0.0)
        bring(stored, filled.fill)
        assert all(filled.fill.seconds[phase] > 0 for phase in PHASES)


# ---------------------------------------------------------------------------- segments

F_SEAL_FUTURE_WRITE = 0x10
ALL_SEALS = (
    fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | F_SEAL_FUTURE_WRITE
)  # fmt: skip


@pytest.fixture
def segment() -> Iterator[CpuSegment]:
    segment = CpuDevice("cpu", 1 << 30).allocate(3 * mmap.PAGESIZE - 5, "test")
    segment.view[:5] = b"right"
    yield segment
    segment.close()


def refused(action: Callable[[], object]) -> bool:
    """Whether the kernel refuses it for want of permission."""
    try:
        action()
    except OSError as error:
        return error.errno in (errno.EPERM, errno.EACCES, errno.EBADF, errno.EINVAL)
    return False


def punch_hole(fd: int, offset: int, size: int) -> None:
    """fallocate(2) with FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE: zeroes bytes without writing."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, 0x02 | 0x01, ctypes.c_long(offset), ctypes.c_long(size)):
        raise OSError(ctypes.get_errno(), "fallocate")


def assert_nobody_can_write(fd: int) -> None:
    """Through the descriptor, or a writable one that is made of it (which root, at least, can open)."""
    page = mmap.PAGESIZE
    opened = [fd]
    with contextlib.suppress(PermissionError):
        opened.append(os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC))
    try:
        for each in opened:
            assert refused(lambda: os.pwrite(each, b"wrong", 0))  # noqa: B023
            assert refused(lambda: os.ftruncate(each, 0))  # noqa: B023
            assert refused(lambda: os.ftruncate(each, 100 * page))  # noqa: B023
            assert refused(lambda: punch_hole(each, 0, page))  # noqa: B023
            assert refused(lambda: mmap.mmap(each, page, mmap.MAP_SHARED, mmap.PROT_WRITE))  # noqa: B023
            assert refused(lambda: mmap.mmap(each, page, mmap.MAP_SHARED))  # noqa: B023
    finally:
        for each in opened[1:]:
            os.close(each)
    assert os.pread(fd, 5, 0) == b"right"


def test_a_segment_is_zeroed_and_whole_pages(segment: CpuSegment) -> None:
    assert segment.nbytes == 3 * mmap.PAGESIZE - 5
    assert segment.footprint == 3 * mmap.PAGESIZE
    assert not any(segment.view[5:])
    assert CpuDevice("cpu", 0).footprint(0) == mmap.PAGESIZE


@pytest.mark.parametrize("sealed", [False, True], ids=["while it loads", "once it is sealed"])
def test_nobody_who_is_lent_a_segment_can_write_to_it(segment: CpuSegment, sealed: bool) -> None:
    if sealed:
        segment.seal()
    fd = segment.lend()
    try:
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert_nobody_can_write(fd)
    finally:
        os.close(fd)


def test_what_is_lent_while_it_loads_fills_up_in_front_of_the_borrower(segment: CpuSegment) -> None:
    fd = segment.lend()
    with mmap.mmap(fd, segment.nbytes, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped:
        os.close(fd)
        assert mapped[:5] == b"right"
        segment.view[1000:1005] = b"later"
        assert mapped[1000:1005] == b"later"
        segment.seal()
        assert mapped[1000:1005] == b"later"


@pytest.mark.parametrize("lent", [False, True], ids=["lent by nobody", "lent before"])
def test_a_sealed_segment_has_every_seal(segment: CpuSegment, lent: bool) -> None:
    if lent:
        os.close(segment.lend())
    segment.seal()
    fd = segment.lend()
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == ALL_SEALS
    os.close(fd)
    with pytest.raises(AssertionError, match="sealed"):
        _ = segment.view
    with pytest.raises(AssertionError, match="sealed"):
        _ = segment.address


def test_what_a_borrower_writes_to_a_private_mapping_stays_its_own(segment: CpuSegment) -> None:
    segment.seal()
    fd = segment.lend()
    with (
        mmap.mmap(fd, segment.nbytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mine,
        mmap.mmap(fd, segment.nbytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as other,
    ):
        mine[:5] = b"wrong"
        assert (mine[:5], other[:5], os.pread(fd, 5, 0)) == (b"wrong", b"right", b"right")
    os.close(fd)


def test_memory_that_is_mapped_outlives_the_segment(segment: CpuSegment) -> None:
    segment.seal()
    fd = segment.lend()
    segment.close()
    segment.close()
    assert os.pread(fd, 5, 0) == b"right"
    os.close(fd)


def test_a_segment_can_be_sealed_while_a_cycle_still_holds_a_slice_of_it(segment: CpuSegment) -> None:
    cycle: list[Any] = [segment.view[:5]]
    cycle.append(cycle)
    del cycle
    segment.seal()


def test_more_memory_than_there_is_is_refused_with_the_number() -> None:
    with pytest.raises(InsufficientCapacity, match=str(1 << 56)) as refusal:
        CpuDevice("cpu", 1 << 60).allocate(1 << 56, "test")
    assert refusal.value.details == {"device": "cpu", "needed_bytes": 1 << 56}


def test_a_segment_is_what_the_protocol_says(segment: CpuSegment) -> None:
    assert isinstance(segment.address, int)
    allocated: Segment = segment
    assert allocated.handle == "fd"
