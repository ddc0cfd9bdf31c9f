"""What helm refuses to install, by the schema or by the templates: typos, nonsense, and what contradicts itself."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.chart.cases import ETCD, PEERS
from tests.chart.helm import CHART, HelmFailed, helm, template


def preload(**fields: Any) -> dict[str, Any]:
    return {"preload": [{"model": "s3://models/x", **fields}]}


def gpu(sharing: str, **fields: Any) -> dict[str, Any]:
    return {"gpu": {"sharing": sharing, **fields}}


def parallel(**fields: Any) -> dict[str, Any]:
    return preload(parallel=fields)


MOUNT = [{"name": "models", "mountPath": "/models"}]
GPU = {"limits": {"nvidia.com/gpu": 1}}
NODE = {"mode": "node"}
TRACE = {"enabled": True, "processor": "cuda 9.0"}
S3 = {"s3": {"endpoint": "https://store.example.com"}}
ROLE = "arn:aws:iam::123456789012:role/x"

# Values → what the refusal says.
TYPOS: list[tuple[dict[str, Any], str]] = [
    ({"prelaod": []}, "prelaod"),
    ({"image": {"repo": "x"}}, "repo"),
    ({"gpu": {"share": "dra"}}, "share"),
    ({"gpu": {"dra": {"deviceClass": "x"}}}, "deviceClass"),
    ({"engine": {"arguments": []}}, "arguments"),
    ({"engine": {"service": {"nodePort": 1}}}, "nodePort"),
    ({"startup": {"waits": True}}, "waits"),
    ({"settings": {"concurrentLoads": 2}}, "concurrentLoads"),
    ({"settings": {"WEIGHTD_ALLOW": "x"}}, "WEIGHTD_ALLOW"),
    ({"settings": {"max_lease": 2}}, "max_lease"),
    ({"credentials": {"s3": {"secret": "x"}}}, "secret"),
    ({"credentials": {"aws": {}}}, "aws"),
    ({"peers": {"enable": True}}, "enable"),
    ({"metrics": {"podMonitor": {"enable": True}}}, "enable"),
    ({"networkPolicy": {"from": []}}, "from"),
    ({"resources": {"limit": {}}}, "limit"),
    ({"probes": {"liveness": {"path": "/"}}}, "path"),
    ({"node": {"runtimeHostPath": "/x"}}, "runtimeHostPath"),
    ({"extraEnv": [{"name": "A", "valeu": "x"}]}, "valeu"),
    ({"trace": {"model": "s3://m/x"}}, "model"),
    ({"engine": {"modle": "s3://m/x"}}, "modle"),
    ({"extraVolumeMounts": [{"name": "a", "mountpath": "/x"}]}, "mountpath"),
    (preload(modle="x"), "modle"),
    (preload(tensors={"includes": []}), "includes"),
    (parallel(tp=2), "tp"),
    ({"preload": [{"device": "cpu"}]}, "model"),
]
NONSENSE: list[tuple[dict[str, Any], str]] = [
    ({"mode": "daemonset"}, "mode"),
    ({"mode": None}, "mode"),
    ({"image": {"variant": "cuda11"}}, "variant"),
    ({"image": {"tag": "a b"}}, "tag"),
    ({"image": {"digest": "sha256:1234"}}, "digest"),
    ({"image": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
    ({"image": {"repository": "Bad Name"}}, "repository"),
    ({"image": None}, "image"),
    ({"engine": {"model": "--port"}}, "model"),
    ({"engine": {"model": "s3://m/x y"}}, "model"),
    ({"engine": {"credentials": "yes"}}, "credentials"),
    ({"trace": {"engine": "tgi"}}, "engine"),
    ({"trace": {"processor": "h200"}}, "processor"),
    ({"trace": {"models": ["s3://m/x"]}}, "models"),
    ({"trace": {"models": [{"args": []}]}}, "model"),
    ({"trace": {"models": [{"model": "s3://m/x", "tpSize": 2}]}}, "tpSize"),
    ({"trace": {"stage": True}}, "stage"),
    ({"trace": {"stage": {"layout": {"key": "0" * 64}}}}, "stage"),
    ({"trace": {"stage": {"device": "gpu"}}}, "stage"),
    ({"ports": {"health": 0}}, "health"),
    ({"ports": {"metrics": 65536}}, "metrics"),
    ({"ports": {"peers": "7401"}}, "peers"),
    ({"engine": {"port": -1}}, "port"),
    ({"engine": {"replicas": -1}}, "replicas"),
    ({"engine": {"replicas": "two"}}, "replicas"),
    ({"engine": {"image": {"tag": ""}}}, "tag"),
    ({"engine": {"args": "serve x"}}, "args"),
    ({"engine": {"shmSize": "2GiB"}}, "shmSize"),
    ({"engine": {"service": {"type": "ExternalName"}}}, "type"),
    ({"engine": {"strategy": {"type": "BlueGreen"}}}, "type"),
    ({"gpu": {"sharing": "mps"}}, "sharing"),
    ({"gpu": {"count": 0}}, "count"),
    ({"gpu": {"count": 1.5}}, "count"),
    ({"gpu": {"resourceName": "gpu"}}, "resourceName"),
    ({"gpu": {"visibleDevices": {"devices": "0,"}}}, "devices"),
    ({"gpu": {"visibleDevices": {"devices": "none"}}}, "devices"),
    ({"gpu": {"dra": {"deviceClassName": "GPU"}}}, "deviceClassName"),
    ({"startup": {"timeoutSeconds": 0}}, "timeoutSeconds"),
    ({"startup": {"wait": "yes"}}, "wait"),
    ({"resources": {"limits": {"memory": "64GiB"}}}, "memory"),
    ({"resources": {"limits": {"memory": "lots"}}}, "memory"),
    ({"resources": {"requests": {"cpu": -1}}}, "cpu"),
    ({"engine": {"resources": {"limits": {"memory": "1Zi"}}}}, "memory"),
    ({"cache": {"sizeLimit": "20 Gi"}}, "sizeLimit"),
    ({"cache": {"path": "cache"}}, "path"),
    ({"runtimeDir": "run"}, "runtimeDir"),
    ({"runtimeDir": "/" + "x" * 100}, "runtimeDir"),
    ({"runtimeDir": "/run/../etc"}, "runtimeDir"),
    ({**NODE, "node": {"hostPath": "relative"}}, "hostPath"),
    ({**NODE, "node": {"updateStrategy": {"type": "Recreate"}}}, "updateStrategy"),
    ({"ipFamily": "IPv5"}, "ipFamily"),
    ({"settings": {"concurrent_loads": 0}}, "concurrent_loads"),
    ({"settings": {"concurrent_loads": "four"}}, "concurrent_loads"),
    ({"settings": {"log_level": "loud"}}, "log_level"),
    ({"settings": {"capacity": {"cpu": "64Gi"}}}, "cpu"),
    ({"settings": {"capacity": {"gpu:0": "64GiB"}}}, "gpu:0"),
    ({"settings": {"capacity": "cpu=64GiB"}}, "capacity"),
    ({"settings": {"allow": "s3://models"}}, "allow"),
    ({"settings": {"allow": ["ftp://models"]}}, "allow"),
    ({"settings": {"allow": ["s3://models,gs://x"]}}, "allow"),
    ({"settings": {"peer_uids": [-1]}}, "peer_uids"),
    ({"settings": {"on_stop": "keep"}}, "on_stop"),
    ({"settings": {"peer_stall": 0}}, "peer_stall"),
    ({"settings": {"listen": "7400"}}, "listen"),
    ({"settings": {"runtime_dir": "/x"}}, "runtime_dir"),
    ({"settings": {"peer_listen": "0.0.0.0:1"}}, "peer_listen"),
    ({"settings": {"token": "secret"}}, "token"),
    ({"preload": {"model": "x"}}, "preload"),
    ({"preload": ["s3://models/x"]}, "preload"),
    ({"preload": [{"model": ""}]}, "model"),
    ({"preload": [{"model": "llama-3-8b"}]}, "model"),
    ({"preload": [{"model": "ftp://x"}]}, "model"),
    (preload(device="gpu0"), "device"),
    (preload(device="cuda"), "device"),
    (preload(device="GPU-1234"), "device"),
    (preload(device=["cpu", "tpu:0"]), "device"),
    (preload(handle="dma_buf"), "handle"),
    (preload(layout="vllm"), "layout"),
    (preload(sources=["mirror"]), "sources"),
    (preload(sources=[]), "sources"),
    (preload(priority=1001), "priority"),
    (preload(ttl_seconds=0), "ttl_seconds"),
    (preload(pin="yes"), "pin"),
    (preload(expect_digest="md5:1234"), "expect_digest"),
    (preload(expect_digest={}), "expect_digest"),
    (parallel(tp_size=0), "tp_size"),
    (parallel(tp_size=2), "map"),
    (parallel(tp_size=2, map={"*": "split"}), "map"),
    (parallel(tp_size=2, map=[{"a": 0, "b": 1}]), "map"),
    (parallel(tp_rank="first"), "tp_rank"),
    (parallel(tp_rank=[]), "tp_rank"),
    ({"credentials": {"s3": {"roleArn": "models"}}}, "roleArn"),
    ({"credentials": {"s3": {"endpoint": "minio:9000"}}}, "endpoint"),
    ({"credentials": {"s3": {"endpoint": "https://user:password@minio"}}}, "endpoint"),
    ({"credentials": {"s3": {"existingSecret": "Bad_Name"}}}, "existingSecret"),
    ({"credentials": {"gcs": {"serviceAccount": "me@example.com"}}}, "serviceAccount"),
    ({"credentials": {"azure": {"clientId": "me"}}}, "clientId"),
    ({"credentials": {"azure": {"account": "A"}}}, "account"),
    ({"peers": {"directory": "static"}}, "directory"),
    ({"peers": {"auth": "none"}}, "auth"),
    ({"peers": {"etcd": {"endpoints": ["etcd:2379"]}}}, "endpoints"),
    ({"peers": {"etcd": {"endpoints": ["http://user:password@etcd:2379"]}}}, "endpoints"),
    ({"metrics": {"podMonitor": {"interval": "15"}}}, "interval"),
    ({"podDisruptionBudget": {"maxUnavailable": "half"}}, "maxUnavailable"),
    ({"podLabels": {"a": "not a label"}}, "podLabels"),
    ({"nodeSelector": {"gpu": True}}, "nodeSelector"),
    ({"tolerations": {"key": "x"}}, "tolerations"),
    ({"extraEnv": [{"name": "1A"}]}, "name"),
    ({"extraEnv": [{"name": "A", "value": 1}]}, "value"),
    ({"extraEnv": {"A": "x"}}, "extraEnv"),
    ({"podSpec": {"containers": []}}, "/podSpec/containers"),
    ({"podSpec": {"serviceAccountName": "x"}}, "/podSpec/serviceAccountName"),
    ({"probes": {"liveness": {"periodSeconds": 0}}}, "periodSeconds"),
    ({"terminationGracePeriodSeconds": -1}, "terminationGracePeriodSeconds"),
    ({"fullnameOverride": "Weights"}, "fullnameOverride"),
]
CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"node": {"hostPath": "/run/weightd"}}, "node.hostPath and node.cacheHostPath are for mode: node"),
    ({**NODE, "cache": {"existingClaim": "x"}}, "are for mode: sidecar"),
    ({**NODE, "cache": {"sizeLimit": "1Gi"}}, "are for mode: sidecar"),
    ({**NODE, "node": {"hostPath": "/x", "cacheHostPath": "/x"}}, "same folder"),
    ({"cache": {"existingClaim": "x", "sizeLimit": "1Gi"}}, "a claim has its own size"),
    ({"runtimeDir": "/x", "cache": {"path": "/x"}}, "must differ"),
    ({"shim": {"path": "/tmp"}}, "must differ"),
    ({"ports": {"health": 7403}}, "ports.health and ports.metrics are both 7403"),
    ({"ports": {"metrics": 8000}}, "engine.port"),
    ({"ports": {"s3": 7402}}, "ports.health and ports.s3 are both 7402"),
    ({**NODE, "s3": {"enabled": True}}, "s3.enabled is for mode: sidecar"),
    ({**gpu("singleContainer"), "s3": {"enabled": True}}, "weightd would ask itself"),
    ({"s3": {"enabled": True}, "engine": {"env": [{"name": "AWS_ENDPOINT_URL", "value": "x"}]}}, "AWS_ENDPOINT_URL"),
    ({"ports": {"health": 7400}}, "settings.listen"),
    ({**NODE, **gpu("singleContainer")}, "gpu.sharing: singleContainer is for mode: sidecar"),
    ({**gpu("singleContainer"), "engine": {"enabled": False}}, "engine.enabled"),
    ({**gpu("singleContainer"), "engine": {"command": []}}, "engine.command"),
    ({**gpu("dra"), "image": {"variant": "cpu"}}, "image.variant: cpu"),
    ({**NODE, **gpu("dra")}, "gpu.dra.adminAccess"),
    (gpu("dra", dra={"adminAccess": True}), "for mode: node"),
    ({**NODE, **gpu("dra", dra={"adminAccess": True, "claimName": "x"})}, "one node's"),
    (gpu("dra", dra={"claimName": "a", "claimTemplateName": "b"}), "name one of them"),
    ({**gpu("dra"), "engine": {"resources": GPU}}, "two different GPUs"),
    ({**gpu("dra"), "resources": GPU}, "two different GPUs"),
    ({**gpu("visibleDevices"), "resources": GPU}, "asks for nvidia.com/gpu"),
    ({**gpu("none"), "engine": {"resources": GPU}}, "gpu.sharing is none"),
    ({**gpu("none"), "settings": {"capacity": {"cuda:0": "1GiB"}}}, "no GPU"),
    ({**gpu("none"), **preload(device="cuda:0")}, "preload[0]: device cuda:0"),
    ({**gpu("dra", count=2), **preload(device="cuda:2")}, "sees 2 GPUs"),
    (preload(device="cpu:0"), "settings.capacity"),
    (preload(device=["cpu", "cpu"]), "2 devices for one segment"),
    (preload(device=["cpu"], parallel={"tp_size": 2, "tp_rank": "all", "map": {"*": 0}}), "1 devices for 2 ranks"),
    (parallel(tp_size=2, tp_rank=2, map={"*": 0}), "tp_rank 2 is not below tp_size 2"),
    (parallel(tp_size=2, tp_rank=[0, 5], map={"*": 0}), "tp_rank 5 is not below"),
    (parallel(tp_rank=1), "not below tp_size 1"),
    (preload(sources=["peer"]), "peers.enabled is false"),
    (preload(tensors={"include": ["x" * 500] * 250}), "longer than 100,000 characters"),
    ({"settings": {"capacity": {"cpu": "64GiB"}}, "resources": {"limits": {"memory": "64G"}}}, "it would be killed"),
    ({"settings": {"capacity": {"cpu": "1GiB", "cpu:0": "2GiB"}}, "resources": {"limits": {"memory": "2.5Gi"}}},
     "killed"),
    ({**gpu("singleContainer"), "settings": {"capacity": {"cpu": "2GiB"}},
      "engine": {"resources": {"limits": {"memory": "1Gi"}}}}, "killed"),
    ({"credentials": {"s3": {"existingSecret": "a", "roleArn": ROLE}}}, "name one of them"),
    ({"credentials": {"gcs": {"existingSecret": "a", "serviceAccount": "a@b.gserviceaccount.com"}}}, "name one of"),
    ({"credentials": {"gcs": {"existingSecret": "a", "emulator": "http://x"}}}, "without credentials"),
    ({"credentials": {"caBundle": {"configMap": "a", "secret": "b"}}}, "name one of them"),
    ({"credentials": {"s3": {"roleArn": ROLE}}, "serviceAccount": {"create": False}}, "serviceAccount.create: false"),
    ({"settings": {"listen": "0.0.0.0:7400"}}, "apiToken.existingSecret"),
    ({"settings": {"listen": "[::]:7400"}}, "apiToken.existingSecret"),
    ({"peers": {"enabled": True, "auth": "tls"}}, "peers.tls.existingSecret"),
    ({"peers": {"enabled": True, "directory": "etcd"}}, "peers.etcd.endpoints"),
    ({"peers": {**PEERS, "etcd": {"endpoints": ["http://etcd:2379"]}}}, "peers.directory is dns"),
    ({"peers": {**ETCD, "etcd": {**ETCD["etcd"], "tlsSecret": ""}}}, "peers.etcd.tlsSecret"),  # type: ignore[dict-item]
    ({"metrics": {"podMonitor": {"enabled": True}, "serviceMonitor": {"enabled": True}}}, "counted twice"),
    ({"metrics": {"enabled": False, "podMonitor": {"enabled": True}}}, "metrics.enabled is false"),
    ({"extraVolumeMounts": MOUNT}, "no volume models"),
    ({"engine": {"volumeMounts": MOUNT}}, "no volume models"),
    ({"extraVolumes": [{"name": "weightd-run", "emptyDir": {}}]}, "the chart's own volumes"),
    ({"extraVolumes": [{"name": "a", "emptyDir": {}}] * 2}, "twice"),
    ({"extraEnv": [{"name": "WEIGHTD_RUNTIME_DIR", "value": "/x"}]}, "WEIGHTD_RUNTIME_DIR is there already"),
    ({"extraEnv": [{"name": "A"}, {"name": "A"}]}, "A is there already"),
    ({"engine": {"env": [{"name": "PYTHONPATH", "value": "/x"}]}}, "PYTHONPATH is there already"),
    ({"engine": {"env": [{"name": "AWS_ENDPOINT_URL", "value": "x"}]}, "credentials": S3}, "AWS_ENDPOINT_URL is there"),
    ({**NODE, "engine": {"env": [{"name": "AWS_ENDPOINT_URL", "value": "x"}]}, "credentials": S3,
      "trace": {**TRACE, "models": [{"model": "s3://m/x"}]}}, "AWS_ENDPOINT_URL is there"),
    ({"trace": TRACE}, "say engine.model"),
    ({**NODE, "trace": TRACE, "engine": {"model": "s3://m/x"}}, "say trace.models"),
    ({"trace": {"models": [{"model": "s3://m/x"}]}}, "trace.enabled is false"),
    ({"trace": {"enabled": True}, "engine": {"model": "s3://m/x"}}, "trace.processor"),
    ({**gpu("none"), "trace": TRACE, "engine": {"model": "s3://m/x"}}, "gpu.sharing: none gives weightd no GPU"),
    ({**gpu("singleContainer"), "trace": TRACE, "engine": {"model": "s3://m/x"}}, "no init container can ask it"),
]  # fmt: skip
WRONG = [*TYPOS, *NONSENSE]


def asked(values: dict[str, Any]) -> str:
    """What helm has against values; empty where it takes them."""
    try:
        template(values)
    except HelmFailed as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def wrong() -> list[list[str]]:
    """What the schema has against each of WRONG, line by line. One question holds several, each a value of its own."""
    questions: list[dict[str, Any]] = []
    places = []
    for values, _ in WRONG:
        place = next((i for i, question in enumerate(questions) if not question.keys() & values.keys()), len(questions))
        if place == len(questions):
            questions.append({})
        questions[place] |= values
        places.append(place)
    with ThreadPoolExecutor(4) as pool:
        answers = [answer.splitlines() for answer in pool.map(asked, questions)]
    return [
        [line for line in answers[place] if any(f"'/{name}" in line or f"'{name}'" in line for name in values)]
        for (values, _), place in zip(WRONG, places, strict=True)
    ]


@pytest.fixture(scope="module")
def contradicting() -> list[str]:
    """What the templates say to each of CONTRADICTIONS."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(asked, [values for values, _ in CONTRADICTIONS]))


