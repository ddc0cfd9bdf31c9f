"""Tiny models with random weights, each in several shards, with heads as large as engines want them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 2000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 256,
}  # fmt: skip
"""The vocabulary is no multiple of what engines pad it to."""


def _llama(**changed: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES | changed))


def _qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**SIZES))


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128, norm_topk_prob=True)
    )


def _paligemma() -> Any:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 2, "patch_size": 14, "image_size": 28, "projection_dim": 256,
    }  # fmt: skip
    text = {**SIZES, "model_type": "gemma", "bos_token_id": 1, "eos_token_id": 2}
    config = PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=1990, projection_dim=256, hidden_size=256
    )
    return PaliGemmaForConditionalGeneration(config)


def _gemma3() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
        "patch_size": 14, "image_size": 28, "vision_use_head": False,
    }  # fmt: skip
    tokens = {"boi_token_index": 1990, "eoi_token_index": 1991, "image_token_index": 1992}
    text = {**SIZES, "sliding_window": 64, "bos_token_id": 1, "eos_token_id": 2}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    )


def _mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=2000, hidden_size=256, num_hidden_layers=2, state_size=16))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "tied": lambda: _llama(tie_word_embeddings=True),
    "even": lambda: _llama(vocab_size=2048),
    "qwen2": _qwen2,
    "moe": _qwen3_moe,
    "mamba": _mamba,
    "draft": lambda: _llama(num_hidden_layers=1),
    "vision": _paligemma,
    "gemma3": _gemma3,
}


def make(name: str, folder: Path, *, seed: int = 16) -> Path:
    """Save one of ``MODELS`` in bfloat16. Norms and biases are random as well: ones and zeros hide mistakes."""
    import torch

    torch.manual_seed(seed)
    model = MODELS[name]().to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) / 4)
    model.save_pretrained(folder, max_shard_size="2MB")
    if name in ("vision", "gemma3"):
        _rename(folder, "vision_tower.", "vision_tower.vision_model.")
    return folder


def _rename(folder: Path, old: str, new: str) -> None:
    """As checkpoints that were published have it, which engines read; Transformers has renamed it since."""
    from safetensors.torch import load_file, save_file

    for path in folder.glob("*.safetensors"):
        save_file({name.replace(old, new): tensor for name, tensor in load_file(path).items()}, path)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(old, new))
