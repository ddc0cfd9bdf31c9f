from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import lacking
from tests.image import ROOT
from tests.image.container import Build, Container, python_for
from tests.image.dockerfile import Dockerfile
from tests.servers import Missing


@pytest.fixture(scope="module", autouse=True)
def _believed(dockerfile: Dockerfile) -> Iterator[None]:
    """Clients on this machine believe the image's user, as engines beside it do by the same variable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WEIGHTD_DAEMON_UID", dockerfile.stages["weightd"].last("USER").value.partition(":")[0])
        yield


@pytest.fixture(scope="session")
def dockerfile() -> Dockerfile:
    return Dockerfile((ROOT / "Dockerfile").read_text())


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """A folder that the image's user can reach; pytest's own are closed to it."""
    path = Path(tempfile.mkdtemp(prefix="weightd-image-"))
    path.chmod(0o755)
    yield path
    subprocess.run(["rm", "-rf", path], check=True)


@pytest.fixture(scope="session")
def base(dockerfile: Dockerfile, folder: Path) -> Container:
    """What the base image is here."""
    try:
        return Container.base(folder / "base", python_for(dockerfile.arguments["BASE"]))
    except Missing as error:
        lacking(str(error))
        raise


@pytest.fixture(scope="session", params=os.environ.get("IMAGES", "none").split(","))
def cuda(request: pytest.FixtureRequest) -> str:
    """Which image: by default the one without CUDA, the smallest; ``make image-test`` takes all."""
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="session")
def build(cuda: str, dockerfile: Dockerfile, folder: Path, base: Container) -> Iterator[Build]:
    """The Dockerfile, carried out for one choice of CUDA."""
    place = folder / cuda
    place.mkdir()
    yield Build(dockerfile, ROOT, place, images={dockerfile.arguments["BASE"]: base}, arguments={"CUDA": cuda})
    subprocess.run(["rm", "-rf", place], check=True)
