"""The files that are made of others: the schema of the daemon's models, the README of the values' comments."""

from __future__ import annotations

import re
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from charts import readme, schema
from tests.chart.cases import CASES, MAP
from tests.chart.helm import CHART, helm, manifests
from weightd.daemon.errors import InvalidRequest
from weightd.daemon.stages.request import parse_request

ROOT = CHART.parent.parent
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())


def test_the_schema_is_that_of_the_daemon_as_it_is_now() -> None:
    assert schema.FILE.read_text() == schema.rendered(), "python -m charts.schema"


def test_the_readme_says_what_the_values_comments_say() -> None:
    assert readme.FILE.read_text() == readme.rendered(), "python -m charts.readme"


def test_every_value_is_documented() -> None:
    found = readme.documented((CHART / "values.yaml").read_text())
    assert len(found) > 100
    assert not [".".join(value.path) for value in found if not value.text]
    for value in found:
        at: Any = VALUES
        for name in value.path:
            at = at[name]
        assert at == value.default


def test_every_value_is_used() -> None:
    templates = "\n".join(path.read_text() for path in (CHART / "templates").iterdir())
    for value in readme.documented((CHART / "values.yaml").read_text()):
        assert re.search(rf'(\.|"){value.path[-1]}\b', templates), value.path


def test_the_schema_closes_every_object_that_is_the_charts_own() -> None:
    document = schema.values()

    def closed(at: dict[str, Any], values: dict[str, Any], path: str) -> None:
        if "properties" not in at or path == ".podSpec":  # whose further fields are Kubernetes' own
            return
        assert at["additionalProperties"] is False, path
        for name, value in values.items():
            assert name in at["properties"], f"{path}.{name}"
            if isinstance(value, dict):
                closed(at["properties"][name], value, f"{path}.{name}")

    closed(document, VALUES, "")
    jsonschema.Draft7Validator.check_schema(document)


REQUESTS: list[dict[str, Any]] = [
    {"model": "/models/x"}, {"model": "file:///models/x"}, {"model": "hf://org/name@main"}, {"model": "az://c/p"},
    {"model": "s3://b/p", "device": None, "parallel": None, "ttl_seconds": None, "expect_digest": None},
    {"model": "/x", "device": "cpu:3"}, {"model": "/x", "device": "cuda:12"},
    {"model": "/x", "device": "GPU-8f1ba1d4-6d3f-4b2c-9a1e-0123456789ab"},
    {"model": "/x", "device": ["cpu", "cpu"], "parallel": {"tp_size": 2, "tp_rank": [0, 1], "map": MAP}},
    {"model": "/x", "parallel": {}}, {"model": "/x", "parallel": {"tp_size": 4, "tp_rank": 3, "map": {"*": -1}}},
    {"model": "/x", "tensors": {}}, {"model": "/x", "tensors": {"include": ["*"], "exclude": []}},
    {"model": "/x", "expect_digest": "xxh3:" + "0" * 32}, {"model": "/x", "expect_digest": {"a": "F" * 64}},
    {"model": "/x", "sources": ["origin", "peer"], "priority": -1000, "pin": True, "ttl_seconds": 0.5},
    {"model": "/x", "handle": "cuda_ipc", "layout": "checkpoint"},
]  # fmt: skip
REFUSED: list[dict[str, Any]] = [
    {}, {"model": ""}, {"model": 1}, {"model": "/x", "unknown": 1}, {"model": "/" * 5000},
    {"model": "/x", "device": ""}, {"model": "/x", "device": 0}, {"model": "/x", "handle": "x"},
    {"model": "/x", "layout": "traced"},
    {"model": "/x", "parallel": {"tp_size": 2}}, {"model": "/x", "parallel": {"tp_size": 1025}},
    {"model": "/x", "parallel": {"tp_rank": []}}, {"model": "/x", "parallel": {"map": {"": 0}}},
    {"model": "/x", "parallel": {"map": {"*": "x"}}}, {"model": "/x", "parallel": {"map": {"*": 0.5}}},
    {"model": "/x", "tensors": {"include": [""]}}, {"model": "/x", "tensors": []},
    {"model": "/x", "expect_digest": "xxh3:0"}, {"model": "/x", "expect_digest": {}},
    {"model": "/x", "expect_digest": {"a": "xxh3:" + "0" * 32}}, {"model": "/x", "sources": []},
    {"model": "/x", "sources": ["peer", "origin", "peer"]}, {"model": "/x", "priority": 1.5},
    {"model": "/x", "priority": -1001}, {"model": "/x", "pin": None}, {"model": "/x", "ttl_seconds": -1},
]  # fmt: skip


def request_schema() -> jsonschema.Draft7Validator:
    document = schema.values()
    return jsonschema.Draft7Validator({"$ref": "#/definitions/StageRequest", "definitions": document["definitions"]})


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
def test_a_request_that_the_daemon_takes_may_be_preloaded(request_: dict[str, Any]) -> None:
    parse_request(request_)
    request_schema().validate(request_)


@pytest.mark.parametrize("request_", REFUSED, ids=lambda value: str(value)[:60])
def test_a_request_that_the_daemon_refuses_may_not(request_: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        parse_request(request_)
    assert not request_schema().is_valid(request_)


def test_the_charts_version_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == project["version"]


def test_the_package_renders_as_the_folder_does(tmp_path: Path) -> None:
    helm("package", str(CHART), "--destination", str(tmp_path))
    (package,) = tmp_path.glob("weightd-*.tgz")
    with tarfile.open(package) as tar:
        names = {name.removeprefix("weightd/") for name in tar.getnames()}
    assert {
        "Chart.yaml",
        "values.schema.json",
        "README.md",
        "files/alerts.yaml",
        "examples/consumer.yaml",
        "examples/values-vllm.yaml",
    } <= names
    assert not [name for name in names if name.endswith(".py")]
    values = CASES["everything that watches"].values
    assert manifests(values, chart=package) == manifests(values)


def test_every_link_of_the_readme_leads_somewhere() -> None:
    text = readme.FILE.read_text()
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings
        elif not target.startswith("http"):
            assert (CHART / target).exists(), target


def test_the_readmes_example_of_values_is_taken() -> None:
    (example,) = (
        block
        for block in re.findall(r"```yaml\n(.*?)```", readme.FILE.read_text(), re.DOTALL)
        if block.startswith("engine:")
    )
    kinds = {document["kind"] for document in manifests(yaml.safe_load(example))}
    assert {"Deployment", "PodMonitor", "PrometheusRule", "ConfigMap", "ServiceAccount"} <= kinds
