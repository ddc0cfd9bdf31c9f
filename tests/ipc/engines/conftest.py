from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers import Daemon
from weightd.ipc import Weights

Lend = Callable[..., Weights]


@pytest.fixture
def lend(daemon: Daemon) -> Iterator[Lend]:
    """Attach; the lease lasts as long as the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *model, **options: stack.enter_context(daemon.attach(*model, **options))


def leases_of(daemon: Daemon, folder: Path) -> list[dict[str, Any]]:
    """This process's leases of a model."""
    return [lease for lease in daemon.client.leases() if lease["pid"] == os.getpid() and str(folder) in lease["model"]]
