"""The origin's share of a fill: what it is given, what is said of it, and what becomes of it where it fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.filling.fills import DEFAULTS, Filled, MiB, prepared, store, tensor
from tests.servers import until
from weightd.daemon.errors import SourceFailed
from weightd.daemon.filling.sink import Share, Sink
from weightd.daemon.layouts.checkpoint import checkpoint_layout
from weightd.daemon.peers.pulling import pace as pace_module
from weightd.daemon.peers.pulling.groups import Groups
from weightd.daemon.peers.pulling.origin import Origin
from weightd.daemon.peers.pulling.pace import Pace

# ---------------------------------------------------------------------------- pace


class Time:
    def __init__(self) -> None:
        self.now = 50.0

    def monotonic(self) -> float:
        return self.now


def test_as_many_are_asked_for_as_come_in_so_many_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Time()
    monkeypatch.setattr(pace_module, "time", clock)
    pace = Pace(2.0, most=20)
    assert pace.at_once == 4
    pace.came()
    assert pace.at_once == 4, "of one nothing can be told"
    clock.now += 0.2
    pace.came()
    assert pace.at_once == 10
    clock.now += 0.2
    for _ in range(2):
        pace.came()
    assert pace.at_once == 15
    for _ in range(9):
        pace.came()
    assert pace.at_once == 20, "and so many at most"
    for _ in range(30):
        clock.now += 1.0
        pace.came()
    assert pace.at_once == 4, "what came long ago is forgotten, and a few are always asked for"


def test_what_comes_all_at_once_divides_by_no_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace_module, "time", Time())
    pace = Pace(0.01, most=1000)
    for _ in range(11):
        pace.came()
    assert pace.at_once == 100


# ---------------------------------------------------------------------------- a share


def test_a_share_stops_by_itself_and_with_the_whole(tmp_path: Path) -> None:
    stored = store(tmp_path, {"t": tensor("U8", (3 * MiB,))})
    with prepared(stored, checkpoint_layout(stored.checkpoint.tensors)) as filled:
        one, other = Share(filled.fill), Share(filled.fill)
        assert (one.threads, one.in_flight_bytes, one.extent_bytes) == (3, MiB, MiB)
        assert one.next() is filled.extents[0]
        one.stop()
        assert (one.stopped, other.stopped, filled.fill.stopped) == (True, False, False)
        assert one.next() is None
        assert other.next() is filled.extents[1]
        filled.fill.stop()
        assert other.stopped
        assert other.next() is None


def test_a_share_does_everything_else_with_the_whole(tmp_path: Path) -> None:
    stored = store(tmp_path, {"t": tensor("U8", (3 * MiB,))})
    recipes = checkpoint_layout(stored.checkpoint.tensors, tp_size=2, tp_ranks=(0, 1), splits={"*": "replicate"})
    with prepared(stored, recipes) as filled:
        share = Share(filled.fill)
        landings = [share.landing(filled.extents[0], wait=False) for _ in range(4)]
        assert [landing is not None for landing in landings] == [True, True, True, False], "there are 3 buffers"
        assert landings[0] is not None
        share.abandon(landings[0])
        assert share.landing(filled.extents[0], wait=False) is not None
        assert 0 < share.failed(filled.extents[0], "there", "it broke") < 1
        assert filled.fill.retries == 1
        share.check_stall(1e18, ["there"])
        with pytest.raises(SourceFailed, match="there: no byte of 1 requests"):
            share.check_stall(0.0 - 1e6, ["there"])
        share.wait(0.0, "buffers")
        with share.phase("copying"):
            pass
        assert filled.fill.seconds["buffers"] > 0
        assert filled.fill.seconds["copying"] > 0


# ---------------------------------------------------------------------------- the origin


class Reading:
    """In place of a source's reader: takes what there is, and does as it is told."""

    def __init__(self, then: Callable[[Sink], object]) -> None:
        self._then = then
        self.closed = 0

    def run(self, sink: Sink) -> None:
        self._then(sink)

    def close(self) -> None:
        self.closed += 1


def begun(filled: Filled, origin: Origin, recipes: Any) -> Groups:
    account = filled.fill.account
    groups = Groups(account.drain(), recipes, [account.leaf_starts(segment) for segment in range(len(recipes))])
    origin.begin(filled.fill)
    return groups


@pytest.fixture
def ready(tmp_path: Path) -> Any:
    """A fill of four groups, and all that is to be known of it."""
    stored = store(tmp_path, {f"t{i}": tensor("U8", (MiB,), i) for i in range(4)})
    recipes = checkpoint_layout(stored.checkpoint.tensors)
    with prepared(stored, recipes, DEFAULTS) as filled:
        yield filled, recipes


