"""Tries every small change that cosmic-ray knows, each with the tests that run through the changed line.

``python -m tests.mutants [--tests FOLDER,...] [MODULE...]``: modules as paths, by default those of ``MODULES``. All is
done in ``.mutants/COMMIT``, in a clone of the commit that is checked out; where it is interrupted, the same
command goes on. Survivors are in ``report`` there, with the change and how many test files were tried.

First each test file is run once, alone, and ``coverage`` notes which lines it reached, in the daemons that it started
too. A file is the unit because its tests share daemons.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutants.chosen import COVERAGE, SECONDS

ROOT = Path(__file__).parents[2]
MODULES = (
    "daemon/layouts", "daemon/filling", "daemon/stages", "daemon/keeper", "daemon/lending", "daemon/peers/serving",
    "daemon/peers/pulling", "ipc",
)  # fmt: skip
LEFT_OUT = {"bench", "chart", "gpu", "image", "mutants"}
"""Folders of tests that run nothing of these, or not here."""
RULES = """[run]
parallel = true
patch = subprocess
sigterm = true
source = {tree}/daemon, {tree}/ipc, {tree}/api
"""
SESSION = """[cosmic-ray]
module-path = {modules}
timeout = 3600.0
excluded-modules = []
test-command = "{python} -m tests.mutants.chosen"

[cosmic-ray.distributor]
name = "local"

[cosmic-ray.filters.operators-filter]
exclude-operators = ["core/ReplaceBinaryOperator_BitOr_.*"]
"""
"""Of ``|`` nearly all are in type hints, which nothing evaluates."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--tests", default="tests", help="folders or files of tests, with commas between")
    parser.add_argument("modules", nargs="*", default=MODULES)
    wanted = parser.parse_args()
    commit = output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    folder = ROOT / ".mutants" / commit[:12]
    tree = folder / "tree"
    if not tree.exists():
        run("git", "clone", "--quiet", "--shared", str(ROOT), str(tree))
        (folder / "path" / "weightd").mkdir(parents=True)
        for name in ("api", "daemon", "ipc"):
            (folder / "path" / "weightd" / name).symlink_to(tree / name)
    run("git", "checkout", "--quiet", "--force", commit, cwd=tree)  # a change may be left over
    env = {**os.environ, "PYTHONPATH": f"{folder / 'path'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    cover(tree, folder, wanted.tests.split(","), env)
    mutate(tree, folder, wanted.modules, env)


def cover(tree: Path, folder: Path, tests: Sequence[str], env: dict[str, str]) -> None:
    """Run each test file that has not been run yet, and note what it reaches and how long it takes."""
    data = folder / COVERAGE
    data.mkdir(exist_ok=True)
    rules = folder / "coveragerc"
    rules.write_text(RULES.format(tree=tree))
    files = sorted({file for name in tests for file in found(tree, name)})
    for file in files:
        name = file.replace("/", ".")
        if (data / name).exists():
            continue
        began = time.monotonic()
        command = ["-m", "coverage", "run", f"--rcfile={rules}", f"--data-file={data / 'part'}", f"--context={file}"]
        print(f"{file} ...", flush=True)
        run(sys.executable, *command, "-m", "pytest", "-q", "--no-header", file, cwd=tree, env=env, check=False)
        seconds = time.monotonic() - began
        combine = ["-m", "coverage", "combine", f"--rcfile={rules}", f"--data-file={data / (name + '.new')}"]
        parts = [str(part) for part in data.glob("part.*")]
        if parts:
            run(sys.executable, *combine, "--quiet", *parts, cwd=tree, env=env)
            (data / f"{name}.new").rename(data / name)
        with (data / SECONDS).open("a") as times:
            times.write(f"{seconds:.1f} {file}\n")


def found(tree: Path, name: str) -> list[str]:
    """Test files of a folder, or a file."""
    path = tree / name
    files = [path] if path.is_file() else path.rglob("test_*.py")
    inside = [file.relative_to(tree) for file in files]
    return [str(file) for file in inside if not LEFT_OUT.intersection(file.parts)]


def mutate(tree: Path, folder: Path, modules: Sequence[str], env: dict[str, str]) -> None:
    """Try all changes of these modules that have not been tried yet, and write the report."""
    name = "-".join(module.replace("/", ".") for module in modules)[:100]
    session, rules = folder / f"{name}.sqlite", folder / f"{name}.toml"
    tool = Path(sys.executable).parent
    rules.write_text(SESSION.format(modules=list(modules), python=sys.executable))
    if not session.exists():
        run(str(tool / "cosmic-ray"), "init", str(rules), str(session), cwd=tree, env=env)
        run(str(tool / "cr-filter-operators"), str(session), str(rules), cwd=tree, env=env)
    run(str(tool / "cosmic-ray"), "exec", str(rules), str(session), cwd=tree, env=env)
    text = output(str(tool / "cr-report"), "--surviving-only", "--show-diff", "--show-output", str(session))
    report = folder / f"{name}.report"
    report.write_text(text)
    print(*text.splitlines()[-4:], report, sep="\n")


def run(*command: str, cwd: Path = ROOT, env: dict[str, str] | None = None, check: bool = True) -> None:
    subprocess.run(command, cwd=cwd, env=env, check=check)


def output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


if __name__ == "__main__":
    main()
