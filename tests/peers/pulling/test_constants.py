"""What no source brings of an entry is as the layout says, whatever a peer has written over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.filling.fills import MiB, leaves_of, prepared, store, tensor
from tests.peers.pulling.pulls import Fleeting, Pull
from weightd.daemon.layouts.recipe import Copy, Entry, Recipe
from weightd.daemon.peers.finding import following
from weightd.ipc.recipe import Box, Constant

LIAR = "10.0.0.1:1"


@pytest.mark.parametrize(
    "claimed", [lambda true, wrong: true, lambda true, wrong: wrong], ids=["other bytes than it claims", "as it claims"]
)
def test_constants_are_put_back_where_a_peer_has_brought_wrong_ones(
    claimed: Callable[[list[int], list[int]], list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = store(tmp_path, {"t": tensor("U8", (MiB - 5,)), "u": tensor("U8", (MiB - 5,), 1)})
    entries = [Entry(name, "U8", (MiB,), index * MiB, MiB) for index, name in enumerate("tu")]
    copies = [Copy(index, index, Box(0, (MiB - 5,), (1,)), Box(0, (MiB - 5,), (1,))) for index in (0, 1)]
    constants = [Constant(index, bytes([7 * index]), Box(MiB - 5, (5,), (1,))) for index in (0, 1)]
    recipe = Recipe(entries, copies, 2 * MiB, 0, constants)
    true = b"".join(stored.data[name] + bytes([7 * index]) * 5 for index, name in enumerate("tu"))
    wrong = b"\xee" * (2 * MiB)
    fleet = Fleeting(LIAR)
    fleet.has(LIAR, wrong, [0], claimed(leaves_of(true), leaves_of(wrong)))
    fleet.said[LIAR].insert(-1, {"type": "leaves", "epoch": "e", "segment": 0, "first": 1, "digests": "0" * 16})
    monkeypatch.setattr(following, "listen", fleet.listen)
    with prepared(stored, [recipe]) as filled:
        filled.fill.write_constants()
        pull = Pull(stored, filled, [recipe], fleet, True)
        pull.run()
        pull.account.check_complete()
        assert fleet.read.get(LIAR), "it was believed at first"
        assert fleet.dropped == [(LIAR, "wrong_bytes")]
        assert bytes(filled.segments[0].view[: 2 * MiB]) == true
        assert [int(of[0]) for of in filled.fill.account.leaves[0]] == leaves_of(true)
        filled.fill.close()
