"""Which tests reach a line, and how long they take."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coverage import CoverageData


def file_of_data(folder: Path, test: str, content: bytes) -> Path:
    """Where what a file of tests reaches is kept, as it is now."""
    return folder / f"{test.replace('/', '.')}-{hashlib.sha256(content).hexdigest()[:12]}"


@dataclass(frozen=True)
class Tests:
    """Tests in the order in which they are tried."""

    names: Sequence[str]
    seconds: float
    """How long they take together on code that is not changed."""


class Reached:
    """What ``noting`` and coverage noted of files of tests."""

    def __init__(self, data: Sequence[Path], tree: Path) -> None:
        self._tree = tree
        self.modules = set[str]()
        """What they import of other packages."""
        self._data: list[tuple[CoverageData, dict[str, float]]] = []
        for path in data:
            one = CoverageData(str(path))
            one.read()
            noted = json.loads(Path(f"{path}.json").read_text())
            self._data.append((one, noted["seconds"]))
            self.modules.update(noted["modules"])

    def tests(self, module: str, lines: range, within: float) -> Tests:
        """Those that reach any of these lines, the fastest first; first those that do it in their own process."""
        themselves: dict[str, float] = {}
        perhaps: dict[str, float] = {}
        for one, seconds in self._data:
            contexts = one.contexts_by_lineno(str(self._tree / module))
            inside = {
                test for line in lines for context in contexts.get(line, ()) for test in [context.partition("|")[2]]
            }
            themselves.update({test: seconds[test] for test in inside if test in seconds})
            if "" in inside:
                perhaps.update(seconds)
        names: list[str] = []
        total = 0.0
        for some in (themselves, perhaps):
            for name in sorted(some.keys() - set(names), key=some.__getitem__):
                if names and total + some[name] > within:
                    break
                names.append(name)
                total += some[name]
        return Tests(names, total)
