"""What a load comes to: digests of all that was read, what they are compared with, what is said where they differ."""

from __future__ import annotations

import contextlib
import hashlib
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.filling.far import FarDevice
from tests.filling.fills import LIMITS, MiB, Stored, leaves_of, store, tensor
from weightd.daemon.checkpoints.cache import Cache
from weightd.daemon.devices.cpu import CpuDevice
from weightd.daemon.errors import Cancelled, DigestMismatch
from weightd.daemon.layouts.digests import checkpoint_digest, leaf_digest, tensor_digest
from weightd.daemon.layouts.extents import Extent
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.sources.base import SourceFile
from weightd.daemon.sources.file import FileSource
from weightd.daemon.sources.uris import Allow
from weightd.daemon.stages.loading import Loading, _interleave
from weightd.daemon.stages.planning import make_plan
from weightd.daemon.stages.request import parse_request

SHARDS = (
    {"a": tensor("U8", (4, MiB // 2 + 1), 1), "none": tensor("F32", (0,))},
    {"b": tensor("U8", (1000,), 2), "c": tensor("U8", (2, 3 * MiB), 3)},
)
TP: dict[str, Any] = {"tp_size": 2, "tp_rank": "all", "map": {"a": 0, "c": 1, "*": "replicate"}}


class Load:
    """One load of SHARDS, laid out, prepared and run step by step."""

    def __init__(self, stored: Stored, cache: Path, source: Any = None, **request: Any) -> None:
        self.stored = stored
        wanted = parse_request({"model": "/m", **request})
        self.device = CpuDevice("cpu", 1 << 30)
        self.cache = Cache(cache)
        source = source or stored.source
        plan = make_plan(source, stored.checkpoint.listing, wanted, self.cache)
        self.loading = Loading(source, plan, wanted, [self.device] * len(plan.recipes), self.cache, LIMITS)
        self.loading.lay_out()
        self.segments = [self.device.allocate(recipe.nbytes, "test") for recipe in plan.recipes]
        self.ledger = self.loading.ledger()
        self.verified: list[list[str]] = [[] for _ in plan.recipes]
        self.loading.prepare(self.segments, self.ledger, self._verify)
        self.phases: list[bool] = []

    def _verify(self, segment: int, entries: list[int]) -> None:
        names = self.loading.plan.recipes[segment].entries
        self.verified[segment] += [names[entry].name for entry in entries]

    def run(self) -> Loading:
        self.loading.run(lambda: self.phases.append(all(segment.writable for segment in self.segments)))
        return self.loading

    def close(self) -> None:
        self.loading.close()
        self.ledger.close()
        for segment in self.segments:
            segment.close()


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    return store(tmp_path / "m", *SHARDS)


@contextlib.contextmanager
def load(stored: Stored, folder: Path, **request: Any) -> Iterator[Load]:
    with contextlib.closing(Load(stored, folder / "cache", **request)) as made:
        yield made


def of(names: Sequence[str], data: dict[str, tuple[str, tuple[int, ...], bytes]]) -> str:
    return checkpoint_digest(
        (name, tensor_digest(*data[name][:2], len(data[name][2]), array("Q", leaves_of(data[name][2]))))
        for name in names
    )


TENSORS = {name: value for shard in SHARDS for name, value in shard.items()}
WHOLE = of(list(TENSORS), TENSORS)


def test_the_digest_of_a_segment_that_is_all_of_it_is_the_checkpoints(stored: Stored, tmp_path: Path) -> None:
    with load(stored, tmp_path) as made:
        done = made.run()
        assert (done.checkpoint_digest, done.segment_digests) == (WHOLE, [WHOLE])
        assert done.satisfied == {WHOLE}
        assert done.bytes_total == sum(len(data) for _, _, data in TENSORS.values())
        assert made.phases == [True]
        assert not any(segment.writable for segment in made.segments), "they are sealed"
        assert sorted(made.verified[0]) == sorted(TENSORS)
        leaves = made.cache.load_leaves(WHOLE)
        assert {name: list(found) for name, found in leaves.items()} == {
            name: leaves_of(data) for name, (_, _, data) in TENSORS.items()
        }, "so that the next one that expects it is told of a leaf that differs at once"


def test_of_slices_the_checkpoints_digest_is_known_only_where_all_of_it_was_read(
    stored: Stored, tmp_path: Path
) -> None:
    with load(stored, tmp_path, parallel=TP) as made:
        assert made.run().checkpoint_digest is None, "a was read row by row"
        assert made.loading.satisfied == set()
    with load(stored, tmp_path, parallel={**TP, "tp_rank": 0}, expect_digest=WHOLE) as made:
        done = made.run()
        assert (done.checkpoint_digest, done.satisfied) == (WHOLE, {WHOLE})
        assert done.segment_digests != [WHOLE]
    with load(stored, tmp_path, tensors={"exclude": ["b"]}) as made:
        assert made.run().checkpoint_digest is None
        assert made.loading.segment_digests == [of(["a", "none", "c"], TENSORS)]


def sha256(stored: Stored, file: int) -> str:
    return hashlib.sha256(stored.files()[file].read_bytes()).hexdigest()


def test_files_are_compared_with_their_sha256_and_only_then_is_anything_verified(
    stored: Stored, tmp_path: Path
) -> None:
    expected = {"1.safetensors": sha256(stored, 1)}
    with load(stored, tmp_path, expect_digest=expected) as made:
        done = made.run()
        assert done.satisfied == {f"1.safetensors=sha256:{sha256(stored, 1)}", WHOLE}
        assert made.verified == [[]], "what was computed says nothing until it has been compared"
    with load(stored, tmp_path, expect_digest=expected) as made:
        made.run()
        assert sorted(made.verified[0]) == ["b", "c"], "leaves are known by now"
        assert not made.loading.goes_on(made.ledger), "nothing of a SHA-256 outlives a process"


@pytest.mark.parametrize("what", ["xxh3", "sha256"])
def test_where_the_source_holds_other_bytes_than_expected_that_is_what_is_said(
    what: str, stored: Stored, tmp_path: Path
) -> None:
    digest = "xxh3:" + "0" * 32 if what == "xxh3" else {"0.safetensors": "0" * 64}
    found = WHOLE if what == "xxh3" else sha256(stored, 0)
    with load(stored, tmp_path, expect_digest=digest) as made, pytest.raises(DigestMismatch) as error:
        made.run()
    assert found in str(error.value)
    assert "0" * 32 in str(error.value)
    assert str(error.value).endswith(
        "a second reading gave the same bytes, so the source itself holds others than expected"
    )
    assert all(segment.writable for segment in made.segments[:0])


class Twice(FileSource):
    """A folder that knows how often it was read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, Allow())
        self.readers = 0

    def reader(self, files: Sequence[SourceFile], *, native: bool = False) -> Any:
        self.readers += 1
        return super().reader(files, native=native)


@pytest.mark.parametrize(("leaves", "more"), [([2], ""), ([1, 4, 5], " and 2 more leaves")])
def test_where_two_readings_differ_the_first_leaf_that_does_is_named(
    leaves: list[int], more: str, stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, preadv = Twice(tmp_path / "m"), os.preadv
    size = stored.files()[1].stat().st_size
    spoiled = [size - 6 * MiB + leaf * MiB for leaf in leaves]

    def read(fd: int, buffers: Any, offset: int) -> int:
        count = preadv(fd, buffers, offset)
        at = offset
        for buffer in buffers:
            for place in spoiled:
                if (
                    source.readers > 1
                    and os.fstat(fd).st_size == size
                    and at <= place < min(at + len(buffer), offset + count)
                ):
                    buffer[place - at] ^= 1
            at += len(buffer)
        return count

    with load(stored, tmp_path, source=source, expect_digest="xxh3:" + "0" * 32) as made:
        monkeypatch.setattr(os, "preadv", read)
        with pytest.raises(DigestMismatch) as error:
            made.run()
        assert f"tensor 'c', leaf {leaves[0]} (bytes {leaves[0] * MiB} and up of the tensor){more} differ" in str(
            error.value
        )
        assert error.value.details == {"tensor": "c", "leaf": leaves[0]}


def brought(made: Load) -> None:
    """A peer has brought the first extent, and all of its bytes are 0."""
    account = made.loading.fill.account
    extent = account.next()
    assert extent is not None
    leaves = [
        (piece.segment, piece.entry, piece.leaf + leaf, leaf_digest(bytes(min(MiB, piece.nbytes - leaf * MiB))))
        for piece in extent.pieces
        for leaf in range(-(-piece.nbytes // MiB))
    ]
    account.arrived([extent], leaves)
    assert account.peer_bytes == extent.nbytes


def test_where_what_peers_brought_is_not_what_is_expected_the_origin_is_read_instead(
    stored: Stored, tmp_path: Path
) -> None:
    with load(stored, tmp_path, expect_digest=WHOLE) as made:
        brought(made)
        made.loading.fill.count_with(metrics := Metrics(), "file")
        assert made.run().checkpoint_digest == WHOLE
        assert made.loading.fill.account.peer_bytes == 0
        assert metrics.registry.get_sample_value("weightd_digest_mismatches_total", {"source": "peer"}) == 1


@pytest.mark.parametrize("why", ["no origin is wanted", "clients use it"])
def test_it_fails_where_the_origin_cannot_make_up_for_peers(why: str, stored: Stored, tmp_path: Path) -> None:
    sources = ["peer"] if why == "no origin is wanted" else ["peer", "origin"]
    with load(stored, tmp_path, expect_digest=WHOLE, sources=sources) as made:
        brought(made)
        made.loading.fill.account.take_back = lambda entries: why != "clients use it"
        with pytest.raises(DigestMismatch, match=WHOLE):
            made.run()


def test_one_that_is_stopped_is_cancelled_and_seals_nothing(stored: Stored, tmp_path: Path) -> None:
    with load(stored, tmp_path) as made:
        made.loading.stop()
        with pytest.raises(Cancelled):
            made.run()
        assert (made.phases, made.segments[0].writable) == ([], True)


def test_a_load_goes_on_in_a_ledger_of_the_same_plan_and_asks_nobody_where_all_is_there(
    stored: Stored, tmp_path: Path
) -> None:
    with load(stored, tmp_path) as made, load(stored, tmp_path, tensors={"exclude": ["b"]}) as other:
        assert made.loading.goes_on(made.ledger)
        assert not other.loading.goes_on(made.ledger)
        assert made.loading._reader is not None
        made.loading._reader.run(made.loading.fill)
        made.loading._reader.close()
        made.loading.prepare(made.segments, made.ledger, lambda *_: None)
        assert made.loading._reader is None
        assert made.run().checkpoint_digest == WHOLE


def test_files_take_turns_where_each_is_hashed_along_its_length() -> None:
    extents = [Extent(file, offset) for file, offset in ((0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1))]
    assert [(extent.file, extent.offset) for extent in _interleave(extents)] == [
        (0, 0), (1, 0), (2, 0), (0, 1), (2, 1), (0, 2),
    ]  # fmt: skip


class Streaming(FarDevice):
    """A GPU that libstreamer can write to."""

    def streams_into(self) -> int:
        return 0


def test_the_library_writes_to_one_gpu_by_itself_and_never_to_several_nor_to_the_host(
    stored: Stored, tmp_path: Path
) -> None:
    one, other, slow = Streaming("cuda:0"), Streaming("cuda:1"), FarDevice("cuda:2")
    host = CpuDevice("cpu", 1 << 30)
    wanted = parse_request({"model": "/m", "parallel": TP})
    cache = Cache(tmp_path / "cache")
    plan = make_plan(stored.source, stored.checkpoint.listing, wanted, cache)
    for devices, native in (([one, one], True), ([one, other], False), ([slow, slow], False), ([host, host], False)):
        loading = Loading(stored.source, plan, wanted, devices, cache, LIMITS)
        loading.lay_out()
        assert loading._native is native
