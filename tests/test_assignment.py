"""Which node reads what from the origin, and gets what from whom: groups of extents, and fleets that share them."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from tests.filling import store, tensor
from weightd.daemon.digests import LEAF
from weightd.daemon.extents import Demands, plan_extents
from weightd.daemon.layout import checkpoint_layout
from weightd.daemon.peers.assignment import Assignment
from weightd.daemon.peers.groups import leaf_ranges, plan_groups

SHARDS = (
    {"embed": tensor("BF16", (3000, 512), 1), "norm": tensor("F32", (7,), 2), "empty": tensor("F16", (0, 4), 3)},
    {"q": tensor("F16", (1024, 2048), 4), "o": tensor("F16", (2048, 1024), 5), "bias": tensor("F64", (513,), 6)},
)


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
    partial: dict[tuple[int, int], set[int]] = {}
    for extent in extents:
        for piece in extent.pieces:
            if piece.leaf < 0:
                partial.setdefault((piece.segment, piece.entry), set()).add(of[id(extent)])
    assert all(len(found) == 1 for found in partial.values()), "what is gathered from strides comes as one"


# ---------------------------------------------------------------------- fleets


class Fleet:
    """Nodes that want the same ``count`` groups, one step at a time, in an order that chance decides."""

    def __init__(self, nodes: int, count: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.count = count
        self.nodes = {f"node-{i}": Assignment(f"node-{i}", [f"0:{g}" for g in range(count)]) for i in range(nodes)}
        self.done: dict[str, set[int]] = {name: set() for name in self.nodes}
        self.origin: Counter[int] = Counter()
        for name, assignment in self.nodes.items():
            for other in self.nodes.keys() - {name}:
                assignment.wants(other)

    def kill(self, name: str) -> None:
        del self.nodes[name]
        for assignment in self.nodes.values():
            assignment.lost(name)

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
            if mine := assignment.from_origin():
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
    one = Assignment(names[0], stripes)
    for name in names[1:]:
        one.wants(name)
    before = [one.owner(group) for group in range(len(stripes))]
    shares = Counter(before)
    assert min(shares.values()) > 300
    assert max(shares.values()) < 500
    one.wants("node-new")
    after = [one.owner(group) for group in range(len(stripes))]
    assert {b for a, b in zip(before, after, strict=True) if a != b} == {"node-new"}
    other = Assignment("node-7", stripes)
    for name in [*names[:7], *names[8:], "node-new"]:
        other.wants(name)
    assert [other.owner(group) for group in range(len(stripes))] == after, "all nodes agree"


def test_what_peers_have_is_not_read_from_the_origin_and_patience_ends() -> None:
    assignment = Assignment("me", [f"0:{i}" for i in range(20)])
    assignment.wants("slow")
    assignment.has("full", range(10))
    mine = assignment.from_origin()
    assert all(group >= 10 for group in mine)
    theirs = set(range(10, 20)) - set(mine)
    assert theirs, "some of it falls to the other"
    assert assignment.from_origin() == []
    assert set(assignment.from_origin(impatient=True)) == theirs
    given = []
    while (group := assignment.from_peer("full")) is not None:
        given.append(group)
    assert sorted(given) == list(range(10))
    assert given != sorted(given), "each node takes them in an order of its own"
    assignment.failed(given[0])
    assignment.lost("full")
    assert assignment.from_peer("full") is None
    assert assignment.from_origin() == [given[0]]
