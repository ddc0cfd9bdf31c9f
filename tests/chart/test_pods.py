"""What Pods have besides, and what helm says of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.chart.cases import CASES, PRELOAD, SINGLE, VLLM, rendered
from tests.chart.helm import CHART, helm, manifests
from tests.chart.manifests import container, env_of, find, pod_labels, pod_spec


def test_pods_are_placed_as_the_values_say() -> None:
    values = CASES["scheduled"].values
    workload = find(rendered("scheduled"), "Deployment")
    spec = pod_spec(workload)
    for name in ("affinity", "priorityClassName", "terminationGracePeriodSeconds", "imagePullSecrets"):
        assert spec[name] == values[name]
    assert "tolerations" not in spec
    first, second = spec["topologySpreadConstraints"]
    assert first["labelSelector"]["matchLabels"] == workload["spec"]["selector"]["matchLabels"]
    assert second["labelSelector"] == {"matchLabels": {"example.com/own": "yes"}}
    assert spec["dnsConfig"] == values["podSpec"]["dnsConfig"]
    assert spec["shareProcessNamespace"] is True
    assert pod_labels(workload)["example.com/own"] == "yes"
    assert workload["metadata"]["labels"]["example.com/team"] == "a"
    assert workload["spec"]["template"]["metadata"]["annotations"] == {"example.com/a": "b"}
    weightd = container(rendered("scheduled"), "weightd")
    assert weightd["image"] == "ghcr.io/weightd/weightd@sha256:" + "a" * 64
    assert env_of(weightd)["UCX_TLS"] == "rc,tcp"


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ({}, "ghcr.io/weightd/weightd:0.1.0-cuda13"),
        ({"variant": "cuda12"}, "ghcr.io/weightd/weightd:0.1.0-cuda12"),
        ({"tag": "main", "variant": "cpu"}, "ghcr.io/weightd/weightd:main"),
        ({"repository": "r.example.com:5000/w"}, "r.example.com:5000/w:0.1.0-cuda13"),
    ],
)
def test_the_image_is_of_the_charts_version_and_variant(image: dict[str, str], name: str) -> None:
    assert container(manifests({"image": image}), "weightd")["image"] == name


def test_labels_of_the_values_never_take_the_place_of_the_charts_own() -> None:
    values = {
        "podLabels": {"app.kubernetes.io/name": "x", "weightd/fleet": "y"},
        "commonLabels": {"weightd/fleet": "z"},
    }
    workload = find(manifests(values), "Deployment")
    assert pod_labels(workload)["app.kubernetes.io/name"] == "weightd"
    assert pod_labels(workload)["weightd/fleet"] == "llama-weightd"


def test_the_cache_is_where_the_values_say() -> None:
    def cache(values: dict[str, Any]) -> dict[str, Any]:
        (volume,) = (
            v for v in pod_spec(find(manifests(values), "Deployment"))["volumes"] if v["name"] == "weightd-cache"
        )
        return volume

    assert cache({})["emptyDir"] == {}
    assert cache({"cache": {"sizeLimit": "20Gi"}})["emptyDir"] == {"sizeLimit": "20Gi"}
    assert cache({"cache": {"existingClaim": "c"}})["persistentVolumeClaim"] == {"claimName": "c"}


def test_one_container_is_what_the_engines_image_is_for() -> None:
    (engine,) = pod_spec(find(manifests(SINGLE), "Deployment"))["containers"]
    assert engine["image"].startswith("vllm/")
    assert not {"runAsUser", "readOnlyRootFilesystem"} & set(engine["securityContext"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, ["deployment/llama-weightd --container weightd -- weightd doctor", "gpu.sharing is dra", "7400"]),
        ({"mode": "node"}, ["daemonset/llama-weightd", "/var/cache/weightd", "group 65532"]),
        (SINGLE, ["--container engine"]),
        ({"engine": {"enabled": False}}, ["weightd.sidecar"]),
        ({"settings": {"listen": "127.0.0.1:7500"}}, ["http://localhost:7500"]),
        ({"peers": {"enabled": True}}, ["llama-weightd-peer-token", "networkPolicy.enabled is false"]),
        ({"gpu": {"sharing": "visibleDevices"}, "preload": PRELOAD}, ["WARNING: s3://models/llama-3-8b is preloaded"]),
        ({"engine": VLLM}, ["It serves s3://models/llama-3-8b", "--container engine | grep weightd:"]),
        ({}, ["engine.model is empty"]),
        ({"engine": VLLM, "preload": PRELOAD}, ["is preloaded to a GPU as it is stored"]),
        (CASES["layouts ahead on nodes"].values, ["-trace --container weightd-trace-0"]),
    ],
)
def test_the_notes_say_how_to_see_what_it_does(values: dict[str, Any], words: list[str]) -> None:
    arguments = ["install", "llama", str(CHART), "--dry-run=client", "--values", "-"]
    _, _, notes = helm(*arguments, stdin=json.dumps(values)).partition("\nNOTES:\n")
    assert all(word in notes for word in words), notes
    assert not [line for line in notes.splitlines() if len(line) > 160]


def test_an_engine_without_weightd_is_pointed_at_the_s3_endpoint_and_weightd_at_the_store() -> None:
    values = {"s3": {"enabled": True}, "credentials": {"s3": {"endpoint": "https://store.example.com"}}}
    documents = manifests(values)
    engine, weightd = env_of(container(documents, "engine")), env_of(container(documents, "weightd"))
    assert weightd["WEIGHTD_S3_LISTEN"] == "127.0.0.1:7404"
    assert weightd["AWS_ENDPOINT_URL"] == "https://store.example.com"
    for name in ("AWS_ENDPOINT_URL", "RUNAI_STREAMER_S3_ENDPOINT"):
        assert engine[name] == "http://127.0.0.1:7404"
    without = env_of(container(manifests({}), "engine"))
    assert set(engine) - set(without) == {"AWS_ENDPOINT_URL", "RUNAI_STREAMER_S3_ENDPOINT"}
    assert "WEIGHTD_S3_LISTEN" not in env_of(container(manifests({}), "weightd"))
