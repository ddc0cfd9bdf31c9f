"""Bytes on their way to a device that copies by itself: when they count, and what becomes of those that change."""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.filling.far import FarDevice
from tests.filling.fills import (
    DEFAULTS,
    LIMITS,
    MiB,
    Stored,
    bring,
    in_time,
    leaves_of,
    noise,
    prepared,
    sliced,
    store,
    tensor,
)
from weightd.daemon.devices.host_memory import address_of
from weightd.daemon.errors import DigestMismatch
from weightd.daemon.filling.arrivals import Arrivals
from weightd.daemon.layouts.checkpoint import Split, checkpoint_layout
from weightd.daemon.layouts.digests import leaf_digest
from weightd.daemon.layouts.extents import Extent
from weightd.daemon.layouts.recipe import Block
from weightd.daemon.observing.metrics import Metrics


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    return store(
        tmp_path,
        {
            "large": tensor("U8", (3 * MiB + 7,), 1),
            "small": tensor("U8", (1000,), 2),
            "wide": tensor("BF16", (64, 40_000), 3),
            "none": tensor("F32", (0,)),
        },
    )


WAYS: dict[str, tuple[int, tuple[int, ...], dict[str, Split], dict[str, Any]]] = {
    "whole": (1, (0,), {"*": "replicate"}, {}),
    "one rank of two": (2, (1,), {"wide": 1, "*": "replicate"}, {}),
    "both ranks": (2, (0, 1), {"wide": 1, "*": "replicate"}, {}),
    "row by row": (2, (1,), {"wide": 1, "*": "replicate"}, {"min_range": 0}),
    "whole tensors for one rank": (2, (1,), {"wide": 1, "*": "replicate"}, {"whole_tensors": True}),
}
"""How → (tp_size, ranks, splits, what the plan is asked for besides)."""


@pytest.mark.parametrize("sha256", [False, True], ids=["", "with sha256"])
@pytest.mark.parametrize("way", WAYS)
def test_every_byte_lands_on_a_device_and_is_hashed_there(way: str, sha256: bool, stored: Stored) -> None:
    size, ranks, splits, demands = WAYS[way]
    recipes = checkpoint_layout(stored.checkpoint.tensors, tp_size=size, tp_ranks=ranks, splits=splits)
    names = {info.name: splits.get(info.name, "replicate") for info in stored.checkpoint.tensors}
    expected = sliced(stored, names, size)
    device = FarDevice()
    wanted = DEFAULTS._replace(**demands, whole_files={0} if sha256 else ())
    prefixes = {0: stored.checkpoint.prefixes[0]} if sha256 else {}
    with prepared(stored, recipes, wanted, device=device, sha256_prefixes=prefixes) as filled:
        bring(stored, filled.fill)
        in_time(filled.fill.finish, filled.fill)
        for index, recipe in enumerate(recipes):
            for number, entry in enumerate(recipe.entries):
                want = expected(recipe, entry)
                assert filled.held(index, entry) == want
                assert list(filled.fill.account.leaves[index][number]) == leaves_of(want)
            assert sorted(filled.verified[index]) == list(range(len(recipe.entries)))
        for number, leaves in filled.fill.account.tensor_leaves.items():
            assert list(leaves) == leaves_of(stored.data[stored.checkpoint.tensors[number].name])
        filled.fill.account.check_complete()
        assert all(filled.fill.seconds[phase] > 0 for phase in ("copying", "verifying"))
        if sha256:
            assert filled.fill.sha256[0].hexdigest() == hashlib.sha256(stored.files()[0].read_bytes()).hexdigest()
        filled.fill.close()
        assert [copier.closed for copier in device.copiers] == [True]


