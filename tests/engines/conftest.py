"""A model that engines start with, and engines in environments of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.engines.environment import beside
from tests.engines.models import make
from tests.servers import SeaweedFS

ENVIRONMENTS = Path(sys.executable).parents[1]
PROMPTS = [[1, 5, 9, 100 + number] for number in range(3)]
HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in four shards, with heads as large as engines want them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(15)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=256,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="2MB")
    return folder


@pytest.fixture(scope="session")
def model(s3: SeaweedFS, llama: Path) -> str:
    """Its URI."""
    return s3.upload(llama, "engines")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of one of ``MODELS``, by its name; each is made once."""
    folder = tmp_path_factory.mktemp("models")

    def path(name: str) -> str:
        if not (folder / name).exists():
            make(name, folder / name)
        return str(folder / name)

    return path


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for an engine's ``PYTHONPATH``, with weightd as its wheel would put it there."""
    return beside(tmp_path_factory.mktemp("shim"))


def environment(name: str) -> Path:
    """A folder of what ``make test-engines`` installs."""
    folder = ENVIRONMENTS / name
    if not (ENVIRONMENTS / f"{name}.stamp").exists():
        pytest.skip(f"{name} is not here: make test-engines")
    return folder


def pointed_at(url: str) -> dict[str, str]:
    """The one variable, and keys of any kind."""
    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
    return {**keys, "AWS_ENDPOINT_URL": url}


def started(engine: str, program: str, model: str, environ: Mapping[str, str], home: Path) -> list[list[int]]:
    """The tokens that an engine generates, in its own environment."""
    python = environment(engine) / "bin" / "python"
    home.mkdir()
    own = {
        "PATH": f"{python.parent}:{os.environ['PATH']}", "HOME": str(home), "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip
    done = subprocess.run(
        [python, HERE / program, model, json.dumps(PROMPTS)],
        env={**own, **environ}, cwd=home, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    (said,) = (line for line in done.stdout.splitlines() if line.startswith("TOKENS "))
    tokens: list[list[int]] = json.loads(said.removeprefix("TOKENS "))
    return tokens
