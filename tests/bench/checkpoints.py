"""Checkpoints made on the spot: one like a language model's, and ones with very many tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy

GIB = 1 << 30
_BF16 = 2
_BLOCK = 64 << 20


def language_model(folder: Path, nbytes: int, shards: int = 8) -> list[Path]:
    """A checkpoint of at least ``nbytes`` in bf16 with the tensors of a Llama, in so many shards, with an index.

    The widths are those of a model of 8 GiB, scaled down for small sizes; the number of layers makes up the size. The
    bytes are random, of one block used again and again with a different beginning for every tensor.
    """
    hidden = 2048 if nbytes >= GIB else 512
    tensors: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (32_000, hidden))]
    total, layer = 2 * _size(tensors[0][1]), 0
    while total < nbytes:
        found = list(_layer(layer, hidden))
        tensors += found
        total += sum(_size(shape) for _, shape in found)
        layer += 1
    tensors += [("model.norm.weight", (hidden,)), ("lm_head.weight", (32_000, hidden))]
    folder.mkdir(parents=True)
    block = numpy.random.default_rng(0).integers(0, 256, _BLOCK, dtype=numpy.uint8)
    files: list[Path] = []
    weight_map: dict[str, str] = {}
    for number, part in enumerate(_spread(tensors, shards), start=1):
        path = folder / f"model-{number:05}-of-{shards:05}.safetensors"
        with path.open("wb") as file:
            file.write(_header(part))
            for index, (name, shape) in enumerate(part):
                weight_map[name] = path.name
                left = _size(shape)
                block[:8].view(numpy.uint64)[0] = number << 32 | index
                while left:
                    left -= file.write(memoryview(block)[:left])
            file.flush()
            os.fsync(file.fileno())
        files.append(path)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": hidden}))
    return files


def _layer(number: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    prefix = f"model.layers.{number}."
    key_value, inner = hidden // 4, hidden * 4
    yield prefix + "input_layernorm.weight", (hidden,)
    yield prefix + "mlp.down_proj.weight", (hidden, inner)
    yield prefix + "mlp.gate_proj.weight", (inner, hidden)
    yield prefix + "mlp.up_proj.weight", (inner, hidden)
    yield prefix + "post_attention_layernorm.weight", (hidden,)
    yield prefix + "self_attn.k_proj.weight", (key_value, hidden)
    yield prefix + "self_attn.o_proj.weight", (hidden, hidden)
    yield prefix + "self_attn.q_proj.weight", (hidden, hidden)
    yield prefix + "self_attn.v_proj.weight", (key_value, hidden)


def many_tensors(folder: Path, count: int, nbytes: int, shards: int) -> list[Path]:
    """A checkpoint of ``count`` equal tensors, about ``nbytes`` in all, in shards, with an index.

    The data is a hole in each file: all zeros, which are read and hashed like any bytes but take no disk.
    """
    folder.mkdir(parents=True)
    columns = max(1, nbytes // count // _BF16 // 32)
    tensors = [(f"model.layers.{i // 100}.experts.{i % 100}.weight", (32, columns)) for i in range(count)]
    files: list[Path] = []
    weight_map: dict[str, str] = {}
    for number, part in enumerate(_spread(tensors, shards), start=1):
        path = folder / f"model-{number:05}-of-{shards:05}.safetensors"
        header = _header(part)
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(_size(shape) for _, shape in part))
        weight_map |= dict.fromkeys((name for name, _ in part), path.name)
        files.append(path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


def primer(folder: Path) -> Path:
    """A file with one small tensor, for libraries to load once before they are measured."""
    path = folder / "primer.safetensors"
    header = _header([("primer", (1024,))])
    path.write_bytes(header + bytes(1024 * _BF16))
    return path


def _size(shape: Sequence[int]) -> int:
    return int(numpy.prod(shape, dtype=numpy.int64)) * _BF16


def _spread(
    tensors: Sequence[tuple[str, tuple[int, ...]]], shards: int
) -> Iterator[Sequence[tuple[str, tuple[int, ...]]]]:
    """Consecutive tensors for each shard, about as many bytes in each."""
    total = sum(_size(shape) for _, shape in tensors)
    part: list[tuple[str, tuple[int, ...]]] = []
    done, made = 0, 0
    for index, (name, shape) in enumerate(tensors):
        part.append((name, shape))
        done += _size(shape)
        enough = done * shards >= total * (made + 1)
        if (enough or len(tensors) - index - 1 == shards - made - 1) and made < shards - 1:
            yield part
            part, made = [], made + 1
    yield part


def _header(tensors: Sequence[tuple[str, tuple[int, ...]]]) -> bytes:
    """Length and JSON header of a safetensors file, padded to 8 bytes as the format's own writer does."""
    table, position = {}, 0
    for name, shape in tensors:
        end = position + _size(shape)
        table[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
