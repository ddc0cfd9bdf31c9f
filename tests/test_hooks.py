"""The hooks of pre-commit: what ``make check`` runs, no more and no less."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent


def commands(*targets: str) -> list[str]:
    """What make would run for these, with all that they need installed."""
    installed = [argument for stamp in ("weightd", "test") for argument in ("-o", f".venv/{stamp}.stamp")]
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "VENV=.venv", *installed, *targets],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


def test_the_hooks_run_what_make_check_runs_and_fetch_nothing() -> None:
    (source,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert source["repo"] == "local"
    targets = []
    for hook in source["hooks"]:
        assert (hook["language"], hook["pass_filenames"]) == ("system", False), hook["id"]
        program, silent, target = shlex.split(hook["entry"])
        assert (program, silent) == ("make", "--silent")
        assert all(re.search(hook["files"], path) for path in ("daemon/cli.py", "pyproject.toml")), hook["id"]
        targets.append(target)
    checks = commands("check")
    assert len(checks) == len(targets)
    assert commands(*targets) == checks
