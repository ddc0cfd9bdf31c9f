from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.api.status.view import View
from tests.conftest import lacking

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-default-apps", "--disable-extensions",
]  # fmt: skip


@pytest.fixture(scope="module")
def _browser() -> Iterator[Any]:
    """Debian's Chromium, one for each module: playwright holds the thread's event loop while it runs."""
    chromium = shutil.which("chromium")
    if chromium is None or importlib.util.find_spec("playwright") is None:
        lacking("a browser: apt-get install chromium, and pip install playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def _view(_browser: Any) -> View:
    return View(_browser)


@pytest.fixture
def view(_view: View) -> View:
    """A page that is nowhere yet: the same in all tests of a module, because a new one takes seconds."""
    _view.reset()
    return _view


@pytest.fixture(scope="module")
def plain(_browser: Any) -> View:
    """A page without JavaScript."""
    return View(_browser, java_script_enabled=False)
