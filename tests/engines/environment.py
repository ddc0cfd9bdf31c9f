"""The engines' environments, with weightd beside the engine as its wheel would put it there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

import weightd.ipc

ENVIRONMENTS = Path(sys.executable).parents[1]
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DEADLINE = 600.0


def installed(name: str) -> Path:
    """A folder of what ``make test-engines`` installs; else the test is skipped."""
    if not (ENVIRONMENTS / f"{name}.stamp").exists():
        pytest.skip(f"{name} is not here: make test-engines")
    return ENVIRONMENTS / name


def python(engine: str) -> Path:
    """The interpreter of an engine's environment."""
    return installed(engine) / "bin" / "python"


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
    # What vLLM has found out of its own classes, each in ten seconds, is as good for the next process.
    cache = installed(engine) / "cache"
    return {
        "PATH": f"{python(engine).parent}:{os.environ['PATH']}", "HOME": str(home), "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": ":".join(map(str, paths)), "VLLM_NO_USAGE_STATS": "1", "VLLM_CACHE_ROOT": str(cache),
    }  # fmt: skip


class Driven:
    """An engine in a process of its own, which a script there drives: a line of JSON asks, a line of JSON answers.

    ``variables`` are all that it has, ``folder`` is where it works, and where ``log`` is what it has said. Used in a
    ``with`` block.
    """

    def __init__(
        self,
        engine: str,
        script: str,
        arguments: Mapping[str, Any] | Sequence[str],
        variables: Mapping[str, str],
        folder: Path,
    ) -> None:
        self.log = folder / "log"
        given = [json.dumps(arguments)] if isinstance(arguments, Mapping) else arguments
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [python(engine), HERE / script, *given],
                env=dict(variables), cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, start_new_session=True,
            )  # fmt: skip
        self._printed = ""

    def answer(self) -> Any:
        """What it says next; an engine that has been started, what it has generated. Raises RuntimeError with the end
        of its log where it ends instead, or is not done within ``DEADLINE`` seconds."""
        assert self.process.stdout is not None
        alarm = threading.Timer(DEADLINE, self.kill)
        alarm.start()
        try:
            for line in self.process.stdout:
                kind, _, answer = line.partition(" ")
                if kind in ("ANSWER", "TOKENS"):
                    return json.loads(answer)
                self._printed += line
        finally:
            alarm.cancel()
        raise RuntimeError(f"the engine has ended:\n{self.said[-8000:]}")

    def ask(self, what: str, **arguments: Any) -> Any:
        """Have it do something; returns what that gives."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    @property
    def said(self) -> str:
        """What it has said so far."""
        return self._printed + self.log.read_text(errors="replace")

    def kill(self) -> None:
        """kill -9 it, and all of its processes."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Driven:
        return self

    def __exit__(
        self, kind: type[BaseException] | None = None, value: object = None, trace: TracebackType | None = None
    ) -> None:
        """End it as its user would."""
        if self.process.poll() is not None:
            return
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()
