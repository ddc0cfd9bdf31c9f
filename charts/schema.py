"""``values.schema.json`` of the chart, written by ``python -m charts.schema``: a test compares the two.

What is the daemon's is taken from its own models: the settings, and the stage requests of ``preload``. Everything else
is closed as well (no unknown names), except for what Kubernetes itself defines and checks.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from charts.readme import documented
from weightd.daemon.settings import Settings
from weightd.daemon.sources.uris import OPENERS
from weightd.daemon.stages.request import StageRequest
from weightd.ipc.engines.ahead import ENGINES

CHART = Path(__file__).parent / "weightd"
FILE = CHART / "values.schema.json"

Schema = dict[str, Any]

ELSEWHERE = {
    "runtime_dir", "cache_dir", "token", "preload", "health_listen", "metrics_listen",
    "s3_listen", "s3_access_key", "s3_secret_key",
    "peers", "peer_listen", "peer_address", "peer_token", "peer_tls_cert", "peer_tls_key", "peer_tls_ca",
}  # fmt: skip
"""Settings that the chart makes of values of its own."""

QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi|E|Ei)?$"
SIZE = r"^[0-9]+(\.[0-9]+)? ?([kKMGTPE]i?B|B)?$"
POOL = r"^(cpu(:[0-9]{1,4})?|cuda:[0-9]{1,3})$"
UUID = r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
DEVICE = rf"{POOL}|^(GPU|MIG)-{UUID}$"
DURATION = r"^([0-9]+(ms|s|m|h))+$"
NAME = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
SUBDOMAIN = rf"{NAME[:-1]}(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
KEY = r"^[-._a-zA-Z0-9]+$"
PATH = r"^(/\.?[A-Za-z0-9_-][A-Za-z0-9._-]*)+$"
"""Absolute, without ``.`` and ``..``."""
LABEL_VALUE = r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"

BOOL: Schema = {"type": "boolean"}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
COUNT: Schema = {"type": "integer", "minimum": 1}
K8S: Schema = {"type": "object"}
"""What Kubernetes defines."""
K8S_LIST: Schema = {"type": "array", "items": K8S}
LABELS: Schema = {"type": "object", "additionalProperties": {"type": "string", "pattern": LABEL_VALUE}}
ANNOTATIONS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}


def text(pattern: str, *, empty: bool = False, longest: int = 253) -> Schema:
    """A string; ``empty`` where the value may be left out."""
    return {"type": "string", "maxLength": longest, "pattern": f"^$|{pattern}" if empty else pattern}


def one_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def closed(*, optional: Sequence[str] = (), **properties: Schema) -> Schema:
    """An object that has these and nothing else. All have defaults, so what is missing was set to null."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": required}


def named() -> Schema:
    """A list of objects that Kubernetes defines, each with a name."""
    return {"type": "array", "items": {"type": "object", "required": ["name"], "properties": {"name": text(NAME)}}}


OBJECT = text(SUBDOMAIN, empty=True)
"""The name of a Secret, ConfigMap or the like."""
ENV: Schema = {
    "type": "array",
    "items": {
        "type": "object",
        "additionalProperties": False,
        "required": ["name"],
        "properties": {
            "name": text(r"^[-._a-zA-Z][-._a-zA-Z0-9]*$"),
            "value": {"type": "string"},
            "valueFrom": K8S,
        },
    },
}
MOUNTS: Schema = {
    "type": "array",
    "items": {
        "type": "object",
        "additionalProperties": False,
        "required": ["name", "mountPath"],
        "properties": {
            "name": text(NAME),
            "mountPath": {"type": "string", "pattern": "^/"},
            "subPath": {"type": "string"},
            "subPathExpr": {"type": "string"},
            "readOnly": BOOL,
            "recursiveReadOnly": {"type": "string"},
            "mountPropagation": {"type": "string"},
        },
    },
}
AMOUNTS: Schema = {
    "type": "object",
    "additionalProperties": {
        "anyOf": [{"type": "string", "pattern": QUANTITY}, {"type": "number", "minimum": 0}],
    },
}
RESOURCES = closed(limits=AMOUNTS, requests=AMOUNTS, optional=("limits", "requests"))
SERVED_NAME = r"^[^\s-]\S*$"
SERVED = text(SERVED_NAME, empty=True, longest=4096)
"""A model by the name that an engine is given: a URI, a path, or a hub's."""
SHARE: Schema = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^([0-9]+%)?$"}]}
OR_NULL: Schema = {"anyOf": [{"type": "null"}, K8S]}


