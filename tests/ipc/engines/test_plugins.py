"""What engines call when they start: it is found by them, costs nothing before, and never keeps one from starting."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from weightd.ipc.engines import plugins

ROOT = Path(__file__).parents[3]


def points(project: str) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = tomllib.loads((ROOT / project).read_text())["project"]["entry-points"]
    return found


def test_both_distributions_have_the_same_entry_points_and_each_is_a_function() -> None:
    assert points("pyproject.toml") == points("ipc/pyproject.toml")
    for group in points("pyproject.toml").values():
        for point in group.values():
            module, _, name = point.partition(":")
            assert callable(getattr(importlib.import_module(module), name))


def test_an_engine_that_cannot_have_it_starts_without_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        plugins.vllm()  # there is no vLLM here
    assert [record.message for record in caplog.records] == ["weightd: vLLM starts without it"] * 2
    assert all(record.levelno == logging.ERROR for record in caplog.records)


def test_finding_it_imports_neither_torch_nor_an_engine() -> None:
    code = "import sys, weightd.ipc.engines.plugins; print({'torch', 'vllm', 'sglang', 'httpx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
