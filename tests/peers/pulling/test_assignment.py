"""Which node reads what from the origin, and gets what from whom: groups of extents, and fleets that share them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from tests.filling.fills import land, prepared, store, tensor
from weightd.daemon.errors import SourceFailed
from weightd.daemon.filling.account import ledger_for
from weightd.daemon.layouts.checkpoint import checkpoint_layout
from weightd.daemon.layouts.digests import LEAF
from weightd.daemon.layouts.extents import Demands, plan_extents
from weightd.daemon.peers.finding.membership import READERS, Readers, weight
from weightd.daemon.peers.moving.parts import leaf_ranges
from weightd.daemon.peers.pulling.assignment import Assignment
from weightd.daemon.peers.pulling.groups import begin_parts_anew, plan_groups

SHARDS = (
    {"embed": tensor("BF16", (3000, 512), 1), "norm": tensor("F32", (7,), 2), "empty": tensor("F16", (0, 4), 3)},
    {"q": tensor("F16", (1024, 2048), 4), "o": tensor("F16", (2048, 1024), 5), "bias": tensor("F64", (513,), 6)},
)

KEY = "0" * 32
PATIENCE = 10.0


# ---------------------------------------------------------------------- groups


@pytest.mark.parametrize(
    "splits", [{"*": "replicate"}, {"q": 0, "o": 1, "*": "replicate"}, {"embed": 1, "q": 1, "o": 0, "*": "replicate"}]
)
@pytest.mark.parametrize("max_runs", [1, 1000])
def test_groups_bring_every_leaf_once_from_the_origin_and_once_from_a_peer(
    splits: dict[str, int | str], max_runs: int, tmp_path: Path
) -> None:
    tensors = store(tmp_path, *SHARDS).checkpoint.tensors
    recipes = checkpoint_layout(tensors, tp_size=2, tp_ranks=[0, 1], splits=splits)  # type: ignore[arg-type]
    extents = plan_extents(tensors, recipes, Demands(2 * LEAF, max_runs, 1 << 16))
    groups = plan_groups(extents, recipes)
    assert Counter(id(extent) for group in groups for extent in group.extents) == Counter(map(id, extents))
    brought = Counter(
        (span.segment, span.entry, leaf) for g in groups for span in g.spans for leaf, *_ in leaf_ranges(span)
    )
    assert set(brought.values()) == {1}
    for segment, recipe in enumerate(recipes):
        for index, entry in enumerate(recipe.entries):
            spans = sorted(s for g in groups for s in g.spans if (s.segment, s.entry) == (segment, index))
            ranges = [place for span in spans for place in leaf_ranges(span)]
            assert [number for number, _, _ in ranges] == list(range(-(-entry.nbytes // LEAF)))
            assert [offset for _, offset, _ in ranges] == [entry.offset + i * LEAF for i in range(len(ranges))]
            assert sum(nbytes for _, _, nbytes in ranges) == entry.nbytes
    of = {id(extent): group.index for group in groups for extent in group.extents}
    partial: dict[tuple[int, int, int], set[int]] = {}
    for extent in extents:
        for piece in extent.pieces:
            for leaf in range(piece.leaf, piece.leaf + piece.shared):
                partial.setdefault((piece.segment, piece.entry, leaf), set()).add(of[id(extent)])
    assert all(len(found) == 1 for found in partial.values()), "a leaf comes as one"


def test_groups_that_are_there_in_part_begin_anew(tmp_path: Path) -> None:
    """Else a peer would write over what has come from the origin, and only its own part would be taken for its own."""
    stored = store(tmp_path, *SHARDS)
    tensors = stored.checkpoint.tensors
    recipes = checkpoint_layout(tensors, tp_size=2, tp_ranks=[0, 1], splits={"o": 1, "q": 1, "*": "replicate"})
    demands = Demands(LEAF, 1, 1 << 16)
    ledger = ledger_for(tensors, recipes, plan_extents(tensors, recipes, demands))
    with prepared(stored, recipes, demands, ledger=ledger) as filled:
        content = {index: file.read_bytes() for index, file in enumerate(stored.files())}
        for extent in filled.extents[::2]:
            land(filled.fill, extent, content[extent.file])
        halves = [
            {bool(extent.index % 2) for extent in group.extents} for group in plan_groups(filled.extents, recipes)
        ]
        assert any(len(half) == 2 for half in halves), "some groups are there in part"
    with prepared(stored, recipes, demands, ledger=ledger) as filled:
        account = filled.fill.account
        begin_parts_anew(filled.extents, recipes, account)
        groups = plan_groups(filled.extents, recipes)
        assert all(len({account.has(extent) for extent in group.extents}) == 1 for group in groups)
        assert any(account.has(extent) for extent in filled.extents)
        assert account.bytes_read == sum(extent.nbytes for extent in filled.extents if account.has(extent))
        assert sorted(e.index for e in account.drain()) == [e.index for e in filled.extents if not account.has(e)]


@pytest.mark.parametrize("landed", [1, 2])
def test_a_group_of_which_anything_is_missing_begins_anew(landed: int, tmp_path: Path) -> None:
    stored = store(tmp_path, {"a": tensor("U8", (3, LEAF // 2)), "b": tensor("U8", (LEAF,), 2)})
    tensors = stored.checkpoint.tensors
    recipes = checkpoint_layout(tensors, tp_size=2, tp_ranks=[0], splits={"a": 1, "*": "replicate"})
    demands = Demands(LEAF, 1, LEAF // 4)
    ledger = ledger_for(tensors, recipes, plan_extents(tensors, recipes, demands))
    content = stored.files()[0].read_bytes()
    with prepared(stored, recipes, demands, ledger=ledger) as filled:
        (group,) = [group for group in plan_groups(filled.extents, recipes) if len(group.extents) > 1]
        assert len(group.extents) == 3
        for extent in group.extents[:landed]:
            land(filled.fill, extent, content)
    with prepared(stored, recipes, demands, ledger=ledger) as filled:
        assert filled.fill.account.bytes_read
        begin_parts_anew(filled.extents, recipes, filled.fill.account)
        assert filled.fill.account.bytes_read == 0
        assert len(filled.fill.account.drain()) == len(filled.extents)


def test_what_is_forgotten_is_taken_back_and_told_of_again_once_it_has_come(tmp_path: Path) -> None:
    stored = store(tmp_path, {"a": tensor("U8", (3 * LEAF,)), "b": tensor("U8", (LEAF + 5,), 2)})
    recipes = checkpoint_layout(stored.checkpoint.tensors)
    content = stored.files()[0].read_bytes()
    taken: list[set[tuple[int, int]]] = []
    with prepared(stored, recipes, Demands(LEAF, 1, 0)) as filled:
        account = filled.fill.account
        account.take_back = lambda entries: taken.append(entries) or True  # type: ignore[func-returns-value]
        for extent in filled.extents:
            land(filled.fill, extent, content)
        assert sorted(filled.verified[0]) == [0, 1]
        first = filled.extents[0]
        entry = first.pieces[0].entry
        assert account.forget([first])
        assert taken == [{(0, entry)}]
        assert not account.has(first)
        account.announce({0: [entry]})
        assert sorted(filled.verified[0]) == [0, 1], "who landed the rest of it meanwhile tells nobody"
        with pytest.raises(SourceFailed, match="have not come"):
            account.check_complete()
        land(filled.fill, first, content)
        account.check_complete()
        assert sorted(filled.verified[0]) == sorted([0, 1, entry])


# ---------------------------------------------------------------------- fleets


def agreed(me: str, others: Iterable[str], stripes: Sequence[str]) -> Assignment:
    """A node's assignment where it knows these others to load the same."""
    readers = Readers(me, KEY, PATIENCE)
    readers.heard(dict.fromkeys(others, 1), 0.0)
    return Assignment(me, stripes, readers, PATIENCE)


