"""Policy by its numbers: who may go, who goes first, when, and whose turn it is to load."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from weightd.daemon.stages import eviction
from weightd.daemon.stages.priority_semaphore import PrioritySemaphore
from weightd.daemon.stages.request import StageRequest
from weightd.daemon.stages.stage import Lease, Stage

NOW = 1000.0


def made(nbytes: int = 1, priority: int = 0, last_used: float = 0.0, ttl: float | None = None, **more: Any) -> Stage:
    stage = Stage("file:///x", ["cpu"], StageRequest(model="/x", priority=priority, ttl_seconds=ttl), None)
    stage.enter("ready")
    stage.reserved = {"cpu": nbytes}
    stage.last_used = last_used
    for name, value in more.items():
        setattr(stage, name, value)
    return stage


LEASE = Lease("le-1", "st-1", 0, 1, 1, 1, 0.0)


def test_holders_of_before_are_awaited_until_their_time_is_over() -> None:
    stage = made(awaited=3, protected_until=NOW)
    assert [eviction.awaited(stage, at) for at in (NOW - 1, NOW, NOW + 1)] == [3, 0, 0]


@pytest.mark.parametrize(
    ("what", "may_go"),
    [
        ({}, True),
        ({"pin": True}, False),
        ({"leases": {"le-1": LEASE}}, False),
        ({"moving": "cuda:0"}, False),
        ({"awaited": 1, "protected_until": NOW + 1}, False),
        ({"awaited": 1, "protected_until": NOW}, True),
        ({"state": "loading"}, False),
        ({"state": "evicted"}, False),
    ],
)
def test_what_is_in_use_or_on_its_way_may_not_go(what: dict[str, Any], may_go: bool) -> None:
    assert eviction.evictable(made(**what), NOW) is may_go


def test_the_least_wanted_go_first_and_none_that_is_not_needed() -> None:
    old, new, dear, pinned = made(2, 0, 1.0), made(3, 0, 2.0), made(4, 1, 0.0), made(99, pin=True)
    stages = [dear, pinned, new, old]
    assert eviction.victims(stages, 1, NOW, "cpu") == [old]
    assert eviction.victims(stages, 2, NOW, "cpu") == [old]
    assert eviction.victims(stages, 3, NOW, "cpu") == [new], "the one before it is not enough, and with it not needed"
    assert eviction.victims(stages, 4, NOW, "cpu") == [old, new]
    assert eviction.victims(stages, 6, NOW, "cpu") == [new, dear]
    assert eviction.victims(stages, 9, NOW, "cpu") == [old, new, dear]
    assert eviction.victims(stages, 10, NOW, "cpu") is None
    assert eviction.victims(stages, 0, NOW, "cpu") == []


def test_a_time_to_live_counts_from_the_last_use_or_the_last_asking_and_waits_for_who_may_come_back() -> None:
    assert eviction.expires_at(made()) is None
    assert eviction.expires_at(made(ttl=10, last_used=5.0, asked_at=3.0)) == 15.0
    assert eviction.expires_at(made(ttl=10, last_used=5.0, asked_at=7.0)) == 17.0
    assert eviction.expires_at(made(ttl=10, last_used=5.0, awaited=1, protected_until=99.0)) == 99.0
    assert eviction.expires_at(made(ttl=10, last_used=5.0, awaited=1, protected_until=9.0)) == 15.0
    assert eviction.expires_at(made(ttl=10, last_used=5.0, awaited=0, protected_until=99.0)) == 15.0
    for what in ({"pin": True}, {"leases": {"le-1": LEASE}}, {"moving": "cpu"}, {"state": "loading"}):
        assert eviction.expires_at(made(ttl=10, **what)) is None


# ---------------------------------------------------------------------------- turns


def taking(count: int, *waiters: tuple[str, int]) -> tuple[PrioritySemaphore, list[str], dict[str, bool], Any]:
    """A semaphore with those who wait for it, who has had a turn, and who has given up."""
    turns, had, given_up = PrioritySemaphore(count), list[str](), dict.fromkeys((name for name, _ in waiters), False)
    priorities = dict(waiters)

    async def wait(name: str) -> None:
        await turns.acquire(lambda: priorities[name], lambda: given_up[name])
        had.append(name)

    return turns, had, given_up, (wait, priorities)


async def rest() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_turns_go_by_priority_then_by_coming_and_priorities_are_asked_when_one_is_free() -> None:
    async def within() -> None:
        turns, had, _, (wait, priorities) = taking(2, ("a", 0), ("b", 0), ("c", 0), ("d", 5), ("e", 0))
        assert turns.free
        tasks = [asyncio.create_task(wait(name)) for name in "abcde"]
        await rest()
        assert (had, turns.free) == (["a", "b"], False)
        turns.release()
        await rest()
        assert had == ["a", "b", "d"]
        priorities["e"] = 1
        turns.release()
        await rest()
        assert had == ["a", "b", "d", "e"]
        turns.release()
        await rest()
        assert had == ["a", "b", "d", "e", "c"]
        assert not turns.free, "three turns are given back, and three were taken"
        turns.release()
        assert turns.free
        await asyncio.gather(*tasks)

    asyncio.run(within())


def test_of_many_who_wait_the_highest_goes_first_each_time() -> None:
    async def within() -> None:
        turns, had, _, (wait, _) = taking(1, ("a", 0), ("b", 1), ("c", -3), ("d", 7), ("e", 2))
        tasks = [asyncio.create_task(wait(name)) for name in "abcde"]
        for _ in range(5):
            await rest()
            turns.release()
        await asyncio.gather(*tasks)
        assert had == ["a", "d", "e", "b", "c"]
        assert turns.free

    asyncio.run(within())


def test_who_has_given_up_gets_a_turn_at_once_which_is_one_less_for_others() -> None:
    async def within() -> None:
        turns, had, given_up, (wait, _) = taking(1, ("a", 0), ("b", 9), ("c", 0), ("d", 0))
        tasks = [asyncio.create_task(wait(name)) for name in "abcd"]
        await rest()
        assert had == ["a"]
        given_up["c"] = True
        turns.changed()
        await rest()
        assert had == ["a", "c"]
        assert not turns.free
        turns.release()  # a's
        await rest()
        assert not turns.free
        assert had == ["a", "c"], "the turn that c has is not given back yet"
        turns.release()
        await rest()
        assert had == ["a", "c", "b"]
        turns.release()
        await rest()
        assert had == ["a", "c", "b", "d"]
        await asyncio.gather(*tasks)

    asyncio.run(within())
