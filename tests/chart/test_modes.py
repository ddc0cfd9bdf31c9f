"""The two modes, the ways to share the GPU, and the engine."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.chart.cases import PRELOAD, rendered
from tests.chart.helm import CHART, manifests
from tests.chart.manifests import all_of, container, containers, env_of, find, pod_spec, workloads

CLAIM = [{"name": "weightd-gpu"}]


def gpus(container: dict[str, Any], resource: str = "nvidia.com/gpu") -> int:
    found: int = container.get("resources", {}).get("limits", {}).get(resource, 0)
    return found


# ---------------------------------------------------------------------- modes


def test_a_sidecar_starts_before_its_engine_and_stays() -> None:
    spec = pod_spec(find(manifests(), "Deployment"))
    shim, weightd = spec["initContainers"]
    assert (shim["name"], weightd["name"]) == ("weightd-shim", "weightd")
    assert weightd["restartPolicy"] == "Always"
    assert "restartPolicy" not in shim
    assert [engine["name"] for engine in spec["containers"]] == ["engine"]
    # The engine decides whether the Pod takes requests: it serves on while the daemon is away.
    assert "readinessProbe" not in weightd


@pytest.mark.parametrize(("wait", "path"), [(True, "/readyz"), (False, "/livez")])
def test_the_engine_waits_for_the_weights_where_it_is_to(wait: bool, path: str) -> None:
    documents = manifests({"startup": {"wait": wait, "timeoutSeconds": 1234}, "preload": PRELOAD})
    probe = container(documents, "weightd")["startupProbe"]
    assert probe["httpGet"] == {"path": path, "port": "weightd-health"}
    assert probe["periodSeconds"] * probe["failureThreshold"] == 1234
    assert find(documents, "Deployment")["spec"]["progressDeadlineSeconds"] > 1234


def test_a_node_has_one_daemon_whose_folders_are_the_nodes() -> None:
    spec = pod_spec(find(rendered("node with everything"), "DaemonSet"))
    paths = {volume["name"]: volume["hostPath"]["path"] for volume in spec["volumes"] if "hostPath" in volume}
    assert paths == {"weightd-run": "/var/run/weights", "weightd-cache": "/mnt/nvme/weights"}
    prepare, weightd = containers(spec)
    assert prepare["name"] == "prepare"
    assert prepare["command"][-4:] == ["65532", "65532", "/run/weightd", "/var/cache/weightd"]
    assert "restartPolicy" not in weightd
    assert weightd["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert weightd["startupProbe"]["httpGet"]["path"] == "/livez"
    assert not all_of(rendered("node with everything"), "Deployment")


def test_a_node_without_further_values_has_the_documented_folders() -> None:
    spec = pod_spec(find(manifests({"mode": "node"}), "DaemonSet"))
    paths = {volume["name"]: volume["hostPath"]["path"] for volume in spec["volumes"] if "hostPath" in volume}
    assert paths == {"weightd-run": "/run/weightd", "weightd-cache": "/var/cache/weightd"}


def test_the_example_of_a_consumer_fits_what_mode_node_renders() -> None:
    consumer = yaml.safe_load((CHART / "examples" / "consumer.yaml").read_text())
    spec = pod_spec(find(manifests({"mode": "node"}), "DaemonSet"))
    weightd = next(c for c in containers(spec) if c["name"] == "weightd")
    mounts = {mount["name"]: mount["mountPath"] for mount in weightd["volumeMounts"]}
    (engine,) = consumer["spec"]["containers"]
    for volume in consumer["spec"]["volumes"]:
        if "hostPath" in volume:
            (theirs,) = (v for v in spec["volumes"] if v["name"] == volume["name"])
            assert volume["hostPath"]["path"] == theirs["hostPath"]["path"]
            (mount,) = (m for m in engine["volumeMounts"] if m["name"] == volume["name"])
            assert (mount["mountPath"], mount["readOnly"]) == (mounts[volume["name"]], True)
    assert consumer["spec"]["securityContext"]["supplementalGroups"] == [weightd["securityContext"]["runAsGroup"]]
    assert env_of(engine)["WEIGHTD_RUNTIME_DIR"] == mounts["weightd-run"]
    assert env_of(engine)["WEIGHTD_DAEMON_UID"] == str(weightd["securityContext"]["runAsUser"])
    (shim,) = consumer["spec"]["initContainers"]
    rendered = container(manifests(), "weightd-shim")
    assert (shim["image"], shim["command"]) == (rendered["image"], rendered["command"])


# ---------------------------------------------------------------------- the GPU


def test_both_containers_share_one_claim() -> None:
    documents = rendered("claims")
    spec = pod_spec(find(documents, "Deployment"))
    request = find(documents, "ResourceClaimTemplate")["spec"]["spec"]["devices"]["requests"][0]["exactly"]
    assert request == {
        "deviceClassName": "gpu.nvidia.com",
        "allocationMode": "ExactCount",
        "count": 4,
        "selectors": [{"cel": {"expression": 'device.driver == "gpu.nvidia.com"'}}],
    }
    assert spec["resourceClaims"] == [{"name": "weightd-gpu", "resourceClaimTemplateName": "llama-weightd-gpu"}]
    for name in ("weightd", "engine"):
        assert container(documents, name)["resources"]["claims"] == CLAIM
        assert not gpus(container(documents, name))


@pytest.mark.parametrize(
    ("name", "claim"),
    [
        ("a claim that exists", {"resourceClaimName": "shared"}),
        ("a template that exists", {"resourceClaimTemplateName": "two-gpus"}),
    ],
)
def test_claims_that_exist_are_taken_and_none_is_made(name: str, claim: dict[str, str]) -> None:
    documents = rendered(name)
    assert pod_spec(find(documents, "Deployment"))["resourceClaims"] == [{"name": "weightd-gpu", **claim}]
    assert not all_of(documents, "ResourceClaimTemplate")


def test_a_nodes_daemon_claims_no_gpu_from_its_engines() -> None:
    (request,) = find(rendered("node by DRA"), "ResourceClaimTemplate")["spec"]["spec"]["devices"]["requests"]
    assert request["exactly"]["adminAccess"] is True
    assert request["exactly"]["allocationMode"] == "All"
    weightd = container(rendered("node"), "weightd")
    assert env_of(weightd)["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert not gpus(weightd)


def test_weightd_sees_gpus_that_only_the_engine_has_asked_for() -> None:
    documents = rendered("visible devices")
    assert env_of(container(documents, "weightd"))["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert "compute" in env_of(container(documents, "weightd"))["NVIDIA_DRIVER_CAPABILITIES"]
    assert (gpus(container(documents, "weightd")), gpus(container(documents, "engine"))) == (0, 2)
    assert "NVIDIA_VISIBLE_DEVICES" not in env_of(container(documents, "engine"))
    assert pod_spec(find(documents, "Deployment"))["runtimeClassName"] == "nvidia"


def test_the_same_devices_are_visible_in_both_without_a_request() -> None:
    documents = rendered("the same visible devices")
    for name in ("weightd", "engine"):
        assert env_of(container(documents, name))["NVIDIA_VISIBLE_DEVICES"] == "0,1"
        assert not gpus(container(documents, name))


def test_each_container_asks_for_replicas() -> None:
    documents = rendered("replicas")
    for name in ("weightd", "engine"):
        assert gpus(container(documents, name), "nvidia.com/gpu.shared") == 2


def test_one_container_runs_both_processes() -> None:
    documents = rendered("one container")
    spec = pod_spec(find(documents, "Deployment"))
    assert "initContainers" not in spec
    (engine,) = spec["containers"]
    assert engine["command"][:2] == ["/bin/sh", "-c"]
    assert engine["args"] == ["vllm", "serve"]
    assert gpus(engine) == 2
    ports = {port["name"] for port in engine["ports"]}
    assert ports == {"http", "weightd-health", "weightd-metrics"}
    # Both the loading and the engine's own start have their time.
    probe = engine["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 3600 + 1800


@pytest.mark.parametrize(
    ("kubernetes", "values", "claims", "visible"),
    [
        ("1.37", {}, True, False),
        ("1.34.0", {}, True, False),
        ("1.34.1-gke.1829001", {}, True, False),
        ("1.33.9", {}, False, True),
        ("1.33.5-eks-113cf36", {}, False, True),
        ("1.37", {"mode": "node"}, False, True),
        ("1.37", {"image": {"variant": "cpu"}}, False, False),
        ("1.37", {"gpu": {"sharing": "none"}}, False, False),
    ],
)
def test_without_a_choice_the_gpu_is_shared_as_the_cluster_can(
    kubernetes: str, values: dict[str, Any], claims: bool, visible: bool
) -> None:
    documents = manifests(values, kubernetes=kubernetes)
    weightd = container(documents, "weightd")
    assert ("claims" in weightd["resources"]) is claims
    assert bool(all_of(documents, "ResourceClaimTemplate")) is claims
    assert ("NVIDIA_VISIBLE_DEVICES" in env_of(weightd)) is visible


# ---------------------------------------------------------------------- the engine


def test_any_engine_takes_vllms_place() -> None:
    documents = rendered("another engine")
    engine = container(documents, "engine")
    assert engine["image"] == "registry.example.com:5000/team/engine:1.2.3"
    assert "command" not in engine
    assert engine["args"] == ["serve", "--port=9000"]
    assert "startupProbe" not in engine
    assert engine["livenessProbe"]["tcpSocket"] == {"port": 9000}
    assert engine["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert engine["resources"]["limits"]["memory"] == "16Gi"
    assert env_of(engine)["PYTHONPATH"] == "/opt/own"
    assert {"name": "models", "mountPath": "/models", "readOnly": True} in engine["volumeMounts"]
    assert find(documents, "Deployment")["spec"]["replicas"] == 3
    assert [c["name"] for c in pod_spec(find(documents, "Deployment"))["initContainers"]] == ["weightd"]
    service = find(documents, "Service")
    assert service["spec"]["type"] == "LoadBalancer"
    assert service["spec"]["ports"] == [{"name": "http", "port": 443, "targetPort": "http"}]
    assert not [volume for volume in pod_spec(find(documents, "Deployment"))["volumes"] if "shm" in volume["name"]]


def test_an_engine_may_be_pinned_by_digest() -> None:
    digest = "sha256:" + "b" * 64
    assert (
        container(manifests({"engine": {"image": {"digest": digest}}}), "engine")["image"]
        == f"vllm/vllm-openai@{digest}"
    )


def test_an_engines_processes_have_room_to_talk() -> None:
    documents = manifests({"engine": {"shmSize": "8Gi"}})
    (volume,) = (v for v in pod_spec(find(documents, "Deployment"))["volumes"] if v["name"] == "engine-shm")
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}


def test_without_an_engine_no_pod_is_rendered_but_what_pods_need_is() -> None:
    documents = rendered("no engine")
    assert not workloads(documents)
    assert {d["kind"] for d in documents} == {"Service", "ServiceAccount", "NetworkPolicy", "ResourceClaimTemplate"}
