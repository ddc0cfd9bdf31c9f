"""docs/architecture.md: what it names is there, and its rooms are those that import-linter keeps."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()
NAMED = sorted(set(re.findall(r"`((?:api|daemon|ipc|tests)/[\w/]*(?:\.py(?::[\w.]+)?)?)`", PAGE)))


def definitions(body: list[ast.stmt], prefix: str = "") -> set[str]:
    """Dotted names of what a body defines: classes, functions, what is assigned, and what is in those."""
    found: set[str] = set()
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found |= {prefix + node.name} | definitions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_it_names_files_in_every_room() -> None:
    assert len(NAMED) > 80
    rooms = {path.parent.name for path in (ROOT / "daemon").glob("*/__init__.py")}
    assert rooms == {name.split("/")[1] for name in NAMED if re.fullmatch(r"daemon/\w+/", name)}


@pytest.mark.parametrize("named", NAMED)
def test_what_it_names_is_there(named: str) -> None:
    file, _, name = named.partition(":")
    path = ROOT / file
    assert path.exists(), f"{file} is not there"
    if name:
        assert name in definitions(ast.parse(path.read_text()).body), f"{file} has no {name}"


def test_its_rooms_are_in_the_order_that_is_checked() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["id"] == "rooms")
    picture = PAGE.partition("## Rooms")[2].partition("```mermaid")[2].partition("```")[0]
    drawn = re.findall(r"^  (\w+)\[", picture, re.MULTILINE)
    assert [room for room in drawn if room not in ("api", "ipc")] == layers[layers.index("settings") + 1 : -2]
