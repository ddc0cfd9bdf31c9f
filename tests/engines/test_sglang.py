"""SGLang as it is installed, with the daemon's memory as its parameters: what it holds, and generates, is what it does
with its own loader."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.models import save
from tests.engines.starting import Engine, shim
from tests.servers import Daemon

PROMPTS = [[1, 5, 9, 100 + number] for number in range(3)]
OTHERS = [[7, 3, 200 + number] for number in range(2)]
PRIVATE = {"load_format": "private", "log_level": "info"}
SURE = {**PRIVATE, "model_loader_extra_config": json.dumps({"fallback": False})}

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.fixture(scope="module")
def truths(folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """(tokens, digests of each rank's parameters and buffers) as SGLang has them by itself."""
    known: dict[str, Any] = {}

    def truth(name: str, tp_size: int = 1, **arguments: Any) -> Any:
        at = f"{name} {tp_size} {sorted(arguments.items())}"
        if at not in known:
            home = tmp_path_factory.mktemp("truth") / "home"
            with Engine("sglang", str(folders(name)), home, PROMPTS, plan(tp_size) | arguments, env_of(tp_size)) as own:
                tokens = own.tokens()
                known[at] = tokens, [own.found(rank)["tensors"] for rank in range(tp_size)]
                assert own.found()["loader"] == "DefaultModelLoader"
        return known[at]

    return truth


def plan(tp_size: int) -> dict[str, Any]:
    return {"tp_size": tp_size}


def env_of(tp_size: int) -> dict[str, str]:
    return {} if tp_size == 1 else {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, range(tp_size)))}


@pytest.fixture
def environment(daemon_of: Daemon, path: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(path), "WEIGHTD_RUNTIME_DIR": str(daemon_of.runtime_dir)}


@pytest.fixture
def daemon_of(start_daemon: Callable[..., Daemon]) -> Iterator[Daemon]:
    return start_daemon()


@pytest.mark.parametrize(
    ("name", "tp_size", "arguments"),
    [("llama", 1, {}), ("llama", 2, {}), ("tied", 1, {}), ("tied", 2, {}), ("moe", 1, {}), ("moe", 2, {}),
     ("llama", 1, {"model_impl": "transformers"})],
    ids=lambda value: str(value) if not isinstance(value, dict) else "-".join(value) or "own",
)  # fmt: skip
def test_parameters_are_the_daemons_memory_and_tokens_are_those_of_its_own_loader(
    name: str,
    tp_size: int,
    arguments: dict[str, Any],
    folders: Callable[[str], Path],
    truths: Callable[..., Any],
    daemon_of: Daemon,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    tokens, tensors = truths(name, tp_size, **arguments)
    asked = plan(tp_size) | SURE | arguments
    with Engine(
        "sglang", str(folders(name)), tmp_path / "home", PROMPTS, asked, environment | env_of(tp_size)
    ) as engine:
        assert engine.tokens() == tokens
        (stage,) = daemon_of.client.stages()
        assert len(daemon_of.client.leases()) == tp_size
        for rank in range(tp_size):
            found = engine.found(rank)
            assert found["tensors"] == tensors[rank]
            assert found["weights"]["share"] == 1.0
            assert found["weights"]["stage"] == stage["id"]
            assert found["weights"]["preloaded"] == 0  # it came after SGLang had looked how much memory there is
        assert engine.said().count("weightd: the engine loads") == 0
    assert daemon_of.client.leases() == []
