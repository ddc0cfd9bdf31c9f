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

from weightd.ipc import Weights  # noqa: E402
from weightd.ipc.engines.transformers import load  # noqa: E402

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 128, "max_position_embeddings": 64,
}  # fmt: skip
MARIAN = {**BART, "pad_token_id": 127, "decoder_start_token_id": 127}
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


def same(weights: Weights, folder: Path, own: tuple[str, ...] = (), **options: Any) -> Any:
    """The model over these weights: all that a checkpoint holds lies in their segment, but for the names in ``own``,
    and it is what from_pretrained makes, computed buffers too."""
    model: Any = load(weights, **options)
    entry = weights.entry(next(iter(weights)))
    start = weights[entry.name].data_ptr() - entry.offset
    for name, tensor in model.state_dict(keep_vars=True).items():
        inside = start <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= start + weights.manifest.nbytes
        assert inside != (name in own), name
        assert not tensor.requires_grad, name
    assert not model.training
    reference = type(model).from_pretrained(folder)
    assert model.dtype == reference.dtype
    assert model.all_tied_weights_keys == reference.all_tied_weights_keys
    for kind in ("named_parameters", "named_buffers"):
        found = dict(getattr(model, kind)(remove_duplicate=False))
        expected = dict(getattr(reference, kind)(remove_duplicate=False))
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == expected[name].dtype, name
            assert torch.equal(tensor, expected[name]), name
    inputs: dict[str, Any] = {"input_ids": TOKENS}
    if model.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": TOKENS}
    elif "ResNet" in type(model).__name__:
        inputs = {"pixel_values": torch.ones(1, 3, 32, 32)}
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], reference(**inputs)[0])
    return model
