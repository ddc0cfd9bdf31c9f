"""Who gets in, and with what: credentials, peers, the network, and those who watch."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.cases import CASES, IDENTITIES, PEERS, SECRETS, rendered
from tests.chart.helm import CHART, manifests
from tests.chart.manifests import all_of, container, env_of, find, pod_labels, pod_spec, workloads

# ---------------------------------------------------------------------- credentials


def test_secrets_become_the_variables_that_each_clouds_library_reads() -> None:
    env = env_of(container(rendered("secrets"), "weightd"))
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
    weightd = container(rendered(name), "weightd")
    (mount,) = (mount for mount in weightd["volumeMounts"] if mount["name"] == "weightd-ca")
    assert mount["mountPath"] == env_of(weightd)["AWS_CA_BUNDLE"] == env_of(weightd)["SSL_CERT_FILE"]
    assert mount["subPath"] == ("bundle.pem" if name == "secrets" else "ca.crt")


def test_identities_become_what_each_cloud_looks_for() -> None:
    documents = rendered("identities")
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
    (service,) = (s for s in all_of(rendered("peers"), "Service") if s["metadata"]["name"].endswith("-peers"))
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["ports"] == [{"name": "weightd-peers", "port": 7401, "targetPort": 7401}]
    assert not all_of(rendered("peers"), "Secret"), "the token was named"


def test_a_token_that_nobody_named_is_made_and_as_long_as_it_should_be() -> None:
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
    weightd = container(rendered("peers by etcd"), "weightd")
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
    policy = find(rendered("everything that watches"), "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}]


def test_memory_may_be_locked_where_rdma_needs_it() -> None:
    weightd = container(rendered("rdma"), "weightd")
    assert weightd["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert weightd["resources"]["limits"]["rdma/hca_shared_devices_a"] == 1
    assert "add" not in container(manifests(), "weightd")["securityContext"]["capabilities"]


# ---------------------------------------------------------------------- seeing


def test_monitors_scrape_the_metrics_port_under_the_name_that_alerts_know() -> None:
    endpoint = find(rendered("everything that watches"), "PodMonitor")["spec"]["podMetricsEndpoints"][0]
    assert endpoint["port"] == "weightd-metrics"
    assert {"targetLabel": "job", "replacement": "weightd"} in endpoint["relabelings"]
    assert find(rendered("everything that watches"), "PodMonitor")["metadata"]["labels"]["release"] == "prometheus"
    documents = rendered("watched by a service")
    endpoint = find(documents, "ServiceMonitor")["spec"]["endpoints"][0]
    service = find(documents, "Service", "llama-weightd-metrics")
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}


def test_alerts_and_dashboard_are_the_files_unchanged() -> None:
    documents = rendered("everything that watches")
    assert find(documents, "PrometheusRule")["spec"] == yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
    dashboard = find(documents, "ConfigMap")
    (text,) = dashboard["data"].values()
    assert json.loads(text) == json.loads((CHART / "files" / "dashboard.json").read_text())
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert dashboard["metadata"]["annotations"] == {"grafana_folder": "Inference"}


def test_annotations_of_alerts_keep_their_own_braces(tmp_path: Path) -> None:
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
    weightd = container(rendered("not watched"), "weightd")
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
