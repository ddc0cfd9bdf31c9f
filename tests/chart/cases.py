"""Values that the chart is rendered with: each way to use it once, and what goes together."""

from __future__ import annotations

from typing import Any, NamedTuple

import yaml

from tests.chart.helm import CHART, Manifest, manifests

OLD, DRA, NEW = "1.31", "1.34", "1.37"
"""Releases of Kubernetes: one before DRA's v1, the first with it, and the newest that is known here."""


class Case(NamedTuple):
    values: dict[str, Any]
    kubernetes: tuple[str, ...] = (OLD, NEW)
    """Releases that it is rendered for and validated against."""
    release: str = "llama"


MAP = {"*.q_proj.weight": 0, "*.o_proj.weight": 1, "*": "replicate"}
PRELOAD: list[dict[str, Any]] = [
    {"model": "s3://models/llama-3-8b", "pin": True, "priority": 7, "ttl_seconds": 86400, "sources": ["origin"]},
    {"model": "/models/$(HOME)/'quoted' \"<&>\"", "device": "cpu", "expect_digest": "ab" * 32},
    {"model": "hf://org/name@main", "tensors": {"include": ["model.*"], "exclude": ["*.bias"]}},
    {"model": "gs://bucket/x", "device": "cpu", "parallel": {"tp_size": 2, "tp_rank": "all", "map": MAP}},
    {"model": "az://c/x", "device": "cpu", "expect_digest": {"a.safetensors": "sha256:" + "0" * 64}},
]
PEERS = {"enabled": True, "token": {"existingSecret": "fleet"}}
ETCD = {
    "enabled": True,
    "directory": "etcd",
    "etcd": {
        "endpoints": ["https://etcd-0.etcd:2379", "https://etcd-1.etcd:2379"],
        "existingSecret": "etcd-user",
        "tlsSecret": "etcd-tls",
        "clientCertificate": True,
    },
    "auth": "tls",
    "tls": {"existingSecret": "fleet-tls"},
}
MODELS = {
    "extraVolumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
    "extraVolumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
}
ENGINE: dict[str, Any] = {
    "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}], "envFrom": [{"secretRef": {"name": "keys"}}],
    "volumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
}  # fmt: skip
SECRETS = {
    "s3": {"existingSecret": "s3", "region": "eu-central-1", "endpoint": "https://minio.storage.svc:9000"},
    "gcs": {"existingSecret": "gcs", "key": "key.json"},
    "azure": {"existingSecret": "azure", "account": "models", "endpointSuffix": "blob.core.chinacloudapi.cn"},
    "hf": {"existingSecret": "hf", "endpoint": "https://hub.example.com"},
    "caBundle": {"configMap": "authorities", "key": "bundle.pem"},
}
IDENTITIES = {
    "s3": {"roleArn": "arn:aws:iam::123456789012:role/models"},
    "gcs": {"serviceAccount": "models@project.iam.gserviceaccount.com"},
    "azure": {"clientId": "01234567-89ab-cdef-0123-456789abcdef", "account": "models"},
}
VLLM = {"model": "s3://models/llama-3-8b", "args": ["--tensor-parallel-size=2", "--port", "8000"]}
EXAMPLES = {path.stem: yaml.safe_load(path.read_text()) for path in (CHART / "examples").glob("values-*.yaml")}
SINGLE = {"gpu": {"sharing": "singleContainer", "count": 2}}