def times(*names: str) -> Schema:
    """A probe whose question is the chart's."""
    return closed(**dict.fromkeys(names, COUNT))


def url(*schemes: str) -> Schema:
    return text(rf"^({'|'.join(schemes)})://[^\s/@]+(/\S*)?$", empty=True, longest=2048)


def bare(schema: Any) -> Any:
    """A schema without what only documents it."""
    if isinstance(schema, dict):
        kept = {name: value for name, value in schema.items() if name not in ("title", "default", "examples", "format")}
        if "properties" in schema:
            kept["properties"] = {name: bare(value) for name, value in schema["properties"].items()}
        return {name: value if name == "properties" else bare(value) for name, value in kept.items()}
    return [bare(value) for value in schema] if isinstance(schema, list) else schema


def stage_request() -> dict[str, Schema]:
    """A stage request as the API takes it, and what it is made of, by the models' names."""
    schema = StageRequest.model_json_schema(ref_template="#/definitions/{model}")
    models = {name: bare(model) for name, model in schema.pop("$defs").items()}
    request = models["StageRequest"] = bare(schema)
    request["properties"]["model"]["pattern"] = rf"^(/|({'|'.join(OPENERS)}):)"
    for kind in request["properties"]["device"]["anyOf"]:
        target = kind.get("items", kind)
        if target.get("type") == "string":
            target["pattern"] = DEVICE
    digest = r"^(xxh3:[0-9a-f]{32}|(sha256:)?[0-9a-fA-F]{64})$"
    for kind in request["properties"]["expect_digest"]["anyOf"]:
        if kind["type"] == "string":
            kind["pattern"] = digest
        elif kind["type"] == "object":
            kind["minProperties"] = 1
            kind["additionalProperties"]["pattern"] = digest.replace("xxh3:[0-9a-f]{32}|", "")
    parallel = models["Parallel"]
    pairs = parallel["properties"]["map"]
    pair = {name: copy.deepcopy(pairs[name]) for name in ("type", "propertyNames", "additionalProperties")}
    # A list keeps the order of patterns, which values lose of a map.
    parallel["properties"]["map"] = {
        "description": pairs.pop("description"),
        "anyOf": [pairs, {"type": "array", "items": {**pair, "minProperties": 1, "maxProperties": 1}}],
    }
    for kind in parallel["properties"]["tp_rank"]["anyOf"]:
        if kind["type"] == "array":
            kind["minItems"] = 1
    parallel["if"] = {"properties": {"tp_size": {"minimum": 2}}, "required": ["tp_size"]}
    parallel["then"] = {"required": ["map"]}
    return models


def staging() -> Schema:
    """What a stage request says beside the model and how it is laid out: for one whose layout is an engine's."""
    said = ("device", "expect_digest", "sources", "priority", "pin", "ttl_seconds")
    properties = stage_request()["StageRequest"]["properties"]
    return closed(optional=said, **{name: copy.deepcopy(properties[name]) for name in said})


def settings() -> Schema:
    """The daemon's settings that are the user's to set, by their names."""
    size: Schema = {"anyOf": [{"type": "string", "pattern": SIZE}, {"type": "integer", "minimum": 0}]}
    properties: dict[str, Schema] = {}
    for name, schema in Settings.model_json_schema()["properties"].items():
        if name in ELSEWHERE:
            continue
        found = bare(schema)
        if "ByteSize" in str(Settings.model_fields[name].annotation):
            if found.get("type") == "object":
                found = {**found, "patternProperties": {POOL: size}, "additionalProperties": False}
            else:
                found = {"description": found["description"], **size}
        if found.get("type") == "array":
            found["items"] = {**found["items"], **({"minimum": 0} if found["items"]["type"] == "integer" else {})}
        properties[name] = found
    properties["allow"]["items"]["pattern"] = rf"^(/|({'|'.join(OPENERS)}):)[^,]*$"
    properties["listen"]["pattern"] = r"^$|^(\[[0-9a-fA-F:.]+\]|[^:\[\]]+):[0-9]{1,5}$"
    return closed(optional=tuple(properties), **dict(sorted(properties.items())))


