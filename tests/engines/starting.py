"""Engines in environments of their own, with the shim as an image has it: ``weightd.ipc``, and its entry points."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

import weightd.ipc

ENVIRONMENTS = Path(sys.executable).parents[1]
HERE = Path(__file__).parent
DEADLINE = 600.0


def shim(folder: Path) -> Path:
    """A folder for PYTHONPATH with ``weightd.ipc`` alone, as if it were installed."""
    (folder / "weightd").mkdir(parents=True)
    (folder / "weightd" / "ipc").symlink_to(Path(weightd.ipc.__file__).parent)
    project = tomllib.loads((HERE.parents[1] / "ipc" / "pyproject.toml").read_text())["project"]
    about = folder / f"weightd_ipc-{project['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: weightd-ipc\nVersion: {project['version']}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {what}" for name, what in points.items())]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def python_of(engine: str) -> Path:
    """The interpreter of an engine's environment; else the test is skipped."""
    python = ENVIRONMENTS / engine / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{engine} is not here: make test-engines")
    return python


def environment_of(python: Path, home: Path) -> dict[str, str]:
    """What every process of an engine gets here: nothing of this machine's own."""
    return {
        "PATH": f"{python.parent}:{os.environ['PATH']}", "HOME": str(home), "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip


class Engine:
    """One engine process, that generates tokens as it is asked to; used in a ``with`` block.

    ``arguments`` are the engine's own; ``environment`` is added to what every engine gets here. ``home`` is a folder of
    its own, in which ``log`` is what it has said.
    """

    def __init__(
        self,
        engine: str,
        model: str,
        home: Path,
        prompts: Sequence[Sequence[int]],
        arguments: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        python = python_of(engine)
        home.mkdir()
        self.log = home / "log"
        self.home = home
        own = environment_of(python, home) | {"FOUND": str(home)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [python, HERE / f"run_{engine}.py", model, json.dumps(prompts), json.dumps(arguments or {})],
                env={**own, **(environment or {})}, cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, start_new_session=True,
            )  # fmt: skip

    def said(self) -> str:
        """What it has said so far."""
        return self.log.read_text(errors="replace")

    def tokens(self) -> list[list[int]]:
        """What it has generated, once it has."""
        assert self.process.stdout is not None
        alarm = threading.Timer(DEADLINE, self.process.kill)
        alarm.start()
        try:
            for line in self.process.stdout:
                if line.startswith("TOKENS "):
                    tokens: list[list[int]] = json.loads(line.removeprefix("TOKENS "))
                    return tokens
        finally:
            alarm.cancel()
        raise AssertionError(f"the engine has ended:\n{self.said()[-5000:]}")

    def ask(self, what: Sequence[Sequence[int]] | str) -> list[list[int]]:
        """Generate once more; with the weights of a folder, where one is named."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return self.tokens()

    def found(self, rank: int = 0) -> dict[str, Any]:
        """What has become of one process's model: its tensors' digests, and of ``weights`` what is lent."""
        told: dict[str, Any] = json.loads((self.home / f"{rank}.json").read_text())
        return told

    def end(self) -> None:
        """Let it end by itself; else it is killed."""
        if self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """kill -9 it, and all of its processes."""
        os.killpg(self.process.pid, 9)
        self.process.wait()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill() if kind else self.end()
