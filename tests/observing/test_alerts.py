"""The alerts: promtool's own tests of them, and that there is something to read for whoever they wake."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import command
from tests.observing.prometheus import HOW
from tests.observing.test_dashboard import ALERTS, known, metric_names
from weightd.daemon.observing.families import BETTER_PATHS, ENDS, FAMILIES, SOURCES, STAGE_STATES, TRANSPORTS
from weightd.daemon.observing.metrics import error_codes

RUNBOOK = Path(__file__).parents[2] / "docs" / "runbook.md"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
]
TESTS = sorted(Path(__file__).parent.glob("alerts-*.yaml"))
VALUES = {
    "code": set(error_codes()), "state": set(STAGE_STATES), "transport": set(TRANSPORTS), "better": set(BETTER_PATHS),
    "how": set(ENDS), "source": set(SOURCES),
}  # fmt: skip
"""Label → all values that it can have."""


def test_promtool_finds_nothing_wrong_with_the_rules() -> None:
    result = subprocess.run(
        [command("promtool", HOW), "check", "rules", str(ALERTS)], text=True, capture_output=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.stem)
def test_alerts_fire_where_they_should_and_only_there(file: Path) -> None:
    result = subprocess.run(
        [command("promtool", HOW), "test", "rules", str(file)], text=True, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_has_a_case_where_it_fires_and_one_where_it_does_not() -> None:
    fires, does_not = set(), set()
    for file in TESTS:
        for test in yaml.safe_load(file.read_text())["tests"]:
            for case in test["alert_rule_test"]:
                (fires if case["exp_alerts"] else does_not).add(case["alertname"])
    names = {rule["alert"] for rule in RULES}
    assert fires == does_not == names


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_says_what_is_wrong_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("info", "warning", "page")
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert page.endswith("/docs/runbook.md")
    assert anchor == rule["alert"].lower()
    assert f"\n## {rule['alert']}\n" in RUNBOOK.read_text()


def test_only_wrong_bytes_wake_somebody_up() -> None:
    assert {rule["alert"] for rule in RULES if rule["labels"]["severity"] == "page"} == {"WeightdDigestMismatch"}


def test_every_section_of_the_runbook_is_of_an_alert_and_says_what_to_do() -> None:
    _, *sections = re.split(r"^## ", RUNBOOK.read_text(), flags=re.MULTILINE)
    assert [section.partition("\n")[0] for section in sections] == [rule["alert"] for rule in RULES]
    for section in sections:
        for part in ("**Meaning.**", "**Look.**", "**Remedies.**"):
            assert part in section, section.partition("\n")[0]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_rules_name_metrics_labels_and_values_that_there_are(rule: dict[str, Any]) -> None:
    names = metric_names(re.sub(r"\b(on|by|without|group_left) \([^)]*\)", "", rule["expr"]))
    assert all(map(known, names)), names
    for name, matchers in re.findall(r"(weightd_\w+)\{([^}]*)\}", rule["expr"]):
        for label, _, value in re.findall(r'(\w+)(=~|!~|=|!=)"([^"]*)"', matchers):
            assert label in FAMILIES[name].labels
            assert set(value.split("|")) <= VALUES[label], f"{name}: {label} is never {value}"
    labels = {label for name in names & FAMILIES.keys() for label in FAMILIES[name].labels}
    for label in re.findall(r"\$labels\.(\w+)", str(rule["annotations"])):
        assert label in {"instance", "job", *labels}
