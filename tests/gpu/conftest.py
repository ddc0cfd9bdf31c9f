from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.gpu.machine import Checkpoint, Machine, checkpoint, fake_machine, no_gpu, real_machine

_seen: list[str] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was found out on the way, where a test may pass in more than one way."""
    if _seen:
        terminalreporter.section("seen on this machine")
        for line in _seen:
            terminalreporter.line(line)


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Have a line shown at the end of the run, whether the test passes or not."""
    return lambda text: _seen.append(f"{request.node.name}: {text}")


@pytest.fixture(params=[pytest.param("gpu", marks=pytest.mark.gpu), "fake"])
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    """GPUs, this machine's own or fake ones. Without any, what needs real ones is skipped, on CI too."""
    if request.param == "gpu":
        if reason := no_gpu():
            pytest.skip(reason)
        with real_machine() as found:
            yield found
        return
    with fake_machine(request.getfixturevalue("fake_library"), tmp_path / "fakecuda") as found:
        yield found


@pytest.fixture
def gpu() -> Iterator[Machine]:
    """This machine's own GPUs, for what no fake can do; for tests that are marked so."""
    if reason := no_gpu():
        pytest.skip(reason)
    for package in ("torch", "cupy", "safetensors", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    with real_machine() as found:
        yield found


@pytest.fixture(scope="session")
def _ballasted(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint(tmp_path_factory.mktemp("checkpoint") / "heavy", ballast=256 << 20)


@pytest.fixture
def heavy(request: pytest.FixtureRequest, machine: Machine, model: Checkpoint) -> Checkpoint:
    """One that shows in a GPU's free memory: several times a machine's slack."""
    found: Checkpoint = request.getfixturevalue("_ballasted") if machine.slack else model
    return found


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A small checkpoint of everything that the format can hold."""
    return checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")
