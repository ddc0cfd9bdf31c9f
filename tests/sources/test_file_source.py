"""Reading files: what changes on the way is noticed, what fails is tried again, what never succeeds is given up."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import resource
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.filling.fills import (
    LIMITS,
    KiB,
    MiB,
    Stored,
    assert_filled,
    bring,
    flaky,
    prepared,
    sliced,
    store,
    tensor,
)
from weightd.daemon.checkpoints.contents import open_checkpoint
from weightd.daemon.checkpoints.listing import list_checkpoint
from weightd.daemon.errors import CheckpointChanged, DaemonError, NotAllowed, SourceFailed, UnreadableFile
from weightd.daemon.layouts.checkpoint import Split, checkpoint_layout
from weightd.daemon.layouts.extents import Demands
from weightd.daemon.limits import FillLimits
from weightd.daemon.sources.file import FileSource, open_source
from weightd.daemon.sources.uris import Allow

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


def overwritten(path: Path) -> None:
    """In place, with its size and mtime kept, as rsync --inplace -t does."""
    stamp = path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xfe")
    os.utime(path, ns=(0, stamp))


def halved(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("change", [appended, touched, replaced, overwritten, halved, os.unlink, fifo])
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
        assert filled.fill.account.bytes_read == 0


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
        assert filled.fill.account.bytes_read == 0


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
        assert filled.fill.account.bytes_read == 2 * MiB


def test_a_file_cut_short_in_the_middle_of_rows_is_noticed(tmp_path: Path) -> None:
    stored = store(tmp_path, {"t": tensor("U8", (1000, 800), 1)})
    recipes = checkpoint_layout(stored.checkpoint.tensors, tp_size=8, tp_ranks=[3], splits={"*": 1})
    path = stored.files()[0]
    whole = path.stat().st_size
    with prepared(stored, recipes, Demands(16 * KiB, 8, MiB, 1), FillLimits(1, MiB, MiB, 2, 60.0)) as filled:
        assert {extent.rows for extent in filled.extents} == {163, 1000 % 163}
        filled.fill.account.on_landed = lambda extent: os.truncate(path, whole - 800 * 500 - 450)
        with pytest.raises(CheckpointChanged, match=rf"0\.safetensors: ends at byte \d+, had {whole} bytes"):
            bring(stored, filled.fill)


# ---------------------------------------------------------------------------- more than one call, one process takes


def test_one_extent_may_go_to_more_places_than_one_call_takes(tmp_path: Path) -> None:
    # Scales of a quantised model, say: a run of 4 bytes each, all of them neighbours in the file.
    shard = {f"s{i}": tensor("F32", (), i) for i in range(3000)} | {"w": tensor("U8", (100,), 5000)}
    stored = store(tmp_path, shard)
    recipes = checkpoint_layout(stored.checkpoint.tensors)
    with prepared(stored, recipes, Demands(MiB, 1 << 20, 64 * KiB)) as filled:
        assert max(len(extent.runs) for extent in filled.extents) > 2 * 1024
        bring(stored, filled.fill)
        assert {entry.name: filled.held(0, entry) for entry in recipes[0].entries} == {
            name: data for name, (_, _, data) in shard.items()
        }


@pytest.mark.parametrize("taken", [1, 3, 4, 5, 4099, 5000])
def test_a_short_read_goes_on_where_it_stopped(taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = {f"s{i}": tensor("F32", (), i) for i in range(1500)}
    stored = store(tmp_path, shard)
    recipes = checkpoint_layout(stored.checkpoint.tensors)
    preadv = os.preadv

    def short(fd: int, views: Sequence[memoryview], position: int) -> int:
        left, part = taken, []
        for view in views:
            part.append(view[:left])
            left -= len(part[-1])
            if not left:
                break
        return preadv(fd, part, position)

    monkeypatch.setattr(os, "preadv", short)
    with prepared(stored, recipes, Demands(MiB, 1 << 20, 64 * KiB)) as filled:
        bring(stored, filled.fill)
        assert [filled.held(0, entry) for entry in recipes[0].entries] == [data for _, _, data in shard.values()]


def test_a_stage_of_more_shards_than_descriptors_is_read(tmp_path: Path) -> None:
    shards = [{f"t{i}": tensor("U8", (10,), i), f"u{i}": tensor("U8", (MiB,), i)} for i in range(60)]
    stored = store(tmp_path, *shards)
    recipes = checkpoint_layout(stored.checkpoint.tensors)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with prepared(stored, recipes, limits=FillLimits(4, MiB, MiB, 4, 5.0)) as filled:
        highest = max(map(int, os.listdir("/proc/self/fd")))
        opened = stored.files()[0].open("rb")  # of somebody else, beside this reader
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, hard))
        try:
            bring(stored, filled.fill)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            opened.close()
        assert filled.fill.account.bytes_read == sum(t.nbytes for t in stored.checkpoint.tensors)


# ---------------------------------------------------------------------------- listing


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("what", ["", "0.safetensors"])
def test_a_file_system_that_does_not_answer_is_not_taken_for_one_that_has_nothing(
    code: int, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path, {"t": tensor("U8", (1000,))})
    source = open_source(f"file://{tmp_path}", Allow())
    for name in ("stat", "open"):
        really = getattr(os, name)

        def failing(path: Any, *more: Any, really: Any = really, **options: Any) -> Any:
            if os.path.realpath(path) == str(tmp_path / what).rstrip("/"):
                raise OSError(code, os.strerror(code), str(path))
            return really(path, *more, **options)

        monkeypatch.setattr(os, name, failing)
    with pytest.raises(SourceFailed, match=os.strerror(code)):
        source.list()


def test_a_folder_that_may_not_be_listed_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path, {"t": tensor("U8", (1000,))})
    (tmp_path / "private").mkdir()
    scandir, closed = os.scandir, [str(tmp_path / "private")]

    def refusing(path: Any) -> Any:
        if os.path.realpath(path) in closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    source = open_source(f"file://{tmp_path}", Allow())
    assert [file.name for file in source.list()] == ["0.safetensors"], "a folder below is none of the weights'"
    closed.append(str(tmp_path))
    with pytest.raises(UnreadableFile, match="Permission denied"):
        source.list()


# ---------------------------------------------------------------------------- what is allowed


@pytest.fixture
def flipping(tmp_path: Path) -> tuple[Path, Callable[[str], None]]:
    """A folder that is allowed, in which a link leads to the checkpoint, until it is told to lead elsewhere."""
    for name, value in (("allowed/true", 1), ("forbidden", 2)):
        (tmp_path / name).mkdir(parents=True)
        store(tmp_path / name, {"t": tensor("U8", (1000,), value)})

    def lead(where: str) -> None:
        link = tmp_path / "allowed" / "new"
        link.symlink_to(tmp_path / where)
        link.rename(tmp_path / "allowed" / "link")

    lead("allowed/true")
    return tmp_path / "allowed", lead


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("what", ["link", "link/0.safetensors"])
def test_a_link_that_flips_while_it_is_looked_at_opens_nothing_that_is_not_allowed(
    flipping: tuple[Path, Callable[[str], None]], moment: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed, lead = flipping
    source = open_source(f"file://{allowed}/{what}", Allow([str(allowed)]))
    truth = (allowed / "true" / "0.safetensors").read_bytes()
    really = os.open

    def opening(path: Any, *more: Any, **options: Any) -> int:
        if not str(path).startswith(f"{allowed}/link"):
            return really(path, *more, **options)
        if moment == "before":
            lead("forbidden")
        fd = really(path, *more, **options)
        lead("forbidden")
        return fd

    monkeypatch.setattr(os, "open", opening)
    if moment == "before":
        with pytest.raises(NotAllowed):
            source.read("0.safetensors", 0, 10_000)
    else:
        assert source.read("0.safetensors", 0, 10_000) == truth
    lead("allowed/true")
    if what == "link":
        if moment == "before":
            with pytest.raises(NotAllowed):
                source.list()
        else:
            assert source.list() == open_source(f"file://{allowed}/true", Allow()).list()


def test_the_native_reader_reads_what_was_looked_at(
    flipping: tuple[Path, Callable[[str], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed, lead = flipping
    source = open_source(f"file://{allowed}/link", Allow([str(allowed)]))
    checkpoint = open_checkpoint(source, list_checkpoint(f"file://{allowed}/link", source))
    stored = Stored(FileSource(allowed / "true", Allow()), checkpoint, {})
    before = len(os.listdir("/proc/self/fd"))
    with prepared(stored, checkpoint_layout(checkpoint.tensors)) as filled:
        reader = source.reader(checkpoint.listing.weights, native=True)
        lead("forbidden")
        reader.run(filled.fill)
        (entry,) = checkpoint_layout(checkpoint.tensors)[0].entries
        assert filled.held(0, entry) == (allowed / "true" / "0.safetensors").read_bytes()[-1000:]
        reader.close()
        with pytest.raises(NotAllowed):
            source.reader(checkpoint.listing.weights, native=True)
    assert len(os.listdir("/proc/self/fd")) == before


# ---------------------------------------------------------------------------- failing reads


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come at once."""
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.0)


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
        assert filled.fill.account.bytes_read <= LIMITS.threads * MiB
