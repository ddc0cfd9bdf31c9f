"""Architectures that engines know, each as small as it can be, with random weights: of Transformers' own classes, saved
as published checkpoints have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

_TEXT: dict[str, Any] = {
    "vocab_size": 515, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
"""The vocabulary is no multiple of what engines pad it to."""
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED: dict[str, Any] = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    **{name: value for name, value in _TEXT.items() if name != "head_dim"}, "num_key_value_heads": 4, "q_lora_rank": 48,
    "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
}  # fmt: skip
"""Attention by way of a latent vector."""
_VISION: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_MAMBA: dict[str, Any] = {
    "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 8, "mamba_d_head": 32,
    "mamba_n_groups": 2,
}  # fmt: skip
_SEES: dict[str, Any] = {
    "image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503,
}  # fmt: skip


def _without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


class Architecture(NamedTuple):
    """A ``model_type`` of Transformers, which of its ``Auto`` classes makes it, and what its configuration is given."""

    model_type: str
    settings: dict[str, Any]
    auto: str = "AutoModelForCausalLM"
    renamed: tuple[str, str] = ("", "")
    """What names begin with in Transformers, and in checkpoints that were published."""


_SEEING = "AutoModelForImageTextToText"
_ENCODER = "AutoModel"
_HEADLESS = _without(_TEXT, "head_dim")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", _TEXT),
    "mixtral": Architecture("mixtral", {**_TEXT, **_LOCAL}),
    "qwen2": Architecture("qwen2", _HEADLESS),
    "qwen3": Architecture("qwen3", _TEXT),
    "qwen2_moe": Architecture("qwen2_moe", {**_HEADLESS, **_EXPERTS, "shared_expert_intermediate_size": 96}),
    "qwen3_moe": Architecture("qwen3_moe", {**_TEXT, **_EXPERTS}),
    "gemma3": Architecture("gemma3_text", {**_TEXT, "sliding_window": 16}),
    "phi3": Architecture("phi3", _HEADLESS),
    "granitemoe": Architecture("granitemoe", {**_HEADLESS, **_LOCAL}),
    "qwen2_5_vl": Architecture(
        "qwen2_5_vl",
        {
            "text_config": {
                **_HEADLESS,
                "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4},
            },
            "vision_config": {
                "depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 128,
                "fullatt_block_indexes": [1],
            },
            **_SEES,
        },
        _SEEING,
    ),
    "gemma3_vl": Architecture(
        "gemma3",
        {
            "text_config": {**_TEXT, "sliding_window": 16}, "vision_config": _VISION, "mm_tokens_per_image": 4,
            "boi_token_index": 500, "eoi_token_index": 501, "image_token_index": 502,
        },
        _SEEING,
        ("vision_tower.", "vision_tower.vision_model."),
    ),
    "deepseek_v3": Architecture("deepseek_v3", {**_LATENT, **_ROUTED, "topk_method": "noaux_tc"}),
    "qwen3_next": Architecture(
        "qwen3_next", {**_TEXT, **_EXPERTS, **_LINEAR, "shared_expert_intermediate_size": 64}
    ),
    "mamba": Architecture("mamba", {"vocab_size": 515, "hidden_size": 128, "num_hidden_layers": 2, "state_size": 16}),
    "gpt_oss": Architecture("gpt_oss", {**_TEXT, **_LOCAL, "sliding_window": 16}),
    # And more of other kinds.
    "gemma2": Architecture("gemma2", {**_TEXT, "sliding_window": 16}),
    "gemma4": Architecture("gemma4_text", {**_TEXT, "sliding_window": 16}),
    "glm4": Architecture("glm4", _TEXT),
    "glm4_moe": Architecture("glm4_moe", {**_TEXT, **_ROUTED, "use_qk_norm": True}),
    "glm4_moe_lite": Architecture(
        "glm4_moe_lite", {**_LATENT, **_ROUTED, "mlp_layer_types": ["dense", "sparse"]}
    ),
    "deepseek_v2": Architecture("deepseek_v2", {**_LATENT, **_ROUTED}),
    "minicpm3": Architecture("minicpm3", _LATENT),
    "cohere2": Architecture("cohere2", {**_HEADLESS, "sliding_window": 16}),
    "falcon": Architecture(
        "falcon",
        {**_without(_HEADLESS, "num_key_value_heads"), "num_kv_heads": 2, "new_decoder_architecture": True},
    ),
    "bloom": Architecture("bloom", {"vocab_size": 515, "hidden_size": 128, "n_layer": 2, "n_head": 4}),
    "gpt2": Architecture("gpt2", {"vocab_size": 515, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gptj": Architecture(
        "gptj",
        {"vocab_size": 515, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 16},
    ),
    "opt": Architecture("opt", {**_HEADLESS, "ffn_dim": 192, "word_embed_proj_dim": 64}),
    "stablelm": Architecture("stablelm", _HEADLESS),
    "nemotron": Architecture("nemotron", _TEXT),
    "exaone4": Architecture("exaone4", {**_HEADLESS, "sliding_window": 16}),
    "apertus": Architecture("apertus", _HEADLESS),
    "phimoe": Architecture("phimoe", {**_HEADLESS, **_LOCAL}),
    "olmoe": Architecture("olmoe", {**_HEADLESS, **_without(_EXPERTS, "moe_intermediate_size")}),
    "ernie4_5_moe": Architecture(
        "ernie4_5_moe",
        {
            **_HEADLESS, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    "llama4": Architecture(
        "llama4_text", {**_TEXT, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 192}
    ),
    "jamba": Architecture(
        "jamba",
        {
            **_HEADLESS, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
    ),
    "mamba2": Architecture(
        "mamba2",
        {
            "vocab_size": 515, "hidden_size": 128, "num_hidden_layers": 2, "state_size": 16, "num_heads": 8,
            "head_dim": 32, "n_groups": 2,
        },
    ),
    "zamba2": Architecture(
        "zamba2",
        {
            **_without(_HEADLESS, "num_hidden_layers"), "num_key_value_heads": 4, "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "hybrid"], "mamba_d_state": 16, "mamba_ngroups": 2,
            "n_mamba_heads": 8, "use_mamba_kernels": False, "adapter_rank": 8, "use_shared_attention_adapter": True,
        },
    ),
    "nemotron_h": Architecture(
        "nemotron_h",
        {
            **_without(_TEXT, "num_hidden_layers"), "layers_block_type": ["mamba", "mlp", "attention"],
            "ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 32, "n_groups": 2, "n_routed_experts": 4,
            "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64, "use_mamba_kernels": False,
        },
    ),
    "falcon_h1": Architecture("falcon_h1", {**_HEADLESS, **_MAMBA, "mamba_d_ssm": 256}),
    "granitemoehybrid": Architecture(
        "granitemoehybrid",
        {**_HEADLESS, **_LOCAL, **_MAMBA, "shared_intermediate_size": 64, "layer_types": ["mamba", "attention"]},
    ),
    "lfm2_moe": Architecture(
        "lfm2_moe", {**_HEADLESS, **_EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]}
    ),
    "mistral3": Architecture(
        "mistral3",
        {
            "text_config": {"model_type": "mistral", **_TEXT}, "image_token_index": 10,
            "vision_config": {"model_type": "pixtral", **_VISION, "head_dim": 32},
        },
        _SEEING,
    ),
    "whisper": Architecture(
        "whisper",
        {
            "vocab_size": 515, "num_mel_bins": 16, "d_model": 128, "encoder_layers": 2, "decoder_layers": 2,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 192, "decoder_ffn_dim": 192,
            "max_source_positions": 50, "max_target_positions": 64, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2, "decoder_start_token_id": 3,
        },
        "AutoModelForSpeechSeq2Seq",
    ),
    "bert": Architecture("bert", _HEADLESS, _ENCODER),
    "roberta": Architecture(
        "xlm-roberta", {**_HEADLESS, "max_position_embeddings": 66, "position_embedding_type": "absolute"}, _ENCODER
    ),
    "modernbert": Architecture("modernbert", {**_HEADLESS, "cls_token_id": 1, "sep_token_id": 2}, _ENCODER),
    "siglip": Architecture(
        "siglip",
        {"text_config": {**_HEADLESS, "projection_size": 64}, "vision_config": _VISION},
        _ENCODER,
    ),
}  # fmt: skip


def make(name: str, folder: Path) -> None:
    """Save one of them in bfloat16. All of its numbers are random: ones and zeros hide mistakes."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    architecture = ARCHITECTURES[name]
    torch.manual_seed(16)
    config = transformers.AutoConfig.for_model(architecture.model_type, **architecture.settings)
    model = getattr(transformers, architecture.auto).from_config(config).to(torch.bfloat16)
    persistent = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for tensor in persistent.values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn_like(tensor))
    model.save_pretrained(folder)
    path, (old, new) = folder / "model.safetensors", architecture.renamed
    if old:
        save_file({name.replace(old, new): tensor for name, tensor in load_file(path).items()}, path)
