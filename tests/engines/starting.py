"""Engines that are started once for what they generate, and layouts that are made ahead of their first start."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.engines.environment import HERE, environment, python
from tests.servers import Daemon

PROMPTS = [[1, 5, 9, 100 + number] for number in range(3)]


def started(engine: str, program: str, model: str, environ: Mapping[str, str], home: Path) -> list[list[int]]:
    """The tokens that an engine generates of ``PROMPTS``; ``environ`` is added to what every engine gets here."""
    # In one process: a worker of vLLM's own dies of SIGILL on processors with AMX, whoever loaded its weights.
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        [python(engine), HERE / program, model, json.dumps(PROMPTS)],
        env={**environment(engine, home, []), **own, **environ},
        cwd=home, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    (said,) = (line for line in done.stdout.splitlines() if line.startswith("TOKENS "))
    tokens: list[list[int]] = json.loads(said.removeprefix("TOKENS "))
    return tokens


def ahead(engine: str, path: Path, daemon: Daemon, home: Path, *options: str) -> list[dict[str, Any]]:
    """What ``weightd trace`` says of each of an engine's processes, in the engine's own environment."""
    # SGLang's needs what this script stubs of torchvision.
    program = [HERE / "run_sglang.py", "trace"] if engine == "sglang" else ["-m", "weightd.ipc.engines.ahead"]
    done = subprocess.run(
        [python(engine), *program, "--engine", engine, *options],
        env=environment(engine, home, [path]) | {"WEIGHTD_RUNTIME_DIR": str(daemon.runtime_dir)},
        cwd=home, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def another(about: dict[str, Any]) -> dict[str, Any]:
    """A layout that goes by the key of one that is not it."""
    return {
        "key": about, "entries": [["model.norm.weight", "BF16", [256]]], "boxes": [[[256], [1], [1]]],
        "copies": [[0, 0, 0, 0, 0]], "casts": [], "constants": [],
    }  # fmt: skip
