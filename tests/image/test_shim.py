"""The shim: what an engine's image copies, and nothing else."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tomllib
import zipfile
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from tests.image import ROOT
from tests.image.container import Build, Container
from tests.image.dockerfile import Dockerfile
from tests.servers import Daemon

HTTPX = ("httpx", "httpcore", "anyio", "certifi", "h11", "idna", "typing_extensions")


@pytest.fixture(scope="module")
def shim(build: Build) -> Container:
    return build.stage("shim")


@pytest.fixture(scope="module")
def engine(build: Build, shim: Container, folder: Path, cuda: str) -> Container:
    """An engine's image that takes the shim as docs/image.md says. Of the engine it has httpx."""
    (text,) = re.findall(r"```dockerfile\n(.*?)```", (ROOT / "docs" / "image.md").read_text(), re.DOTALL)
    dockerfile = Dockerfile(text)
    (stage,) = dockerfile.stages.values()
    (copied,) = (instruction.flags["from"] for instruction in stage.all("COPY"))
    of_engine = build.stage("tools").child(folder / f"engine-base-{cuda}")
    of_engine.run("python", "-m", "venv", "--without-pip", "/opt/engine")
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    wanted = [pin for pin in pins if pin.partition("==")[0] in HTTPX]
    install(of_engine, *wanted)
    of_engine.env["PATH"] = "/opt/engine/bin:" + of_engine.env["PATH"]
    build = Build(dockerfile, ROOT, folder / f"engine-{cuda}", images={stage.base: of_engine, copied: shim})
    return build.stage(stage.name)


def install(engine: Container, *wanted: str) -> None:
    """Put packages, and none that they ask for, into the engine's environment."""
    uv = ("/build/bin/uv", "pip", "install", "--quiet", "--python", "/opt/engine/bin/python", "--no-deps")
    engine.run(*uv, *wanted)


def test_it_holds_weightd_ipc_and_its_wheel_and_nothing_else(shim: Container) -> None:
    files = {path.relative_to(shim.root).as_posix() for path in shim.root.rglob("*") if path.is_file()}
    (wheel,) = (name for name in files if name.endswith(".whl"))
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ipc").rglob("*") if path.suffix in (".py", ".typed")}
    information = re.compile(r"weightd/weightd_ipc-[\d.]+\.dist-info/")
    unpacked = {name for name in files - {wheel} if not information.match(name)}
    assert unpacked == {f"weightd/weightd/{name}" for name in ours}
    names = {name for name in zipfile.ZipFile(shim.root / wheel).namelist() if ".dist-info/" not in name}
    assert names == {f"weightd/{name}" for name in ours}
    assert wheel.startswith("wheels/weightd_ipc-")
    (licence,) = (shim.root / "weightd").glob("weightd_ipc-*.dist-info/licenses/LICENSE")
    assert licence.read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_it_is_of_the_same_version_and_asks_for_the_same_as_weightd() -> None:
    whole, part = (tomllib.loads((ROOT / path / "pyproject.toml").read_text())["project"] for path in ("", "ipc"))
    for field in ("version", "requires-python", "license", "dependencies"):
        assert part[field] == whole[field], field
    assert part["optional-dependencies"] == {"cuda": whole["optional-dependencies"]["cuda"]}


def test_an_engine_that_has_httpx_attaches_with_nothing_but_the_shim(
    engine: Container, daemon: Daemon, folder: Path, cuda: str
) -> None:
    model = folder / f"shim-model-{cuda}"
    model.mkdir()
    tensor = numpy.random.default_rng(1).standard_normal((700, 33), numpy.float32)
    save_file({"w": tensor}, model / "a.safetensors")
    script = """
import hashlib, importlib.util, json, sys
from weightd.ipc import attach
with attach(sys.argv[1]) as weights:
    found = {"digest": weights.digest, "sha": hashlib.sha256(weights.raw("w")).hexdigest()}
    try:
        weights["w"]
    except ImportError as error:
        found["tensor"] = str(error)
found["have"] = [name for name in ("torch", "numpy", "weightd.daemon", "weightd.api") if importlib.util.find_spec(name)]
print(json.dumps(found))
"""
    mounts = {"/run/weightd": daemon.runtime_dir}
    done = subprocess.run(
        engine.command("python", "-c", script, str(model), writable=(), mounts=mounts), env=engine.env,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["sha"] == hashlib.sha256(tensor.tobytes()).hexdigest()
    assert found["digest"] == daemon.stage(model)["checkpoint_digest"]
    assert found["have"] == []
    assert "torch" in found["tensor"]


def test_an_engine_that_installs_weightd_as_well_still_has_one_weightd_ipc(
    build: Build, engine: Container, shim: Container, folder: Path, cuda: str
) -> None:
    both = engine.child(folder / f"engine-both-{cuda}")
    (own,) = (build.stage("wheel").root / "wheels").glob("*.whl")
    (part,) = (shim.root / "wheels").glob("*.whl")
    for wheel in (part, own):
        (both.root / wheel.name).write_bytes(wheel.read_bytes())
        install(both, f"/{wheel.name}")
    where = "import weightd.ipc, weightd.daemon.keeper.supervisor as k; print(weightd.ipc.__file__, k.__file__)"
    # What is on PYTHONPATH comes first; without it, what was installed.
    first = both.run("python", "-c", where).split()
    assert first[0] == "/opt/weightd/weightd/ipc/__init__.py"
    assert first[1].startswith("/opt/engine/lib/")
    second = both.run("python", "-c", where, env={"PYTHONPATH": ""}).split()
    assert second[0].startswith("/opt/engine/lib/")
