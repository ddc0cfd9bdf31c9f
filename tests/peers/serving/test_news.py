"""What a peer is told of a stage's leaves: each once, and none that it has been told of already."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.layouts.recipes import infos
from weightd.daemon.filling.account import Account, ledger_for
from weightd.daemon.filling.ledger import Ledger
from weightd.daemon.layouts.checkpoint import checkpoint_layout
from weightd.daemon.layouts.digests import LEAF
from weightd.daemon.layouts.extents import Demands, plan_extents
from weightd.daemon.peers.serving import news as news_module
from weightd.daemon.peers.serving.news import News
from weightd.daemon.stages.manifests import SealedManifest
from weightd.daemon.stages.planning import Plan
from weightd.daemon.stages.request import parse_request
from weightd.daemon.stages.segments import segment_manifest
from weightd.daemon.stages.stage import Stage

TENSORS = infos(("a", "U8", (3 * LEAF,)), ("b", "U8", (10,)), ("c", "U8", (2, LEAF)))
RECIPES = checkpoint_layout(TENSORS, tp_size=2, tp_ranks=[0, 1], splits={"c": 0, "*": "replicate"})
"""5 leaves in each of two segments."""


class Loading:
    """A stage that loads, leaf by leaf, with an account and without any bytes."""

    def __init__(self) -> None:
        extents = plan_extents(TENSORS, RECIPES, Demands(LEAF, 16, 0))
        self.ledger: Ledger = ledger_for(TENSORS, RECIPES, extents)
        self.account = Account(
            TENSORS, RECIPES, extents, ledger=self.ledger, expected_leaves={}, on_verified=lambda segment, entries: None
        )
        for segment in range(2):
            for number in range(5):
                entry, at = self.account.leaf_at(segment, number)
                self.account.leaves[segment][entry][at] = (segment + 1) << 60 | number
        parallel = {"tp_size": 2, "tp_rank": "all", "map": {"*": 0}}
        self.stage = Stage("file:///m", ["cpu", "cpu"], parse_request({"model": "/m", "parallel": parallel}), None)
        self.stage.fill = cast(Any, SimpleNamespace(account=self.account, seconds={}))
        self.stage.segments = cast(Any, [SimpleNamespace()] * 2)

    def there(self, segment: int, *leaves: int) -> None:
        for leaf in leaves:
            self.account.there[segment][leaf] = 1

    def ready(self) -> None:
        plan = cast(Plan, SimpleNamespace(recipes=RECIPES))
        self.stage.manifests = [SealedManifest.seal(segment_manifest(self.stage, plan, i)) for i in range(2)]
        self.stage.ledger, self.stage.fill = self.ledger, None
        self.stage.enter("ready")


def event(kind: str, segment: int, first: int, **more: Any) -> dict[str, Any]:
    return {"type": kind, "epoch": "e1", "segment": segment, "first": first, **more}


def digests(segment: int, *leaves: int) -> str:
    return "".join(f"{(segment + 1) << 60 | leaf:016x}" for leaf in leaves)


def test_each_leaf_is_told_of_once_with_its_digest_and_what_is_coming_without() -> None:
    load, news = Loading(), News("e1")
    assert news.behind(load.stage), "nothing was ever said"
    assert news.catch_up(load.stage) == []
    assert not news.behind(load.stage)
    load.there(0, 1, 2, 4)
    load.account.coming[1][3] = load.account.coming[1][4] = 1
    assert news.behind(load.stage)
    assert news.catch_up(load.stage) == [
        event("leaves", 0, 1, digests=digests(0, 1, 2)),
        event("leaves", 0, 4, digests=digests(0, 4)),
        event("coming", 1, 3, count=2),
    ]
    assert not news.behind(load.stage)
    assert news.catch_up(load.stage) == []
    load.there(0, 0, 3)
    assert news.catch_up(load.stage) == [
        event("leaves", 0, 0, digests=digests(0, 0)),
        event("leaves", 0, 3, digests=digests(0, 3)),
    ]


def test_that_something_is_coming_is_news_by_itself() -> None:
    load, news = Loading(), News("e1")
    news.catch_up(load.stage)
    load.account.coming[0][4] = 1
    assert news.behind(load.stage)
    assert news.catch_up(load.stage) == [event("coming", 0, 4, count=1)]
    load.account.coming[0][4] = 0
    assert news.behind(load.stage)


def test_what_was_taken_back_is_told_of_again_when_it_is_there_again() -> None:
    load, news = Loading(), News("e1")
    load.there(1, 0, 1)
    news.catch_up(load.stage)
    load.account.there[1][1] = 0
    assert news.behind(load.stage)
    assert news.catch_up(load.stage) == []
    load.there(1, 1)
    assert news.catch_up(load.stage) == [event("leaves", 1, 1, digests=digests(1, 1))]


def test_of_a_ready_stage_the_rest_is_told_and_then_no_more() -> None:
    load, news, late = Loading(), News("e1"), News("e1")
    load.there(0, 0, 1, 2, 3, 4)
    news.catch_up(load.stage)
    load.ready()
    assert news.behind(load.stage)
    assert news.catch_up(load.stage) == [event("leaves", 1, 0, digests=digests(1, *range(5)))]
    assert not news.behind(load.stage)
    assert news.catch_up(load.stage) == []
    assert late.catch_up(load.stage) == [event("leaves", s, 0, digests=digests(s, *range(5))) for s in (0, 1)]
    assert not news.complete


def test_of_what_neither_loads_nor_is_ready_there_is_nothing_to_tell() -> None:
    load, news = Loading(), News("e1")
    load.stage.fill = None
    assert not news.behind(load.stage)
    assert news.catch_up(load.stage) == []
    for state in ("verifying", "failed"):
        load.stage.enter(state)
        assert not news.behind(load.stage)
        assert news.catch_up(load.stage) == []


def test_an_event_has_so_many_leaves_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(news_module, "_MAX_LEAVES", 2)
    load, news, late = Loading(), News("e1"), News("e1")
    load.there(0, *range(5))
    assert [(said["first"], len(said["digests"]) // 16) for said in news.catch_up(load.stage)] == [
        (0, 2),
        (2, 2),
        (4, 1),
    ]
    load.there(1, 2, 3)
    news.catch_up(load.stage)
    load.ready()
    assert [(said["segment"], said["first"], len(said["digests"]) // 16) for said in news.catch_up(load.stage)] == [
        (1, 0, 2),
        (1, 4, 1),
    ], "of what was told in part, all is told again"
    assert len(late.catch_up(load.stage)) == 6
