"""An engine's own layout, eight ranks with rows and columns cut and projections fused, against whole tensors."""

from __future__ import annotations

from functools import partial
from math import prod

from tests.bench.checkpoints import language_model
from tests.bench.contender import contend
from tests.bench.machine import require
from tests.bench.measure import Row, Section, gigabytes_per_second, interleave
from tests.bench.session import Session
from weightd.ipc import Client
from weightd.ipc.recipe import Box, Key, Move, Parameter, encode

RANKS = 8
_FUSED = {
    "self_attn.q_proj": "self_attn.qkv_proj",
    "self_attn.k_proj": "self_attn.qkv_proj",
    "self_attn.v_proj": "self_attn.qkv_proj",
    "mlp.gate_proj": "mlp.gate_up_proj",
    "mlp.up_proj": "mlp.gate_up_proj",
}
_COLUMNS = ("o_proj", "down_proj")


def run(session: Session) -> Section:
    """Measure; the checkpoint is made here and removed by the session."""
    require(session.folder, disk=session.size + (1 << 30), memory=int(2.3 * session.size) + (1 << 30))
    session.progress("making the checkpoint")
    folder = session.folder / "model"
    files = [str(path) for path in language_model(folder, session.size)]
    section = Section("layouts", f"an engine's own layout on {RANKS} ranks, page cache warm")
    with session.daemon("layouts", int(1.2 * session.size) + (256 << 20)) as daemon:
        stage = partial(
            contend,
            "staging:stage",
            runtime_dir=str(daemon.runtime_dir),
            model=str(folder),
            nbytes=session.size,
            files=files,
        )
        with Client(runtime_directory=daemon.runtime_dir) as client:
            keys = _upload(client, str(folder))
        stage()  # what is there once for the daemon's whole life is there
        contenders = {
            "whole": stage,
            "all ranks": partial(stage, layout=keys),
            "one rank": partial(stage, layout=keys[3:4]),
        }
        samples = interleave(contenders, session.repetitions, session.progress)
    section.samples["repetitions"] = samples
    whole = Row("whole tensors", "GB/s", gigabytes_per_second(samples["whole"]))
    ranks = Row(f"{RANKS} ranks in one stage, all of each tensor", "GB/s", gigabytes_per_second(samples["all ranks"]))
    ranks.at_least(0.7, whole)
    alone = samples["one rank"]
    one = Row("one rank: what it holds, per second", "GB/s", [s["segment_bytes"] / s["seconds"] / 1e9 for s in alone])
    one.at_least(0.7, whole)
    read = Row("one rank: bytes read of those that it holds", "×", [s["nbytes"] / s["segment_bytes"] for s in alone])
    read.note = "columns are read with what lies between them, where that is narrower than 8 KiB"
    once = Row(
        "all ranks: bytes read of the checkpoint's", "×",
        [s["nbytes"] / w["nbytes"] for s, w in zip(samples["all ranks"], samples["whole"], strict=True)],
    )  # fmt: skip
    section.rows += [whole, ranks, one, read, once]
    return section


def _upload(client: Client, model: str) -> list[str]:
    """Upload the layouts of all ranks, as vLLM's and SGLang's Llama has them; their keys."""
    found = client.checkpoint(model)
    stored = {name: tuple(shape) for name, _, shape in found["tensors"]}
    keys = []
    for rank in range(RANKS):
        key = Key(found["headers"], "bench", "1", "bfloat16", "0" * 64, rank, {"tp_size": RANKS, "tp_rank": rank})
        client.put_layout(key.digest, _layout(key, stored, rank))
        keys.append(key.digest)
    return keys


def _layout(key: Key, stored: dict[str, tuple[int, ...]], rank: int) -> dict[str, object]:
    rows: dict[str, int] = {}
    width: dict[str, int] = {}
    parts: list[tuple[str, str, Box, int]] = []
    for name, shape in stored.items():
        module = ".".join(name.split(".")[3:5]) if ".layers." in name else ""
        into = name.replace(module, _FUSED[module]) if module in _FUSED else name
        if len(shape) == 1:
            box = Box(0, shape, (1,))
        elif any(column in name for column in _COLUMNS):
            cut = shape[1] // RANKS
            box = Box(rank * cut, (shape[0], cut), (shape[1], 1))
        else:
            cut = shape[0] // RANKS
            box = Box(rank * cut * shape[1], (cut, shape[1]), (shape[1], 1))
        parts.append((name, into, box, rows.get(into, 0)))
        rows[into] = rows.get(into, 0) + box.shape[0]
        width[into] = prod(box.shape[1:])
    numbers = {into: index for index, into in enumerate(rows)}
    entries = []
    for into, count in rows.items():
        shape = (count,) if into.endswith("norm.weight") else (count, width[into])
        entries.append(Parameter(into, "BF16", shape))
    moves = []
    for name, into, box, first in parts:
        strides = (1,) if len(box.shape) == 1 else (width[into], 1)
        moves.append(Move(name, numbers[into], box, Box(first * width[into], box.shape, strides)))
    return encode(key, stored, entries, moves)
