"""A stage's clock: phases that add up, whatever threads do at the same time."""

from __future__ import annotations

import random
import threading
import time

import pytest

from weightd.daemon.observing import clock as clocks
from weightd.daemon.observing.clock import STAGE_PHASES, Clock, by_phase


class Time:
    """Monotonic seconds that go on when they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(clocks.time, "monotonic", lambda: self.now)

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)


def spent(clock: Clock) -> dict[str, float]:
    return {phase: seconds for phase, seconds in by_phase(clock.spent()).items() if seconds}


def test_a_stage_is_in_one_phase_after_the_other(passing: Time) -> None:
    clock = Clock(98.0, "listing")
    clock.enter("queued")
    passing.passes(3)
    clock.enter("headers")
    passing.passes(1)
    clock.enter("queued")
    passing.passes(1)
    assert spent(clock) == {"listing": 2, "queued": 4, "headers": 1}


def test_a_moment_is_shared_out_among_the_threads_that_are_at_something(passing: Time) -> None:
    clock = Clock()
    clock.enter("other")
    passing.passes(1)
    for _ in range(3):
        clock.join("source")
    clock.join("verifying")
    passing.passes(4)
    clock.leave("verifying")
    passing.passes(1)
    for _ in range(3):
        clock.leave("source")
    passing.passes(2)
    assert spent(clock) == {"other": 3, "source": 4, "verifying": 1}


def test_waiting_is_told_apart_by_what_it_waits_for(passing: Time) -> None:
    clock = Clock()
    clock.join("source")
    clock.origin = "s3"
    clock.join("source", "peer")
    passing.passes(4)
    clock.leave("source")
    passing.passes(1)
    assert clock.spent() == {("source", "s3"): 2, ("source", "peer"): 3}


def test_nothing_counts_once_it_has_stopped(passing: Time) -> None:
    clock = Clock()
    clock.join("copying")
    passing.passes(2)
    clock.stop()
    passing.passes(5)
    clock.leave("copying")
    clock.enter("verifying")
    passing.passes(5)
    assert spent(clock) == {"copying": 2}


def test_what_the_daemon_before_has_not_noted_down_is_other(passing: Time) -> None:
    before = Clock(90.0)
    before.join("source")
    noted = before.spent()
    passing.passes(7)
    clock = Clock.taken_over(before.began, noted, stopped=False)
    passing.passes(1)
    assert clock.began == 90
    assert spent(clock) == {"queued": 11, "other": 7}
    ended = Clock.taken_over(before.began, noted, stopped=True)
    passing.passes(50)
    assert spent(ended) == {"queued": 10}


def test_phases_add_up_to_the_duration_whatever_threads_do() -> None:
    clock = Clock()

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            phase, source = rng.choice(sorted(STAGE_PHASES)), rng.choice(("", "peer"))
            clock.join(phase, source)
            time.sleep(rng.random() / 10_000)
            clock.leave(phase, source)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    before = time.monotonic()
    total = sum(clock.spent().values())
    assert before - clock.began <= total <= time.monotonic() - clock.began
    assert by_phase(clock.spent()).keys() == STAGE_PHASES.keys()