CASES: dict[str, Case] = {
    "default": Case({}, (OLD, DRA, NEW)),
    "node": Case({"mode": "node"}),
    "node by DRA": Case({"mode": "node", "gpu": {"sharing": "dra", "dra": {"adminAccess": True}}}, (DRA, NEW)),
    "node with everything": Case(
        {
            "mode": "node",
            "preload": PRELOAD,
            "peers": PEERS,
            "node": {
                "hostPath": "/var/run/weights",
                "cacheHostPath": "/mnt/nvme/weights",
                "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}},
            },
            "networkPolicy": {"enabled": True},
            "podDisruptionBudget": {"enabled": True},
            "metrics": {"podMonitor": {"enabled": True}},
            "nodeSelector": {"nvidia.com/gpu.present": "true"},
        }
    ),
    "node that is prepared": Case({"mode": "node", "node": {"prepare": False}, "gpu": {"sharing": "replicas"}}),
    "processors only": Case(
        {"image": {"variant": "cpu"}, "settings": {"capacity": {"cpu": "8GiB", "cpu:0": 1 << 30}}, "preload": PRELOAD,
         "resources": {"limits": {"memory": "11Gi"}}}
    ),
    "claims": Case(
        {"gpu": {"sharing": "dra", "count": 4, "dra": {"selectors": ['device.driver == "gpu.nvidia.com"']}},
         "preload": [{"model": "s3://m/x", "device": "cuda:3"}]},
        (DRA, NEW),
    ),
    "a claim that exists": Case({"gpu": {"sharing": "dra", "dra": {"claimName": "shared"}}}, (DRA, NEW)),
    "a template that exists": Case({"gpu": {"sharing": "dra", "dra": {"claimTemplateName": "two-gpus"}}}, (DRA, NEW)),
    "visible devices": Case({"gpu": {"sharing": "visibleDevices", "count": 2}, "runtimeClassName": "nvidia"}),
    "the same visible devices": Case(
        {"gpu": {"sharing": "visibleDevices", "visibleDevices": {"devices": "0,1", "engine": "same"}},
         "preload": [{"model": "s3://m/x", "device": "cuda:1"}]}
    ),
    "replicas": Case({"gpu": {"sharing": "replicas", "count": 2, "resourceName": "nvidia.com/gpu.shared"}}),
    "one container": Case(SINGLE),
    "one container with everything": Case(
        {
            **SINGLE,
            **MODELS,
            "preload": [{"model": "s3://m/x", "device": ["cuda:0", "cuda:1"],
                         "parallel": {"tp_size": 2, "tp_rank": [0, 1], "map": {"*": "replicate"}}}],
            "peers": ETCD,
            "credentials": SECRETS,
            "engine": {"env": [{"name": "VLLM_LOGGING_LEVEL", "value": "DEBUG"}], "args": ["/models/x"]},
            "metrics": {"podMonitor": {"enabled": True}},
        }
    ),
    "an engine that does not wait": Case({"startup": {"wait": False}, "preload": PRELOAD}),
    "another engine": Case(
        {
            **MODELS,
            "engine": {
                "image": {"repository": "registry.example.com:5000/team/engine", "tag": "1.2.3"},
                "command": [], "args": ["serve", "--port=9000"], "port": 9000, "replicas": 3, "shmSize": "",
                "env": [{"name": "PYTHONPATH", "value": "/opt/own"}], "envFrom": [{"secretRef": {"name": "keys"}}],
                "resources": {"requests": {"cpu": 4, "memory": "16Gi"}, "limits": {"memory": "16Gi"}},
                "volumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
                "startupProbe": None, "livenessProbe": {"tcpSocket": {"port": 9000}},
                "strategy": {"type": "Recreate", "rollingUpdate": None},
                "service": {"type": "LoadBalancer", "port": 443, "annotations": {"example.com/lb": "internal"}},
            },
            "shim": {"enabled": False},
        }
    ),
    "an engine with all credentials": Case({"engine": VLLM, "credentials": SECRETS}),
    "an engine without credentials": Case({"engine": {**VLLM, "credentials": False}, "credentials": SECRETS}),
    "a layout ahead": Case(
        {"engine": {**VLLM, **ENGINE}, **MODELS,
         "gpu": {"sharing": "visibleDevices", "visibleDevices": {"engine": "same"}},
         "credentials": SECRETS, "startup": {"timeoutSeconds": 600},
         "trace": {"enabled": True, "processor": "cuda 9.0", "stage": {"pin": True, "ttl_seconds": 86400},
                   "resources": {"requests": {"cpu": 2}}}}
    ),
    "layouts ahead on processors": Case(
        {"engine": VLLM, "image": {"variant": "cpu"}, "trace": {"enabled": True, "engine": "sglang", "stage": {}}}
    ),
    "layouts ahead on nodes": Case(
        {
            "mode": "node", "engine": ENGINE, **MODELS, "credentials": SECRETS, "peers": PEERS,
            "networkPolicy": {"enabled": True}, "podDisruptionBudget": {"enabled": True},
            "metrics": {"podMonitor": {"enabled": True}}, "podLabels": {"example.com/own": "yes"},
            "podAnnotations": {"example.com/a": "b"}, "nameOverride": "n" * 63,
            "trace": {
                "enabled": True, "processor": "cuda 9.0", "stage": {"device": ["cuda:0", "cuda:1"]},
                "models": [
                    {"model": "s3://models/llama-3-8b", "args": ["--tensor-parallel-size=2"]},
                    {"model": "s3://models/other", "engine": "sglang", "image": "registry.example.com:5000/sglang:1",
                     "processor": "cuda 10.0", "stage": None},
                ],
            },
        }
    ),
    "layouts ahead by DRA and identities": Case(
        {"mode": "node", "gpu": {"sharing": "dra", "dra": {"adminAccess": True}}, "credentials": IDENTITIES,
         "engine": {"credentials": False}, "shim": {"enabled": False},
         "trace": {"enabled": True, "processor": "cuda 9.0", "models": [{"model": "s3://m/x"}]}},
        (DRA, NEW),
    ),
    **{f"example {name}": Case(values) for name, values in EXAMPLES.items()},
    "no engine": Case({"engine": {"enabled": False}, "peers": PEERS, "networkPolicy": {"enabled": True}}),
    "no service": Case({"engine": {"service": {"enabled": False}}, "serviceAccount": {"create": False}}),
    "secrets": Case({"credentials": SECRETS}),
    "a secret with authorities": Case({"credentials": {"caBundle": {"secret": "ca"}, "gcs": {"emulator": "http://gcs:4443"}}}),
    "identities": Case({"credentials": IDENTITIES, "serviceAccount": {"annotations": {"example.com/team": "a"}}}),
    "peers": Case({"peers": PEERS, "networkPolicy": {"enabled": True}}),
    "peers with IPv6": Case({"peers": PEERS, "ipFamily": "IPv6"}),
    "peers by etcd": Case({"peers": ETCD}),
    "rdma": Case(
        {"peers": PEERS, "rdma": {"enabled": True, "resourceName": "rdma/hca_shared_devices_a"},
         "securityContext": {"runAsUser": 0, "runAsGroup": 0, "runAsNonRoot": False}}
    ),
    "everything that watches": Case(
        {
            "metrics": {
                "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
                "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
                "dashboard": {"enabled": True, "annotations": {"grafana_folder": "Inference"}},
            },
            "podDisruptionBudget": {"enabled": True, "minAvailable": "50%"},
            "networkPolicy": {
                "enabled": True,
                "prometheusFrom": [{"podSelector": {"matchLabels": {"app": "prometheus"}}}],
                "engineFrom": [{"namespaceSelector": {}}],
                "extraIngress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}],
                "egress": [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}],
            },
        }
    ),
    "watched by a service": Case({"metrics": {"serviceMonitor": {"enabled": True}}}),
    "not watched": Case({"metrics": {"enabled": False}, "networkPolicy": {"enabled": True, "prometheusFrom": []}}),
    "scheduled": Case(
        {
            "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
                {"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["h200"]}]}]}}},
            "topologySpreadConstraints": [
                {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"},
                {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "DoNotSchedule",
                 "labelSelector": {"matchLabels": {"example.com/own": "yes"}}},
            ],
            "priorityClassName": "inference", "terminationGracePeriodSeconds": 300, "tolerations": [],
            "podAnnotations": {"example.com/a": "b"}, "podLabels": {"example.com/own": "yes"},
            "commonLabels": {"example.com/team": "a"}, "imagePullSecrets": [{"name": "registry"}],
            "image": {"digest": "sha256:" + "a" * 64, "pullPolicy": "Always"},
            "podSpec": {"dnsConfig": {"options": [{"name": "ndots", "value": "2"}]}, "shareProcessNamespace": True},
            "extraEnv": [{"name": "UCX_TLS", "value": "rc,tcp"}],
        }
    ),
    "other paths and ports": Case(
        {"runtimeDir": "/srv/weightd", "cache": {"path": "/srv/cache", "existingClaim": "cache"},
         "shim": {"path": "/srv/shim"}, "ports": {"peers": 1, "health": 2, "metrics": 65535}, "peers": PEERS,
         "apiToken": {"existingSecret": "token"}, "settings": {"listen": "127.0.0.1:7500"}}
    ),
    "S3 for an engine without weightd": Case(
        {"s3": {"enabled": True}, "shim": {"enabled": False}, "ports": {"s3": 7480}, "settings": {"s3_absent": "pass"}}
    ),
    "a small cache": Case({"cache": {"sizeLimit": "500Mi"}, "fullnameOverride": "weights"}),
    "long names": Case(
        {"nameOverride": "n" * 63, "peers": PEERS,
         "metrics": {"serviceMonitor": {"enabled": True}, "dashboard": {"enabled": True}}},
        release="r" * 53,
    ),
}  # fmt: skip


def rendered(name: str, kubernetes: str | None = None) -> list[Manifest]:
    """What helm makes of a case, by default for the newest release that it is for."""
    case = CASES[name]
    return manifests(case.values, release=case.release, kubernetes=kubernetes or case.kubernetes[-1])
