"""Sections as tables for people, and everything as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tests.bench.measure import Row, Section, Target


def show_header(console: Console, facts: Mapping[str, str]) -> None:
    """The machine and the versions, in a few lines."""
    console.print(Text(" · ".join(f"{name}: {value}" for name, value in facts.items())), style="dim")


def show_section(console: Console, section: Section) -> None:
    """One table, with its notes below."""
    table = Table(title=section.title, title_justify="left", title_style="bold", expand=False)
    table.add_column("contender", overflow="fold", ratio=3)
    for column in ("median", "min – max"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("against", overflow="fold", ratio=2)
    for column in ("is", "target"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in section.rows:
        name = Text(row.contender, style="bold" if row.targets else "")
        if row.note:
            name.append(f"\n{row.note}", style="dim")
        low, high = min(row.values), max(row.values)
        figures = [f"{_number(row.median)} {row.unit}", f"{_number(low)} – {_number(high)}"]
        first, *others = row.targets or [None]
        table.add_row(name, *figures, *_target(first, row))
        for target in others:
            table.add_row("", "", "", *_target(target, row))
    console.print(table)
    for note in section.notes:
        console.print(Text(f"  {note}"), style="dim")
    console.print()


def _target(target: Target | None, row: Row) -> Sequence[str | Text]:
    if target is None:
        return ["", "", "", ""]
    sign = "≥" if target.sense == "at least" else "<"
    verdict = Text("pass", "green") if target.met else Text(f"SHORT by {target.short_by:.0%}", "bold red")
    unit = target.unit if target.unit == "×" else f" {target.unit}"
    return [target.against, f"{_number(target.found)}{unit}", f"{sign} {_number(target.wanted)}{unit}", verdict]


def _number(value: float) -> str:
    size = abs(value)
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def show_verdict(console: Console, sections: Sequence[Section]) -> None:
    """One line for all: how many targets are met, and which are not."""
    short = [(row, target) for section in sections for row in section.rows for target in row.targets if not target.met]
    count = sum(len(row.targets) for section in sections for row in section.rows)
    console.print(f"{count - len(short)} of {count} targets met.", style="bold")
    for row, target in short:
        against = f" × {target.against}" if target.against else f" {target.unit}"
        line = f"  SHORT by {target.short_by:.0%}: {row.contender}: {_number(target.found)}{against}"
        console.print(Text(f"{line}, target {target.sense} {_number(target.wanted)}"), style="red")


def as_json(facts: Mapping[str, str], arguments: Mapping[str, Any], sections: Sequence[Section]) -> dict[str, Any]:
    """Everything: rows with their medians and targets, and every raw sample."""
    return {
        "machine": dict(facts),
        "arguments": dict(arguments),
        "sections": {
            section.name: {
                "title": section.title,
                "notes": section.notes,
                "rows": [
                    {
                        "contender": row.contender,
                        "note": row.note,
                        "unit": row.unit,
                        "median": row.median,
                        "values": row.values,
                        "targets": [
                            {**asdict(target), "met": target.met, "short_by": target.short_by} for target in row.targets
                        ],
                    }
                    for row in section.rows
                ],
                "samples": section.samples,
            }
            for section in sections
        },
    }
