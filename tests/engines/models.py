"""Tiny models that engines can serve: random, but without a parameter that is all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

_SIZES = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 256,
}  # fmt: skip


def _llama(**changed: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_SIZES | changed))


def _moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SIZES, **experts))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "tied": lambda: _llama(tie_word_embeddings=True, vocab_size=2000),
    "moe": _moe,
}


def save(name: str, folder: Path, seed: int = 16) -> Path:
    """Make a model, in several shards."""
    import torch

    torch.manual_seed(seed)
    model = MODELS[name]()
    for parameter, values in model.named_parameters():
        if "norm" in parameter:  # they are ones otherwise, as whoever never loads them leaves them
            values.data.normal_(1, 0.1)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="2MB")
    return folder
