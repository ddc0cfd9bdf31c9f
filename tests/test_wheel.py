"""The wheel: what an engine's image gets by ``pip install weightd``."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # From a copy: building leaves folders behind.
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in ("api", "daemon", "ipc")), str(folder)], check=True)
    source.mkdir()
    for name in ("api", "daemon", "ipc"):
        (folder / name).rename(source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_all_packages_and_their_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = ("api", "daemon", "ipc")
    kinds = ("*.py", "*.cu", "*.html", "*.css", "*.js")
    files = (path for top in tops for kind in kinds for path in (ROOT / top).rglob(kind))
    ours = {path.relative_to(ROOT).as_posix() for path in files}
    assert {f"weightd/{name}" for name in ours} <= names
    assert {f"weightd/{top}/py.typed" for top in tops} <= names
    assert not [name for name in names if not name.startswith("weightd")]


def test_the_wheel_brings_its_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (information,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        assert archive.read(f"{information}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert b"License-Expression: Apache-2.0\n" in archive.read(f"{information}/METADATA")


def test_in_an_empty_environment_without_torch_it_brings_httpx_and_imports(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *constraints, str(wheel)], check=True
    )
    listed = subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", "list", "--format=freeze"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    installed = {line.partition("==")[0].lower() for line in listed.split()}
    https = {
        "httpx",
        "httpcore",
        "anyio",
        "certifi",
        "h11",
        "idna",
        "sniffio",
        "typing_extensions",
        "typing-extensions",
    }
    assert installed <= {"pip", "setuptools", "weightd", *https}
    script = (
        "import weightd.ipc as ipc\n"
        "try: ipc.attach('/model', socket='/nonexistent')\n"
        "except ipc.DaemonUnavailable as error: print(error)\n"
        "import importlib.util; assert importlib.util.find_spec('torch') is None\n"
    )
    result = subprocess.run([python, "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "weightd serve" in result.stdout
    command = subprocess.run([tmp_path / "venv" / "bin" / "weightd", "ls"], capture_output=True, text=True, check=False)
    assert command.returncode != 0
    assert "weightd[daemon]" in command.stderr
