"""From files to segments: every byte lands where it belongs, is read once and is hashed; a fill can be stopped."""

from __future__ import annotations

import itertools
import os
import random
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoint_files import Tensor
from tests.filling.fills import (
    DEFAULTS,
    LIMITS,
    KiB,
    MiB,
    Stored,
    assert_filled,
    bring,
    flaky,
    land,
    leaves_of,
    prepared,
    roomy,
    sliced,
    store,
    tensor,
)
from weightd.daemon.devices.cpu import CpuDevice
from weightd.daemon.errors import DigestMismatch
from weightd.daemon.filling.fill import Fill
from weightd.daemon.filling.phases import PHASES
from weightd.daemon.filling.sink import Landing
from weightd.daemon.layouts.checkpoint import Split, checkpoint_layout
from weightd.daemon.layouts.extents import Demands, plan_extents
from weightd.daemon.layouts.recipe import Copy, Entry, Recipe, arrange, contiguous, validate
from weightd.daemon.limits import FillLimits
from weightd.ipc.recipe import Box

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


def test_what_is_read_into_buffers_is_hashed_there_and_written_to_each_of_its_places(tmp_path: Path) -> None:
    stored = store(
        tmp_path, {f"t{i}": tensor("U8", (1000 + i,), i) for i in range(5)} | {"t9": tensor("U8", (MiB,), 9)}
    )
    recipes = checkpoint_layout(stored.checkpoint.tensors)
    with prepared(stored, recipes, device=CpuDevice("cpu", 1 << 40, "buffered"), buffered=True) as filled:
        assert [len(extent.runs) for extent in filled.extents] == [5, 1]
        landing = filled.fill.landing(filled.extents[0])
        assert landing is not None
        assert landing.slot is not None
        filled.fill.abandon(landing)
        bring(stored, filled.fill)
        assert [filled.held(0, entry) for entry in recipes[0].entries] == list(stored.data.values())
        leaves = [list(found) for found in filled.fill.account.leaves[0]]
        assert leaves == [leaves_of(data) for data in stored.data.values()]
        assert sorted(filled.verified[0]) == list(range(6))


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


# ---------------------------------------------------------------------------- stopping


def test_a_fill_that_is_stopped_before_it_runs_reads_nothing(tmp_path: Path) -> None:
    stored = store(tmp_path, {"t": tensor("U8", (3 * MiB,))})
    with prepared(stored, checkpoint_layout(stored.checkpoint.tensors)) as filled:
        filled.fill.stop()
        bring(stored, filled.fill)
        assert (filled.fill.account.bytes_read, filled.verified) == (0, [[]])


def test_a_fill_that_is_stopped_on_the_way_takes_no_further_extent(tmp_path: Path) -> None:
    stored = store(tmp_path, {f"t{i:02}": tensor("U8", (MiB,), i) for i in range(20)})
    fills: list[Fill] = []
    with prepared(
        stored, checkpoint_layout(stored.checkpoint.tensors), on_verified=lambda *_: fills[0].stop()
    ) as filled:
        fills.append(filled.fill)
        bring(stored, filled.fill)
        assert MiB <= filled.fill.account.bytes_read <= LIMITS.threads * MiB


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
        assert fill.account.bytes_read == 0


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
