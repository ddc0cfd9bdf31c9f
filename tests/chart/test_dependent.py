"""A chart that depends on this one, by file://, and has weightd in a Pod of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.chart.cases import IDENTITIES, PEERS
from tests.chart.helm import CHART, HelmFailed, Manifest, helm, manifests, template
from tests.chart.manifests import all_of, container, env_of, find, labelled, pod_labels, pod_spec, workloads

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def dependent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dependent chart with its dependency fetched: in a copy, as fetching leaves files behind."""
    return fetched(tmp_path_factory.mktemp("dependent"))


def fetched(folder: Path, alias: str = "") -> Path:
    chart = folder / "dependent"
    shutil.copytree(HERE / "dependent", chart)
    about = yaml.safe_load((chart / "Chart.yaml").read_text())
    (dependency,) = about["dependencies"]
    dependency["repository"] = f"file://{CHART}"
    if alias:
        dependency |= {"alias": alias, "condition": f"{alias}.enabled"}
        pod = chart / "templates" / "pod.yaml"
        pod.write_text(
            pod.read_text().replace('" . |', f'" .Subcharts.{alias} |').replace('" . }', f'" .Subcharts.{alias} }}')
        )
        values = yaml.safe_load((chart / "values.yaml").read_text())
        (chart / "values.yaml").write_text(yaml.safe_dump({alias: values["weightd"]}))
    (chart / "Chart.yaml").write_text(yaml.safe_dump(about))
    helm("dependency", "build", str(chart), "--skip-refresh", home=folder)
    return chart


def rendered(chart: Path, **values: Any) -> list[Manifest]:
    return manifests({"weightd": values}, chart=chart)


def test_lint_has_nothing_against_it(dependent: Path) -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", str(dependent))


@pytest.mark.parametrize("kubernetes", ["1.31", "1.37"])
def test_its_pod_has_weightd_beside_its_own_engine(dependent: Path, kubernetes: str) -> None:
    documents = manifests({}, chart=dependent, kubernetes=kubernetes)
    for document in documents:
        kubernetes_validate.validate(document, kubernetes, strict=True)
    (workload,) = workloads(documents)
    weightd, engine = (container(documents, name) for name in ("weightd", "engine"))
    assert weightd["restartPolicy"] == "Always"
    assert env_of(engine)["WEIGHTD_RUNTIME_DIR"] == env_of(weightd)["WEIGHTD_RUNTIME_DIR"]
    assert "s3://models/llama-3-8b" in env_of(weightd)["WEIGHTD_PRELOAD"]
    volumes = {volume["name"] for volume in pod_spec(workload)["volumes"]}
    for each in (weightd, engine, container(documents, "weightd-shim")):
        assert {mount["name"] for mount in each["volumeMounts"]} <= volumes


def test_both_containers_have_the_claim_that_the_dependency_makes(dependent: Path) -> None:
    documents = rendered(dependent)
    (claim,) = pod_spec(workloads(documents)[0])["resourceClaims"]
    assert claim["resourceClaimTemplateName"] == find(documents, "ResourceClaimTemplate")["metadata"]["name"]
    for name in ("weightd", "engine"):
        assert container(documents, name)["resources"]["claims"] == [{"name": claim["name"]}]


def test_peers_and_policies_find_its_pods(dependent: Path) -> None:
    documents = rendered(
        dependent, peers=PEERS, networkPolicy={"enabled": True}, podDisruptionBudget={"enabled": True},
        metrics={"podMonitor": {"enabled": True}}, credentials={"azure": IDENTITIES["azure"]},
    )  # fmt: skip
    (workload,) = workloads(documents)
    assert labelled(workload, find(documents, "Service")["spec"]["selector"])
    for kind, field in (
        ("NetworkPolicy", "podSelector"),
        ("PodDisruptionBudget", "selector"),
        ("PodMonitor", "selector"),
    ):
        assert labelled(workload, find(documents, kind)["spec"][field]["matchLabels"])
    assert pod_labels(workload)["azure.workload.identity/use"] == "true"
    assert pod_spec(workload)["serviceAccountName"] == find(documents, "ServiceAccount")["metadata"]["name"]


def test_with_mode_node_its_pod_attaches_to_the_nodes_weightd(dependent: Path) -> None:
    documents = rendered(dependent, mode="node")
    (daemons,) = all_of(documents, "DaemonSet")
    (workload,) = all_of(documents, "Deployment")
    ours, theirs = (
        {v["name"]: v["hostPath"]["path"] for v in pod_spec(of)["volumes"] if "hostPath" in v}
        for of in (workload, daemons)
    )
    assert ours == theirs
    assert [each["name"] for each in pod_spec(workload)["initContainers"]] == ["weightd-shim"]


def test_layouts_are_made_ahead_in_its_pod_and_on_nodes_outside_of_it(dependent: Path) -> None:
    trace = {"enabled": True, "processor": "cuda 9.0", "models": [{"model": "s3://models/llama-3-8b"}]}
    (workload,) = workloads(rendered(dependent, trace=trace))
    assert [c["name"] for c in pod_spec(workload)["initContainers"]] == ["weightd-shim", "weightd", "weightd-trace-0"]
    documents = rendered(dependent, mode="node", trace=trace)
    (workload,) = all_of(documents, "Deployment")
    assert [c["name"] for c in pod_spec(workload)["initContainers"]] == ["weightd-shim"]
    assert len(all_of(documents, "DaemonSet")) == 2


def test_values_of_the_dependency_are_checked_there_too(dependent: Path) -> None:
    with pytest.raises(HelmFailed, match="prelaod"):
        rendered(dependent, prelaod=[])
    with pytest.raises(HelmFailed, match=r"engine\.enabled"):
        rendered(dependent, gpu={"sharing": "singleContainer"})


def test_under_an_alias_it_takes_the_dependencys_own_context(dependent: Path, tmp_path: Path) -> None:
    documents = manifests({}, chart=fetched(tmp_path, alias="weights"))
    assert container(documents, "weightd")["restartPolicy"] == "Always"
    assert find(documents, "ServiceAccount")["metadata"]["name"] == "llama-weights"


def test_another_charts_context_is_refused_with_what_to_pass(tmp_path: Path) -> None:
    chart = fetched(tmp_path, alias="weights")
    pod = chart / "templates" / "pod.yaml"
    pod.write_text(pod.read_text().replace('"weightd.sidecar" .Subcharts.weights', '"weightd.sidecar" .'))
    with pytest.raises(HelmFailed, match=r"pass \.Subcharts\.NAME"):
        template({}, chart=chart)
