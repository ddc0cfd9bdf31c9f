"""The engines' environments, with weightd beside the engine as its wheel would put it there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

import weightd.ipc

ENVIRONMENTS = Path(sys.executable).parents[1]
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def python(engine: str) -> Path:
    """The interpreter of an engine's environment; else the test is skipped."""
    found = ENVIRONMENTS / engine / "bin" / "python"
    if not found.exists():
        pytest.skip(f"{engine} is not here: make test-engines")
    return found


def beside(folder: Path) -> Path:
    """A folder for an engine's ``PYTHONPATH``: ``weightd.ipc``, with its entry points, and nothing of the daemon."""
    (folder / "weightd").mkdir(parents=True)
    (folder / "weightd" / "ipc").symlink_to(Path(weightd.ipc.__file__).resolve().parent)
    project = tomllib.loads((ROOT / "ipc" / "pyproject.toml").read_text())["project"]
    information = folder / f"weightd_ipc-{project['version']}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: weightd-ipc\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    text = "\n".join(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups)
    (information / "entry_points.txt").write_text(text)
    return folder


def environment(engine: str, home: Path, paths: Iterable[Path]) -> dict[str, str]:
    """The variables that an engine's process starts with."""
    home.mkdir(parents=True, exist_ok=True)
    return {
        "PATH": f"{python(engine).parent}:{os.environ['PATH']}", "HOME": str(home), "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": ":".join(map(str, paths)), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip


class Driven:
    """An engine in a process of its own, which a script there drives: a line of JSON asks, a line of JSON answers."""

    def __init__(
        self, engine: str, script: str, settings: Mapping[str, Any], variables: Mapping[str, str], folder: Path
    ) -> None:
        self._errors = folder / "stderr"
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [python(engine), HERE / script, json.dumps(settings)],
                env=dict(variables), cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                text=True, start_new_session=True,
            )  # fmt: skip
        self.log = ""
        """What it has said on its standard output so far."""

    def answer(self) -> Any:
        """What it says next. Raises RuntimeError with the end of its log where it ends instead."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
            self.log += line
        raise RuntimeError(f"the engine has ended:\n{self.log[-4000:]}\n{self._errors.read_text()[-4000:]}")

    def ask(self, what: str, **arguments: Any) -> Any:
        """Have it do something; returns what that gives."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    @property
    def said(self) -> str:
        """All of its log."""
        return self.log + self._errors.read_text()

    def __enter__(self) -> Driven:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it as its user would, and read its log to the end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.log += self.process.stdout.read()
            self.process.wait(60)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, 9)
                self.process.wait()
