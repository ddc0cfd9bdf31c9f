from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from tests.checkpoint_files import write_index
from tests.conftest import lacking
from tests.fault_proxy import FaultProxy
from tests.peers.fleet import Fleet, Start
from tests.servers import SeaweedFS


@pytest.fixture(autouse=True)
def _nixl() -> None:
    if importlib.util.find_spec("nixl_cu12") is None and importlib.util.find_spec("nixl_cu13") is None:
        lacking("NIXL: pip install nixl-cu12")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    rng = numpy.random.default_rng(8)
    save_file(
        {f"w{i}": rng.standard_normal((512, 2048 + i), numpy.float32) for i in range(6)}, folder / "a.safetensors"
    )
    save_file({"big": rng.standard_normal((4096, 1024), numpy.float32)}, folder / "b.safetensors")
    write_index(folder)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def origin(s3: SeaweedFS) -> Iterator[FaultProxy]:
    """The object store, behind a proxy that sees every request."""
    with FaultProxy(s3.url) as proxy:
        yield proxy


@pytest.fixture
def fleet(origin: FaultProxy, s3: SeaweedFS, start_daemon: Start) -> Callable[[int], Fleet]:
    return lambda count: Fleet(start_daemon, origin, s3, count)
