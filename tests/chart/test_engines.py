"""Engines that start from lent memory: what they are told, with which credentials, and layouts that are made ahead."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.chart.cases import CASES, ENGINE, SECRETS, VLLM, rendered
from tests.chart.helm import Manifest, manifests
from tests.chart.manifests import all_of, container, containers, env_of, find, pod_spec
from weightd.daemon.stages.request import parse_request
from weightd.ipc.engines import ahead

TRACE = {"enabled": True, "processor": "cuda 9.0"}


def tracers(documents: list[Manifest], kind: str = "Deployment", name: str | None = None) -> list[dict[str, Any]]:
    spec = pod_spec(find(documents, kind, name))
    return [c for c in spec["initContainers"] if c["name"].startswith("weightd-trace")]


def asked(tracer: dict[str, Any]) -> tuple[Any, list[str]]:
    """What weightd's own command line makes of a container's arguments, and what it leaves to the engine."""
    return ahead.parser().parse_known_args(tracer["args"])


# ---------------------------------------------------------------------- the engine


def test_vllm_serves_the_model_of_the_values_with_its_plugin_on_its_path() -> None:
    engine = container(manifests({"engine": VLLM}), "engine")
    assert engine["command"] == ["vllm", "serve"]
    assert engine["args"] == ["s3://models/llama-3-8b", *VLLM["args"]]
    env = env_of(engine)
    assert (env["WEIGHTD_RUNTIME_DIR"], env["PYTHONPATH"]) == ("/run/weightd", "/opt/weightd")
    assert not [name for name in env if name.startswith("VLLM_")], "VLLM_PLUGINS would have to name it"


def test_a_model_is_said_in_the_common_container_as_well() -> None:
    (engine,) = pod_spec(find(manifests({**CASES["one container"].values, "engine": VLLM}), "Deployment"))["containers"]
    assert engine["args"] == ["vllm", "serve", "s3://models/llama-3-8b", *VLLM["args"]]


def test_an_engine_reads_the_object_store_as_weightd_does_so_that_it_can_load_by_itself() -> None:
    documents = rendered("an engine with all credentials")
    engine, weightd = container(documents, "engine"), container(documents, "weightd")
    # From the values' credentials alone.
    bare = {variable for name in ("engine", "weightd") for variable in env_of(container(manifests(), name))}
    given = {name: value for name, value in env_of(weightd).items() if name not in bare}
    assert {"AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "GOOGLE_APPLICATION_CREDENTIALS", "HF_TOKEN"} < set(given)
    assert given.items() <= env_of(engine).items()
    mounts = {mount["name"]: mount for mount in engine["volumeMounts"]}
    for name in ("weightd-gcs", "weightd-ca"):
        assert mounts[name] in weightd["volumeMounts"]


@pytest.mark.parametrize(
    "values",
    [
        CASES["an engine without credentials"].values,
        {"s3": {"enabled": True}, "credentials": SECRETS},
        {"engine": {"credentials": False}, "credentials": {"s3": SECRETS["s3"]}},
    ],
)
def test_an_engine_that_is_to_have_no_credentials_has_none(values: dict[str, Any]) -> None:
    engine = container(manifests(values), "engine")
    found = set(env_of(engine)) - {"AWS_ENDPOINT_URL", "RUNAI_STREAMER_S3_ENDPOINT"}  # of the daemon's own endpoint
    assert found == {"WEIGHTD_RUNTIME_DIR", "WEIGHTD_DAEMON_UID", "PYTHONPATH"}
    assert not {mount["name"] for mount in engine["volumeMounts"]} & {"weightd-gcs", "weightd-ca"}


def test_the_examples_serve_the_same_model_with_either_engine() -> None:
    commands = {}
    for name in ("vllm", "sglang"):
        engine = container(rendered(f"example values-{name}"), "engine")
        commands[name] = [*engine["command"], *engine["args"]]
        assert engine["image"].count(":") == 1
    assert commands["vllm"][:3] == ["vllm", "serve", "s3://models/llama-3-8b"]
    assert commands["sglang"][:5] == [
        "python3", "-m", "sglang.launch_server", "--model-path", "s3://models/llama-3-8b"
    ]  # fmt: skip
    assert "--port=8000" in commands["sglang"], "where its Service and probes ask"
    assert json.loads(commands["sglang"][-1].partition("=")[2]) == {"fallback": False}
    assert "AWS_ACCESS_KEY_ID" in env_of(container(rendered("example values-vllm"), "engine"))
    assert "AWS_ACCESS_KEY_ID" not in env_of(container(rendered("example values-sglang"), "engine"))


# ---------------------------------------------------------------------- layouts ahead, beside an engine


def test_a_layout_is_made_between_weightd_and_the_engine_with_the_engines_image_and_arguments() -> None:
    documents = rendered("a layout ahead")
    spec = pod_spec(find(documents, "Deployment"))
    assert [c["name"] for c in spec["initContainers"]] == ["weightd-shim", "weightd", "weightd-trace-0"]
    (tracer,) = tracers(documents)
    engine = container(documents, "engine")
    assert "restartPolicy" not in tracer, "the engine starts when it has ended"
    for name in ("image", "imagePullPolicy", "envFrom", "securityContext"):
        assert tracer[name] == engine[name]
    given, options = asked(tracer)
    assert (given.engine, given.model, given.tp_size) == ("vllm", "s3://models/llama-3-8b", 2)
    assert options == ["--port", "8000"]
    assert (given.processor, given.timeout, given.wait) == ("cuda 9.0", 600, True)
    parse_request({"model": given.model, "layout": {"key": ["0" * 64]}, **given.stage})
    assert given.stage == {"pin": True, "ttl_seconds": 86400}
    assert tracer["resources"] == {"requests": {"cpu": 2}}
    assert find(documents, "Deployment")["spec"]["progressDeadlineSeconds"] >= 2 * 600


@pytest.mark.parametrize("gpu", [{"sharing": "dra"}, {"sharing": "replicas"}, {"sharing": "visibleDevices"}])
def test_no_gpu_is_asked_for_or_seen_where_layouts_are_made(gpu: dict[str, Any]) -> None:
    documents = manifests({"engine": VLLM, "gpu": gpu, "trace": TRACE})
    (tracer,) = tracers(documents)
    assert "resources" not in tracer
    assert env_of(tracer)["NVIDIA_VISIBLE_DEVICES"] == "void"
    without = {**env_of(tracer)}
    del without["NVIDIA_VISIBLE_DEVICES"]
    engine = {name: value for name, value in env_of(container(documents, "engine")).items() if "NVIDIA" not in name}
    assert without == engine


def test_without_a_stage_nothing_is_staged_and_without_waiting_nothing_is_waited_for() -> None:
    def given(**values: Any) -> Any:
        (tracer,) = tracers(manifests({"engine": VLLM, **values}))
        return asked(tracer)[0]

    assert given(trace=TRACE).stage is None
    assert given(trace={**TRACE, "stage": {}}).stage == {}
    assert given(trace={**TRACE, "stage": {}}).wait
    assert not given(trace={**TRACE, "stage": {}}, startup={"wait": False}).wait


def test_on_processors_the_layout_is_for_a_processor() -> None:
    (tracer,) = tracers(rendered("layouts ahead on processors"))
    given, _ = asked(tracer)
    assert (given.engine, given.processor, given.stage) == ("sglang", "cpu", {})


def test_models_that_are_listed_take_the_place_of_the_engines() -> None:
    models = [{"model": "s3://m/a", "args": ["--tp", "4"]}, {"model": "s3://m/b", "processor": "cuda 8.0"}]
    first, second = tracers(manifests({"engine": VLLM, "trace": {**TRACE, "models": models}}))
    assert (first["name"], second["name"]) == ("weightd-trace-0", "weightd-trace-1")
    assert (asked(first)[0].model, asked(first)[0].tp_size) == ("s3://m/a", 4)
    assert (asked(second)[0].model, asked(second)[0].tp_size, asked(second)[0].processor) == ("s3://m/b", 1, "cuda 8.0")


# ---------------------------------------------------------------------- layouts ahead, on each node


def test_on_nodes_a_daemonset_of_its_own_gives_each_weightd_the_layouts() -> None:
    documents = rendered("layouts ahead on nodes")
    daemon, tracing = (find(documents, "DaemonSet", d["metadata"]["name"]) for d in all_of(documents, "DaemonSet"))
    assert tracing["metadata"]["name"] == f"{daemon['metadata']['name']}-trace"
    first, second = tracers(documents, "DaemonSet", tracing["metadata"]["name"])
    assert first["image"] == "vllm/vllm-openai:v0.33.0"
    assert second["image"] == "registry.example.com:5000/sglang:1"
    assert first["command"] == ["python3", "-m", "weightd.ipc.engines.ahead"], "one that fails is seen, and tried again"
    assert asked(first)[0].stage == {"device": ["cuda:0", "cuda:1"]}
    assert asked(first)[0].wait
    assert (asked(second)[0].engine, asked(second)[0].processor) == ("sglang", "cuda 10.0")
    assert asked(second)[0].stage is None
    env = env_of(first)
    assert env["AWS_ACCESS_KEY_ID"]["secretKeyRef"]["name"] == "s3", "vLLM reads its configuration itself"
    assert env["HF_HUB_OFFLINE"] == "1"
    assert {"weightd-gcs", "weightd-ca", "models"} <= {mount["name"] for mount in first["volumeMounts"]}


def test_on_nodes_layouts_change_without_the_pods_that_hold_weights() -> None:
    values = CASES["layouts ahead on nodes"].values
    changed = {**values, "trace": {**values["trace"], "models": [{"model": "s3://models/next"}]}}
    name = find(rendered("layouts ahead on nodes"), "NetworkPolicy")["metadata"]["name"]
    before, after = (find(manifests(each), "DaemonSet", name) for each in (values, changed))
    assert before == after
    assert len(all_of(manifests({**values, "trace": {}}), "DaemonSet")) == 1


def test_where_nodes_have_devices_by_claim_what_traces_claims_none() -> None:
    documents = rendered("layouts ahead by DRA and identities")
    (tracing,) = (d for d in all_of(documents, "DaemonSet") if d["metadata"]["name"].endswith("-trace"))
    spec = pod_spec(tracing)
    assert "resourceClaims" not in spec
    assert [c["name"] for c in containers(spec)] == ["weightd-trace-0", "traced"]
    assert spec["serviceAccountName"] == find(documents, "ServiceAccount")["metadata"]["name"]
    assert tracing["spec"]["template"]["metadata"]["labels"]["azure.workload.identity/use"] == "true"


def test_values_of_the_engine_are_those_of_the_trace_on_nodes_too() -> None:
    documents = manifests({"mode": "node", "engine": {**ENGINE, "volumeMounts": [], "image": {"tag": "v0.32.0"}},
                           "trace": {**TRACE, "models": [{"model": "s3://m/x"}]}})  # fmt: skip
    (tracer,) = tracers(documents, "DaemonSet", "llama-weightd-trace")
    assert tracer["image"] == "vllm/vllm-openai:v0.32.0"
