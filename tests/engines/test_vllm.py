"""vLLM with the daemon's memory as its parameters: real engines on a CPU, against the same engines by themselves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.environment import HERE, Driven, beside, environment, python
from tests.engines.models import make
from tests.servers import Daemon, SeaweedFS

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
        variables |= bound_to_cores(settings.get("tensor_parallel_size", 1))
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


@pytest.fixture(scope="session")
def truth(models: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Any]:
    """The tokens that vLLM generates by itself, with no weightd beside it."""
    known: dict[tuple[str, int], Any] = {}

    def tokens(name: str, ranks: int) -> Any:
        if (name, ranks) not in known:
            folder = tmp_path_factory.mktemp("truth")
            variables = environment("vllm", folder, [HERE]) | bound_to_cores(ranks)
            settings = {"model": models(name), "tensor_parallel_size": ranks}
            with Driven("vllm", "drive_vllm.py", settings, variables, folder) as engine:
                assert engine.answer() == "started"
                known[name, ranks] = engine.ask("generate", prompts=PROMPTS)
        return known[name, ranks]

    return tokens


def bound_to_cores(ranks: int) -> dict[str, str]:
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks)))} if ranks > 1 else {}


WEIGHTD = {"load_format": "weightd", **extra(fallback=False)}


@pytest.mark.parametrize(("name", "ranks"), [("tied", 1), ("moe", 1), ("llama", 2), ("moe", 2)])
def test_an_engine_generates_what_it_generates_by_itself(
    name: str,
    ranks: int,
    models: Callable[[str], str],
    truth: Callable[[str, int], Any],
    start: Callable[..., Driven],
    start_daemon: Callable[..., Daemon],
) -> None:
    daemon = start_daemon()
    engine = start(models(name), daemon, tensor_parallel_size=ranks, **WEIGHTD)
    assert engine.ask("generate", prompts=PROMPTS) == truth(name, ranks)
    reports = engine.ask("report")
    assert len(reports) == ranks
    assert all(report["share"] > (0.4 if name == "moe" else 0.9999) for report in reports)
    # Each process has a segment and a lease of its own, all of one stage, which has read nothing twice.
    (stage,) = daemon.client.stages()
    assert {report["stage"] for report in reports} == {stage["id"]}
    assert {report["lease"] for report in reports} == {lease["id"] for lease in daemon.client.leases()}
    stored = sum(path.stat().st_size for path in Path(models(name)).glob("*.safetensors"))
    assert stage["bytes_done"] <= stored
    engine.__exit__(None, None, None)
    assert daemon.client.leases() == []


def test_an_engine_outlives_the_daemon_and_loads_again_from_the_next(
    models: Callable[[str], str],
    truth: Callable[[str, int], Any],
    start: Callable[..., Driven],
    start_daemon: Callable[..., Daemon],
) -> None:
    daemon, tokens = start_daemon(), truth("llama", 1)
    first, second = (start(models("llama"), daemon, **WEIGHTD) for _ in range(2))
    digests = first.ask("digests")
    assert first.ask("generate", prompts=PROMPTS) == second.ask("generate", prompts=PROMPTS) == tokens
    leases = {lease["id"] for lease in daemon.client.leases()}
    assert len(leases) == 2
    assert len(daemon.client.stages()) == 1
    os.kill(daemon.pid, signal.SIGKILL)
    assert first.ask("generate", prompts=PROMPTS) == tokens
    deadline = time.monotonic() + 30
    while {lease["id"] for lease in daemon.client.leases()} != leases:
        assert time.monotonic() < deadline, daemon.client.leases()
        time.sleep(0.2)
    # What one engine does to its weights is its own: the memory is copied as it is written to.
    first.ask("scribble")
    assert first.ask("generate", prompts=PROMPTS) != tokens
    assert second.ask("generate", prompts=PROMPTS) == tokens
    assert second.ask("digests") == digests
    first.ask("reload")
    assert first.ask("generate", prompts=PROMPTS) == tokens
    assert first.ask("digests") == digests
    os.killpg(second.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while len(daemon.client.leases()) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert first.ask("generate", prompts=PROMPTS) == tokens


def test_an_object_uri_needs_nothing_but_a_daemon(
    models: Callable[[str], str],
    s3: SeaweedFS,
    truth: Callable[[str, int], Any],
    start: Callable[..., Driven],
    start_daemon: Callable[..., Daemon],
) -> None:
    tokens = truth("llama", 1)
    uri = s3.upload(Path(models("llama")), "vllm/llama")
    daemon = start_daemon(env=s3.env)
    env = {**s3.env, "RUNAI_STREAMER_S3_ENDPOINT": s3.url}
    engine = start(uri, daemon, env)
    assert engine.ask("generate", prompts=PROMPTS) == tokens
    (report,) = engine.ask("report")
    assert report["share"] == 1.0
    (stage,) = daemon.client.stages()
    assert (stage["id"], stage["model"], stage["state"]) == (report["stage"], uri, "ready")
    engine.__exit__(None, None, None)
    # The daemon has gone before the engine looks: vLLM does what it would have done.
    daemon.stop()
    alone = start(uri, daemon, env)
    assert alone.ask("report") == [None]
    assert alone.ask("generate", prompts=PROMPTS) == tokens
    assert "vLLM loads by itself" in alone.said
