"""Models that engines start with, and what is put beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engines.environment import beside
from tests.engines.models import make
from tests.servers import SeaweedFS


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
