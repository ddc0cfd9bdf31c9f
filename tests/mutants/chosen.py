"""Runs the tests that reach the line in which the tree differs from its commit, the fastest first, until one fails.

What cosmic-ray runs for each change, in the clone that has it. Its exit code says whether a test has noticed.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

from coverage import CoverageData

COVERAGE = "coverage"
"""Folder of what each test file reaches, a file of data for each."""
SECONDS = "seconds"
"""How long they take, there."""
AT_ONCE = 600
"""Seconds after which a file of tests counts as failed: a change may be one that waits for ever."""


def changed(diff: str) -> dict[str, set[int]]:
    """Lines of the files that differ, by what was there before."""
    found: dict[str, set[int]] = {}
    lines: set[int] = set()
    for line in diff.splitlines():
        if line.startswith("--- a/"):
            lines = found.setdefault(line.removeprefix("--- a/"), set())
        elif at := re.match(r"@@ -(\d+)(?:,(\d+))? ", line):
            first, count = int(at[1]), int(at[2] or 1)
            lines.update(range(first, first + max(count, 1)))
    return found


def reaching(tree: Path, places: dict[str, set[int]]) -> list[str]:
    """Test files that reach any of the statements in these lines, the fastest first."""
    seconds = dict[str, float]()
    for text in (tree.parent / COVERAGE / SECONDS).read_text().splitlines():
        time, _, test = text.partition(" ")
        seconds[test] = float(time)
    wanted = {
        str(tree / file): {line for changed_line in lines for line in statement(before(file), changed_line)}
        for file, lines in places.items()
    }
    found = []
    for test in seconds:
        data = CoverageData(str(tree.parent / COVERAGE / test.replace("/", ".")))
        data.read()
        if any(not lines.isdisjoint(data.lines(file) or ()) for file, lines in wanted.items()):
            found.append(test)
    return sorted(found, key=seconds.__getitem__)


def before(file: str) -> str:
    """What the commit has."""
    return subprocess.run(["git", "show", f"HEAD:{file}"], check=True, stdout=subprocess.PIPE, text=True).stdout


def statement(source: str, line: int) -> range:
    """The lines of the innermost statement that a line is of, without those of what is inside it."""
    found = range(line, line + 1)
    for node in ast.walk(ast.parse(source)):  # outer ones first
        if isinstance(node, ast.stmt) and node.end_lineno:
            body = getattr(node, "body", None)
            end = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno
            if node.lineno <= line <= end:
                found = range(node.lineno, end + 1)
    return found


def main() -> int:
    tree = Path.cwd()
    diff = subprocess.run(["git", "diff", "--unified=0"], check=True, stdout=subprocess.PIPE, text=True).stdout
    files = reaching(tree, changed(diff))
    print(f"{len(files)} files of tests")
    for file in files:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", file]
        try:
            code = subprocess.run(command, check=False, timeout=AT_ONCE).returncode
        except subprocess.TimeoutExpired:
            code = 1
        if code:
            print(f"noticed by {file}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
