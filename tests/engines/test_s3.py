"""Engines as they come, with no package of weightd beside them, start through the S3 endpoint: same tokens, and the
second start reads no weights at the origin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.fault_proxy import FaultProxy
from tests.servers import Daemon, SeaweedFS, free_ports

ENVIRONMENTS = Path(sys.executable).parents[1]
PROMPTS = [[1, 5, 9, 100 + number] for number in range(3)]
HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def model(s3: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> str:
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
    return s3.upload(folder, "engines")


def started(engine: str, model: str, environment: Mapping[str, str], home: Path) -> list[list[int]]:
    """The tokens that an engine generates, in its own environment."""
    python = ENVIRONMENTS / engine / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{engine} is not here: make test-engines")
    home.mkdir()
    own = {
        "PATH": f"{python.parent}:{os.environ['PATH']}", "HOME": str(home), "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip
    done = subprocess.run(
        [python, HERE / f"run_{engine}.py", model, json.dumps(PROMPTS)],
        env={**own, **environment}, cwd=home, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    (said,) = (line for line in done.stdout.splitlines() if line.startswith("TOKENS "))
    tokens: list[list[int]] = json.loads(said.removeprefix("TOKENS "))
    return tokens


@pytest.mark.timeout(2000)
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_starts_from_resident_weights_by_two_variables(
    engine: str, model: str, s3: SeaweedFS, start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    def pointed_at(url: str) -> dict[str, str]:
        return {**s3.env, "AWS_ENDPOINT_URL": url, "RUNAI_STREAMER_S3_ENDPOINT": url}

    with FaultProxy(s3.url) as origin:
        truth = started(engine, model, pointed_at(origin.url), tmp_path / "origin")
        assert all(len(tokens) == 12 for tokens in truth)
        (port,) = free_ports(1)
        daemon = start_daemon("--s3-listen", f"127.0.0.1:{port}", env={**s3.env, "AWS_ENDPOINT_URL": origin.url})
        for home in ("first", "second"):
            before = len(origin.seen)
            assert started(engine, model, pointed_at(f"http://127.0.0.1:{port}"), tmp_path / home) == truth
            asked = origin.seen[before:]
            weights = [seen for seen in asked if seen.method == "GET" and seen.path.endswith(".safetensors")]
            assert bool(weights) == (home == "first"), weights
        (stage,) = daemon.client.stages()
        assert (stage["model"], stage["state"]) == (model, "ready")
        assert daemon.client.leases() == []
