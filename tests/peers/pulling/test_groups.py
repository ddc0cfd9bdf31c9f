"""Groups by their numbers: what is asked of a peer at once, how far each is, and which one brings a leaf."""

from __future__ import annotations

import pytest

from tests.layouts.recipes import infos
from weightd.daemon.layouts.checkpoint import checkpoint_layout
from weightd.daemon.layouts.digests import LEAF
from weightd.daemon.layouts.extents import Demands, Extent, plan_extents
from weightd.daemon.peers.moving.parts import PART, Span
from weightd.daemon.peers.pulling.groups import Group, Groups, plan_groups

MiB = 1 << 20


@pytest.mark.parametrize(("offset", "stripe"), [(0, "3:0"), (8 * MiB - 1, "3:0"), (8 * MiB, "3:1"), (17 * MiB, "3:2")])
def test_a_stripe_is_eight_mib_of_a_file(offset: int, stripe: str) -> None:
    assert Group(0, [Extent(3, offset), Extent(4, 0)], []).stripe == stripe


def spans_of(group: Group) -> list[list[tuple[int, ...]]]:
    return [[tuple(span) for span in part.spans] for part in group.begin_parts()]


def test_a_span_is_cut_into_parts_of_whole_leaves() -> None:
    group = Group(7, [], [Span(1, 2, 512, 2 * PART + LEAF + 5, 3)])
    assert spans_of(group) == [
        [(1, 2, 512, PART, 3)],
        [(1, 2, 512 + PART, PART, 3 + 8)],
        [(1, 2, 512 + 2 * PART, LEAF + 5, 3 + 16)],
    ]
    assert [part.group for part in group.begin_parts()] == [7, 7, 7]


def test_spans_share_a_part_as_long_as_a_leaf_fits_and_they_are_of_one_segment() -> None:
    small = [Span(0, entry, 256 * entry, 100, 0) for entry in range(3)]
    assert spans_of(Group(0, [], small)) == [[tuple(span) for span in small]]
    apart = [small[0], Span(1, 0, 0, 100, 0), Span(1, 1, 256, 100, 0)]
    assert spans_of(Group(0, [], apart)) == [[tuple(apart[0])], [tuple(apart[1]), tuple(apart[2])]]
    filling = [Span(0, 0, 0, PART - LEAF, 0), Span(0, 1, PART, LEAF, 0), Span(0, 2, 2 * PART, 5, 0)]
    assert spans_of(Group(0, [], filling)) == [[tuple(filling[0]), tuple(filling[1])], [tuple(filling[2])]]
    tight = [Span(0, 0, 0, PART - LEAF + 1, 0), Span(0, 1, PART, 5, 0)]
    assert spans_of(Group(0, [], tight)) == [[tuple(tight[0])], [tuple(tight[1])]]
    odd = [Span(0, 0, 0, 100, 0), Span(0, 1, 256, PART, 0)]
    assert spans_of(Group(0, [], odd)) == [
        [(0, 0, 0, 100, 0), (0, 1, 256, PART - LEAF, 0)],
        [(0, 1, 256 + PART - LEAF, LEAF, 7)],
    ]


def test_a_part_has_256_spans_at_most() -> None:
    spans = [Span(0, entry, 256 * entry, 1, 0) for entry in range(257)]
    assert [len(part.spans) for part in Group(0, [], spans).begin_parts()] == [256, 1]


def test_a_group_is_a_peers_once_all_parts_have_come_and_here_once_all_extents_have_landed() -> None:
    first, second = Span(0, 0, 0, PART, 0), Span(0, 0, PART, 5, 8)
    group = Group(0, [Extent(0, 0), Extent(0, 1)], [Span(0, 0, 0, PART + 5, 0)])
    assert len(group.begin_parts()) == 2
    assert group.part_came("a", [(second, 8, 88)]) is False
    assert group.brought_by is None
    assert group.part_came("a", [(first, 0, 80), (first, 1, 81)]) is True
    assert group.brought_by == "a"
    assert group.take_digests() == [(0, 0, 8, 88), (0, 0, 0, 80), (0, 0, 1, 81)]
    assert group.take_digests() == []
    group.begin_parts()
    group.part_came("b", [(second, 8, 88)])
    group.let_go()
    assert group.take_digests() == []
    assert [group.landed(), group.landed()] == [False, True]


