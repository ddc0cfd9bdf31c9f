"""An engine's layout written by hand, with everything that one may have, and what it makes of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from weightd.ipc.recipe import Box, Constant, Key, Move, Parameter, encode, headers_digest

NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8"}
HIDDEN, HEADS = 96, 320


@dataclass(frozen=True)
class Upload:
    """A layout, and what a segment in it has to hold."""

    key: Key
    document: dict[str, Any]
    expected: dict[str, torch.Tensor]


def checkpoint(folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two files with what a model of one layer has; the query alone is more than one leaf."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    attention = {f"{name}_proj": random(rows * HEADS, HIDDEN * 20) for name, rows in (("q", 2), ("k", 1), ("v", 1))}
    rest = {
        "embedding": random(300, HIDDEN),
        "gate": random(40, HIDDEN),
        "up": random(40, HIDDEN),
        "down": random(HIDDEN, 40),
        "norm": random(HIDDEN),
        "bias": random(64, dtype=torch.float32),
        "scale": random(16),
        "steps": torch.arange(6),
        "left out": random(50, 50),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(attention, folder / "model-00001-of-00002.safetensors")
    save_file(rest, folder / "model-00002-of-00002.safetensors")
    return {**attention, **rest}


def key_of(tensors: dict[str, torch.Tensor], rank: int = 0, size: int = 1) -> Key:
    headers = headers_digest((name, NAMES[tensor.dtype], tensor.shape) for name, tensor in tensors.items())
    parallel = {"tp_rank": rank, "tp_size": size}
    return Key(headers, "tests", "1", "bfloat16", "0" * 64, rank, parallel, ["none"])


def upload(tensors: dict[str, torch.Tensor], rank: int = 0, size: int = 1) -> Upload:
    """The layout of one of an engine's ranks: attention fused and cut by rows, ``down`` by columns, a padded
    vocabulary, casts both ways, a transposed weight, and parameters that no tensor is for."""
    entries: list[Parameter] = []
    moves: list[Move] = []
    constants: list[Constant] = []
    expected: dict[str, torch.Tensor] = {}

    def parameter(name: str, value: torch.Tensor) -> int:
        entries.append(Parameter(name, NAMES[value.dtype], tuple(value.shape)))
        expected[name] = value.contiguous()
        return len(entries) - 1

    def move(of: str, part: torch.Tensor, entry: int, into: torch.Tensor, *, cast: bool = False) -> None:
        source = Box(part.storage_offset(), tuple(part.shape), part.stride())
        moves.append(Move(of, entry, source, Box(into.storage_offset(), tuple(into.shape), into.stride()), cast))

    parts = {name: tensors[name].chunk(size)[rank] for name in ("q_proj", "k_proj", "v_proj", "gate", "up")}
    for fused, names in (("qkv", ("q_proj", "k_proj", "v_proj")), ("gate_up", ("gate", "up"))):
        entry = parameter(fused, torch.cat([parts[name] for name in names]))
        first = 0
        for name in names:
            move(name, parts[name], entry, expected[fused][first : first + len(parts[name])])
            first += len(parts[name])
    column = tensors["down"].chunk(size, 1)[rank]
    move("down", column, parameter("down", column), expected["down"])
    padded = torch.cat([tensors["embedding"], torch.full((20, HIDDEN), 1.5, dtype=torch.bfloat16)])
    entry = parameter("embedding", padded)
    move("embedding", tensors["embedding"], entry, padded[:300])
    constants.append(Constant(entry, b"\xc0\x3f", Box(0, (320, HIDDEN), (HIDDEN, 1))))  # 1.5, below what is copied too
    turned = parameter("embedding.T", tensors["embedding"].t())
    move("embedding", tensors["embedding"].t(), turned, expected["embedding.T"])
    narrow = parameter("bias", tensors["bias"].to(torch.bfloat16))
    move("bias", tensors["bias"], narrow, expected["bias"], cast=True)
    wide = parameter("scale", tensors["scale"].float().repeat(2))
    for half in (expected["scale"][:16], expected["scale"][16:]):
        move("scale", tensors["scale"], wide, half, cast=True)
    move("norm", tensors["norm"], parameter("norm", tensors["norm"]), expected["norm"])
    move("steps", tensors["steps"], parameter("steps", tensors["steps"]), expected["steps"])
    ones = parameter("ones", torch.ones(40, 30))
    constants.append(Constant(ones, b"\0\0\x80\x3f", Box(0, (40, 30), (30, 1))))
    zeros = parameter("zeros", torch.zeros(7, dtype=torch.uint8))
    constants.append(Constant(zeros, b"\0", Box(0, (7,), (1,))))
    parameter("none", torch.zeros(0, 4))
    key = key_of(tensors, rank, size)
    return Upload(key, encode(key, tensors, entries, moves, constants), expected)


def other(made: Upload) -> dict[str, Any]:
    """Another layout by the same key, as it is compared, that makes the same of a checkpoint."""
    first, second, *rest = made.document["copies"]
    return {**made.document, "copies": [second, first, *rest]}
