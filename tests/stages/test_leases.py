"""Leases without any socket: who may have one, who is known again, and what is said of who has them."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest

from weightd.daemon.errors import InvalidRequest, LeaseLimit, StageLeased, StageRevoked
from weightd.daemon.filling.ledger import Ledger
from weightd.daemon.stages import eviction
from weightd.daemon.stages.leases import Leases
from weightd.daemon.stages.request import parse_request
from weightd.daemon.stages.stage import Lease, Stage


class House:
    """Two ready stages, the second with ranks 1 and 3, and a clock that only a test moves."""

    def __init__(self) -> None:
        self.clock = 1000.0
        self.changes = 0
        self.now = mock.Mock(side_effect=lambda: self.clock)
        requests = [
            {"model": "/x"},
            {"model": "/x", "parallel": {"tp_size": 4, "tp_rank": [1, 3], "map": {"*": "replicate"}}},
        ]
        self.one, self.two = [Stage("file:///x", ["cpu"], parse_request(request), None) for request in requests]
        stages = {stage.id: stage for stage in (self.one, self.two)}
        for stage in stages.values():
            stage.enter("ready")
            stage.ledger = Ledger.private(0, 0)
        self.leases = Leases(stages, grace=30.0, most_per_user=2, changed=self.change)

    def change(self) -> None:
        self.changes += 1

    def begin(self, stage: Stage, rank: int = 0, uid: int | None = 7, renews: str | None = None) -> Lease:
        return self.leases.begin(stage, rank, uid=uid, gid=8, pid=9 if uid is not None else None, renews=renews)


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    with mock.patch.object(eviction, "now", house.now):
        yield house


def noted(stage: Stage) -> tuple[int, float, bool]:
    assert stage.ledger is not None
    return stage.ledger.leases, stage.ledger.last_used, stage.ledger.lent


def test_a_lease_is_noted_where_the_next_daemon_finds_it_and_so_is_its_end(house: House) -> None:
    lease = house.begin(house.one)
    assert (lease.stage, lease.rank, lease.uid, lease.gid, lease.pid) == (house.one.id, 0, 7, 8, 9)
    assert lease.id.startswith("le-")
    assert len(lease.id) == 15
    assert house.one.leases == {lease.id: lease}
    assert (noted(house.one), house.one.lent, house.changes) == ((1, 1000.0, True), True, 1)
    house.clock += 5
    house.leases.end(lease)
    assert (noted(house.one), house.one.last_used, house.changes) == ((0, 1005.0, True), 1005.0, 2)
    house.leases.end(lease)
    house.leases.end(Lease("le-1", "st-gone", 0, 1, 1, 1, 0.0))
    assert house.one.leases == {}


def test_a_rank_that_a_stage_does_not_have_is_refused_with_those_that_it_has(house: House) -> None:
    with pytest.raises(InvalidRequest, match=r"no tp_rank 2, it has \[1, 3\]"):
        house.begin(house.two, 2)
    assert house.begin(house.two, 3).rank == 3


def test_each_user_has_so_many_leases_over_all_stages_and_no_more(house: House) -> None:
    house.begin(house.one)
    last = house.begin(house.two, 1)
    with pytest.raises(LeaseLimit, match="uid 7 holds 2 leases"):
        house.begin(house.one)
    for _ in range(2):
        house.begin(house.one, uid=None)
    with pytest.raises(LeaseLimit, match="TCP clients hold 2 leases"):
        house.begin(house.one, uid=None)
    house.leases.end(last)
    house.begin(house.one)
    assert len(list(house.leases)) == 4
    assert house.leases.holders() == ["a client over TCP", "pid 9 (uid 7)"]


def test_what_is_being_taken_away_is_lent_to_nobody(house: House) -> None:
    house.one.revoked_until = 0.0
    with pytest.raises(StageRevoked, match=house.one.id):
        house.begin(house.one)


def test_who_leased_before_a_restart_is_awaited_for_the_grace_and_known_by_the_lease(house: House) -> None:
    assert house.one.ledger is not None
    house.one.ledger.note(2, 900.0, lent=True)
    house.leases.await_holders(house.one)
    assert (house.one.awaited, house.one.lent, house.one.last_used) == (2, True, 900.0)
    assert house.one.protected_until == 1030.0
    assert house.leases.in_use(house.one)
    assert house.leases.holders() == ["2 that have not come back yet"]
    with pytest.raises(StageLeased, match="has 2 leases, held by processes that have 30 s left to come back"):
        house.leases.check_none(house.one)
    lease = house.begin(house.one, renews="le-before")
    assert (lease.id, house.one.awaited, noted(house.one)[0]) == ("le-before", 1, 2)
    again = house.begin(house.one, renews="le-before")
    assert again.id != "le-before", "that one is there still"
    assert house.one.awaited == 1
    assert house.leases.holders() == ["pid 9 (uid 7)", "1 that have not come back yet"]
    with pytest.raises(StageLeased, match=r"has 3 leases, held by pid 9 \(uid 7\), pid 9 \(uid 7\): force") as error:
        house.leases.check_none(house.one)
    assert [found["id"] for found in error.value.details["leases"]] == ["le-before", again.id]
    house.leases.end(lease)
    house.leases.end(again)
    house.clock = 1030.0
    assert not house.leases.in_use(house.one)
    house.leases.check_none(house.one)
    assert house.leases.holders() == []
    house.leases.note(house.one)
    assert noted(house.one)[0] == 0, "nobody is awaited any more"


def test_where_nobody_leased_before_a_restart_nobody_is_awaited(house: House) -> None:
    house.leases.await_holders(house.one)
    assert (house.one.awaited, house.one.lent, house.one.last_used) == (0, False, 1000.0)
    assert house.one.protected_until == 0.0


def test_a_peers_reading_counts_as_lent_but_not_as_anybodys_lease(house: House) -> None:
    one, other = (house.leases.begin_for_peer(house.one, by) for by in ("a:1", "a:1"))
    assert house.one.peer_leases == {one, other}
    assert (house.one.lent, house.leases.in_use(house.one)) == (True, False)
    house.leases.end_for_peer(one)
    assert house.one.peer_leases == {other}
    house.leases.end_for_peer(one)


def test_ten_holders_are_named_and_all_are_counted(house: House) -> None:
    for uid in range(12):
        house.begin(house.one, uid=uid)
    with pytest.raises(StageLeased, match="has 12 leases") as error:
        house.leases.check_none(house.one)
    assert str(error.value).count("uid") == 10
    assert len(error.value.details["leases"]) == 12
