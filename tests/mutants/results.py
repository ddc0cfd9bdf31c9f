"""What came of trials: kept as they end, a line for each, and told by module."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.changes import Change


@dataclass(frozen=True)
class Result:
    """Which test noticed a change, or none."""

    change: Change
    noticed: str | None
    tests: int
    """How many were to be tried."""
    diff: str


class Results:
    """Those of one commit, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._found: dict[str, dict[str, object]] = {found["key"]: found for found in map(json.loads, lines)}

    def __contains__(self, change: Change) -> bool:
        return change.key in self._found

    def add(self, result: Result) -> None:
        found = {"key": result.change.key, "noticed": result.noticed, "tests": result.tests, "diff": result.diff}
        self._found[result.change.key] = found
        with self._path.open("a") as file:
            file.write(json.dumps(found) + "\n")

    def survived(self, change: Change) -> bool:
        return change in self and self._found[change.key]["noticed"] is None

    def tests(self, change: Change) -> object:
        return self._found[change.key]["tests"]

    def diff(self, change: Change) -> object:
        return self._found[change.key]["diff"]


def table(results: Results, tried: Iterable[Change]) -> str:
    """Each change that survived, and then a line for each module."""
    modules: dict[str, list[Change]] = {}
    for change in tried:
        if change in results:
            modules.setdefault(change.module, []).append(change)
    survivors = [change for found in modules.values() for change in found if results.survived(change)]
    text = [f"{change}, {results.tests(change)} tests\n{results.diff(change)}\n" for change in survivors]
    text.append(f"{'tried':>6} {'killed':>6} {'survived':>8}")
    whole = [change for found in modules.values() for change in found]
    for name, found in [*modules.items(), ("all", whole)]:
        left = sum(results.survived(change) for change in found)
        percent = f"{100 * (len(found) - left) / max(len(found), 1):.0f} %"
        text.append(f"{len(found):6} {len(found) - left:6} {left:8}  {percent:>5}  {name}")
    return "\n".join(text)