def test_it_reads_what_it_is_given_and_says_that_this_is_coming(ready: Any) -> None:
    filled, recipes = ready
    taken: list[int] = []
    over = threading.Event()

    def read(sink: Sink) -> None:
        while not sink.stopped:
            extent = sink.next()
            if extent is not None:
                taken.append(extent.index)
            elif over.wait(0.001):
                return

    reader = Reading(read)
    origin = Origin(lambda: reader)
    groups = begun(filled, origin, recipes)
    assert (origin.exists, origin.works, origin.left_over()) == (True, True, set())
    origin.read([])
    assert origin._thread is None, "there is nothing to read"
    origin.read(groups.all[1:3])
    assert origin.groups == {1, 2}
    assert bytes(filled.fill.account.coming[0]) == b"\0\1\1\0"
    assert origin._thread is not None
    assert origin._thread.daemon, "one that hangs keeps no process from ending"
    until(lambda: taken == [1, 2], "they are read")
    assert [origin.brought(group) for group in (1, 3, 1)] == [True, False, False]
    assert origin.groups == {2}
    assert origin.left_over() == set(), "it is at work"
    over.set()
    origin.stop()
    origin.close()
    assert reader.closed == 1


def test_what_it_has_room_for_is_less_where_others_may_begin_too(ready: Any) -> None:
    filled, recipes = ready
    origin = Origin(lambda: Reading(lambda sink: None))
    groups = begun(filled, origin, recipes)
    assert [origin.room(alone=False, here=here) for here in (0, 1, 2, 9)] == [1, 2, 3, 4]
    assert origin.room(alone=True, here=0) == 64
    origin.groups.update(group.index for group in groups.all[:3])
    assert [origin.room(alone=False, here=9), origin.room(alone=True, here=9)] == [1, 61]


def test_what_it_has_room_for_is_what_it_brings_in_half_a_second(ready: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Time()
    monkeypatch.setattr(pace_module, "time", clock)
    origin = Origin(lambda: Reading(lambda sink: None))
    begun(ready[0], origin, ready[1])
    origin.groups = set(range(9))
    for group in range(9):
        assert origin.brought(group)
        clock.now += 0.0625
    assert origin.room(alone=False, here=9) == 8


def test_where_it_fails_what_it_was_given_is_left_over_and_its_reader_is_closed(ready: Any) -> None:
    filled, recipes = ready

    def fail(sink: Sink) -> None:
        raise SourceFailed("503")

    reader = Reading(fail)
    origin = Origin(lambda: reader)
    groups = begun(filled, origin, recipes)
    origin.read(groups.all[:2])
    until(lambda: not origin._thread.is_alive(), "it has failed")
    assert origin.left_over() == {0, 1}
    assert (origin.works, origin.exists, origin.groups) == (False, True, set())
    assert (reader.closed, filled.fill.account.queued) == (1, 0), "what it did not begin with is not for the next one"
    assert origin.left_over() == set()
    assert isinstance(origin.error, SourceFailed)
    assert origin.error.__traceback__ is None, "its frames would hold views of segments"
    origin.stop()
    origin.close()
    assert reader.closed == 1


def test_what_is_no_failure_of_the_source_is_the_loads(ready: Any) -> None:
    filled, recipes = ready

    def fail(sink: Sink) -> None:
        raise ZeroDivisionError

    origin = Origin(lambda: Reading(fail))
    groups = begun(filled, origin, recipes)
    origin.read(groups.all[:1])
    until(lambda: not origin._thread.is_alive(), "it has failed")
    with pytest.raises(ZeroDivisionError):
        origin.left_over()


def test_a_reader_that_has_read_all_is_used_again(ready: Any) -> None:
    filled, recipes = ready
    runs: list[int] = []

    def read(sink: Sink) -> None:
        runs.append(sum(1 for _ in iter(sink.next, None)))

    made: list[Reading] = []
    origin = Origin(lambda: made.append(Reading(read)) or made[-1])  # type: ignore[func-returns-value]
    groups = begun(filled, origin, recipes)
    for some in (groups.all[:1], groups.all[1:4]):
        origin.read(some)
        until(lambda: not origin._thread.is_alive(), "it has read them")
        assert origin.left_over() == set()
    assert (runs, len(made)) == ([1, 3], 1)


def test_without_one_nothing_works(ready: Any) -> None:
    origin = Origin(None)
    begun(ready[0], origin, ready[1])
    assert (origin.exists, origin.works) == (False, False)
    origin.stop()
    origin.close()
