"""The table of values in the chart's README, written by ``python -m charts.readme`` from the comments of values.yaml.

A value's text is the comment in front of it that begins with ``# --``; lines in it that begin with ``-`` are points.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

CHART = Path(__file__).parent / "weightd"
FILE = CHART / "README.md"
BEGIN, END = "<!-- values -->\n", "<!-- end of values -->\n"


class Value(NamedTuple):
    """One value, by the path of its keys."""

    path: tuple[str, ...]
    default: Any
    text: str
    """Empty where no comment says anything of it."""


def documented(source: str) -> list[Value]:
    """All values that have a comment, and those that have none and none in what they are part of."""
    root = yaml.compose(source, yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    return list(_values(root, (), source.splitlines()))


def _values(node: yaml.MappingNode, above: tuple[str, ...], lines: list[str]) -> Iterator[Value]:
    for key, value in node.value:
        path = (*above, key.value)
        text = _comment(lines, key.start_mark.line)
        if text or not (isinstance(value, yaml.MappingNode) and value.value):
            loader = yaml.SafeLoader("")
            yield Value(path, loader.construct_object(value, deep=True), text)
        else:
            yield from _values(value, path, lines)


def _comment(lines: list[str], line: int) -> str:
    """The comment that ends above a line, from ``# --`` on."""
    found: list[str] = []
    while line and (stripped := lines[line - 1].strip()).startswith("#"):
        line -= 1
        if stripped.startswith("# -- "):
            return "\n".join([stripped[5:], *reversed(found)])
        found.append(stripped.removeprefix("#").removeprefix(" "))
    return ""


def table(values: list[Value]) -> str:
    """A section for each group of values, and a table in each."""
    groups: dict[str, list[Value]] = {}
    for value in values:
        groups.setdefault(value.path[0] if len(value.path) > 1 else "", []).append(value)
    parts = []
    for group, members in sorted(groups.items(), key=lambda item: item[0] != ""):
        parts.append(f"### {f'`{group}`' if group else 'General'}\n")
        parts.append("| value | meaning | default |\n| --- | --- | --- |")
        parts += [
            f"| `{'.'.join(value.path)}` | {_cell(value.text)} | {_default(value.default)} |" for value in members
        ]
        parts.append("")
    return "\n".join(parts)


def _cell(text: str) -> str:
    points = re.split(r"\n- ", text)
    return "<br>• ".join(" ".join(point.split()) for point in points).replace("|", "\\|")


def _default(value: Any) -> str:
    return f"`{json.dumps(value)}`".replace("|", "\\|") if value not in ("", None) else ""


def rendered() -> str:
    """The README's text."""
    text = FILE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + table(documented((CHART / "values.yaml").read_text())) + "\n" + END + after


if __name__ == "__main__":
    FILE.write_text(rendered())
