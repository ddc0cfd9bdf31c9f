"""A plugin of pytest: has coverage note which test reaches a line, and notes how long each takes that passes.

Besides, what of other packages they have imported, so that trials begin with that.
"""

from __future__ import annotations

import json
import sys
import sysconfig
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import coverage
import pytest

seconds: dict[str, float] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reached", type=Path, required=True, help="file for how long each test takes")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """What fixtures reach is of the whole file: other tests may use what they made."""
    measured = coverage.Coverage.current()
    assert measured is not None
    measured.switch_context(item.nodeid)
    began = time.monotonic()
    try:
        result = yield
        seconds[item.nodeid] = time.monotonic() - began
        return result
    finally:
        measured.switch_context("")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    began = time.monotonic()
    result = yield
    item.stash[SETUP] = time.monotonic() - began
    return result


SETUP = pytest.StashKey[float]()


def pytest_runtest_teardown(item: pytest.Item) -> None:
    if item.nodeid in seconds:
        seconds[item.nodeid] += item.stash[SETUP]


def pytest_sessionfinish(session: pytest.Session) -> None:
    path: Path = session.config.getoption("--reached")
    installed = sysconfig.get_path("purelib")
    modules = {
        name for name, module in sys.modules.items() if (getattr(module, "__file__", None) or "").startswith(installed)
    }
    path.write_text(json.dumps({"seconds": seconds, "modules": sorted(modules)}, indent=0))