def values() -> Schema:
    """The schema of all values."""
    image: dict[str, Schema] = {
        "repository": text(r"^[a-z0-9][a-zA-Z0-9.:_/-]*[a-z0-9]$"),
        "tag": text(r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$", empty=True),
        "digest": text(r"^sha256:[0-9a-f]{64}$", empty=True),
        "pullPolicy": one_of("Always", "IfNotPresent", "Never"),
    }
    traced: dict[str, Schema] = {
        "engine": one_of(*sorted(ENGINES)),
        "processor": text(r"^(cpu|cuda [0-9]+\.[0-9]+)$", empty=True),
        "args": {"type": "array", "items": {"type": "string"}},
        "image": text(r"^[a-z0-9][a-zA-Z0-9._:@/-]*[a-zA-Z0-9]$", longest=512),
        "stage": {"anyOf": [{"type": "null"}, staging()]},
    }
    monitor = closed(enabled=BOOL, interval=text(DURATION), labels=LABELS)
    root = closed(
        # What Helm itself hands down to a dependency.
        **{"global": K8S, "enabled": BOOL},
        optional=("global", "enabled"),
        mode=one_of("sidecar", "node"),
        nameOverride=text(NAME, empty=True, longest=63),
        fullnameOverride=text(NAME, empty=True, longest=253),
        commonLabels=LABELS,
        image=closed(**image, variant=one_of("cuda13", "cuda12", "cpu")),
        imagePullSecrets=named(),
        preload={"type": "array", "maxItems": 1000, "items": {"$ref": "#/definitions/StageRequest"}},
        startup=closed(wait=BOOL, timeoutSeconds={"type": "integer", "minimum": 1, "maximum": 604800}),
        settings=settings(),
        apiToken=closed(existingSecret=OBJECT, key=text(KEY)),
        # A socket's path has at most 107 bytes.
        runtimeDir=text(PATH, longest=90),
        cache=closed(path=text(PATH), sizeLimit=text(QUANTITY, empty=True), existingClaim=OBJECT),
        ports=closed(peers=PORT, health=PORT, metrics=PORT, s3=PORT),
        s3=closed(enabled=BOOL),
        ipFamily=one_of("IPv4", "IPv6"),
        gpu=closed(
            sharing=one_of("auto", "dra", "visibleDevices", "replicas", "singleContainer", "none"),
            count={"type": "integer", "minimum": 1, "maximum": 128},
            resourceName=text(r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$"),
            dra=closed(
                deviceClassName=text(SUBDOMAIN),
                selectors={"type": "array", "maxItems": 32, "items": {"type": "string", "minLength": 1}},
                claimName=OBJECT,
                claimTemplateName=OBJECT,
                adminAccess=BOOL,
            ),
            visibleDevices=closed(
                devices=text(r"^(all|[0-9]+(:[0-9]+)?(,[0-9]+(:[0-9]+)?)*|(GPU|MIG)-[^,\s]+(,(GPU|MIG)-[^,\s]+)*)$"),
                engine=one_of("request", "same"),
            ),
        ),
        engine=closed(
            enabled=BOOL,
            image=closed(**{**image, "tag": text(image["tag"]["pattern"].removeprefix("^$|"))}),
            command={"type": "array", "items": {"type": "string"}},
            model=SERVED,
            args={"type": "array", "items": {"type": "string"}},
            replicas={"type": "integer", "minimum": 0},
            port=PORT,
            env=ENV,
            envFrom=K8S_LIST,
            credentials=BOOL,
            resources=RESOURCES,
            volumeMounts=MOUNTS,
            shmSize=text(QUANTITY, empty=True),
            startupProbe=OR_NULL,
            readinessProbe=OR_NULL,
            livenessProbe=OR_NULL,
            securityContext=K8S,
            strategy=closed(
                type=one_of("RollingUpdate", "Recreate"), rollingUpdate=OR_NULL, optional=("rollingUpdate",)
            ),
            service=closed(
                enabled=BOOL,
                type=one_of("ClusterIP", "NodePort", "LoadBalancer"),
                port=PORT,
                annotations=ANNOTATIONS,
            ),
            optional=("startupProbe", "readinessProbe", "livenessProbe"),
        ),
        shim=closed(enabled=BOOL, path=text(PATH)),
        trace=closed(
            enabled=BOOL,
            engine=traced["engine"],
            processor=traced["processor"],
            models={
                "type": "array",
                "maxItems": 100,
                "items": closed(optional=tuple(traced), **traced, model=text(SERVED_NAME, longest=4096)),
            },
            stage=traced["stage"],
            resources=RESOURCES,
            optional=("stage",),
        ),
        node=closed(
            hostPath=text(PATH, empty=True),
            cacheHostPath=text(PATH, empty=True),
            prepare=BOOL,
            updateStrategy=closed(
                type=one_of("OnDelete", "RollingUpdate"), rollingUpdate=K8S, optional=("rollingUpdate",)
            ),
        ),
        credentials=closed(
            s3=closed(
                existingSecret=OBJECT,
                accessKeyIdKey=text(KEY),
                secretAccessKeyKey=text(KEY),
                roleArn=text(r"^arn:aws[a-z-]*:iam::[0-9]{12}:role/\S+$", empty=True, longest=2048),
                region=text(r"^[a-zA-Z0-9-]+$", empty=True),
                endpoint=url("http", "https"),
            ),
            gcs=closed(
                existingSecret=OBJECT,
                key=text(KEY),
                serviceAccount=text(r"^[^@\s]+@[^@\s]+\.gserviceaccount\.com$", empty=True),
                emulator=url("http", "https"),
            ),
            azure=closed(
                account=text(r"^[a-z0-9]{3,24}$", empty=True),
                existingSecret=OBJECT,
                accountKeyKey=text(KEY),
                clientId=text(rf"^{UUID}$", empty=True),
                endpointSuffix=text(r"^[a-z0-9.-]+(:[0-9]{1,5})?$", empty=True),
            ),
            hf=closed(existingSecret=OBJECT, key=text(KEY), endpoint=url("http", "https")),
            caBundle=closed(configMap=OBJECT, secret=OBJECT, key=text(KEY)),
        ),
        serviceAccount=closed(create=BOOL, name=OBJECT, annotations=ANNOTATIONS, automountToken=BOOL),
        peers=closed(
            enabled=BOOL,
            directory=one_of("dns", "etcd"),
            clusterDomain=text(SUBDOMAIN),
            etcd=closed(
                endpoints={
                    "type": "array",
                    "maxItems": 64,
                    "items": {"type": "string", "pattern": r"^https?://[^\s/@,?#]+(/[^\s,?#]*)?$"},
                },
                existingSecret=OBJECT,
                key=text(KEY),
                tlsSecret=OBJECT,
                clientCertificate=BOOL,
            ),
            auth=one_of("token", "tls"),
            token=closed(existingSecret=OBJECT, key=text(KEY)),
            tls=closed(existingSecret=OBJECT),
        ),
        rdma=closed(enabled=BOOL, resourceName=text(r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$", empty=True)),
        networkPolicy=closed(
            enabled=BOOL, prometheusFrom=K8S_LIST, engineFrom=K8S_LIST, extraIngress=K8S_LIST, egress=K8S_LIST
        ),
        podDisruptionBudget=closed(enabled=BOOL, maxUnavailable=SHARE, minAvailable=SHARE),
        metrics=closed(
            enabled=BOOL,
            podMonitor=monitor,
            serviceMonitor=monitor,
            prometheusRule=closed(enabled=BOOL, labels=LABELS),
            dashboard=closed(enabled=BOOL, labels=LABELS, annotations=ANNOTATIONS),
        ),
        probes=closed(
            liveness=times("periodSeconds", "timeoutSeconds", "failureThreshold"),
            readiness=times("periodSeconds", "timeoutSeconds", "failureThreshold"),
        ),
        resources=RESOURCES,
        extraEnv=ENV,
        extraVolumes=named(),
        extraVolumeMounts=MOUNTS,
        securityContext=K8S,
        podSecurityContext=K8S,
        podAnnotations=ANNOTATIONS,
        podLabels=LABELS,
        nodeSelector=LABELS,
        tolerations=K8S_LIST,
        affinity=K8S,
        topologySpreadConstraints=K8S_LIST,
        priorityClassName=OBJECT,
        runtimeClassName=OBJECT,
        terminationGracePeriodSeconds={"type": "integer", "minimum": 0},
        podSpec={"type": "object", "properties": dict.fromkeys(sorted(rendered_of_pods()), False)},
    )
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chart weightd",
        **root,
        "definitions": dict(sorted(stage_request().items())),
    }


def rendered_of_pods() -> set[str]:
    """Fields of a Pod's spec that other values fill."""
    templates = CHART / "templates"
    common = (templates / "_pod.tpl").read_text().partition('define "weightd.podCommon"')[2]
    return {"initContainers", "containers", "volumes", *re.findall(r"^([a-zA-Z]+):", common, re.MULTILINE)}


def described(schema: Schema) -> Schema:
    """The schema with the comments of ``values.yaml`` in it, which editors show."""
    for value in documented((CHART / "values.yaml").read_text()):
        at = schema
        for name in value.path:
            at = at["properties"][name]
        at["description"] = " ".join(value.text.split())
    return schema


def rendered() -> str:
    """The file's text."""
    return json.dumps(described(copy.deepcopy(values())), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(rendered())
