"""The daemon's variables: each is one that the daemon knows, and it reads out of it what the values say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from charts.schema import ELSEWHERE
from tests.chart.cases import CASES, MAP, PEERS, rendered
from tests.chart.helm import Manifest, manifests
from tests.chart.manifests import container, daemon_of, daemons, env_of, pod_spec
from weightd.daemon.addresses import parse_address
from weightd.daemon.node import preload
from weightd.daemon.settings import Settings
from weightd.daemon.stages.request import parse_request

ADDRESSES = {"IPv4": "10.1.2.3", "IPv6": "fd00::7"}
LIKELY: dict[str, Any] = {
    "allow": ["s3://models/", "/models"], "capacity": {"cpu": "64GiB", "cuda:0": 60_000_000_000}, "log_level": "debug",
    "log_format": "json", "listen": "127.0.0.1:7500", "peer_uids": [0, 1000], "peer_gids": [65532], "extent": "16MiB",
    "in_flight": 1 << 31, "cuda_reserve": "512MiB", "cuda_fill": "ring", "on_stop": "refuse", "peer_trust": True,
    "retry_deadline": 12.5, "restart_limit": 0, "max_leases": 1_000_000,
}  # fmt: skip


@pytest.fixture
def parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Settings, dict[str, str]]]:
    """What the daemon in the only workload reads: its settings, and its variables expanded. All Secrets exist."""

    def parse(documents: list[Manifest], family: str = "IPv4") -> tuple[Settings, dict[str, str]]:
        return _parsed(documents, family, tmp_path, monkeypatch)

    return parse


def _parsed(
    documents: list[Manifest], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Settings, dict[str, str]]:
    (workload,) = daemons(documents)
    daemon = daemon_of(pod_spec(workload))
    assert daemon is not None
    known: dict[str, str] = {}
    for name, text in env_of(daemon).items():
        if not isinstance(text, str):
            text = ADDRESSES[family] if "fieldRef" in text else "of-a-secret"
        known[name] = re.sub(
            r"\$\$|\$\((\w+)\)", lambda found: known.get(found[1], found[0]) if found[1] else "$", text
        )
    for name, text in known.items():
        if name.startswith("WEIGHTD_") and name != "WEIGHTD_DAEMON_UID":  # which is its clients'
            setting = name.removeprefix("WEIGHTD_").lower()
            assert setting in Settings.model_fields, f"{name} is no setting"
            if name.startswith("WEIGHTD_PEER_TLS_"):
                file = tmp_path / name
                file.touch()
                text = str(file)
            monkeypatch.setenv(name, text)
    return Settings(), known


Parsed = Callable[..., tuple[Settings, dict[str, str]]]


@pytest.mark.parametrize("name", [name for name in CASES if name != "no engine"])
def test_the_daemon_knows_every_variable_and_takes_every_value(name: str, parsed: Parsed) -> None:
    case = CASES[name]
    settings, env = parsed(rendered(name), case.values.get("ipFamily", "IPv4"))
    assert settings.runtime_dir == Path(case.values.get("runtimeDir", "/run/weightd"))
    assert settings.preload == env.get("WEIGHTD_PRELOAD", "")
    assert preload.read(settings.preload) == [parse_request(request) for request in case.values.get("preload", [])]


def test_every_setting_can_be_set_and_arrives_as_it_was_meant(parsed: Parsed) -> None:
    values: dict[str, Any] = {}
    for name, field in Settings.model_fields.items():
        if name not in ELSEWHERE:
            default = field.get_default(call_default_factory=True, validated_data={})
            values[name] = LIKELY.get(name, default)
    assert len(values) > 20
    settings, env = parsed(manifests({"settings": values}))
    meant = Settings(**values)
    for name in values:
        assert getattr(settings, name) == getattr(meant, name), name
        assert f"WEIGHTD_{name.upper()}" in env


def test_numbers_arrive_as_digits_however_large_they_are() -> None:
    values = {"settings": {"in_flight": 2_000_000_000, "capacity": {"cpu": 1_099_511_627_776}, "peer_stall": 0.5}}
    env = env_of(container(manifests(values), "weightd"))
    assert env["WEIGHTD_IN_FLIGHT"] == "2000000000"
    assert env["WEIGHTD_CAPACITY"] == "cpu=1099511627776"
    assert env["WEIGHTD_PEER_STALL"] == "0.5"


def test_what_the_chart_makes_of_values_of_its_own_are_settings() -> None:
    assert Settings.model_fields.keys() >= ELSEWHERE


def test_patterns_of_a_map_count_in_the_order_that_was_meant() -> None:
    parallel = {"tp_size": 2, "tp_rank": "all"}
    requests = [
        {"model": "s3://m/a", "parallel": {**parallel, "map": MAP}},
        {"model": "s3://m/b", "parallel": {**parallel, "map": [{"*": 0}, {"*.norm.weight": "replicate"}, {"a": -1}]}},
        {"model": "s3://m/c", "parallel": {**parallel, "map": {"*": 0, "**": 1, "b*": 2, "a*": 3}}},
    ]
    text = env_of(container(manifests({"preload": requests}), "weightd"))["WEIGHTD_PRELOAD"]
    maps = [list(request["parallel"]["map"].items()) for request in json.loads(text)]
    assert maps[0][-1] == ("*", "replicate"), "the pattern that fits everything is the last to be asked"
    assert dict(maps[0]) == MAP
    assert maps[1] == [("*", 0), ("*.norm.weight", "replicate"), ("a", -1)]
    assert [pattern for pattern, _ in maps[2]] == ["**", "a*", "b*", "*"]
    parse_request(json.loads(text)[1])


def test_text_that_looks_like_a_variable_of_kubernetes_stays_text(parsed: Parsed) -> None:
    requests = [{"model": "s3://m/$(POD_IP)/$$(X)"}]
    settings, env = parsed(
        manifests({"preload": requests, "settings": {"allow": ["s3://m/$(POD_IP)"]}, "peers": PEERS})
    )
    assert settings.allow == ["s3://m/$(POD_IP)"]
    assert json.loads(env["WEIGHTD_PRELOAD"])[0]["model"] == "s3://m/$(POD_IP)/$$(X)"


@pytest.mark.parametrize("family", ["IPv4", "IPv6"])
def test_peers_reach_the_pods_own_address(family: str, parsed: Parsed) -> None:
    settings, env = parsed(manifests({"peers": PEERS, "ipFamily": family}), family)
    assert parse_address(settings.peer_address) == (ADDRESSES[family], 7401)
    assert settings.peer_listen == {"IPv4": "0.0.0.0:7401", "IPv6": "[::]:7401"}[family]
    assert env["WEIGHTD_HEALTH_LISTEN"] == {"IPv4": "0.0.0.0:7402", "IPv6": "[::]:7402"}[family]
    assert settings.peers == "dns:llama-weightd-peers.models.svc.cluster.local:7401"


def test_fleets_in_one_etcd_are_kept_apart_unless_a_path_says_otherwise() -> None:
    def directory(*endpoints: str, release: str = "a") -> str:
        peers = {**PEERS, "directory": "etcd", "etcd": {"endpoints": list(endpoints)}}
        text: str = env_of(container(manifests({"peers": peers}, release=release), "weightd"))["WEIGHTD_PEERS"]
        return text

    assert directory("http://e:2379", "http://f:2379") == "etcd:http://e:2379,http://f:2379/weightd/models/a-weightd"
    assert directory("http://e:2379/") == "etcd:http://e:2379/weightd/models/a-weightd"
    assert directory("http://e:2379", release="b") != directory("http://e:2379", release="a")
    assert directory("http://e:2379/common") == "etcd:http://e:2379/common"
    assert directory("http://e:2379/common", release="b") == "etcd:http://e:2379/common"
