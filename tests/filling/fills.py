"""A checkpoint on disk, a fill of it, and what must be true of any fill: for the tests of filling."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import xxhash
from numpy.lib.stride_tricks import as_strided

from tests.checkpoint_files import BITS, Tensor, nbytes, write_checkpoint
from weightd.daemon.checkpoints.contents import Checkpoint, open_checkpoint
from weightd.daemon.checkpoints.listing import list_checkpoint
from weightd.daemon.devices.cpu import CpuDevice, CpuSegment
from weightd.daemon.filling.fill import Fill
from weightd.daemon.filling.sink import Landing
from weightd.daemon.layouts.checkpoint import Split
from weightd.daemon.layouts.digests import tensor_digest
from weightd.daemon.layouts.extents import Demands, Extent, plan_extents
from weightd.daemon.layouts.recipe import Entry, Recipe
from weightd.daemon.limits import FillLimits
from weightd.daemon.sources.file import FileSource
from weightd.daemon.sources.uris import Allow

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
    checkpoint = open_checkpoint(source, list_checkpoint(f"file://{folder}", source, ["*.safetensors"]))
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
    device: CpuDevice | None = None,
    **options: Any,
) -> Iterator[Filled]:
    """Segments and a fill for them, nothing read yet."""
    device = device or CpuDevice("cpu", 1 << 40)
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
    for extent, following in pairwise(extent for extent in extents if extent.rows == 1):
        assert (extent.file, extent.end) <= (following.file, following.offset) or extent.file < following.file
    # Rows of one extent may lie between those of another.
    rows = sorted(
        (extent.file, extent.offset + row * extent.stride, extent.nbytes // extent.rows)
        for extent in extents
        for row in range(extent.rows)
    )
    for (file, begin, count), (file_after, begin_after, _) in pairwise(rows):
        assert file < file_after or begin + count <= begin_after
    for extent in extents:
        assert 0 < extent.nbytes <= demands.extent_bytes
        assert starts[extent.file] <= extent.offset
        assert extent.end <= sizes[extent.file]
        if extent.scatters is None:
            assert 0 < len(extent.runs) <= demands.max_runs
            assert sum(run.nbytes for run in extent.runs) == extent.nbytes
            for run in extent.runs:
                brought[run.segment][run.offset : run.offset + run.nbytes] += 1
        else:
            assert not extent.runs
            for scatter in extent.scatters:
                block = scatter.block
                run = scatter.cast.scaled(block.run) if scatter.cast else block.run
                assert min(block) >= 0
                assert block.source + (block.rows - 1) * block.source_stride + block.run <= extent.nbytes
                assert block.target + (block.rows - 1) * block.target_stride + run <= recipes[scatter.segment].nbytes
                there = as_strided(
                    brought[scatter.segment][block.target :], (block.rows, run), (block.target_stride, 1)
                )
                there += 1
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
    device: CpuDevice | None = None,
) -> int:
    """Fill, and compare everything with the reference; returns the bytes that were read."""
    tensors = stored.checkpoint.tensors
    prefixes = {file: stored.checkpoint.prefixes[file] for file in demands.whole_files}
    through = device is not None and stored.source.buffered
    with prepared(
        stored, recipes, demands, limits, device=device, buffered=through, sha256_prefixes=prefixes
    ) as filled:
        fill = filled.fill
        assert_a_sound_plan(stored, recipes, filled.extents, demands)
        bring(stored, fill)
        assert fill.next() is None
        for index, recipe in enumerate(recipes):
            digests = []
            for number, entry in enumerate(recipe.entries):
                want = expected(recipe, entry)
                assert filled.held(index, entry) == want, entry
                assert list(fill.account.leaves[index][number]) == leaves_of(want), entry
                digests.append(tensor_digest(entry.dtype, entry.shape, len(want), array("Q", leaves_of(want))))
            assert fill.account.digests(index) == digests
            assert sorted(filled.verified[index]) == list(range(len(recipe.entries)))
            for before, after in pairwise(recipe.entries):
                assert not any(filled.segments[index].view[before.offset + before.nbytes : after.offset])
        for number, leaves in fill.account.tensor_leaves.items():
            assert list(leaves) == leaves_of(stored.data[tensors[number].name])
        if demands.whole_tensors:
            hashed = set(fill.account.tensor_leaves)
            hashed |= {
                copy.tensor for recipe in recipes for copy in recipe.copies if copy.source is copy.target is None
            }
            assert hashed >= {number for number, info in enumerate(tensors) if info.nbytes}
        for file, path in enumerate(stored.files()):
            if file in demands.whole_files:
                assert fill.sha256[file].hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
        assert fill.account.bytes_read == sum(extent.nbytes for extent in filled.extents)
        assert fill.retries == 0
        return fill.account.bytes_read


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


def roomy(wanted: Demands, threads: int) -> FillLimits:
    """Limits with as many bounce buffers as there can be extents."""
    return FillLimits(threads, MiB, wanted.extent_bytes, 1000, 60.0)


def sliced(stored: Stored, splits: Mapping[str, Split], size: int) -> Callable[[Recipe, Entry], bytes]:
    shapes = {info.name: (info.dtype, info.shape) for info in stored.checkpoint.tensors}

    def expected(recipe: Recipe, entry: Entry) -> bytes:
        split = splits[entry.name]
        data = stored.data[entry.name]
        return data if split == "replicate" else cut(data, *shapes[entry.name], split, size, recipe.rank)

    return expected
