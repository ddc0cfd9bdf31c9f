"""What would import an engine again and again: forks of one process that has imported it."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.engines.environment import HERE, environment, python

DEADLINE = 600.0


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
        variables = environment(self.engine_name, home, []) | dict(environ)
        return Run(connection, [*arguments], variables, home)


class Run:
    """One fork, with ``lines`` as its standard output; it and all of its processes have ended where these end."""

    def __init__(
        self, connection: socket.socket, arguments: Sequence[str], variables: Mapping[str, str], home: Path
    ) -> None:
        self.home = home
        self.lines = connection.makefile("r")
        connection.sendall(json.dumps([arguments, variables, str(home)]).encode() + b"\n")

    def said(self) -> str:
        """What it has logged so far."""
        return (self.home / "log").read_text(errors="replace")
