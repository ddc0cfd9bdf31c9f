"""A ledger: what one process notes in it is what the next one reads, where the module's first lines say it lies."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest
import xxhash

from tests.layouts.recipes import entry, recipe_of
from weightd.daemon.filling.ledger import Ledger, fingerprint, leaf_counts
from weightd.daemon.layouts.digests import LEAF
from weightd.daemon.layouts.extents import Extent
from weightd.daemon.layouts.recipe import Box, Copy

PLAN = bytes(range(16))
HEAD = 4 + 4 + 8 + 4 + 16


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    made = Ledger.new(3, 5, PLAN)
    yield made
    made.close()


def content(ledger: Ledger) -> bytes:
    return os.pread(ledger.fd, 1 << 20, 0)


def memfd(content: bytes) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.write(fd, content)
    return fd


@pytest.mark.parametrize("extents", [0, 1, 3, 4, 5, 11, 12, 13, 100])
@pytest.mark.parametrize("leaves", [0, 1, 7])
def test_marks_follow_the_head_and_digests_follow_them_on_a_boundary_of_8_bytes(extents: int, leaves: int) -> None:
    ledger = Ledger.new(extents, leaves, PLAN)
    padding = -(HEAD + extents) % 8
    assert content(ledger) == struct.pack("=IIdI", 0, extents, 0.0, 0) + PLAN + bytes(extents + padding + 8 * leaves)
    ledger.landed[:] = bytes([1, 2] * extents)[:extents]
    for index, view in enumerate(ledger.leaves([1] * leaves)):
        view[0] = (index + 1) << 56
    marks, digests = content(ledger)[HEAD : HEAD + extents], content(ledger)[HEAD + extents + padding :]
    assert marks == bytes([1, 2] * extents)[:extents]
    assert digests == struct.pack(f"={leaves}Q", *((index + 1) << 56 for index in range(leaves)))
    private = Ledger.private(extents, leaves)
    assert (private.fd, private.extents, private.fingerprint) == (-1, extents, bytes(16))
    assert bytes(private.landed) == bytes(extents)
    assert [list(view) for view in private.leaves([leaves])] == [[0] * leaves]
    with pytest.raises(ValueError, match=f"with {leaves} leaf digests, expected are {leaves + 1}"):
        private.leaves([leaves + 1])
    private.close()
    ledger.close()


def test_what_is_noted_is_found_by_who_adopts_it_and_the_rest_stays(ledger: Ledger) -> None:
    adopted = Ledger.adopt(os.dup(ledger.fd))
    assert (adopted.leases, adopted.last_used, adopted.lent) == (0, 0.0, False)
    ledger.note(7, 1234.5, lent=True)
    assert (adopted.leases, adopted.last_used, adopted.lent) == (7, 1234.5, True)
    assert (adopted.extents, adopted.fingerprint) == (3, PLAN)
    assert content(ledger)[:HEAD] == struct.pack("=IIdI", 7, 3, 1234.5, 1) + PLAN
    ledger.note(0, 1235.5, lent=False)
    assert (adopted.leases, adopted.last_used, adopted.lent) == (0, 1235.5, False)
    ledger.landed[1] = 1
    assert bytes(adopted.landed) == b"\0\1\0"
    adopted.close()


def test_leaves_are_cut_by_their_counts_from_where_it_is_said(ledger: Ledger) -> None:
    ledger.leaves([5])[0][:] = memoryview(struct.pack("=5Q", 10, 11, 12, 13, 14)).cast("Q")
    assert [list(view) for view in ledger.leaves([2, 0, 3])] == [[10, 11], [], [12, 13, 14]]
    assert [list(view) for view in ledger.leaves([1, 1], 2)] == [[12], [13]]
    with pytest.raises(ValueError, match="with 5 leaf digests, expected are 6"):
        ledger.leaves([4], 2)


@pytest.mark.parametrize("nbytes", [1, HEAD - 1, HEAD, 39])
def test_what_is_too_short_to_be_a_ledger_is_none(nbytes: int) -> None:
    fd = memfd(bytes(nbytes))
    with pytest.raises(ValueError, match=f"a ledger of {nbytes} bytes"):
        Ledger.adopt(fd)


def test_a_ledger_has_to_hold_the_extents_that_it_says_it_has() -> None:
    for extents, nbytes, good in ((0, 40, True), (4, 40, True), (5, 40, False), (5, 48, True), (5, 1 << 16, True)):
        fd = memfd((struct.pack("=IIdI", 0, extents, 0.0, 0) + PLAN).ljust(nbytes, b"\0"))
        if good:
            Ledger.adopt(fd).close()
            continue
        with pytest.raises(ValueError, match=f"of {nbytes} bytes says that it has {extents} extents"):
            Ledger.adopt(fd)


def test_closing_twice_closes_one_descriptor_whatever_its_number(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[int] = []
    fd = ledger.fd
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", closed.append)
        ledger.close()
        ledger.close()
        assert (closed, ledger.fd) == ([fd], -1)
        ledger.fd = 0
        ledger.close()
        assert closed == [fd, 0]
        Ledger.private(1, 1).close()
        assert closed == [fd, 0], "there is none"
    os.close(fd)


def test_a_fingerprint_is_of_each_extents_place_and_of_each_entry() -> None:
    entries = [entry("a", "F32", (2, 3)), entry("b", "U8", (4,), 256)]
    extents = [Extent(0, 100, 24, 3, 50), Extent(1, 8, 4)]
    cut = [Copy(0, 0, Box(0, (2, 3), (6, 1)))]
    text = b"2" + struct.pack("=10Q", 0, 100, 24, 3, 50, 1, 8, 4, 1, 0) + b"a\0F32(2, 3)0\nb\0U8(4,)256\n"
    expected = xxhash.xxh3_128(text).digest()
    assert fingerprint([recipe_of(entries, cut)], extents) == expected
    assert fingerprint([recipe_of(entries[:1], cut), recipe_of(entries[1:], [])], extents) == expected


@pytest.mark.parametrize("tensors", [[0, 1], [0, 0]], ids=["each once", "one twice"])
def test_of_whole_tensors_a_fingerprint_is_that_of_versions_before(tensors: list[int]) -> None:
    entries = [entry("a", "U8", (24,)), entry("b", "U8", (24,), 256)]
    text = struct.pack("=6Q", 0, 100, 24, 1, 8, 24) + b"a\0U8(24,)0\nb\0U8(24,)256\n"
    recipe = recipe_of(entries, [Copy(tensor, number) for number, tensor in enumerate(tensors)])
    found = fingerprint([recipe], [Extent(0, 100, 24), Extent(1, 8, 24)])
    assert (found == xxhash.xxh3_128(text).digest()) == (tensors == [0, 1])


def test_leaves_are_counted_for_each_entry_of_each_segment() -> None:
    first = recipe_of([entry("a", shape=(LEAF + 1,)), entry("b", shape=(0,))], [])
    assert leaf_counts([first, recipe_of([entry("c", shape=(5,))], [])]) == [2, 0, 1]
