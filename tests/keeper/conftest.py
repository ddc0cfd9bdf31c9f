from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.keeper.made import Made, Time
from weightd.daemon.keeper import supervisor

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr(supervisor, "time", clock)
    return clock


@pytest.fixture
def make(tmp_path: Path, clock: Time) -> Iterator[Any]:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    made: list[Made] = []

    def make(**options: Any) -> Made:
        made.append(Made(tmp_path / f"run{len(made)}", **options))
        return made[-1]

    yield make
    signal.set_wakeup_fd(-1)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for keeper in made:
        for fd in keeper._held.values():
            os.close(fd)
        keeper._hang_up()
        keeper.theirs.close()
