"""What holds for whatever the chart renders: asserted for each case, for each release of Kubernetes that it is for."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import kubernetes_validate
import pytest
from kubernetes_validate import utils as validating

from tests.chart.cases import CASES, rendered
from tests.chart.helm import Manifest, manifests, template
from tests.chart.manifests import (
    all_of,
    containers,
    daemon_of,
    daemons,
    env_of,
    is_tracing,
    labelled,
    pod_labels,
    pod_spec,
    quantity,
    walk,
    workloads,
)

RENDERED = [(name, kubernetes) for name, case in CASES.items() for kubernetes in case.kubernetes]
CUSTOM = {"PodMonitor", "ServiceMonitor", "PrometheusRule"}
"""Kinds that Kubernetes has no schema of."""
ENUMERATIONS = {
    "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
    "restartPolicy": {"Always"},
    "protocol": {"TCP", "UDP", "SCTP"},
    "medium": {"Memory"},
    "fsGroupChangePolicy": {"OnRootMismatch", "Always"},
    "policyTypes": {"Ingress", "Egress"},
    "allocationMode": {"ExactCount", "All"},
    "whenUnsatisfiable": {"DoNotSchedule", "ScheduleAnyway"},
    "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
    "operator": {"Exists", "Equal", "In", "NotIn", "DoesNotExist", "Gt", "Lt"},
    "clusterIP": {"None"},
}
"""Fields for which Kubernetes knows some words only, which its schemas do not say."""
TYPES = {
    "hostPath": {"DirectoryOrCreate", "Directory"},
    "strategy": {"RollingUpdate", "Recreate"},
    "updateStrategy": {"RollingUpdate", "OnDelete"},
    "seccompProfile": {"RuntimeDefault"},
    "spec": {"ClusterIP", "NodePort", "LoadBalancer"},
}
"""The same for fields called ``type``, by what they are in."""

# It would read and index two megabytes of definitions again for each manifest.
validating.schema_contents = functools.cache(validating.schema_contents)
validating.all_versions = functools.cache(validating.all_versions)


@pytest.fixture(scope="module", autouse=True)
def _on_all_cores(_helm: None) -> None:
    """All cases are rendered once, side by side; the test that asks for one that is refused says so."""
    with ThreadPoolExecutor(4) as pool:
        for case in RENDERED:
            pool.submit(rendered, *case)


@pytest.fixture(params=RENDERED, ids=" ".join)
def documents(request: pytest.FixtureRequest) -> list[Manifest]:
    return rendered(*request.param)


@pytest.mark.parametrize(("name", "kubernetes"), RENDERED, ids=map(" ".join, RENDERED))
def test_kubernetes_itself_takes_every_manifest_and_knows_every_field(name: str, kubernetes: str) -> None:
    found = rendered(name, kubernetes)
    assert found
    for document in found:
        if document["kind"] not in CUSTOM:
            assert kubernetes_validate.validate(document, kubernetes, strict=True) == kubernetes


def test_that_validation_would_notice_a_field_that_does_not_exist() -> None:
    for document in rendered("default", "1.37"):
        with pytest.raises(validating.ValidationError):
            kubernetes_validate.validate({**document, "replica": 1}, "1.37", strict=True)


def test_words_are_those_that_kubernetes_knows(documents: list[Manifest]) -> None:
    for document in documents:
        for path, value in walk(document):
            if path and path[-1] in ENUMERATIONS:
                words = value if isinstance(value, list) else [value]
                assert set(words) <= ENUMERATIONS[path[-1]], path
            if len(path) > 1 and path[-1] == "type" and path[-2] in TYPES:
                assert value in TYPES[path[-2]], path


def test_names_fit_and_are_there_once(documents: list[Manifest]) -> None:
    names = Counter((document["apiVersion"], document["kind"], document["metadata"]["name"]) for document in documents)
    assert set(names.values()) == {1}
    for document in documents:
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", document["metadata"]["name"])
        assert document["metadata"]["namespace"] == "models"


def test_labels_fit_and_name_the_release(documents: list[Manifest]) -> None:
    for document in documents:
        assert document["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "Helm"
        assert len(document["metadata"]["labels"]["app.kubernetes.io/instance"]) <= 53
        for path, value in walk(document):
            if path and path[-1] in ("labels", "matchLabels", "nodeSelector"):
                for key, text in value.items():
                    prefix, _, name = key.rpartition("/")
                    assert re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", name), path
                    assert len(prefix) <= 253
                    assert re.fullmatch(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?", text), path


def test_a_workload_selects_its_own_pods_by_labels_that_never_change(documents: list[Manifest]) -> None:
    for workload in workloads(documents):
        selector = workload["spec"]["selector"]["matchLabels"]
        assert set(selector) == {"app.kubernetes.io/name", "app.kubernetes.io/instance"}
        assert labelled(workload, selector)
        # A new version of the chart alone replaces no Pod: its weights would be gone.
        assert not [label for label in pod_labels(workload) if "version" in label or "chart" in label]


def test_whatever_selects_pods_finds_these(documents: list[Manifest]) -> None:
    for document in documents:
        spec = document.get("spec", {})
        selector = spec.get("podSelector", spec.get("selector")) or {}
        selector = selector.get("matchLabels", selector)
        if document["kind"] == "ServiceMonitor":
            (service,) = (s for s in all_of(documents, "Service") if s["spec"]["ports"][0]["name"] == "weightd-metrics")
            assert selector.items() <= service["metadata"]["labels"].items()
            # The engine's Service, or the peers', would be scraped at a port that it does not have, or twice.
            others = [s for s in all_of(documents, "Service") if s is not service]
            assert not [s for s in others if selector.items() <= s["metadata"]["labels"].items()]
        elif document["kind"] in ("Service", "NetworkPolicy", "PodDisruptionBudget", "PodMonitor"):
            assert selector, "an empty selector is all Pods of the namespace"
            for workload in workloads(documents):
                # What traces ahead is no daemon: it has no peers, no metrics, and may go at any time.
                assert labelled(workload, selector) is not is_tracing(workload)


def test_every_port_that_is_named_or_numbered_is_a_containers(documents: list[Manifest]) -> None:
    for workload in daemons(documents):
        spec = pod_spec(workload)
        ports = [port for container in containers(spec) for port in container.get("ports", [])]
        numbers = {port["containerPort"] for port in ports}
        names = {port["name"]: port["containerPort"] for port in ports}
        assert len(numbers) == len(names) == len(ports), "ports are there twice"
        assert all(re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?", name) for name in names)
        main = {port["name"] for container in spec["containers"] for port in container.get("ports", [])}
        for service in all_of(documents, "Service"):
            for port in service["spec"]["ports"]:
                # Kubernetes before 1.32 resolves no names of sidecars' ports.
                assert port["targetPort"] in (main | numbers)
                assert 1 <= port["port"] <= 65535
        for policy in all_of(documents, "NetworkPolicy"):
            for rule in policy["spec"]["ingress"]:
                assert {port["port"] for port in rule.get("ports", [])} <= numbers
        for monitor in all_of(documents, "PodMonitor"):
            assert [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]] == ["weightd-metrics"]
            assert "weightd-metrics" in names


def test_probes_ask_a_port_of_their_own_container(documents: list[Manifest]) -> None:
    for workload in workloads(documents):
        for container in containers(pod_spec(workload)):
            own = {key for port in container.get("ports", []) for key in (port["name"], port["containerPort"])}
            probes = [probe for name, probe in container.items() if name.endswith("Probe")]
            for probe in probes:
                assert (probe.get("httpGet") or probe["tcpSocket"])["port"] in own
    for workload in daemons(documents):
        daemon = daemon_of(pod_spec(workload))
        assert daemon is not None
        if daemon["name"] == "weightd":
            assert daemon["livenessProbe"]["httpGet"]["path"] == "/livez"
            assert daemon["livenessProbe"]["periodSeconds"] * daemon["livenessProbe"]["failureThreshold"] >= 60


def test_every_mount_has_a_volume_and_every_volume_a_mount(documents: list[Manifest]) -> None:
    for workload in workloads(documents):
        spec = pod_spec(workload)
        volumes = Counter(volume["name"] for volume in spec["volumes"])
        assert set(volumes.values()) == {1}
        mounted = set()
        for container in containers(spec):
            mounts = container.get("volumeMounts", [])
            assert len({mount["mountPath"] for mount in mounts}) == len(mounts)
            mounted |= {mount["name"] for mount in mounts}
        assert mounted == set(volumes)


def test_every_path_that_the_daemon_is_told_is_mounted(documents: list[Manifest]) -> None:
    for workload in daemons(documents):
        daemon = daemon_of(pod_spec(workload))
        assert daemon is not None
        mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in daemon["volumeMounts"]}
        for name, text in env_of(daemon).items():
            if isinstance(text, str) and text.startswith("/") and name != "WEIGHTD_ALLOW":
                (mount,) = (path for path in mounts if f"{text}/".startswith(f"{path}/"))
                # What is secret is only read, and what is written lies on a volume: the image is read-only.
                assert mounts[mount] == (not name.endswith(("_DIR", "_HOME", "CACHE_PATH")))
        if daemon["securityContext"].get("readOnlyRootFilesystem"):
            assert "/tmp" in mounts


def test_engines_find_the_sockets_and_files_where_the_daemon_has_them_and_cannot_replace_them(
    documents: list[Manifest],
) -> None:
    (ours,) = (daemon_of(pod_spec(workload)) for workload in daemons(documents)) if daemons(documents) else (None,)
    for workload in workloads(documents):
        for engine in containers(pod_spec(workload)):
            if engine is ours or not (engine["name"] == "engine" or engine["name"].startswith("weightd-trace")):
                continue
            assert ours is not None
            theirs = {mount["name"]: mount for mount in ours["volumeMounts"]}
            mounts = {mount["name"]: mount for mount in engine["volumeMounts"]}
            for name in ("weightd-run", "weightd-cache"):
                assert mounts[name]["mountPath"] == theirs[name]["mountPath"]
                assert mounts[name]["readOnly"] is True
            assert env_of(engine)["WEIGHTD_RUNTIME_DIR"] == theirs["weightd-run"]["mountPath"]
            assert env_of(engine)["WEIGHTD_DAEMON_UID"] == env_of(ours)["WEIGHTD_DAEMON_UID"]
            if "weightd-shim" in mounts:
                assert env_of(engine)["PYTHONPATH"] == mounts["weightd-shim"]["mountPath"]


def test_of_weightds_secrets_an_engine_has_those_of_the_object_stores_and_no_other(documents: list[Manifest]) -> None:
    stores = {
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "HF_TOKEN",
    }
    for workload in workloads(documents):
        for engine in containers(pod_spec(workload)):
            if engine is not daemon_of(pod_spec(workload)):
                assert {name for name in env_of(engine) if re.search("SECRET|TOKEN|KEY", name)} <= stores
                for mount in engine.get("volumeMounts", []):
                    assert mount["name"] not in ("weightd-peer-tls", "weightd-etcd-tls")


def test_variables_are_there_once_and_refer_to_what_came_before(documents: list[Manifest]) -> None:
    for workload in workloads(documents):
        for container in containers(pod_spec(workload)):
            known: set[str] = set()
            for entry in container.get("env", []):
                assert entry["name"] not in known
                text = entry.get("value", "")
                assert isinstance(text, str)
                assert set(re.findall(r"(?<!\$)\$\(([^)]*)\)", text)) <= known
                known.add(entry["name"])


def test_quantities_are_quantities_and_no_request_is_over_its_limit(documents: list[Manifest]) -> None:
    for workload in workloads(documents):
        for container in containers(pod_spec(workload)):
            resources = container.get("resources", {})
            limits = {name: quantity(value) for name, value in resources.get("limits", {}).items()}
            requests = {name: quantity(value) for name, value in resources.get("requests", {}).items()}
            assert all(value <= limits.get(name, value) for name, value in requests.items())
            assert all("/" not in name or float(value).is_integer() for name, value in limits.items())
        for path, value in walk(pod_spec(workload)):
            if path and path[-1] == "sizeLimit":
                assert quantity(value) > 0


def test_no_pod_has_the_nodes_namespaces_or_a_privileged_container(documents: list[Manifest]) -> None:
    for workload in workloads(documents):
        spec = pod_spec(workload)
        assert not {"hostPID", "hostIPC", "hostNetwork", "hostUsers"} & set(spec)
        assert spec["automountServiceAccountToken"] is False
        for container in containers(spec):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"]["drop"] == ["ALL"]
            assert not security.get("privileged")
            assert set(security["capabilities"].get("add", [])) <= {"CHOWN", "IPC_LOCK"}
        if workload["kind"] == "Deployment":
            assert not [volume for volume in spec["volumes"] if "hostPath" in volume]


def test_weightd_runs_as_what_pod_security_calls_restricted(documents: list[Manifest]) -> None:
    for workload in workloads(documents):
        for container in containers(pod_spec(workload)):
            security = container["securityContext"]
            if container["name"] not in ("weightd", "weightd-shim", "traced") or security["runAsUser"] == 0:
                continue
            assert security["runAsNonRoot"] is True
            assert security["runAsUser"] > 0
            assert security["readOnlyRootFilesystem"] is True
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}
            assert "add" not in security["capabilities"]


def test_images_have_a_tag_or_a_digest_and_none_is_the_latest(documents: list[Manifest]) -> None:
    for workload in workloads(documents):
        for container in containers(pod_spec(workload)):
            assert re.fullmatch(r"[\w./:-]+(:[\w.-]+|@sha256:[0-9a-f]{64})", container["image"])
            assert not container["image"].endswith(":latest")


def test_what_a_pod_refers_to_is_rendered_or_was_named_in_the_values(documents: list[Manifest], request: Any) -> None:
    name = request.node.callspec.params["documents"][0]
    given = json.dumps(CASES[name].values)
    own = {(document["kind"], document["metadata"]["name"]) for document in documents}
    kinds = {
        "secretKeyRef": ("Secret", "name"), "secretRef": ("Secret", "name"), "secret": ("Secret", "secretName"),
        "configMap": ("ConfigMap", "name"), "persistentVolumeClaim": ("PersistentVolumeClaim", "claimName"),
    }  # fmt: skip
    for workload in workloads(documents):
        spec = pod_spec(workload)
        references = {("ServiceAccount", spec["serviceAccountName"])}
        for path, value in walk(spec):
            if path and path[-1] in kinds:
                kind, key = kinds[path[-1]]
                references.add((kind, value[key]))
        for claim in spec.get("resourceClaims", []):
            assert len(claim) == 2
            if "resourceClaimTemplateName" in claim:
                references.add(("ResourceClaimTemplate", claim["resourceClaimTemplateName"]))
        for kind, wanted in references - own:
            assert f'"{wanted}"' in given or (kind, wanted) == ("ServiceAccount", "default"), (kind, wanted)


def test_containers_claim_what_their_pod_has_claimed(documents: list[Manifest]) -> None:
    for workload in workloads(documents):
        spec = pod_spec(workload)
        there = {claim["name"] for claim in spec.get("resourceClaims", [])}
        used = {claim["name"] for c in containers(spec) for claim in c.get("resources", {}).get("claims", [])}
        assert there == used
        # Two ways at once would be two GPUs.
        limits = [name for c in containers(spec) for name in c.get("resources", {}).get("limits", {})]
        assert not (used and [name for name in limits if "nvidia" in name])


@pytest.mark.parametrize("name", [name for name in CASES if name != "default"][::4])
def test_the_same_values_render_the_same_text(name: str) -> None:
    case = CASES[name]
    kubernetes = case.kubernetes[-1]
    first = template(case.values, release=case.release, kubernetes=kubernetes)
    # Another question by an argument that changes nothing: the answer is not the remembered one.
    again = template(case.values, release=case.release, kubernetes=kubernetes, arguments=["--timeout", "1m"])
    assert first == again


@pytest.mark.parametrize("name", ["peers", "everything that watches", "node with everything", "claims"])
@pytest.mark.parametrize("releases", [("a", "b"), ("llama", "llama-2"), ("r" * 52 + "1", "r" * 52 + "2")])
def test_two_releases_in_one_namespace_share_nothing(name: str, releases: tuple[str, str]) -> None:
    one, two = (manifests(CASES[name].values, release=release) for release in releases)
    keys = [{(document["kind"], document["metadata"]["name"]) for document in documents} for documents in (one, two)]
    assert not keys[0] & keys[1]
    for documents, others in ((one, two), (two, one)):
        for document in documents:
            spec = document.get("spec", {})
            selector = spec.get("podSelector", spec.get("selector")) or {}
            selector = selector.get("matchLabels", selector)
            assert not (selector and any(labelled(workload, selector) for workload in workloads(others)))
