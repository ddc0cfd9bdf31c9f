"""Constants, where no source brings anything: written once, and again where what was there is not to be believed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.filling.fills import DEFAULTS, bring, prepared, store, tensor
from weightd.daemon.filling.account import ledger_for
from weightd.daemon.layouts.extents import plan_extents
from weightd.daemon.layouts.recipe import Copy, Entry, Recipe, validate
from weightd.ipc.recipe import Box, Constant

PADDED, ONES = Entry("padded", "U8", (16,), 0, 16), Entry("ones", "U8", (8,), 256, 8)
RECIPE = Recipe(
    [PADDED, ONES],
    [Copy(0, 0, Box(0, (10,), (1,)), Box(2, (10,), (1,)))],
    264,
    0,
    [
        Constant(0, b"\7", Box(0, (16,), (1,))),
        Constant(0, b"\0", Box(12, (2,), (1,))),
        Constant(1, b"\1", Box(0, (8,), (1,))),
        Constant(1, b"\0", Box(0, (4,), (2,))),
    ],
)


def holds(data: bytes) -> tuple[bytes, bytes]:
    return b"\7\7" + data + b"\0\0\7\7", b"\0\1" * 4


def test_the_last_of_constants_that_overlap_stands_and_copies_stand_above_all(tmp_path: Path) -> None:
    stored = store(tmp_path, {"t": tensor("U8", (10,))})
    validate(RECIPE, stored.checkpoint.tensors)
    with prepared(stored, [RECIPE]) as filled:
        filled.fill.write_constants()
        assert filled.verified == [[1]]
        bring(stored, filled.fill)
        assert tuple(filled.held(0, entry) for entry in RECIPE.entries) == holds(stored.data["t"])
        assert filled.verified == [[1, 0]]
        filled.fill.close()


def test_constants_that_a_process_before_has_written_are_told_of_and_not_hashed_again(tmp_path: Path) -> None:
    stored = store(tmp_path, {"t": tensor("U8", (10,)), "u": tensor("U8", (10,), 1)})
    more = Entry("more", "U8", (12,), 512, 12)
    recipe = RECIPE._replace(
        entries=[*RECIPE.entries, more],
        copies=[*RECIPE.copies, Copy(1, 2, Box(0, (10,), (1,)), Box(0, (10,), (1,)))],
        constants=[*RECIPE.constants, Constant(2, b"\0", Box(10, (2,), (1,)))],
        nbytes=524,
    )
    tensors = stored.checkpoint.tensors
    ledger = ledger_for(tensors, [recipe], plan_extents(tensors, [recipe], DEFAULTS))
    with prepared(stored, [recipe], ledger=ledger) as before:
        before.fill.write_constants()
        first = before.fill.next()
        assert first is not None
        landing = before.fill.landing(first)
        assert landing is not None
        landing.views[0][:] = stored.data["t"]
        before.fill.landed(first, landing)
        memory = before.segments[0].view
        memory[512:524] = b"\xff" * 12  # what a peer has brought a part of, which nobody has verified
        with prepared(stored, [recipe], ledger=ledger) as after:
            after.segments[0].view[:] = memory
            assert after.verified == [[0]]
            after.fill.write_constants()
            assert after.verified == [[0, 1]]
            assert after.fill.account.there[0] == b"\1\1\0"
            bring(stored, after.fill)
            assert (after.held(0, PADDED), after.held(0, ONES)) == holds(stored.data["t"])
            assert after.held(0, more) == stored.data["u"] + b"\0\0"
            after.fill.close()
        before.fill.close()


@pytest.mark.parametrize("run", [1, 3, 2 << 20])
def test_rows_of_constants_are_written_each_where_it_belongs(run: int, tmp_path: Path) -> None:
    stored = store(tmp_path, {"t": tensor("U8", (3,))})
    entry = Entry("e", "U8", (3, run + 1), 0, 3 * (run + 1))
    recipe = Recipe(
        [entry],
        [Copy(0, 0, Box(0, (3, 1), (1, 1)), Box(run, (3, 1), (run + 1, 1)))],
        entry.nbytes,
        0,
        [Constant(0, b"\5", Box(0, (3, run), (run + 1, 1)))],
    )
    validate(recipe, stored.checkpoint.tensors)
    with prepared(stored, [recipe]) as filled:
        filled.fill.write_constants()
        bring(stored, filled.fill)
        assert filled.held(0, entry) == b"".join(b"\5" * run + bytes([byte]) for byte in stored.data["t"])
        filled.fill.close()
