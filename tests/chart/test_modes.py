"""What each value is for, in what the chart renders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.cases import CASES, IDENTITIES, PEERS, PRELOAD, SECRETS, SINGLE
from tests.chart.helm import CHART, Manifest, manifests
from tests.chart.manifests import all_of, container, containers, env_of, find, pod_labels, pod_spec, workloads

CLAIM = [{"name": "weightd-gpu"}]


def case(name: str) -> list[Manifest]:
    values, kubernetes, release = CASES[name]
    return manifests(values, kubernetes=kubernetes[-1], release=release)


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
    spec = pod_spec(find(case("node with everything"), "DaemonSet"))
    paths = {volume["name"]: volume["hostPath"]["path"] for volume in spec["volumes"] if "hostPath" in volume}
    assert paths == {"weightd-run": "/var/run/weights", "weightd-cache": "/mnt/nvme/weights"}
    prepare, weightd = containers(spec)
    assert prepare["name"] == "prepare"
    assert prepare["command"][-4:] == ["65532", "65532", "/run/weightd", "/var/cache/weightd"]
    assert "restartPolicy" not in weightd
    assert weightd["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert weightd["startupProbe"]["httpGet"]["path"] == "/livez"
    assert not all_of(case("node with everything"), "Deployment")


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
    (shim,) = consumer["spec"]["initContainers"]
    rendered = container(manifests(), "weightd-shim")
    assert (shim["image"], shim["command"]) == (rendered["image"], rendered["command"])


# ---------------------------------------------------------------------- the GPU


def test_both_containers_share_one_claim() -> None:
    documents = case("claims")
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
    documents = case(name)
    assert pod_spec(find(documents, "Deployment"))["resourceClaims"] == [{"name": "weightd-gpu", **claim}]
    assert not all_of(documents, "ResourceClaimTemplate")


def test_a_nodes_daemon_claims_no_gpu_from_its_engines() -> None:
    (request,) = find(case("node by DRA"), "ResourceClaimTemplate")["spec"]["spec"]["devices"]["requests"]
    assert request["exactly"]["adminAccess"] is True
    assert request["exactly"]["allocationMode"] == "All"
    weightd = container(case("node"), "weightd")
    assert env_of(weightd)["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert not gpus(weightd)


def test_weightd_sees_gpus_that_only_the_engine_has_asked_for() -> None:
    documents = case("visible devices")
    assert env_of(container(documents, "weightd"))["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert "compute" in env_of(container(documents, "weightd"))["NVIDIA_DRIVER_CAPABILITIES"]
    assert (gpus(container(documents, "weightd")), gpus(container(documents, "engine"))) == (0, 2)
    assert "NVIDIA_VISIBLE_DEVICES" not in env_of(container(documents, "engine"))
    assert pod_spec(find(documents, "Deployment"))["runtimeClassName"] == "nvidia"


def test_the_same_devices_are_visible_in_both_without_a_request() -> None:
    documents = case("the same visible devices")
    for name in ("weightd", "engine"):
        assert env_of(container(documents, name))["NVIDIA_VISIBLE_DEVICES"] == "0,1"
        assert not gpus(container(documents, name))


def test_each_container_asks_for_replicas() -> None:
    documents = case("replicas")
    for name in ("weightd", "engine"):
        assert gpus(container(documents, name), "nvidia.com/gpu.shared") == 2


def test_one_container_runs_both_processes() -> None:
    documents = case("one container")
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
        ("1.33.9", {}, False, True),
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
    documents = case("another engine")
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


def test_an_engines_processes_have_room_to_talk() -> None:
    documents = manifests({"engine": {"shmSize": "8Gi"}})
    (volume,) = (v for v in pod_spec(find(documents, "Deployment"))["volumes"] if v["name"] == "engine-shm")
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}


def test_without_an_engine_no_pod_is_rendered_but_what_pods_need_is() -> None:
    documents = case("no engine")
    assert not workloads(documents)
    assert {d["kind"] for d in documents} == {"Service", "ServiceAccount", "NetworkPolicy", "ResourceClaimTemplate"}


# ---------------------------------------------------------------------- credentials


def test_secrets_become_the_variables_that_each_clouds_library_reads() -> None:
    env = env_of(container(case("secrets"), "weightd"))
    for name, secret in {
        "AWS_ACCESS_KEY_ID": "s3", "AWS_SECRET_ACCESS_KEY": "s3", "AZURE_STORAGE_ACCOUNT_KEY": "azure", "HF_TOKEN": "hf"
    }.items():  # fmt: skip
        assert env[name]["secretKeyRef"] == {"name": secret, "key": name}
    assert env["AWS_SESSION_TOKEN"]["secretKeyRef"]["optional"] is True
    assert env["AWS_ENDPOINT_URL"] == SECRETS["s3"]["endpoint"]
    assert env["AWS_DEFAULT_REGION"] == "eu-central-1"
    assert env["RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING"] == "0"
    assert env["GOOGLE_APPLICATION_CREDENTIALS"] == "/etc/weightd/gcs/key.json"
    assert env["AZURE_STORAGE_ACCOUNT_NAME"] == "models"
    assert env["HF_ENDPOINT"] == "https://hub.example.com"


@pytest.mark.parametrize("name", ["secrets", "a secret with authorities"])
def test_authorities_take_the_place_of_the_images_own(name: str) -> None:
    weightd = container(case(name), "weightd")
    (mount,) = (mount for mount in weightd["volumeMounts"] if mount["name"] == "weightd-ca")
    assert mount["mountPath"] == env_of(weightd)["AWS_CA_BUNDLE"] == env_of(weightd)["SSL_CERT_FILE"]
    assert mount["subPath"] == ("bundle.pem" if name == "secrets" else "ca.crt")


def test_identities_become_what_each_cloud_looks_for() -> None:
    documents = case("identities")
    account = find(documents, "ServiceAccount")
    assert account["metadata"]["annotations"] == {
        "eks.amazonaws.com/role-arn": IDENTITIES["s3"]["roleArn"],
        "iam.gke.io/gcp-service-account": IDENTITIES["gcs"]["serviceAccount"],
        "azure.workload.identity/client-id": IDENTITIES["azure"]["clientId"],
        "example.com/team": "a",
    }
    (workload,) = workloads(documents)
    assert pod_labels(workload)["azure.workload.identity/use"] == "true"
    assert "azure.workload.identity/use" not in pod_labels(workloads(manifests())[0])
    # Instead of an identity's, the instance's own credentials would be used where this is set.
    assert "AWS_EC2_METADATA_DISABLED" not in env_of(container(documents, "weightd"))


def test_an_account_that_exists_is_used_and_none_is_made() -> None:
    documents = manifests({"serviceAccount": {"create": False, "name": "models"}})
    assert not all_of(documents, "ServiceAccount")
    assert pod_spec(find(documents, "Deployment"))["serviceAccountName"] == "models"


# ---------------------------------------------------------------------- peers and the network


def test_peers_find_each_other_while_they_load() -> None:
    (service,) = (s for s in all_of(case("peers"), "Service") if s["metadata"]["name"].endswith("-peers"))
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["ports"] == [{"name": "weightd-peers", "port": 7401, "targetPort": 7401}]
    assert not all_of(case("peers"), "Secret"), "the token was named"


def test_a_token_that_nobody_named_is_made_and_as_long_as_it_should_be() -> None:
    import base64

    documents = manifests({"peers": {"enabled": True}})
    secret = find(documents, "Secret")
    assert len(base64.b64decode(secret["data"]["token"])) == 48
    assert env_of(container(documents, "weightd"))["WEIGHTD_PEER_TOKEN"]["secretKeyRef"] == {
        "name": secret["metadata"]["name"],
        "key": "token",
    }


def test_peers_are_off_unless_asked_for() -> None:
    documents = manifests()
    assert not [name for name in env_of(container(documents, "weightd")) if "PEER" in name]
    assert "weightd-peers" not in {port["name"] for port in container(documents, "weightd")["ports"]}


def test_certificates_are_mounted_for_daemons_and_etcd() -> None:
    weightd = container(case("peers by etcd"), "weightd")
    env = env_of(weightd)
    assert {env[f"WEIGHTD_PEER_TLS_{name}"] for name in ("CERT", "KEY", "CA")} == {
        f"/etc/weightd/peer-tls/{name}" for name in ("tls.crt", "tls.key", "ca.crt")
    }
    assert {env[f"ETCDCTL_{name}"] for name in ("CERT", "KEY", "CACERT")} == {
        f"/etc/weightd/etcd-tls/{name}" for name in ("tls.crt", "tls.key", "ca.crt")
    }
    assert env["ETCDCTL_USER"]["secretKeyRef"] == {"name": "etcd-user", "key": "user"}
    assert "WEIGHTD_PEER_TOKEN" not in env


def test_only_peers_prometheus_and_the_engines_clients_get_in() -> None:
    def rules(values: dict[str, Any]) -> list[dict[str, Any]]:
        policy = find(
            manifests({**values, "networkPolicy": {"enabled": True, **values.get("networkPolicy", {})}}),
            "NetworkPolicy",
        )
        assert policy["spec"]["policyTypes"][0] == "Ingress"
        found: list[dict[str, Any]] = policy["spec"]["ingress"] or []
        return found

    fleet = {"podSelector": {"matchLabels": {"weightd/fleet": "llama-weightd"}}}
    prometheus = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    metrics = {"from": [prometheus], "ports": [{"port": 7403, "protocol": "TCP"}]}
    engine = {"ports": [{"port": 8000, "protocol": "TCP"}]}
    assert rules({}) == [metrics, engine]
    assert rules({"peers": PEERS}) == [{"from": [fleet]}, metrics, engine]
    assert rules({"mode": "node", "peers": PEERS}) == [{"from": [fleet]}, metrics]
    assert rules({"mode": "node", "metrics": {"enabled": False}}) == []
    (first, second, third) = rules(CASES["everything that watches"].values)
    assert first["from"] == [{"podSelector": {"matchLabels": {"app": "prometheus"}}}]
    assert second == {**engine, "from": [{"namespaceSelector": {}}]}
    assert third == {"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}
    policy = find(case("everything that watches"), "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}]


def test_memory_may_be_locked_where_rdma_needs_it() -> None:
    weightd = container(case("rdma"), "weightd")
    assert weightd["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert weightd["resources"]["limits"]["rdma/hca_shared_devices_a"] == 1
    assert "add" not in container(manifests(), "weightd")["securityContext"]["capabilities"]


# ---------------------------------------------------------------------- seeing


def test_monitors_scrape_the_metrics_port_under_the_name_that_alerts_know() -> None:
    endpoint = find(case("everything that watches"), "PodMonitor")["spec"]["podMetricsEndpoints"][0]
    assert endpoint["port"] == "weightd-metrics"
    assert {"targetLabel": "job", "replacement": "weightd"} in endpoint["relabelings"]
    assert find(case("everything that watches"), "PodMonitor")["metadata"]["labels"]["release"] == "prometheus"
    documents = case("watched by a service")
    endpoint = find(documents, "ServiceMonitor")["spec"]["endpoints"][0]
    service = find(documents, "Service", "llama-weightd-metrics")
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}


def test_alerts_and_dashboard_are_the_files_unchanged() -> None:
    documents = case("everything that watches")
    assert find(documents, "PrometheusRule")["spec"] == yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
    dashboard = find(documents, "ConfigMap")
    (text,) = dashboard["data"].values()
    assert json.loads(text) == json.loads((CHART / "files" / "dashboard.json").read_text())
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert dashboard["metadata"]["annotations"] == {"grafana_folder": "Inference"}


def test_annotations_of_alerts_keep_their_own_braces(tmp_path: Path) -> None:
    import shutil

    chart = tmp_path / "weightd"
    shutil.copytree(CHART, chart)
    rules = {
        "groups": [
            {"name": "a", "rules": [{"alert": "A", "expr": "up == 0", "annotations": {"summary": "{{ $labels.x }}"}}]}
        ]
    }
    (chart / "files" / "alerts.yaml").write_text(yaml.safe_dump(rules))
    documents = manifests({"metrics": {"prometheusRule": {"enabled": True}}}, chart=chart)
    assert find(documents, "PrometheusRule")["spec"] == rules


def test_metrics_that_are_off_are_served_nowhere() -> None:
    weightd = container(case("not watched"), "weightd")
    assert "WEIGHTD_METRICS_LISTEN" not in env_of(weightd)
    assert {port["name"] for port in weightd["ports"]} == {"weightd-health"}


@pytest.mark.parametrize(
    ("values", "spec"),
    [
        ({}, {"maxUnavailable": 1}),
        ({"maxUnavailable": "25%"}, {"maxUnavailable": "25%"}),
        ({"minAvailable": 2}, {"minAvailable": 2}),
        ({"minAvailable": 0}, {"minAvailable": 0}),
    ],
)
def test_a_disruption_budget_says_one_thing(values: dict[str, Any], spec: dict[str, Any]) -> None:
    budget = find(manifests({"podDisruptionBudget": {"enabled": True, **values}}), "PodDisruptionBudget")["spec"]
    assert {name: value for name, value in budget.items() if name != "selector"} == spec


# ---------------------------------------------------------------------- the Pod


def test_pods_are_placed_as_the_values_say() -> None:
    values = CASES["scheduled"].values
    workload = find(case("scheduled"), "Deployment")
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
    weightd = container(case("scheduled"), "weightd")
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
