"""The small parts of a filling: whose time goes where, who gets which buffer, and what is hashed in which order."""

from __future__ import annotations

import hashlib
import mmap
import threading
from typing import Any
from unittest import mock

import pytest

from weightd.daemon.devices.cpu import HostBuffers
from weightd.daemon.filling import phases as phases_module
from weightd.daemon.filling.ordered_hash import OrderedHash
from weightd.daemon.filling.phases import PHASES, Phases
from weightd.daemon.filling.sink import Landing, Share
from weightd.daemon.filling.slots import Slots
from weightd.daemon.layouts.extents import Extent
from weightd.daemon.observing.clock import Clock
from weightd.daemon.observing.metrics import Metrics


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_seconds_inside_are_counted_towards_the_phase_and_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    time, metrics, clock = Time(), Metrics(), mock.create_autospec(Clock, instance=True)
    monkeypatch.setattr(phases_module, "time", time)
    phases = Phases(clock)
    assert phases.seconds == dict.fromkeys(PHASES, 0.0)

    def spend(name: str, seconds: float, source: str = "") -> None:
        with phases.phase(name, source):
            time.now += seconds

    def counted(source: str, phase: str) -> float | None:
        return metrics.registry.get_sample_value(
            "weightd_stage_phase_seconds_total", {"source": source, "phase": phase}
        )

    spend("copying", 2.0)
    phases.count_with(metrics, "s3")
    for _ in range(2):
        spend("copying", 3.0)
    spend("source", 5.0, "peer")
    spend("source", 7.0)
    assert phases.seconds == {"source": 12.0, "buffers": 0.0, "copying": 8.0, "verifying": 0.0}
    assert (counted("s3", "copying"), counted("peer", "source"), counted("s3", "source")) == (6.0, 5.0, 7.0)
    assert clock.join.mock_calls == [mock.call("copying", "")] * 3 + [
        mock.call("source", "peer"),
        mock.call("source", ""),
    ]
    assert clock.leave.mock_calls == clock.join.mock_calls


def test_a_phase_that_fails_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time()
    monkeypatch.setattr(phases_module, "time", time)
    phases = Phases(Clock())

    def fails() -> None:
        with phases.phase("buffers"):
            time.now += 4
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert phases.seconds["buffers"] == 4.0


# ---------------------------------------------------------------------------- buffers


def acquire(slots: Slots, urgent: bool = False) -> mmap.mmap | None:
    return slots.acquire(False, threading.Event(), lambda: urgent)


def test_the_last_buffer_is_for_who_is_urgent_and_what_is_given_back_goes_first() -> None:
    slots = Slots(3, HostBuffers(4096))
    one, two = acquire(slots), acquire(slots)
    assert one is not None
    assert two is not None
    assert acquire(slots) is None
    last = acquire(slots, urgent=True)
    assert last is not None
    assert acquire(slots, urgent=True) is None
    slots.release(one)
    assert acquire(slots) is None, "it is the last one now"
    slots.release(two)
    assert acquire(slots) is two
    slots.release(two)
    slots.release(last)
    again = [acquire(slots), acquire(slots), acquire(slots, urgent=True)]
    assert {id(slot) for slot in again} == {id(one), id(two), id(last)}, "there are three"
    slots.close()


def test_a_buffer_not_made_yet_and_one_that_is_free_are_two() -> None:
    slots = Slots(2, HostBuffers(4096))
    one = acquire(slots)
    assert one is not None
    slots.release(one)
    assert acquire(slots) is one
    assert acquire(slots) is None
    slots.close()


def test_all_that_were_made_are_given_back_at_the_end() -> None:
    buffers = mock.Mock(acquire=mock.Mock(side_effect=lambda: mmap.mmap(-1, 4096)))
    slots = Slots(3, buffers)
    taken = [acquire(slots), acquire(slots)]
    slots.close()
    assert [call.args[0] for call in buffers.release.mock_calls] == taken
    slots.close()
    assert buffers.release.call_count == 2


def test_who_waits_gets_what_is_given_back_or_learns_that_it_is_over() -> None:
    slots, stop = Slots(1, HostBuffers(4096)), threading.Event()
    first = slots.acquire(True, stop, lambda: True)
    assert first is not None
    got: list[Any] = []
    threads = [threading.Thread(target=lambda: got.append(slots.acquire(True, stop, lambda: True))) for _ in range(2)]
    for thread in threads:
        thread.start()
    slots.release(first)
    stop.set()
    slots.wake()
    for thread in threads:
        thread.join(30)
    assert sorted(got, key=lambda slot: slot is None)[1:] == [None]
    assert slots.acquire(True, stop, lambda: False) is None
    slots.close()


# ---------------------------------------------------------------------------- order


def test_ranges_are_hashed_in_their_order_and_each_is_let_go_once_it_is() -> None:
    freed: list[int] = []
    ordered = OrderedHash(b"head")
    ranges = {4: [b"ab", b"c"], 7: [b"defg"], 11: [b"h"]}
    for offset in (11, 7, 4):
        views = [memoryview(bytearray(part)) for part in ranges[offset]]
        assert ordered.position == 4
        ordered.add(offset, sum(map(len, views)), views, lambda offset=offset: freed.append(offset))  # type: ignore[misc]
        assert not views or offset != 4, "views are let go of with what they are of"
    assert (freed, ordered.position) == ([4, 7, 11], 12)
    assert ordered.hexdigest() == hashlib.sha256(b"headabcdefgh").hexdigest()


def test_what_waits_for_what_does_not_come_is_forgotten() -> None:
    ordered = OrderedHash(b"")
    ordered.add(5, 1, [memoryview(b"x")], lambda: pytest.fail("it was not hashed"))
    ordered.clear()
    ordered.add(0, 5, [memoryview(b"abcde")], lambda: None)
    assert (ordered.position, ordered.hexdigest()) == (5, hashlib.sha256(b"abcde").hexdigest())


# ---------------------------------------------------------------------------- a share


def test_a_share_waits_for_a_landing_unless_it_is_told_not_to() -> None:
    whole, extent = mock.Mock(stopped=False), Extent(0, 0)
    share = Share(whole)
    assert share.landing(extent) is whole.landing.return_value
    share.landing(extent, wait=False)
    assert whole.landing.mock_calls == [mock.call(extent, wait=True), mock.call(extent, wait=False)]
    share.wait(1.5)
    share.wait(2.5, "buffers")
    assert whole.wait.mock_calls == [mock.call(1.5, "source"), mock.call(2.5, "buffers")]
    share.phase("copying", "peer")
    share.phase("copying")
    assert whole.phase.mock_calls == [mock.call("copying", "peer"), mock.call("copying", "")]
    landing = Landing([], 0)
    share.landed(extent, landing)
    share.abandon(landing)
    assert (whole.landed.mock_calls, whole.abandon.mock_calls) == ([mock.call(extent, landing)], [mock.call(landing)])
