"""The dashboard on a real Prometheus that scrapes two real daemons at work: every panel has something to show."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import httpx
import numpy
import pytest
from safetensors.numpy import save_file

from charts.dashboard import FILE, text
from tests.conftest import lacking
from tests.observing.page import PAGE
from tests.observing.prometheus import Prometheus
from tests.servers import Daemon, SeaweedFS, free_ports, until
from weightd.daemon.observing.families import FAMILIES, PROCESS

ALERTS = FILE.parent / "alerts.yaml"
BOARD: dict[str, Any] = json.loads(FILE.read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
UNITS = {"short", "s", "bytes", "binBps", "percentunit", "reqps", "ops", "dateTimeFromNow"}
OTHERS = {"scrape_duration_seconds", "up"}
"""Metrics of Prometheus itself."""
MODELS = ("llama", "mistral", "qwen")
QUIET = (
    "weightd_stages_adopted_total", "weightd_keeper_daemon_ends_total", "weightd_keeper_orphaned_bytes",
    "weightd_leases_awaited", "weightd_peers_off", "weightd_preload_missing", "weightd_source_retries_total",
    "weightd_digest_mismatches_total", "weightd_queue_oldest_seconds", 'state="queued"',
    "weightd_connections_dropped_total",
)  # fmt: skip
"""In queries of what does not happen here."""
SELDOM = (
    "rate(weightd_peer_read_bytes_total", "increase(weightd_peer_slow_path_total", "increase(weightd_errors_total",
)  # fmt: skip
"""In queries of what is over within a scrape or two: their totals are looked at."""


class Watched(NamedTuple):
    prometheus: Prometheus
    daemons: list[Daemon]
    uris: list[str]
    variables: Mapping[str, str]
    """Variable → what stands for it in queries."""


@pytest.fixture(scope="module")
def watched(s3: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Two daemons that are peers, at work until the tests are over, and the Prometheus that has scraped them."""
    if not any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13")):
        lacking("NIXL: pip install nixl-cu12")
    folder = tmp_path_factory.mktemp("observing")
    rng = numpy.random.default_rng(8)
    uris = []
    for name in MODELS:
        (folder / name).mkdir()
        save_file({"w": rng.standard_normal((1024, 1024), numpy.float32)}, folder / name / "a.safetensors")
        uris.append(s3.upload(folder / name, f"observed-{name}"))
    ports = free_ports(6)
    targets, peers, over_s3 = ([f"127.0.0.1:{port}" for port in pair] for pair in (ports[:2], ports[2:4], ports[4:]))
    env = {**s3.env, "UCX_TLS": "tcp", "WEIGHTD_PEERS": "static:" + ",".join(peers), "WEIGHTD_PEER_TOKEN": "fleet"}
    daemons = [
        Daemon(folder / f"daemon-{index}", "--listen", target, "--capacity", "cpu=10MiB", "--s3-listen", s3_at,
               env={**env, "WEIGHTD_PEER_LISTEN": peer})
        for index, (target, peer, s3_at) in enumerate(zip(targets, peers, over_s3, strict=True))
    ]  # fmt: skip
    stopped = threading.Event()
    with daemons[0], daemons[1], Prometheus(folder / "prometheus", targets, ALERTS) as prometheus:
        for daemon in daemons:  # the second one has it from the first
            assert daemon.stage(uris[0])["state"] == "ready"
        workers = [
            threading.Thread(target=work, args=(*of, uris, stopped)) for of in zip(daemons, over_s3, strict=True)
        ]
        for worker in workers:
            worker.start()
        try:
            instance = "|".join(map(re.escape, targets))
            variables = {
                "instance": instance, "model": uris[0], "__rate_interval": "4s", "__range": "1m", "datasource": "",
            }  # fmt: skip
            yield Watched(prometheus, daemons, uris, variables)
        finally:
            stopped.set()
            for worker in workers:
                worker.join()


