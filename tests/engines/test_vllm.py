"""vLLM with the daemon's memory as its parameters: real engines on a CPU, against the same engines by themselves."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.environment import HERE, Driven, beside, environment, python
from tests.engines.models import make
from tests.servers import Daemon

pytestmark = pytest.mark.timeout(1200)
PROMPTS = [[1, 5, 9, 100 + number] for number in range(3)]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folder = tmp_path_factory.mktemp("models")

    def path(name: str) -> str:
        if not (folder / name).exists():
            make(name, folder / name)
        return str(folder / name)

    return path


@pytest.fixture(scope="session")
def beside_vllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return beside(tmp_path_factory.mktemp("path"))


@pytest.fixture
def start(tmp_path: Path, beside_vllm: Path) -> Iterator[Callable[..., Driven]]:
    """Start vLLM: ``start(model, daemon, load_format="weightd")``; it ends with the test, if not before."""
    running: list[Driven] = []

    def started(model: str, daemon: Daemon | None, env: dict[str, str] | None = None, **settings: Any) -> Driven:
        folder = tmp_path / f"engine{len(running)}"
        variables = environment("vllm", folder, [beside_vllm, HERE]) | (env or {})
        if daemon is not None:
            variables["WEIGHTD_RUNTIME_DIR"] = str(daemon.runtime_dir)
        if settings.get("tensor_parallel_size"):
            variables["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
        engine = Driven("vllm", "drive_vllm.py", {"model": model, **settings}, variables, folder)
        running.append(engine)
        assert engine.answer() == "started"
        return engine

    yield started
    for engine in running:
        engine.__exit__(None, None, None)


@pytest.fixture
def compared(tmp_path: Path, beside_vllm: Path) -> Callable[..., list[Any]]:
    """What vLLM's loader makes of cases (settings of both, what weightd's has besides), against what weightd does."""

    def run(cases: list[tuple[dict[str, Any], dict[str, Any]]], daemon: Daemon, engine: str = "vllm") -> list[Any]:
        variables = environment(engine, tmp_path / "home", [beside_vllm, HERE])
        variables["WEIGHTD_RUNTIME_DIR"] = str(daemon.runtime_dir)
        done = subprocess.run(
            [python(engine), HERE / "compare_vllm.py", json.dumps(cases)],
            env=variables, cwd=tmp_path / "home", capture_output=True, text=True, check=False, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
        lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
        answers = [json.loads(line.removeprefix("ANSWER ")) for line in lines]
        assert len(answers) == len(cases)
        return answers

    return run


def extra(**options: Any) -> dict[str, Any]:
    return {"model_loader_extra_config": options}


@pytest.mark.parametrize(
    ("implementation", "names"),
    [("vllm", ["llama", "tied", "qwen2", "moe", "vision", "mamba"]), ("transformers", ["llama", "tied", "moe"])],
)
def test_every_parameter_and_buffer_is_what_vllms_own_loader_makes_it(
    implementation: str,
    names: list[str],
    models: Callable[[str], str],
    daemon: Daemon,
    compared: Callable[..., list[Any]],
) -> None:
    cases = [({"model": models(name), "model_impl": implementation}, extra(fallback=False)) for name in names]
    for name, answer in zip(names, compared(cases, daemon), strict=True):
        assert answer.get("differ") == [], (name, answer)
        report = answer["report"]
        assert report["modes"]["clone"] == 0, name
        assert bool(report["modes"]["opaque"]) == (name == "mamba"), name  # it keeps a function of a weight
        # What vLLM packs for a CPU is its own afterwards: experts, here.
        assert report["share"] > {"moe": 0.4, "mamba": 0.9}.get(name, 0.9999), name
        assert report["lent_nbytes"] > 0.98 * report["segment_nbytes"], name


def test_what_goes_wrong_ends_in_vllms_own_loader_or_is_raised_as_was_asked(
    models: Callable[[str], str], daemon: Daemon, tmp_path: Path, compared: Callable[..., list[Any]]
) -> None:
    both = {"model": models("llama")}
    absent, late = {"socket": str(tmp_path / "nowhere")}, {"timeout": 1e-6}
    cases = [
        (both, extra(**absent)),
        (both, extra(**absent, fallback=False)),
        (both, extra(**late)),
        (both, extra(**late, fallback=False)),
        (both, extra(sockets="?")),
        (both, extra(mode="quick")),
        (both, extra(mode="stream", fallback=False)),
        (both, extra(mode="clone", fallback=False)),
        (both, extra(mode="zero-copy", fallback=False)),
        ({"model": models("mamba")}, extra(mode="zero-copy", fallback=False)),
        ({"model": models("mamba")}, extra(mode="zero-copy")),
    ]
    answers = compared(cases, daemon)
    for number in (0, 2, 6, 10):
        assert answers[number] == {"differ": [], "report": None}, number
    assert answers[1]["raised"].startswith("DaemonUnavailable: no daemon answers at")
    assert answers[3]["raised"].startswith("AttachTimeout: ")
    assert answers[4]["raised"].startswith("ValueError: weightd knows no option 'sockets', but ")
    assert answers[5]["raised"].startswith("ValueError: mode is 'quick', and can be ")
    assert answers[7]["differ"] == []
    assert (answers[7]["report"]["lent_nbytes"], answers[7]["report"]["share"]) == (0, 0.0)
    assert answers[8]["differ"] == []
    assert answers[8]["report"]["share"] == 1.0
    assert answers[9]["raised"].startswith("ModelMismatch: ")
