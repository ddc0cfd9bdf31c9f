"""Finding one's way in manifests."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from tests.chart.helm import Manifest

Container = dict[str, Any]

_UNITS = {
    "": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
    "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50, "Ei": 1 << 60,
}  # fmt: skip


def find(documents: Iterable[Manifest], kind: str, name: str | None = None) -> Manifest:
    """The only manifest of a kind, or the one of that name."""
    (found,) = all_of(documents, kind, name)
    return found


def all_of(documents: Iterable[Manifest], kind: str, name: str | None = None) -> list[Manifest]:
    return [d for d in documents if d["kind"] == kind and name in (None, d["metadata"]["name"])]


def workloads(documents: Iterable[Manifest]) -> list[Manifest]:
    return [document for document in documents if document["kind"] in ("Deployment", "DaemonSet", "Pod")]


def daemons(documents: Iterable[Manifest]) -> list[Manifest]:
    """Workloads that have a daemon in their Pods."""
    return [workload for workload in workloads(documents) if not is_tracing(workload)]


def is_tracing(workload: Manifest) -> bool:
    """Whether this is the DaemonSet that makes layouts ahead."""
    return workload["metadata"].get("labels", {}).get("app.kubernetes.io/component") == "trace"


def pod_spec(workload: Manifest) -> dict[str, Any]:
    spec: dict[str, Any] = workload["spec"] if workload["kind"] == "Pod" else workload["spec"]["template"]["spec"]
    return spec


def pod_labels(workload: Manifest) -> dict[str, str]:
    metadata = workload["metadata"] if workload["kind"] == "Pod" else workload["spec"]["template"]["metadata"]
    labels: dict[str, str] = metadata["labels"]
    return labels


def containers(spec: dict[str, Any]) -> list[Container]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def container(documents: Iterable[Manifest], name: str) -> Container:
    """The container of that name in the only workload that does not trace."""
    (workload,) = daemons(documents)
    (found,) = (c for c in containers(pod_spec(workload)) if c["name"] == name)
    return found


def daemon_of(spec: dict[str, Any]) -> Container | None:
    """The container that runs the daemon."""
    return next((c for c in containers(spec) if "WEIGHTD_HEALTH_LISTEN" in env_of(c)), None)


def env_of(container: Container) -> dict[str, Any]:
    """Variable → its text, or where it comes from."""
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container.get("env", [])}


def quantity(value: Any) -> float:
    """A quantity's number, in bytes where it is memory. ValueError where it is none."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([a-zA-Z]{0,2})", str(value))
    if found is None or found[2] not in _UNITS:
        raise ValueError(f"no quantity: {value!r}")
    return float(found[1]) * _UNITS[found[2]]


def walk(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """All values in a document, with their paths."""
    yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from walk(inner, (*path, key))


def labelled(workload: Manifest, selector: dict[str, str]) -> bool:
    """Whether a selector finds a workload's Pods."""
    return selector.items() <= pod_labels(workload).items()
