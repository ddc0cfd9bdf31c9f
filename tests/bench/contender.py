"""A process of its own for each contender: ``python -m tests.bench.contender module:function '{"argument": ...}'``.

The function returns its sample, which goes to stdout as the last line, in JSON.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.bench.measure import Sample

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 1800.0
"""Seconds after which a contender is taken for stuck."""


_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class ContenderFailed(RuntimeError):
    """A contender's process ended without a sample; carries the end of what it said."""


def contend(function: str, *, environment: Mapping[str, str] | None = None, **arguments: Any) -> Sample:
    """Run ``module:function(**arguments)`` (module within this package) in a fresh process. Raises ContenderFailed."""
    command = [sys.executable, "-m", "tests.bench.contender", function, json.dumps(arguments)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    lines = out.strip().splitlines()
    if process.returncode or not lines:
        tail = "\n".join((err or out).strip().splitlines()[-8:])
        raise ContenderFailed(f"{function} ended with {process.returncode}:\n{tail}")
    sample: Sample = json.loads(lines[-1])
    return sample


def die_with_parent() -> None:
    """In a child, before exec: be killed when the parent dies, even where that is killed itself."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """The child's side."""
    module, _, name = sys.argv[1].partition(":")
    function = getattr(importlib.import_module(f"tests.bench.{module}"), name)
    sample = function(**json.loads(sys.argv[2]))
    print("\n" + json.dumps(sample), flush=True)
    # Freeing gigabytes page by page on the way out is nobody's measurement.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
