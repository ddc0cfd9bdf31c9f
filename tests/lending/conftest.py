from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator

import pytest


@pytest.fixture
def opened() -> Iterator[contextlib.ExitStack]:
    """Connections that are closed at the end; this process may have as many as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.ExitStack() as stack:
        yield stack
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
