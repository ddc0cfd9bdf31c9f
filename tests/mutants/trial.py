"""One trial: whether any of some tests fails, in a process of its own that a change can neither hang nor outlive."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import re
import select
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import hypothesis
import pytest

PR_SET_CHILD_SUBREAPER = 36
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


class Trials:
    """Trials of the tests in ``tree``, with whose code and environment they run."""

    def __init__(self, tree: Path, env: Mapping[str, str], modules: Iterable[str]) -> None:
        """``modules``: of other packages, which are imported now, so that no trial has to."""
        self._tree = tree
        self._env = env
        for name in sorted(modules):
            with contextlib.suppress(Exception):  # some cannot be imported by themselves
                importlib.import_module(name)
        # What a trial leaves running becomes this process's child.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def noticed(self, tests: Sequence[str], seconds: float) -> str | None:
        """The test that fails, "time" where they have not ended after three times what they need and five seconds."""
        if not tests:
            return None
        folder = Path(tempfile.mkdtemp(prefix="mutant-"))  # short: sockets are in it
        try:
            pid = os.fork()
            if pid == 0:
                self._run(folder, tests)
            with open(os.pidfd_open(pid)) as over:
                ended = select.select([over], [], [], 5 + 3 * seconds)[0]
            if not ended:
                os.kill(pid, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            text = (folder / "output").read_text(errors="replace")
        finally:
            _end_children()
            shutil.rmtree(folder, ignore_errors=True)
        if not ended:
            return "time"
        if status == 0:
            return None
        failed = FAILED.search(text)
        return failed[1] if failed else f"exit status {status}"

    def _run(self, folder: Path, tests: Sequence[str]) -> None:
        code = 1
        try:
            os.setsid()
            fd = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            os.chdir(self._tree)
            os.environ.clear()
            os.environ.update(self._env)
            for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "weightd")]:
                del sys.modules[name]
            sys.path[:0] = self._env["PYTHONPATH"].split(os.pathsep)
            sys.dont_write_bytecode = True
            phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # smaller examples interest nobody
            hypothesis.settings.register_profile("trial", derandomize=True, database=None, phases=phases)
            options = ["-q", "-x", "--no-header", "--tb=line", "-p", "no:cacheprovider", "--hypothesis-profile=trial"]
            code = int(pytest.main([*options, f"--basetemp={folder / 'tmp'}", *tests]))
            sys.stdout.flush()
        finally:
            os._exit(code)


def _end_children() -> None:
    """End what the trial left running, whatever session it is in."""
    while True:
        for pid in Path("/proc/self/task").glob("*/children"):
            for child in pid.read_text().split():
                os.kill(int(child), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return