@pytest.mark.parametrize("index", range(len(WRONG)), ids=[str(values)[:80] for values, _ in WRONG])
def test_the_schema_refuses_it_and_says_where(index: int, wrong: list[list[str]]) -> None:
    values, reason = WRONG[index]
    assert wrong[index], f"helm took {values}"
    assert any(reason in line for line in wrong[index]), wrong[index]


@pytest.mark.parametrize("index", range(len(CONTRADICTIONS)), ids=[str(values)[:80] for values, _ in CONTRADICTIONS])
def test_the_templates_refuse_it_and_say_why(index: int, contradicting: list[str]) -> None:
    values, reason = CONTRADICTIONS[index]
    assert contradicting[index], f"helm took {values}"
    assert reason in contradicting[index]
    # A template that stumbled is no refusal.
    assert "execution error" in contradicting[index]
    assert "nil pointer" not in contradicting[index]


@pytest.mark.parametrize("kubernetes", ["1.33", "1.29"])
def test_claims_are_refused_where_kubernetes_has_none(kubernetes: str) -> None:
    with pytest.raises(HelmFailed, match=r"needs Kubernetes 1\.34"):
        template(gpu("dra"), kubernetes=kubernetes)


def test_a_release_of_kubernetes_without_native_sidecars_is_refused() -> None:
    with pytest.raises(HelmFailed, match=r">=1\.29"):
        template(kubernetes="1.28.9")


def test_lint_finds_nothing_to_say_and_refuses_as_install_does() -> None:
    said = helm("lint", "--strict", str(CHART))
    assert "0 chart(s) failed" in said
    assert "WARNING" not in said
    with pytest.raises(HelmFailed, match="prelaod"):
        helm("lint", "--strict", str(CHART), "--set", "prelaod=x")
