"""One thing that ``weightd doctor`` looked at."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """``remedy`` is empty where there is nothing to mend."""

    what: str
    level: Literal["ok", "warning", "error"]
    found: str
    remedy: str = ""
