"""Engines that start in seconds: forks of one process that has imported what they need."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.engines.environment import HERE, environment, python

DEADLINE = 600.0
Prompts = Sequence[Sequence[int]]


class Host:
    """A process that has imported an engine, and forks what is asked of it; used in a ``with`` block.

    ``script`` is one that does ``forks.listen``, ``paths`` are what it imports from besides.
    """

    def __init__(self, engine: str, script: str, folder: Path, *paths: Path) -> None:
        self.engine_name = engine
        self._socket = folder / "socket"
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [python(engine), HERE / script, "listen", self._socket],
                env=environment(engine, folder, paths), cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=log, text=True, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Host:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("LISTENING"):
                return self
        raise AssertionError(f"{self.engine_name} cannot be imported:\n{self._log.read_text()[-5000:]}")

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def run(self, arguments: Sequence[str], home: Path, environ: Mapping[str, str]) -> Run:
        """The script with these arguments; ``environ`` is added to what every engine gets here."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(DEADLINE)
        connection.connect(str(self._socket))
        variables = environment(self.engine_name, home, []) | {"FOUND": str(home)} | dict(environ)
        return Run(connection, [*arguments], variables, home)

    def engine(
        self,
        model: str,
        home: Path,
        prompts: Prompts,
        arguments: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Engine:
        """An engine, with arguments of its own; ``home`` is a folder of its own."""
        return Engine(self.run([model, json.dumps(prompts), json.dumps(arguments or {})], home, environ or {}))

    def ahead(self, home: Path, environ: Mapping[str, str], *options: str) -> list[dict[str, Any]]:
        """What ``weightd trace`` says of each of an engine's processes."""
        run = self.run(["trace", "--engine", self.engine_name, *options], home, environ)
        told = [json.loads(line) for line in run.lines if line.startswith("{")]
        assert told, run.said()[-5000:]
        return told


class Run:
    """One fork, with ``lines`` as its standard output; it and all of its processes have ended where these end."""

    def __init__(
        self, connection: socket.socket, arguments: Sequence[str], variables: Mapping[str, str], home: Path
    ) -> None:
        self.home = home
        self._connection = connection
        self.lines = connection.makefile("r")
        self.say([arguments, variables, str(home)])
        self._group = int(self.lines.readline())

    def say(self, what: Any) -> None:
        """A line of its standard input."""
        self._connection.sendall(json.dumps(what).encode() + b"\n")

    def said(self) -> str:
        """What it has logged so far."""
        return (self.home / "log").read_text(errors="replace")

    def end(self) -> None:
        """Let it end by itself; else it is killed."""
        self._connection.shutdown(socket.SHUT_WR)
        self._connection.settimeout(60)
        try:
            self.lines.read()
        except (TimeoutError, ConnectionError):
            self.kill()

    def kill(self) -> None:
        """kill -9 it, and all of its processes."""
        try:
            os.killpg(self._group, signal.SIGKILL)
        except ProcessLookupError:
            return


class Engine:
    """An engine that generates tokens as it is asked to; used in a ``with`` block."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.said = run.said
        self.kill = run.kill

    def tokens(self) -> list[list[int]]:
        """What it has generated, once it has. Raises AssertionError with the end of its log where it ends instead."""
        for line in self._run.lines:
            if line.startswith("TOKENS "):
                tokens: list[list[int]] = json.loads(line.removeprefix("TOKENS "))
                return tokens
        raise AssertionError(f"the engine has ended:\n{self.said()[-5000:]}")

    def ask(self, what: Prompts | str) -> list[list[int]]:
        """Generate once more; with the weights of a folder, where one is named."""
        self._run.say(what)
        return self.tokens()

    def found(self, rank: int = 0) -> dict[str, Any]:
        """What has become of one process's model: its tensors' digests, and of ``weights`` what is lent."""
        told: dict[str, Any] = json.loads((self._run.home / f"{rank}.json").read_text())
        return told

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run.kill() if kind else self._run.end()
