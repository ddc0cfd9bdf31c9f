"""The account of a filling, without any bytes: what is there, what is to come, and what is taken back."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.layouts.recipes import infos
from weightd.daemon.errors import DigestMismatch, SourceFailed
from weightd.daemon.filling.account import Account, ledger_for
from weightd.daemon.filling.ledger import Ledger
from weightd.daemon.layouts.checkpoint import checkpoint_layout
from weightd.daemon.layouts.digests import LEAF, tensor_digest
from weightd.daemon.layouts.extents import Demands, Extent, Piece, plan_extents
from weightd.daemon.layouts.recipe import Copy, Entry, Recipe
from weightd.daemon.observing.metrics import Metrics
from weightd.ipc.recipe import Box

DEMANDS = Demands(extent_bytes=LEAF, max_runs=16, min_range=LEAF // 2)
TENSORS = infos(
    ("none", "U8", (0,)), ("a", "U8", (2 * LEAF + 5,)), ("b", "U8", (100,)), ("c", "U8", (4, LEAF)),
    ("d", "U8", (2, 2)),
)  # fmt: skip
HALF = checkpoint_layout(TENSORS, tp_size=2, tp_ranks=[1], splits={"c": 1, "*": "replicate"})
"""Of ``c`` four rows that are read one by one, two to a leaf."""
BOTH = checkpoint_layout(TENSORS, tp_size=2, tp_ranks=[0, 1], splits={"c": 1, "*": "replicate"})
"""All of it is bounced by ``TOGETHER``, and its tensors are hashed as such."""
TOGETHER = DEMANDS._replace(min_range=1 << 40)
A, B, C, D = 1, 2, 3, 4


class Made(Account):
    """One that remembers what it told."""

    def __init__(
        self,
        recipes: Any = HALF,
        demands: Demands = DEMANDS,
        ledger: Ledger | None = None,
        expected: Mapping[str, array[int]] | None = None,
    ) -> None:
        self.extents = plan_extents(TENSORS, recipes, demands)
        self.verified: list[tuple[int, list[int]]] = []
        super().__init__(
            TENSORS,
            recipes,
            self.extents,
            ledger=ledger,
            expected_leaves=expected or {},
            on_verified=lambda segment, entries: self.verified.append((segment, sorted(entries))),
        )

    def of(self, entry: int) -> list[Extent]:
        return [extent for extent in self.extents if any(piece.entry == entry for piece in extent.pieces)]

    def come(self, extents: Sequence[Extent], *, from_peer: bool = False) -> None:
        for extent in extents:
            completed = self.completed(extent)
            complete = self.count(extent, from_peer=from_peer)
            self.mark(extent, completed, from_peer=from_peer)
            self.announce(complete)

    def leaf_marks(self, entry: int, segment: int = 0) -> bytes:
        starts = self.leaf_starts(segment)
        assert len(self.there[segment]) == starts[-1]
        return bytes(self.there[segment][starts[entry] : starts[entry + 1]])


def test_extents_are_taken_in_order_and_may_be_taken_back_together() -> None:
    account = Made()
    assert account.queued == len(account.extents) == 9
    assert [account.next(), account.next()] == account.extents[:2]
    rest = account.drain()
    assert rest == account.extents[2:]
    assert (account.queued, account.next()) == (0, None)
    account.requeue(reversed(rest))
    assert account.next() == account.extents[-1]
    assert [extent.index for extent in account.extents] == list(range(9))


def test_an_entry_is_complete_with_its_last_extent_and_its_leaves_are_there_as_they_come() -> None:
    account = Made()
    landed: list[Extent] = []
    account.on_landed = landed.append
    assert account.verified == [(0, [0])], "what has no bytes is there from the start"
    assert list(account.leaf_starts(0)) == [0, 0, 3, 4, 6, 7]
    first, second, third = account.of(A)
    account.come([second])
    assert account.leaf_marks(A) == b"\0\1\0"
    account.come([third, first])
    assert (account.leaf_marks(A), account.verified[1:]) == (b"\1\1\1", [(0, [A])])
    account.come(account.of(C)[1:])
    assert account.leaf_marks(C) == b"\0\1", "a leaf is there once all of it is"
    account.come(account.of(C)[:1])
    assert (account.leaf_marks(C), account.verified[2:]) == (b"\1\1", [(0, [C])])
    assert landed == [second, third, first, *account.of(C)[1:], account.of(C)[0]]
    assert account.bytes_read == 2 * LEAF + 5 + 2 * LEAF
    assert [account.has(extent) for extent in account.extents] == [
        extent not in (*account.of(B), *account.of(D)) for extent in account.extents
    ]


def test_a_leaf_is_completed_by_the_last_of_the_extents_that_bring_parts_of_it() -> None:
    account = Made()
    assert [account.completed(extent) for extent in account.of(A)] == [[], [], []], "they are whole"
    first, second, third, fourth = account.of(C)
    offset = HALF[0].entries[C].offset
    assert [account.completed(extent) for extent in (second, third)] == [[], []]
    assert account.completed(first) == [Piece(0, C, offset, LEAF, 0)]
    assert account.completed(fourth) == [Piece(0, C, offset + LEAF, LEAF, 1)]


def test_leaves_that_one_extent_completes_are_one_piece_as_far_as_they_follow_each_other() -> None:
    tensors = infos(("t", "U8", (LEAF // 2 + 1, 5)))
    target = Entry("t", "U8", (5, LEAF // 2 + 1), 0, tensors[0].nbytes)
    turned = Recipe([target], [Copy(0, 0, Box(0, target.shape, (1, 5)))], target.nbytes, 0)
    extents = plan_extents(tensors, [turned], DEMANDS)
    account = Account(
        tensors, [turned], extents, ledger=None, expected_leaves={}, on_verified=lambda segment, entries: None
    )
    assert [account.completed(extent) for extent in extents] == [[], [], [Piece(0, 0, 0, target.nbytes, 0)]]


def test_what_is_being_read_is_marked_by_segment_entry_and_leaf() -> None:
    account = Made(BOTH)
    account.begun([(0, A, 1, 2), (1, C, 0, 1), (1, D, 0, 1)])
    assert bytes(account.coming[0]) == b"\0\1\1" + bytes(4)
    assert bytes(account.coming[1]) == bytes(4) + b"\1\0" + b"\1"
    assert [bytes(marks) for marks in account.there] == [bytes(7), bytes(7)]


def test_bytes_of_peers_are_counted_apart() -> None:
    account, metrics = Made(), Metrics()
    sample = metrics.registry.get_sample_value
    account.count_with(metrics, "file")
    account.come(account.of(A))
    account.come(account.of(B) + account.of(D), from_peer=True)
    assert (account.bytes_read, account.peer_bytes) == (2 * LEAF + 5 + 104, 104)
    assert sample("weightd_source_read_bytes_total", {"source": "file"}) == 2 * LEAF + 5
    assert sample("weightd_origin_saved_bytes_total") == 104
    assert account.from_peers(account.extents) == account.of(B) + account.of(D)


def test_what_a_peer_brings_is_compared_counted_and_told_together() -> None:
    account = Made(expected={"b": array("Q", [77])})
    extents = account.of(B) + account.of(A) + account.of(D)
    digests = [(0, A, leaf, leaf + 1) for leaf in range(3)]
    with pytest.raises(DigestMismatch, match=r"tensor 'b', leaf 0 .*000000000000004e, expected 000000000000004d"):
        account.arrived(extents, [*digests, (0, B, 0, 78)])
    assert (account.bytes_read, account.verified) == (0, [(0, [0])])
    account.arrived(extents, [*digests, (0, B, 0, 77), (0, D, 0, 5)])
    assert (account.leaf_marks(A), account.leaf_marks(B), account.leaf_marks(D)) == (b"\1\1\1", b"\1", b"\1")
    assert account.verified == [(0, [0]), (0, [A, B, D])]
    assert [list(account.leaves[0][entry]) for entry in (A, B, D)] == [[1, 2, 3], [77], [5]]
    assert account.peer_bytes == account.bytes_read == 2 * LEAF + 5 + 104
    account.arrived(account.of(C)[:2], [(0, C, 0, 6)])
    assert (account.leaf_marks(C), account.verified[2:]) == (b"\1\0", []), "leaf by leaf"
    account.arrived(account.of(C)[2:], [(0, C, 1, 7)])
    assert (account.leaf_marks(C), account.verified[2:]) == (b"\1\1", [(0, [C])])


def test_what_is_forgotten_is_to_come_again_and_who_uses_it_is_asked() -> None:
    account = Made()
    asked: list[set[tuple[int, int]]] = []

    def take_back(entries: set[tuple[int, int]]) -> bool:
        asked.append(entries)
        return len(asked) == 1

    account.take_back = take_back
    account.come(account.of(A)[:1])
    account.come(account.of(A)[1:] + account.of(C), from_peer=True)
    account.come(account.of(D))
    gone = account.of(A)[1:2] + account.of(C)[:1]
    assert account.forget(gone) is True
    assert asked == [{(0, A), (0, C)}]
    assert account.forget(account.of(A)[:1]) is False
    assert (account.leaf_marks(A), account.leaf_marks(C), account.leaf_marks(D)) == (b"\0\0\1", b"\0\1", b"\1")
    assert (account.bytes_read, account.peer_bytes) == (3 * LEAF // 2 + 5 + 4, 3 * LEAF // 2 + 5)
    assert [account.has(extent) for extent in account.of(A)] == [False, False, True]
    before = list(account.verified)
    account.announce({0: [A, C]})
    assert account.verified == before, "what was forgotten is not verified"
    account.come(account.of(A)[:2])
    assert account.verified == [*before, (0, [A])]
    account.come(gone[1:])
    assert (account.leaf_marks(C), account.verified[-1]) == (b"\1\1", (0, [C]))


def test_a_reader_that_returns_too_soon_is_told_what_has_not_come() -> None:
    account = Made()
    account.come(account.of(A))
    with pytest.raises(SourceFailed, match="6 of 9 extents have not come"):
        account.check_complete()
    for extent in account.extents:
        account.mark(extent, [])
    with pytest.raises(SourceFailed, match="tensor 'b': 100 of 100 bytes have not come"):
        account.check_complete()
    account.come(account.of(B))
    with pytest.raises(SourceFailed, match=f"tensor 'c': {2 * LEAF} of {2 * LEAF} bytes have not come"):
        account.check_complete()
    account.come(account.of(C))
    with pytest.raises(SourceFailed, match="tensor 'd': 4 of 4 bytes"):
        account.check_complete()
    account.come(account.of(D))
    account.check_complete()


def test_leaves_are_found_by_their_number_over_all_entries() -> None:
    account = Made()
    for number, leaf in enumerate(leaf for leaves in account.leaves[0] for leaf in range(len(leaves))):
        entry, at = account.leaf_at(0, number)
        assert at == leaf
        account.leaves[0][entry][at] = 100 + number
    assert [account.leaf_at(0, number) for number in (0, 2, 3, 4, 5, 6)] == [
        (A, 0),
        (A, 2),
        (B, 0),
        (C, 0),
        (C, 1),
        (D, 0),
    ]
    assert list(account.leaves_at(0, 0, 7)) == list(range(100, 107))
    assert list(account.leaves_at(0, 2, 3)) == [102, 103, 104]
    assert list(account.leaves_at(0, 5, 0)) == []
    with pytest.raises(IndexError):
        account.leaves_at(0, 5, 3)
    assert account.digests(0) == [
        tensor_digest(entry.dtype, entry.shape, entry.nbytes, leaves)
        for entry, leaves in zip(HALF[0].entries, account.leaves[0], strict=True)
    ]


def test_what_is_expected_of_a_leaf_is_known_or_that_there_should_be_none() -> None:
    account = Made(expected={"a": array("Q", [5, 6])})
    assert [account.expected_leaf(0, A, leaf) for leaf in range(4)] == [5, 6, -1, -1]
    assert account.expected_leaf(0, B, 0) is None
    account.leaves[0][A][0] = 5
    account.leaves[0][A][1] = 7
    account.compare_entry(0, A, 0, 1)
    account.compare_entry(0, B, 0, 1)
    with pytest.raises(DigestMismatch, match=rf"leaf 1 \(bytes {LEAF} and up") as error:
        account.compare_entry(0, A, 0, 2)
    assert error.value.details == {"tensor": "a", "leaf": 1}
    with pytest.raises(DigestMismatch, match="has 3 leaves, expected are 2: it is longer") as error:
        account.compare_entry(0, A, 2, 1)
    assert error.value.details == {"tensor": "a", "leaf": 2}


def test_the_next_process_goes_on_where_the_ledger_says_that_this_one_was() -> None:
    ledger = ledger_for(TENSORS, BOTH, plan_extents(TENSORS, BOTH, TOGETHER))
    account = Made(BOTH, TOGETHER, ledger)
    assert sorted(account.tensor_leaves) == [A, B, C, D]
    account.tensor_leaves[C][3] = 66
    account.come(account.of(C))
    account.come(account.of(A)[:2], from_peer=True)
    account.come(account.of(D), from_peer=True)
    again = Made(BOTH, TOGETHER, ledger)
    assert (
        (again.bytes_read, again.peer_bytes) == (account.bytes_read, account.peer_bytes) == (6 * LEAF + 4, 2 * LEAF + 4)
    )
    assert again.drain() == again.of(A)[2:] + again.of(B)
    assert sorted(again.tensor_leaves) == [B, C], "what a peer has brought is not hashed as the checkpoint has it"
    assert again.tensor_leaves[C][3] == 66
    assert again.there == account.there
    assert again.verified == [(0, [0, C, D]), (1, [0, C, D])]
    assert again.from_peers(again.extents) == again.of(A)[:2] + again.of(D)
    again.close()
    account.close()
    ledger.close()


def test_a_ledger_holds_just_what_a_plan_needs() -> None:
    extents = plan_extents(TENSORS, BOTH, TOGETHER)
    ledger = ledger_for(TENSORS, BOTH, extents)
    assert (ledger.extents, len(ledger.fingerprint)) == (len(extents), 16)
    ledger.leaves([7, 7, 3, 1, 4, 1])
    with pytest.raises(ValueError, match="with 23 leaf digests, expected are 24"):
        ledger.leaves([24])
    ledger.close()
