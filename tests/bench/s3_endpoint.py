"""Resident weights through the S3 endpoint, by the streamer that engines use, by a client that only receives, and by an
engine, beside the store that they came from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.bench import engine
from tests.bench.contender import contend
from tests.bench.http_servers import nginx, wrk
from tests.bench.machine import require
from tests.bench.measure import Row, Sample, Section, gigabytes_per_second, interleave
from tests.bench.object_store import Stored, stored
from tests.bench.session import Session
from tests.servers import Daemon, free_ports, s3_env

MAX_SIZE = 1 << 30
_PART = 8 << 20
_THREADS = ("2", "4", "8", "16")
_STARTS = 3
"""Of an engine, at most: one takes half a minute."""


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _with_cpu(daemon: Daemon, run: Callable[[], Sample]) -> Sample:
    pid = daemon.pid
    before = _cpu_seconds(pid)
    sample = run()
    return {**sample, "daemon_cpu_seconds": _cpu_seconds(pid) - before}


def _spent(samples: list[Sample]) -> list[float]:
    return [1e9 * sample["daemon_cpu_seconds"] / sample["nbytes"] for sample in samples]


def run(session: Session) -> Section:
    """Measure; servers, objects and checkpoint are made here and removed by the session."""
    size = min(session.size, MAX_SIZE)
    section = Section("s3face", f"S3 endpoint → its clients, {size / 2**30:.2f} GiB in 8 objects, resident")
    shared = Path("/dev/shm") / f"weightd-bench-{os.getpid()}"
    require(session.folder, disk=4 * size + (2 << 30), memory=6 * size + (1 << 30))
    folder = shared / "models" / "bench"
    try:
        with stored(session, section, folder, size) as there, nginx(session.folder / "nginx", shared) as limit:
            if there is None:
                return section
            if limit is None:
                section.notes.append("the limit is not measured: nginx is not installed")
            (port,) = free_ports(1)
            url = f"http://127.0.0.1:{port}"
            environment = {**there.server.env, "WEIGHTD_S3_LISTEN": f"127.0.0.1:{port}"}
            urls = {"nginx": limit, "store": there.server.url, "endpoint": url}
            with session.daemon("s3face", int(3 * size) + (64 << 20), environment) as daemon:
                daemon.stage(there.prefix, device="cpu")
                given = {name: of for name, of in urls.items() if of is not None}
                _streamed(session, section, there, given, daemon)
                _received(session, section, there, given, daemon)
                _engines(session, section, there, url, daemon, size)
    finally:
        shutil.rmtree(shared, ignore_errors=True)
    return section


def _streamed(session: Session, section: Section, there: Stored, urls: dict[str, str], daemon: Daemon) -> None:
    """By the library that engines stream with."""

    def read(url: str, threads: str) -> Callable[[], Sample]:
        return partial(
            contend, "from_s3:library", primer=there.primer, uris=there.uris, sizes=there.sizes, part=_PART,
            in_flight=1 << 40, environment={**s3_env(url), "RUNAI_STREAMER_OBJ_CONCURRENCY": threads},
        )  # fmt: skip

    contenders: dict[str, Callable[[], Sample]] = {}
    for name, url in urls.items():
        choices = {threads: read(url, threads) for threads in _THREADS}
        best, section.samples[f"calibration of {name}"] = session.calibrate(name, choices)
        contenders[name] = choices[best]
    alone = contenders["endpoint"]
    contenders["endpoint"] = lambda: _with_cpu(daemon, alone)
    samples = section.samples["repetitions"] = interleave(contenders, session.repetitions, session.progress)
    store = Row("streamer ← SeaweedFS, where they came from", "GB/s", gigabytes_per_second(samples["store"]))
    ours = Row("streamer ← weightd's S3 endpoint", "GB/s", gigabytes_per_second(samples["endpoint"]))
    ours.at_least(3.0, store)
    if "nginx" in samples:
        top = Row("streamer ← nginx, the same files in shared memory", "GB/s", gigabytes_per_second(samples["nginx"]))
        ours.at_least(0.8, top)
        section.rows.append(top)
    section.rows += [store, ours, Row("processor time of the daemon", "s/GB", _spent(samples["endpoint"]))]


def _received(session: Session, section: Section, there: Stored, urls: dict[str, str], daemon: Daemon) -> None:
    """By a client that takes next to nothing of the cores: what servers can do, where the streamer is the limit."""
    if shutil.which("wrk") is None:
        section.notes.append("what the servers can do by themselves is not measured: wrk is not installed")
        return
    paths = [uri.removeprefix("s3:/") for uri in there.uris]
    contenders: dict[str, Callable[[], Sample]] = {
        name: partial(wrk, session.folder, url, paths, there.sizes, _PART) for name, url in urls.items()
    }
    alone = contenders["endpoint"]
    contenders["endpoint"] = lambda: _with_cpu(daemon, alone)
    samples = section.samples["wrk"] = interleave(contenders, session.repetitions, session.progress)
    store = Row("wrk ← SeaweedFS", "GB/s", gigabytes_per_second(samples["store"]))
    ours = Row("wrk ← weightd's S3 endpoint", "GB/s", gigabytes_per_second(samples["endpoint"]))
    ours.note = "ranges of 8 MiB on 8 connections, which the client drops"
    if "nginx" in samples:
        section.rows.append(Row("wrk ← nginx", "GB/s", gigabytes_per_second(samples["nginx"])))
    section.rows += [store, ours, Row("processor time of the daemon", "s/GB", _spent(samples["endpoint"]))]


def _engines(session: Session, section: Section, there: Stored, url: str, daemon: Daemon, size: int) -> None:
    """vLLM, from its start to its first token: from the store, then from a daemon that has nothing, then again."""
    if engine.python("vllm") is None:
        section.notes.append("engine starts are not measured: make .venv/vllm.stamp")
        return
    session.progress("making a model for vLLM")
    engine.llama(session.folder / "llama", size)
    model = there.server.upload(session.folder / "llama", "bench-llama")
    samples: dict[str, list[Sample]] = {"warm-up": [], "store": [], "first": [], "second": []}
    order = ["store", "first", "second"] * min(session.repetitions, _STARTS)
    for number, name in enumerate(["warm-up", *order]):
        session.progress(f"vLLM, {name}")
        at = there.server.url if name in ("store", "warm-up") else url
        settings = {"model": model, "load_format": "runai_streamer", "pack": True}
        home = session.folder / f"home-{number}"
        samples[name].append(engine.run("vllm", "start_vllm.py", settings, home, s3_env(at)))
        if name == "second":
            for stage in daemon.client.stages():
                if stage["model"] == model:
                    daemon.client.remove(stage["id"])
    section.samples["engine"] = samples
    titles = {
        "store": "vLLM ← SeaweedFS",
        "first": "vLLM ← the endpoint, which has to load",
        "second": "vLLM ← the endpoint, again",
    }
    for name, title in titles.items():
        made = sorted(sample["made"] for sample in samples[name])
        row = Row(f"{title}: to its first token", "s", [sample["seconds"] for sample in samples[name]])
        row.note = f"{made[len(made) // 2]:.1f} s of it after imports, {size / 2**30:.2f} GiB of weights"
        section.rows.append(row)
