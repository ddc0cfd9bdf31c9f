"""Engines that generate tokens as they are asked to, and layouts that are made ahead of their first start."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.engines.environment import HERE, environment, python
from tests.servers import Daemon

DEADLINE = 600.0


class Engine:
    """One engine process, that generates tokens as it is asked to; used in a ``with`` block.

    ``arguments`` are the engine's own; ``environ`` is added to what every engine gets here. ``home`` is a folder of
    its own, in which ``log`` is what it has said.
    """

    def __init__(
        self,
        engine: str,
        model: str,
        home: Path,
        prompts: Sequence[Sequence[int]],
        arguments: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        own = environment(engine, home, []) | {"FOUND": str(home)} | dict(environ or {})
        self.log = home / "log"
        self.home = home
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [python(engine), HERE / f"run_{engine}.py", model, json.dumps(prompts), json.dumps(arguments or {})],
                env=own, cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
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


def ahead(engine: str, path: Path, daemon: Daemon, home: Path, *options: str) -> list[dict[str, Any]]:
    """What ``weightd trace`` says of each of an engine's processes, in the engine's own environment."""
    # SGLang's needs what this script stubs of torchvision.
    program = [HERE / "run_sglang.py", "trace"] if engine == "sglang" else ["-m", "weightd.ipc.engines.ahead"]
    done = subprocess.run(
        [python(engine), *program, "--engine", engine, *options],
        env=environment(engine, home, [path]) | {"WEIGHTD_RUNTIME_DIR": str(daemon.runtime_dir)},
        cwd=home, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def another(about: dict[str, Any]) -> dict[str, Any]:
    """A layout that goes by the key of one that is not it."""
    return {
        "key": about, "entries": [["model.norm.weight", "BF16", [256]]], "boxes": [[[256], [1], [1]]],
        "copies": [[0, 0, 0, 0, 0]], "casts": [], "constants": [],
    }  # fmt: skip
