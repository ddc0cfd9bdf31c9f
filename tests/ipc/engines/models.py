"""Small random models, saved as Transformers saves them, and then changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
NORM = "model.norm.weight"
TOKENS = torch.arange(24).reshape(2, 12)


def saved(folder: Path, architecture: str, *, dtype: Any = torch.float32, shard: str = "1GB", **options: Any) -> Path:
    """A random model, saved as Transformers saves it."""
    kind = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = kind(kind.config_class(**options)).to(dtype)
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point() and buffer.dim() == 1:
                buffer.add_(0.5)  # so that what is lent and what the class would make differ
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def llama(folder: Path, architecture: str = "LlamaForCausalLM", **options: Any) -> Path:
    return saved(folder, architecture, **{**SMALL, **options})


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object], **config: Any) -> Path:
    """The checkpoint with other tensors, and another configuration."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def drop(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: Any) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.update({name: tensor})


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(TOKENS)[0]
