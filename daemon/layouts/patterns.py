"""Many glob patterns over many names: which is the first that matches.

One by one they would be compared pattern times name, an hour for a request of a few MB. Patterns without a wildcard,
and with one ``*`` at one end, are looked up instead; of all others the number of comparisons is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import translate

from weightd.daemon.errors import Cancelled, InvalidRequest

MAX_COMPARISONS = 20_000_000
"""Of names with patterns that have to be compared: half a minute."""
MAX_COMPARED = 10_000
"""Patterns that have to be compared: each is compiled."""
_LOOK_AT_CANCELLATION = 256
_WILD = re.compile(r"[*?\[]")


class Patterns:
    """Glob patterns, as ``fnmatch`` has them, in their order; ``field`` is where the request has them."""

    def __init__(
        self, patterns: Sequence[str], field: str, names: int, cancelled: Callable[[], bool] = lambda: False
    ) -> None:
        """For ``names`` names. Raises InvalidRequest where comparing would take too long; Cancelled."""
        self._cancelled = cancelled
        self._tries = 0
        self._exact: dict[str, int] = {}
        self._prefixes: dict[str, int] = {}
        self._suffixes: dict[str, int] = {}
        compared = []
        for index, pattern in enumerate(patterns):
            if not _WILD.search(pattern):
                self._exact.setdefault(pattern, index)
            elif pattern.endswith("*") and not _WILD.search(pattern[:-1]):
                self._prefixes.setdefault(pattern[:-1], index)
            elif pattern.startswith("*") and not _WILD.search(pattern[1:]):
                self._suffixes.setdefault(pattern[1:], index)
            else:
                compared.append((index, pattern))
        if len(compared) > MAX_COMPARED or len(compared) * names > MAX_COMPARISONS:
            raise InvalidRequest(
                f"{field}: {len(compared)} patterns, {compared[0][1]!r} the first of them, have to be compared with "
                f"each of {names} tensors, at most {min(MAX_COMPARED, MAX_COMPARISONS // max(1, names))} may: name "
                "tensors in full, or by patterns with one * at one end, of which there may be any number"
            )
        self._prefix_lengths = sorted({len(prefix) for prefix in self._prefixes})
        self._suffix_lengths = sorted({len(suffix) for suffix in self._suffixes})
        self._compared = [(index, self._compile(pattern)) for index, pattern in compared]

    def _compile(self, pattern: str) -> Callable[[str], object]:
        self._look()
        return re.compile(translate(pattern)).match

    def _look(self) -> None:
        self._tries += 1
        if self._tries % _LOOK_AT_CANCELLATION == 0 and self._cancelled():
            raise Cancelled("the stage was cancelled while it was planned")

    def first(self, name: str) -> int | None:
        """Index of the first pattern that matches; None where none does. Raises Cancelled."""
        self._look()
        found = [
            self._exact.get(name),
            *(self._prefixes.get(name[:length]) for length in self._prefix_lengths if length <= len(name)),
            *(self._suffixes.get(name[len(name) - length :]) for length in self._suffix_lengths if length <= len(name)),
        ]
        best = min((index for index in found if index is not None), default=None)
        for index, matches in self._compared:
            if best is not None and index > best:
                break
            if matches(name):
                return index
        return best