def test_extents_that_bring_parts_of_the_same_leaves_are_one_group_and_all_others_are_by_themselves() -> None:
    tensors = infos(("a", "U8", (5 * LEAF,)), ("b", "U8", (6, LEAF)))
    recipes = checkpoint_layout(tensors, tp_size=2, tp_ranks=[0], splits={"b": 1, "*": "replicate"})
    groups = plan_groups(plan_extents(tensors, recipes, Demands(2 * LEAF, 1, LEAF // 2)), recipes)
    assert [[tuple(span) for span in group.spans] for group in groups] == [
        [(0, 0, 0, 2 * LEAF, 0)],
        [(0, 0, 2 * LEAF, 2 * LEAF, 2)],
        [(0, 0, 4 * LEAF, LEAF, 4)],
        [(0, 1, 5 * LEAF, LEAF, 0)],
        [(0, 1, 6 * LEAF, LEAF, 1)],
        [(0, 1, 7 * LEAF, LEAF, 2)],
    ]
    assert [len(group.extents) for group in groups] == [1, 1, 1, 2, 2, 2]


def test_a_group_reaches_as_far_as_its_extents_cut_through_leaves() -> None:
    half = LEAF // 2
    tensors = infos(("a", "U8", (4, 2 * (LEAF + half))), ("b", "U8", (2, LEAF // 4)))
    recipes = checkpoint_layout(tensors, tp_size=2, tp_ranks=[1], splits={"a": 1, "b": 0})
    groups = plan_groups(plan_extents(tensors, recipes, Demands(2 * LEAF, 1, 0)), recipes)
    assert [[tuple(span) for span in group.spans] for group in groups] == [
        [(0, 0, 0, LEAF, 0), (0, 0, LEAF, LEAF, 1), (0, 0, 2 * LEAF, LEAF, 2)],
        [(0, 0, 3 * LEAF, LEAF, 3), (0, 0, 4 * LEAF, LEAF, 4), (0, 0, 5 * LEAF, LEAF, 5)],
        [(0, 1, 6 * LEAF, LEAF // 4, 0)],
    ]
    assert [len(group.extents) for group in groups] == [2, 2, 1]
    turned = checkpoint_layout(infos(("t", "U8", (3 * LEAF, 2))), tp_size=2, tp_ranks=[0], splits={"*": 1})
    extents = plan_extents(infos(("t", "U8", (3 * LEAF, 2))), turned, Demands(LEAF + LEAF // 2, 1, 1 << 30))
    (group,) = plan_groups(extents, turned)
    assert [tuple(span) for span in group.spans] == [(0, 0, 0, 3 * LEAF, 0)]


def test_leaves_tell_their_groups() -> None:
    tensors = infos(("a", "U8", (3 * LEAF,)), ("b", "U8", (10,)), ("c", "U8", (2, LEAF)))
    recipes = checkpoint_layout(tensors)
    extents = plan_extents(tensors, recipes, Demands(2 * LEAF, 16, 0))
    for index, extent in enumerate(extents):
        extent.index = index
    groups = Groups(extents[1:], recipes, [[0, 3, 4, 6]])
    assert [group.index for group in groups.all] == [0, 1, 2]
    assert [groups.of(extent) for extent in extents[1:]] == groups.all
    a, b, c = groups.all
    assert [groups.leaves(group) for group in groups.all] == [[(0, 2, 1)], [(0, 3, 1)], [(0, 4, 2)]]
    assert [groups.of_leaf(0, leaf) for leaf in range(7)] == [None, None, a, b, c, c, None]
    assert groups.at(0, 0, 2) == []
    assert groups.at(0, 1, 2) == [a]
    assert groups.at(0, 2, 4) == [a, b, c]
    assert groups.at(0, 4, 1) == [c]