class Fleet:
    """Nodes that want the same ``count`` groups, one step at a time, in an order that chance decides."""

    def __init__(self, nodes: int, count: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.count = count
        names = [f"node-{i}" for i in range(nodes)]
        self.readers = {name: Readers(name, KEY, PATIENCE) for name in names}
        self.nodes = {
            name: Assignment(name, [f"0:{g}" for g in range(count)], self.readers[name], PATIENCE) for name in names
        }
        self.done: dict[str, set[int]] = {name: set() for name in self.nodes}
        self.origin: Counter[int] = Counter()
        for readers in self.readers.values():
            readers.heard(dict.fromkeys(names, 1), 0.0)

    def kill(self, name: str) -> None:
        del self.nodes[name]
        for other, assignment in self.nodes.items():
            assignment.lost(name)
            self.readers[other].lost(name, 1.0)

    def bring(self, name: str, group: int) -> None:
        """A group has come to a node, which says so to all others."""
        self.nodes[name].done(group)
        self.done[name].add(group)
        for other in self.nodes.keys() - {name}:
            self.nodes[other].has(name, [group])

    def step(self) -> bool:
        """Some node gets something; whether any did."""
        names = list(self.nodes)
        self.rng.shuffle(names)
        for name in names:
            assignment = self.nodes[name]
            if mine := assignment.from_origin(self.count, at=1.0, idle=0.0):
                self.origin.update(mine)
                for group in mine:
                    self.bring(name, group)
                return True
            others = [other for other in names if other != name]
            self.rng.shuffle(others)
            for other in others:
                group = assignment.from_peer(other)
                if group is not None:
                    assert group in self.done[other], "a peer is asked for what it has"
                    if self.rng.random() < 0.1:
                        assignment.failed(group)
                    else:
                        self.bring(name, group)
                    return True
        return False


@pytest.mark.parametrize("nodes", [1, 2, 8, 40])
@pytest.mark.parametrize("seed", range(3))
def test_a_fleet_that_starts_together_reads_each_group_of_the_origin_once(nodes: int, seed: int) -> None:
    fleet = Fleet(nodes, 100, seed)
    while fleet.step():
        pass
    assert all(assignment.finished for assignment in fleet.nodes.values())
    assert fleet.origin == Counter(range(100))


@pytest.mark.parametrize("seed", range(10))
def test_what_fell_to_a_node_that_died_falls_to_others(seed: int) -> None:
    fleet = Fleet(8, 200, seed)
    doomed = ["node-3", "node-5"]
    for _ in range(300):
        fleet.step()
        if fleet.rng.random() < 0.01 and doomed:
            fleet.kill(doomed.pop())
    while doomed:
        fleet.kill(doomed.pop())
    while fleet.step():
        pass
    assert all(assignment.finished for assignment in fleet.nodes.values())
    again = [group for group, times in fleet.origin.items() if times > 1]
    assert sum(fleet.origin.values()) <= 200 + len(again) * 2, "only what died with its only holders is read again"


def test_the_share_of_the_origin_is_even_and_a_node_more_moves_only_what_it_takes() -> None:
    stripes = [f"{file}:{stripe}" for file in range(8) for stripe in range(500)]
    names = [f"node-{i}" for i in range(10)]
    one = agreed(names[0], names, stripes)
    before = [one.owner(group, at=1.0) for group in range(len(stripes))]
    shares = Counter(before)
    assert min(shares.values()) > 300
    assert max(shares.values()) < 500
    names.append("node-new")
    more = agreed(names[0], names, stripes)
    after = [more.owner(group, at=1.0) for group in range(len(stripes))]
    assert {b for a, b in zip(before, after, strict=True) if a != b} == {"node-new"}
    other = agreed("node-7", names, stripes)
    assert [other.owner(group, at=1.0) for group in range(len(stripes))] == after, "all nodes agree"


def test_whose_turn_a_group_is_follows_the_readers_as_they_come_and_go() -> None:
    rng = random.Random(3)
    stripes = [f"0:{i}" for i in range(50)]
    pool = [f"node-{i}" for i in range(READERS + 8)]
    readers = Readers("me", KEY, PATIENCE)
    assignment = Assignment("me", stripes, readers, PATIENCE)
    for stamp in range(60):
        at = float(stamp)
        readers.heard({node: stamp for node in pool if rng.random() < rng.choice((0.02, 0.2))}, at)
        if rng.random() < 0.3:
            readers.lost(rng.choice(pool), at)
        fresh = Assignment("me", stripes, readers, PATIENCE)
        for group, stripe in enumerate(stripes):
            first, *others = sorted(readers.now(at), key=lambda node: weight(node, stripe), reverse=True)
            assert assignment.owner(group, at=at) == fresh.owner(group, at=at) == first
            assert assignment._second[group] == fresh._second[group] == (others or [first])[0]


def test_what_peers_have_is_not_read_from_the_origin_and_patience_ends() -> None:
    assignment = agreed("me", ["slow"], [f"0:{i}" for i in range(20)])
    assignment.has("full", range(10))
    mine = assignment.from_origin(20, at=1.0, idle=0.0)
    assert all(group >= 10 for group in mine)
    theirs = set(range(10, 20)) - set(mine)
    assert len(theirs) > 2, "some of it falls to the other"
    assert assignment.from_origin(20, at=2.0, idle=1.0) == []
    stolen = assignment.from_origin(20, at=3.0, idle=PATIENCE / 4)
    assert set(stolen) < theirs
    assert len(stolen) == 2, "whoever has nothing to do helps the other a little"
    assert set(assignment.from_origin(20, at=9.0, idle=PATIENCE + 1)) == theirs - set(stolen), "and then does it all"
    given = []
    while (group := assignment.from_peer("full")) is not None:
        given.append(group)
    assert sorted(given) == list(range(10))
    assert given != sorted(given), "each node takes them in an order of its own"
    assignment.failed(given[0])
    assignment.lost("full")
    assert assignment.from_peer("full") is None
    assert assignment.from_origin(20, at=9.0, idle=0.0) == [given[0]]


def test_what_another_reads_already_is_left_to_it_while_it_lives() -> None:
    stripes = [f"0:{i}" for i in range(100)]
    assignment = agreed("me", ["early"], stripes)
    mine = {group for group in range(100) if assignment.owner(group, at=1.0) == "me"}
    begun = sorted(mine)[:10]
    assignment.coming("early", begun)
    assert set(assignment.from_origin(100, at=1.0, idle=0.0)) == mine - set(begun)
    assert assignment.from_origin(100, at=2.0, idle=0.0) == []
    assert set(assignment.from_origin(100, at=2.0 + PATIENCE, idle=0.0)) >= set(begun), "not when it is heard no more"
    lost = agreed("me", ["early"], stripes)
    lost.coming("early", begun)
    lost.lost("early")
    assert set(lost.from_origin(100, at=1.0, idle=0.0)) == mine


def test_who_has_nothing_to_do_takes_two_at_once_and_those_that_another_reads_only_later() -> None:
    stripes = [f"0:{i}" for i in range(40)]
    assignment = agreed("me", ["early"], stripes)
    mine = set(assignment.from_origin(100, at=1.0, idle=0.0))
    theirs = set(range(40)) - mine
    begun = set(sorted(theirs)[2:])
    assignment.coming("early", begun)
    assert assignment.from_origin(0, at=1.0, idle=PATIENCE + 1) == []
    assert assignment.from_origin(100, at=1.0, idle=PATIENCE / 8) == [], "for want of room nobody is passed over"
    assert set(assignment.from_origin(100, at=1.0, idle=PATIENCE / 8 + 0.01)) == theirs - begun
    assert assignment.from_origin(100, at=1.0, idle=PATIENCE / 2) == []
    assert len(set(assignment.from_origin(100, at=1.0, idle=PATIENCE / 2 + 0.01)) & begun) == 2
    assert len(assignment.from_origin(1, at=1.0, idle=PATIENCE / 2 + 0.01)) == 1


def test_a_node_that_is_not_among_the_readers_reads_only_once_nobody_else_has_brought_anything() -> None:
    stripes = [f"0:{i}" for i in range(10)]
    others = [f"node-{i}" for i in range(2000)]
    others = sorted(others, key=lambda node: weight(KEY, node), reverse=True)[:READERS]
    assert weight(KEY, "me") < min(weight(KEY, node) for node in others)
    assignment = agreed("me", others, stripes)
    assert assignment.from_origin(10, at=1.0, idle=PATIENCE) == []
    assert len(assignment.from_origin(10, at=1.0, idle=PATIENCE + 0.01)) > 0


def test_what_is_not_to_be_believed_is_to_come_again() -> None:
    assignment = agreed("me", [], ["0:0", "0:1"])
    assert sorted(assignment.from_origin(2, at=1.0, idle=0.0)) == [0, 1]
    assignment.done(0)
    assignment.done(1)
    assert assignment.finished
    assignment.again([1])
    assert not assignment.finished
    assignment.has("other", [0, 1])
    assert assignment.from_peer("other") == 1
    assert assignment.from_peer("other") is None
