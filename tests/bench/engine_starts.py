"""Engines that start again while their weights are resident, beside the same engines with loaders of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench import engine
from tests.bench.machine import require
from tests.bench.measure import Row, Sample, Section, interleave, warm_cache
from tests.bench.session import Session
from tests.engines.environment import beside
from tests.servers import Daemon, Missing, SeaweedFS

MAX_SIZE = 2 << 30
_ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}
_STARTS = 3
"""Of each kind, at most: one takes half a minute."""
_LAYERS, _EXPERTS = 100, 128


def run(session: Session) -> Section:
    """Measure; checkpoint, object store and daemon are made here and removed by the session."""
    size = min(session.size, MAX_SIZE)
    section = Section("engines", f"engines that start again, {size / 2**30:.2f} GiB of weights resident")
    there = [name for name in _ENGINES if engine.python(name) is not None]
    section.notes += [f"{_ENGINES[name]} is not measured: make .venv/{name}.stamp" for name in _ENGINES.keys() - there]
    if not there:
        return section
    require(session.folder, disk=3 * size + (2 << 30), memory=6 * size + (4 << 30))
    session.progress("making a model")
    folder = session.folder / "llama"
    engine.llama(folder, size)
    try:
        store = SeaweedFS(session.folder / "s3")
    except Missing as missing:
        section.notes.append(f"not measured: {missing}")
        return section
    with store, session.daemon("engines", int(3 * size) + (256 << 20), store.env) as daemon:
        session.progress("uploading")
        uri = store.upload(folder, "bench")
        shim = beside(session.folder / "shim")
        shim_variables = {"PYTHONPATH": str(shim), "WEIGHTD_RUNTIME_DIR": str(daemon.runtime_dir)}
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        for name in there:
            _starts(session, section, name, folder, uri, {**store.env, **shim_variables}, store.env, daemon, weights)
        if "vllm" in there:
            _trace(session, section, shim)
    return section


def _starts(
    session: Session,
    section: Section,
    name: str,
    folder: Path,
    uri: str,
    shim: Mapping[str, str],
    alone: Mapping[str, str],
    daemon: Daemon,
    weights: int,
) -> None:
    model = "model" if name == "vllm" else "model_path"
    sure = {"fallback": False}
    options: Any = sure if name == "vllm" else json.dumps(sure)
    # SGLang knows no loader's options for an object URI that it is not to read itself.
    object_uri = {"model_loader_extra_config": options}
    kinds: dict[str, tuple[dict[str, Any], Mapping[str, str]]] = {
        "own": ({model: str(folder)}, {}),
        "streamer": ({model: uri, "load_format": "runai_streamer"}, alone),
        "weightd": ({model: uri, **object_uri}, shim),
    }
    number = 0

    def start(settings: dict[str, Any], variables: Mapping[str, str]) -> Sample:
        nonlocal number
        number += 1
        if settings[model] == str(folder):
            warm_cache([str(path) for path in folder.glob("*.safetensors")])
        home = session.folder / f"{name}-{number}"
        return engine.run(name, f"start_{name}.py", settings, home, variables)

    pack = {"pack": True} if name == "vllm" else {}
    contenders: dict[str, Callable[[], Sample]] = {
        kind: partial(start, {**settings, **pack}, variables) for kind, (settings, variables) in kinds.items()
    }
    called = _ENGINES[name]
    for kind, begin in contenders.items():  # weightd's traces, stages, and imports for the first time
        session.progress(f"{called}, {kind}: once before anything is measured")
        begin()
    samples = interleave(contenders, min(session.repetitions, _STARTS), session.progress)
    section.samples[name] = samples
    if len({sample["token"] for each in samples.values() for sample in each}) != 1:
        section.notes.append(f"{called}: tokens differ, so these figures are worth nothing")
    titles = {
        "own": "its own loader, page cache warm",
        "streamer": "runai_streamer, from S3",
        "weightd": "weightd, from S3, resident",
    }
    phases, firsts = {}, {}
    for kind, title in titles.items():
        of = samples[kind]
        phases[kind] = Row(f"{called}, {title}: weight phase", "s", [sample["weights"] for sample in of])
        firsts[kind] = Row(f"{called}, {title}: start to first token", "s", [sample["seconds"] for sample in of])
        firsts[kind].note = f"{median(sample['first'] for sample in of):.1f} s of it after imports"
    for rows in (phases, firsts):
        for kind in ("own", "streamer"):
            rows["weightd"].under(1.0, rows[kind])
        section.rows += rows.values()
    if name == "vllm":
        # What is lent is read once where vLLM packs, and is its own then.
        settings, variables = kinds["weightd"]
        session.progress(f"{called}, memory of one more process")
        alike = [start({**settings, "pack": False}, variables) for _ in range(min(session.repetitions, _STARTS))]
    else:
        alike = samples["weightd"]
    section.samples[f"{name}, memory"] = alike
    row = Row(
        f"{called}, weightd: memory that a further process takes while it loads", "% of weights",
        [100 * sample["own"] / weights for sample in alike],
    )  # fmt: skip
    row.under(3.0)
    if name == "vllm":
        row.note = "without packing, which is for CPUs: with it all of the weights, whoever loads them"
    section.rows.append(row)
    for stage in daemon.client.stages():
        daemon.client.remove(stage["id"])


def _trace(session: Session, section: Section, shim: Path) -> None:
    """Of a large mixture of experts: no memory, no weights, and none of its kernels."""
    session.progress(f"tracing {_LAYERS} layers of {_EXPERTS} experts")
    settings = {"layers": _LAYERS, "experts": _EXPERTS, "repetitions": session.repetitions}
    sample = engine.run("vllm", "trace_experts.py", settings, session.folder / "trace", {"PYTHONPATH": str(shim)})
    section.samples["trace"] = sample
    what = f"vLLM's layout of {_LAYERS} layers of {_EXPERTS} experts, {sample['tensors']} tensors"
    seconds = Row(f"{what}: to trace", "s", sample["traced"])
    seconds.under(5.0)
    wire = Row(f"{what}: on the wire", "MB", [sample["wire"] / 1e6])
    wire.under(2.0)
    section.rows += [seconds, wire]
