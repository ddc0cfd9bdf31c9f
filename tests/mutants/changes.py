"""Which changes there are of a module: those that cosmic-ray knows, without those that cannot matter."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

SAME = {"core/ReplaceComparisonOperator_Is_Eq", "core/ReplaceComparisonOperator_IsNot_NotEq"}
"""``is`` is used of None and the like alone, of which ``==`` says the same."""
BETWEEN = {"arith_expr", "term", "power", "shift_expr", "and_expr", "xor_expr", "expr"}
"""What an operator between two values is a part of; the star of ``*args`` is none."""


class Unmade(Exception):
    """cosmic-ray has a place for the change, and cannot make it there."""


@dataclass(frozen=True)
class Change:
    """One change of one module, known by its operator and by which of the places where that applies it is."""

    module: str
    operator: str
    occurrence: int
    line: int
    lines: range
    """Those of the statement that it is in."""

    @property
    def key(self) -> str:
        return f"{self.module} {self.operator} {self.occurrence}"

    def __str__(self) -> str:
        return f"{self.module}:{self.line} {self.operator.removeprefix('core/')} {self.occurrence}"

    @contextmanager
    def made(self, tree: Path) -> Iterator[str]:
        """Within the block the file has the change; gives it as a diff. Raises Unmade."""
        path = tree / self.module
        before = path.read_text()
        try:
            after = mutate_code(before, get_operator(self.operator)(), self.occurrence)
        except AttributeError as error:  # of exceptions with a dot in their name
            raise Unmade(str(error)) from None
        assert after is not None
        diff = difflib.unified_diff(before.split("\n"), after.split("\n"), lineterm="", n=1)
        try:
            path.write_text(after)
            yield "\n".join(list(diff)[2:])
        finally:
            path.write_text(before)


def changes(tree: Path, module: str) -> list[Change]:
    """All of a module, from its beginning to its end. What is in type hints is left out: nothing evaluates them."""
    source = (tree / module).read_text()
    parsed = ast.parse(source)
    hints = [span(hint) for hint in type_hints(parsed)]
    statements = [(lines, node) for node in ast.walk(parsed) if isinstance(node, ast.stmt) for lines in [own(node)]]
    nodes = list(ast_nodes(get_ast(source)))
    found = []
    for name in operator_names():
        operator = get_operator(name)
        if name in SAME or operator.arguments():
            continue
        places = ((place, node) for node in nodes for place in operator().mutation_positions(node))
        for occurrence, ((start, end), node) in enumerate(places):
            if "BinaryOperator" in name and node.parent.type not in BETWEEN:
                continue
            if any(first <= start and end <= last for first, last in hints):
                continue
            lines = [lines for lines, _ in statements if start[0] in lines]  # outer ones first
            found.append(
                Change(module, name, occurrence, start[0], lines[-1] if lines else range(start[0], start[0] + 1))
            )
    return sorted(found, key=lambda change: (change.line, change.operator, change.occurrence))


def sample(found: Sequence[Change], count: int | None, seed: int) -> list[Change]:
    """So many of them, the same ones for the same module and seed."""
    if count is None or len(found) <= count:
        return list(found)
    chosen = Random(f"{seed} {found[0].module}").sample(range(len(found)), count)
    return [found[index] for index in sorted(chosen)]


def own(node: ast.stmt) -> range:
    """A statement's lines, without those of what is inside it."""
    body = getattr(node, "body", None)
    end = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or node.lineno
    return range(node.lineno, end + 1)


def type_hints(parsed: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(parsed):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.returns:
            yield node.returns
        elif isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation:
            yield node.annotation


def span(node: ast.expr) -> tuple[tuple[int, int], tuple[int, int]]:
    return (node.lineno, node.col_offset), (node.end_lineno or node.lineno, node.end_col_offset or node.col_offset)
