"""docs/metrics.md, made of what the code says of itself: ``python -m tests.observing.page`` writes it anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from weightd.api import problems  # noqa: F401  # has error codes of its own
from weightd.daemon.observing.clock import STAGE_PHASES
from weightd.daemon.observing.families import FAMILIES, LABELS, MAX_MODELS, MAX_PEERS, PROCESS, SECTIONS, Family
from weightd.daemon.observing.metrics import error_codes

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"

_HEAD = f"""\
# Metrics

<!-- Made by `python -m tests.observing.page` from daemon/observing/families.py; a test compares. -->

`GET /metrics` answers in the Prometheus text format: on the Unix socket, on the port of the API, and on the port of
`WEIGHTD_METRICS_LISTEN`, which serves nothing else. What is there, how many series there can be, and how to read the
ones that are not plain, is on this page. A dashboard and alerts that use them are in
[charts/weightd/files](../charts/weightd/files); what to do when an alert fires is in the [runbook](runbook.md).

## Why was this start slow

Every second of a stage, from the request until it is ready or has ended otherwise, is some phase's. The stage's record
has them as `seconds` (`weightd show`, `GET /v1/stage/{{id}}`), `weightd_latest_stage_seconds` has them for the latest
stage of each model, `weightd_stage_wall_seconds_total` for all stages together.

PHASES
Phases add up to the duration. While a stage loads, several threads work for it, each in a phase of its own; such a
moment is shared out among them equally, so that a phase's share is about what would be saved if it took no time. The
label `source` says where the bytes of that moment came from or were to come from: the stage's own source, or `peer`.
`weightd_stage_phase_seconds_total` is of the same phases in thread-seconds: eight threads that wait for a second are
eight seconds there, and one second of wall clock.

Which share of all stages' time of the last hour went where:

```promql
sum by (phase, source) (increase(weightd_stage_wall_seconds_total[1h]))
  / on () group_left () sum(increase(weightd_stage_wall_seconds_total[1h]))
```

## How many series there are

Nothing that comes from outside makes any number of series. {MAX_MODELS} models on each device, and {MAX_PEERS} peers,
are named in labels; URIs lose their query and user, which may be secrets, and what is longer than 120 characters its
middle. A daemon that has a thousand models, and no peers, has about 500 series, most of them buckets of histograms.
Counters begin at 0 where their labels are known, so that the first step of each shows in `increase()`.
"""


def page() -> str:
    """The page's text."""
    parts = [_HEAD.replace("PHASES", _table(("phase", "what the stage does"), _named(STAGE_PHASES)))]
    for title, families in SECTIONS.items():
        rows = [(f"`{family.name}`", family.kind, _labels(family), family.text) for family in families]
        parts.append(f"## {title}\n\n" + _table(("metric", "type", "labels", "meaning"), rows))
    parts.append("## The process\n\n" + _table(("metric", "meaning"), _named(PROCESS)))
    rows = [(f"`{label.rpartition('.')[2]}`{_where(label)}", text) for label, text in LABELS.items()]
    parts.append("## Labels\n\n" + _table(("label", "values"), rows))
    codes = {**error_codes(), "internal_error": "A bug: the daemon's log has it in full."}
    parts.append("## Error codes\n\n" + _table(("code", "meaning"), _named(dict(sorted(codes.items())))))
    return "\n".join(parts)


def _named(meanings: Mapping[str, str]) -> list[tuple[str, ...]]:
    return [(f"`{name}`", text) for name, text in meanings.items()]


def _labels(family: Family) -> str:
    return ", ".join(f"`{label}`" for label in family.labels)


def _where(label: str) -> str:
    family = label.rpartition(".")[0]
    assert not family or family in FAMILIES
    return f" of `{family}`" if family else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    PAGE.write_text(page())