def work(daemon: Daemon, s3_at: str, uris: list[str], stopped: threading.Event) -> None:
    """What engines and operators do, again and again: more models than fit, each attached to until the next."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(daemon.runtime_dir / "api.sock"))) as client:
        number = 0
        held = daemon.attach(uris[0])
        while not stopped.wait(0.2):
            uri = uris[number % 3]
            number += 1
            if daemon.stage(uri, wait=60)["state"] == "ready":
                before, held = held, daemon.attach(uri)
                before.close()
            httpx.get(f"http://{s3_at}/models/{uri.removeprefix('s3://models/')}/a.safetensors", timeout=60)
            client.get("http://weightd/v1/stage/none", timeout=30)
            client.post("http://weightd/v1/stage", json={"model": "/nowhere"}, timeout=30)
        held.close()


def substituted(query: str, variables: Mapping[str, str]) -> str:
    """The query as Grafana sends it: in it, values of variables with several values are regular expressions."""
    for name, value in variables.items():
        value = value.replace("\\", "\\\\") if name == "instance" else value
        query = query.replace(f"${name}", value)
    assert "$" not in query, f"an unknown variable: {query}"
    return query


def queries(panel: Mapping[str, Any]) -> list[str]:
    return [target["expr"] for target in panel["targets"]]


def metric_names(query: str) -> set[str]:
    return set(re.findall(r"\b(?:weightd|process|scrape|up|go)_?[a-z0-9_]*\b", re.sub(r'"[^"]*"', "", query)))


def known(name: str) -> bool:
    family = FAMILIES.get(name) or FAMILIES.get(re.sub(r"_(bucket|count|sum)$", "", name))
    return name in PROCESS or name in OTHERS or family is not None


def test_the_file_is_what_the_code_makes() -> None:
    assert FILE.read_text() == text(), "run: python charts/dashboard.py"


def test_panels_say_what_they_show_in_units_that_grafana_knows_and_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24, panel["title"]
        assert not cells & taken, f"{panel['title']} overlaps"
        taken |= cells
    for panel in PANELS:
        assert len(panel["description"]) > 10, panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        if panel["type"] != "table":
            assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    rows = [panel["title"] for panel in BOARD["panels"] if panel["type"] == "row"]
    assert [row.split()[0] for row in rows] == ["Overview", "One", "Residency", "Peers", "API"]


def test_queries_name_metrics_that_there_are() -> None:
    for panel in PANELS:
        for query in queries(panel):
            names = metric_names(query)
            assert names, query
            assert all(map(known, names)), query


def test_every_metric_that_changes_is_on_some_panel() -> None:
    shown = {name for panel in PANELS for query in queries(panel) for name in metric_names(query)}
    missing = {
        name for name in FAMILIES if not any(re.fullmatch(rf"{name}(_bucket|_count|_sum)?", one) for one in shown)
    }
    assert missing == {
        "weightd_stage_phase_seconds_total",  # what is shown, in thread-seconds
        "weightd_preload_entries", "weightd_keeper_up", "weightd_keeper_orphans", "weightd_adopted_bytes_total",
        "weightd_device_paths_info",
        "weightd_device_quarantined",  # of GPUs, which have an alert of their own
    }  # fmt: skip


def test_variables_have_values(watched: Watched) -> None:
    variables = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    for name in ("instance", "model"):
        found = re.fullmatch(r"label_values\((.*), (\w+)\)", variables[name]["query"])
        assert found is not None
        series = substituted(found.group(1), watched.variables)
        label = found.group(2)
        values = until(
            lambda series=series, label=label: (  # type: ignore[misc]
                len(values := watched.prometheus.label_values(label, series)) >= 2 and values
            ),
            f"{name} has values",
            60,
        )
        if name == "model":
            assert set(watched.uris) & set(values)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_query_brings_series(panel: dict[str, Any], watched: Watched) -> None:
    for query in queries(panel):
        asked = substituted(query, watched.variables)
        until(lambda asked=asked: watched.prometheus.query(asked), f"{asked} brings series", 60)  # type: ignore[misc]


def test_queries_show_something_other_than_zero_of_what_happens_here(watched: Watched) -> None:
    asked = {
        substituted(query, watched.variables)
        for panel in PANELS
        for query in queries(panel)
        if not any(words in query for words in (*QUIET, *SELDOM))
    }
    assert len(asked) > len(PANELS) / 2

    def flat() -> set[str]:
        for query in list(asked):
            values = [float(one["value"][1]) for one in watched.prometheus.query(query)]
            if any(value and math.isfinite(value) for value in values):
                asked.discard(query)
        return asked

    until(lambda: not flat(), f"other than zero: {asked}", 120)


def test_queries_of_the_page_bring_series_that_are_shares(watched: Watched) -> None:
    found = re.findall(r"```promql\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found
    for query in found:
        shares = until(lambda query=query: watched.prometheus.query(query), query, 60)  # type: ignore[misc]
        assert sum(float(one["value"][1]) for one in shares) == pytest.approx(1)


def test_queries_show_what_has_happened(watched: Watched) -> None:
    prometheus = watched.prometheus
    for query in (
        'sum(weightd_peer_read_bytes_total{transport="tcp"})',
        "sum(weightd_peer_sent_bytes_total)",
        "sum(weightd_origin_saved_bytes_total)",
        'sum(weightd_stage_wall_seconds_total{phase="source", source="peer"})',
        'sum(weightd_stage_wall_seconds_total{phase="listing", source="s3"})',
        "sum(weightd_stages_restaged_total)",
        'sum(weightd_evictions_total{reason="capacity"})',
        "sum(weightd_attach_duration_seconds_count)",
        'sum(weightd_errors_total{code="checkpoint_not_found"})',
        "min(weightd_peers)",
    ):
        until(lambda query=query: any(float(one["value"][1]) > 0 for one in prometheus.query(query)), query, 60)  # type: ignore[misc]
    assert set(prometheus.targets().values()) == {"up"}


def test_alerts_can_be_evaluated_there(watched: Watched) -> None:
    rules = until(
        lambda: (found := watched.prometheus.rules()) and all(r["health"] == "ok" for r in found) and found,
        "every rule was evaluated",
    )
    until(
        lambda: (
            {rule["name"] for rule in watched.prometheus.rules() if rule["state"] == "firing"}
            >= {"WeightdStageFailing", "WeightdCapacityThrash"}
        ),
        "what goes wrong here fires",
        60,
    )
    assert len(rules) > 10