def spoil(data: bytearray) -> None:
    data[len(data) // 2] ^= 4


@pytest.mark.parametrize("way", ["sha256", "tensor"])
def test_bytes_that_change_on_their_way_to_a_device_fail_the_fill_where_those_that_came_were_hashed(
    way: str, stored: Stored
) -> None:
    recipes = checkpoint_layout(
        stored.checkpoint.tensors, include=["wide", "small"], tp_size=2, splits={"*": "replicate"}
    )
    wanted = DEFAULTS._replace(whole_files={0} if way == "sha256" else (), whole_tensors=way == "tensor")
    prefixes = {0: stored.checkpoint.prefixes[0]} if way == "sha256" else {}
    if way == "tensor":
        recipes += recipes  # bounced, and hashed as the checkpoint has it
    with prepared(stored, recipes, wanted, device=FarDevice(spoil=spoil), sha256_prefixes=prefixes) as filled:
        with pytest.raises(DigestMismatch, match=r"'(wide|small)': bytes changed between the host and cuda:0") as error:
            bring_and_finish(stored, filled.fill)
        assert error.value.details["tensor"] in ("wide", "small")
        assert filled.fill.stopped
        assert filled.verified == [[] for _ in recipes]
        filled.fill.close()


def bring_and_finish(stored: Stored, fill: Any) -> None:
    bring(stored, fill)
    in_time(fill.finish, fill)


def test_a_leaf_that_lies_on_a_device_is_compared_with_what_is_expected(stored: Stored) -> None:
    known = {"large": array("Q", leaves_of(stored.data["large"]))}
    recipes = checkpoint_layout(stored.checkpoint.tensors)
    with prepared(stored, recipes, device=FarDevice(), expected_leaves=known) as filled:
        bring_and_finish(stored, filled.fill)
        assert sorted(filled.verified[0]) == [0, 1, 2, 3]
        filled.fill.close()
    known["large"][3] ^= 1
    with prepared(stored, recipes, device=FarDevice(), expected_leaves=known) as filled:
        with pytest.raises(DigestMismatch, match="tensor 'large', leaf 3 "):
            bring_and_finish(stored, filled.fill)
        filled.fill.close()


@pytest.mark.parametrize("changed", [False, True], ids=["", "changed on the way"])
def test_what_peers_bring_to_a_device_counts_once_what_lies_there_is_what_came(changed: bool, stored: Stored) -> None:
    recipes = checkpoint_layout(stored.checkpoint.tensors, include=["large"])
    (entry,) = recipes[0].entries
    data = memoryview(bytearray(stored.data["large"]))
    device, metrics = FarDevice(spoil=spoil if changed else lambda data: None), Metrics()
    with prepared(stored, recipes, device=device) as filled:
        fill = filled.fill
        fill.count_with(metrics, "file")
        extents = fill.account.drain()
        free = threading.Event()
        fill.send([(0, entry.offset, data[:MiB]), (0, entry.offset + MiB, data[MiB:])], free.set)
        in_time(fill.drain, fill)
        assert free.is_set()
        assert filled.verified == [[]], "nobody has said what it is"
        fill.arrived_on_device(extents, [(0, 0, leaf, digest) for leaf, digest in enumerate(leaves_of(data.tobytes()))])
        if changed:
            with pytest.raises(DigestMismatch, match=r"'large', leaf \d: bytes changed between the host and cuda:0"):
                in_time(fill.finish, fill)
            assert filled.verified == [[]]
        else:
            in_time(fill.finish, fill)
            assert filled.verified == [[0]]
            assert filled.held(0, entry) == stored.data["large"]
            assert (fill.account.bytes_read, fill.account.peer_bytes) == (len(data), len(data))
            assert fill.account.from_peers(extents) == extents
            saved = metrics.registry.get_sample_value("weightd_origin_saved_bytes_total")
            assert saved == len(data)
            # What is read from the source after it came from a peer is the source's again.
            assert fill.account.forget(extents)
            fill.account.requeue(extents)
            bring_and_finish(stored, fill)
            assert fill.account.peer_bytes == 0
        fill.close()


def test_a_device_has_a_buffer_for_each_thread_twice_and_one_for_who_is_urgent(stored: Stored) -> None:
    recipes = checkpoint_layout(stored.checkpoint.tensors)
    with prepared(stored, recipes, device=FarDevice()) as filled:
        taken = [filled.fill.landing(extent, wait=False) for extent in [filled.extents[0]] * 8]
        assert [landing is not None for landing in taken] == [True] * 7 + [False]
        assert LIMITS.threads == 3
        filled.fill.close()


# ---------------------------------------------------------------------------- arrivals by themselves


class Arriving:
    """Arrivals into segments of two devices, and what they told."""

    def __init__(self, digest: Callable[[Any], None] | None = None) -> None:
        self.devices = [FarDevice("cuda:0"), FarDevice("cuda:1")]
        self.segments = [self.devices[i].allocate(4096, "test") for i in (0, 1, 0)]
        self.digested: list[Extent] = []
        self.failed: list[BaseException] = []
        self.arrivals = Arrivals(
            self.segments, digest or self.digested.extend, self.failed.append, lambda name: threading.Lock()
        )

    def close(self) -> None:
        self.arrivals.close()
        for segment in self.segments:
            segment.close()


def test_leaves_are_those_of_each_device_in_the_order_in_which_they_were_asked_for() -> None:
    made = Arriving()
    for index, segment in enumerate(made.segments):
        segment.view[:4096] = noise(4096, index)
    ranges = [(2, 10, 100), (1, 0, 4096), (0, 4000, 96), (1, 5, 7)]
    assert made.arrivals.leaves(ranges) == [
        leaf_digest(noise(4096, segment)[offset : offset + nbytes]) for segment, offset, nbytes in ranges
    ]
    assert [len(device.copiers) for device in made.devices] == [1, 1], "one for each device"
    made.close()
    assert all(copier.closed for device in made.devices for copier in device.copiers)


def test_an_extent_is_digested_once_the_marks_of_all_its_devices_were_waited_for() -> None:
    made = Arriving()
    source = memoryview(bytearray(noise(4096, 5)))
    address = address_of(source)
    for segment in (0, 1):
        made.arrivals.put(segment, Block(3, 100, 7, 50, 20, 2), address)
    assert not made.arrivals.check(0, Block(3, 100, 7, 50, 20, 2), address)
    marks = made.arrivals.marks({0, 1, 2})
    assert len(marks) == 2
    extent, done = Extent(0, 0), threading.Event()
    made.arrivals.add(extent, marks, done.set)
    made.arrivals.add(None)
    made.arrivals.finish()
    assert (made.digested, done.is_set(), made.failed) == ([extent], True, [])
    for segment in (0, 1):
        assert made.arrivals.check(segment, Block(3, 100, 7, 50, 20, 2), address)
        assert bytes(made.segments[segment].view[7:27]) == bytes(source[3:23])
        assert bytes(made.segments[segment].view[57:77]) == bytes(source[103:123])
    made.close()


@pytest.mark.parametrize("where", ["copying", "digesting"])
def test_what_fails_on_the_way_is_told_ends_the_wait_and_nothing_is_digested_after_it(where: str) -> None:
    digested: list[Extent] = []

    def digest(extents: list[Extent]) -> None:
        if where == "digesting":
            raise ValueError(where)
        digested.extend(extents)

    def done() -> None:
        if where == "copying":
            raise ValueError(where)

    made = Arriving(digest)
    made.arrivals.add(Extent(0, 0), (), done)
    made.arrivals.finish()
    assert [str(error) for error in made.failed] == [where]
    freed = threading.Event()
    made.arrivals.add(Extent(0, 1), (), freed.set)
    assert freed.wait(30), "what it was copied from is to be free all the same"
    made.arrivals.finish()
    made.close()
    assert digested == []


def test_closing_waits_for_copies_that_read_from_buffers() -> None:
    made = Arriving()
    freed: list[int] = []
    for number in range(20):
        made.arrivals.add(None, made.arrivals.marks({0}), lambda number=number: freed.append(number))  # type: ignore[misc]
    made.close()
    assert freed == list(range(20))
