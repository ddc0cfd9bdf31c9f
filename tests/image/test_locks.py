"""The image's locks: what pyproject.toml asks for, in the versions that the tests run with, less what was cut."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import lacking
from tests.image import ROOT

LOCKS = {"none": ("daemon",), "12": ("daemon", "cuda12"), "13": ("daemon", "cuda13")}
NIXL = {"none": "nixl-cu12", "12": "nixl-cu12", "13": "nixl-cu13"}


def pins(path: Path) -> dict[str, str]:
    """Name → version of a requirements file that pins all it names."""
    found = {}
    for line in path.read_text().splitlines():
        if match := re.match(r"([A-Za-z0-9._-]+)==([^\s;\\]+)", line):
            found[canonicalize_name(match[1])] = match[2]
    return found


def lock(cuda: str) -> dict[str, str]:
    return pins(ROOT / "requirements" / f"cuda-{cuda}.txt")


@pytest.mark.parametrize("cuda", LOCKS)
def test_a_lock_has_all_that_its_extras_ask_for_in_versions_that_they_allow(cuda: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        *project["dependencies"],
        *(item for extra in LOCKS[cuda] for item in project["optional-dependencies"][extra]),
    ]
    locked = lock(cuda)
    for requirement in map(Requirement, [*asked, f"{NIXL[cuda]}==1.5.*"]):
        version = locked.get(canonicalize_name(requirement.name))
        assert version, f"{requirement} is not in the lock: make lock"
        assert requirement.specifier.contains(version), f"{requirement}, locked {version}: make lock"


@pytest.mark.parametrize("name", ["build", *(f"cuda-{cuda}" for cuda in LOCKS)])
def test_a_lock_has_the_versions_of_constraints_txt_and_a_hash_for_each(name: str) -> None:
    tested = pins(ROOT / "constraints.txt")
    path = ROOT / "requirements" / f"{name}.txt"
    other = {"cuda-bindings"} if name == "cuda-12" else set()  # the tests run with those of CUDA 13
    differing = {
        package: (version, tested[package])
        for package, version in pins(path).items()
        if package not in other and tested.get(package, version) != version
    }
    assert not differing, "make lock"
    for entry in re.split(r"\n(?=[a-z])", path.read_text()):
        assert "==" not in entry or "--hash=sha256:" in entry, entry


@pytest.mark.parametrize("cuda", LOCKS)
def test_what_was_cut_is_in_no_lock_and_only_build_tools_have_versions_that_no_test_runs_with(cuda: str) -> None:
    lines = (ROOT / "requirements" / "cut.txt").read_text().splitlines()
    cut = {canonicalize_name(line) for line in lines if line and not line.startswith("#")}
    locked = lock(cuda)
    assert "torch" in cut
    assert not cut & set(locked)
    untested = set(locked) - set(pins(ROOT / "constraints.txt"))
    assert all(re.match(r"cupy-|nixl-|nvidia-", name) for name in untested), untested


def test_make_lock_would_change_nothing(tmp_path: Path) -> None:
    uv = Path(sys.executable).parent / "uv"
    if not uv.exists():
        lacking("uv: pip install uv")
    for name in ("pyproject.toml", "constraints.txt", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    env = {**os.environ, "UV": str(uv), "ARGS": ""}
    subprocess.run([tmp_path / "requirements" / "lock.sh"], check=True, env=env, stdout=subprocess.DEVNULL)
    for path in sorted((ROOT / "requirements").glob("*.txt")):
        assert (tmp_path / "requirements" / path.name).read_text() == path.read_text(), f"{path.name}: make lock"
