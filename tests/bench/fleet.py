"""Eight daemons and their origin, each behind a link of the same rate: until all are ready, and what they ask for."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

from tests.bench.checkpoints import language_model
from tests.bench.machine import require
from tests.bench.measure import Row, Sample, Section, Target, cores, interleave
from tests.bench.session import Session
from tests.network import Network, at_once, daemons_on
from tests.servers import Daemon, Missing, SeaweedFS, until
from weightd.daemon.peers.moving.movers import unavailable

COUNT = 8
RATE = 15_000_000
"""Bytes a second of each link, each way: little enough for two cores to keep up with all of them."""
TIMES = 1.35
"""Times as long as one daemon alone that all of them may take."""
ORIGIN = 1.05
"""Times the checkpoint that may leave the origin."""
VICTIM = COUNT // 2
_LOOK = 0.15
_DEADLINE = 900.0


def run(session: Session) -> Section:
    """Measure; network, server, objects and checkpoint are made here and removed by the session."""
    size = max(64 << 20, session.size // 16)
    section = Section("fleet", f"{COUNT} daemons, {size >> 20} MiB, links and origin of {RATE // 10**6} MB/s each")
    if why := unavailable():
        section.notes.append(f"not measured: {why}")
        return section
    require(session.folder, disk=2 * size + (2 << 30), memory=COUNT * size + 3 * size + (2 << 30))
    try:
        _measure(session, section, size)
    except Missing as missing:
        section.notes.append(f"not measured: {missing}")
    return section


def _measure(session: Session, section: Section, size: int) -> None:
    folder = session.folder / "model"
    session.progress("making the checkpoint")
    language_model(folder, size)
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Network(1 + COUNT, RATE))
        origin, *nodes = network.nodes
        server = stack.enter_context(SeaweedFS(session.folder / "s3", origin))
        uri = server.upload(folder, "bench")
        daemons = daemons_on(
            nodes, session.folder, "--capacity", f"cpu={2 * size}", env={**server.env, "WEIGHTD_EXTENT": "1MiB"}
        )
        stack.callback(at_once, Daemon.stop, daemons)
        at_once(Daemon.start, daemons)
        session.progress("warming up")
        _run(network, daemons[:1], uri, sources=["origin"])
        contenders = {
            "alone": lambda: _run(network, daemons[:1], uri, sources=["origin"]),
            "together": lambda: _run(network, daemons, uri),
            "killed": lambda: _run(network, daemons, uri, victim=daemons[VICTIM]),
        }
        samples = interleave(contenders, min(3, session.repetitions), session.progress)
    section.samples["repetitions"] = samples
    _rows(section, samples)
    _plot(session, section, {name: found[0] for name, found in samples.items()})


def _run(network: Network, daemons: Sequence[Daemon], uri: str, victim: Daemon | None = None, **request: Any) -> Sample:
    """Stage with all of them at once. ``victim`` is killed, with its keeper, once half of its bytes are there."""
    origin = network.nodes[0]
    before, cpu = origin.sent, _cpu(network)
    start = time.time()
    stages: dict[Daemon, str] = {}
    at_once(lambda daemon: stages.update({daemon: daemon.client.stage(uri, **request)["id"]}), daemons)
    asked = time.time() - start
    landed: list[list[tuple[float, int]]] = [[(0.0, 0)] for _ in daemons]
    records: dict[Daemon, dict[str, Any]] = {}
    alive = set(daemons)
    while alive - records.keys():
        look = time.time()
        if look - start > _DEADLINE:
            raise RuntimeError(f"{len(alive - records.keys())} stages have not ended in {_DEADLINE:g} s")
        for daemon, series in zip(daemons, landed, strict=True):
            if daemon not in alive or daemon in records:
                continue
            record = daemon.client.show(stages[daemon])
            series.append((round(time.time() - start, 3), record["bytes_done"]))
            if record["state"] in ("ready", "failed"):
                records[daemon] = record
            elif daemon is victim and record["bytes_done"] >= record["bytes_total"] / 2 > 0:
                _kill(daemon)
                alive.remove(daemon)
        time.sleep(max(0.0, look + _LOOK - time.time()))
    sent, spent, lasted = origin.sent - before, _cpu(network) - cpu, time.time() - start
    for daemon, record in records.items():
        if record["state"] != "ready":
            raise RuntimeError(f"{daemon.place.host}: {record['error']}")
    if victim is not None and victim in alive:
        raise RuntimeError("it was over before one could be killed: --size makes it longer")
    if len({record["checkpoint_digest"] for record in records.values()}) != 1:
        raise RuntimeError("not all have the same bytes")
    for daemon, record in records.items():
        # Peers that listened to it hang up with the next word of it, or are found to be dead.
        until(lambda: not daemon.client.leases(), "no peer has a lease", 60)  # noqa: B023
        daemon.client.remove(record["id"])
    for daemon in records:
        until(lambda: not daemon.used_bytes, "its memory is free", 60)  # noqa: B023
    if victim is not None:
        victim.start()
    nbytes = next(iter(records.values()))["bytes_total"]
    return {
        "seconds": max(record["ready_at"] for record in records.values()) - start,
        "first_seconds": min(record["ready_at"] for record in records.values()) - start,
        "asked_seconds": asked,
        "nbytes": nbytes,
        "origin_share": sent / nbytes,
        "peer_share": sum(record["bytes_by_source"]["peer"] for record in records.values()) / (nbytes * len(records)),
        "cpu_share": spent / lasted / cores(),
        "landed": landed,
    }


def _kill(daemon: Daemon) -> None:
    """kill -9 of the keeper first, which would start another daemon, and of the daemon."""
    pids = [daemon.keeper_pid, daemon.status["daemon_pid"]]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    daemon.stop()


def _cpu(network: Network) -> float:
    """CPU seconds of all nodes' processes, and of this one."""
    return network.cpu_seconds() + sum(os.times()[:2])


def _rows(section: Section, samples: dict[str, list[Sample]]) -> None:
    alone = Row("one daemon alone, from the origin", "s", [sample["seconds"] for sample in samples["alone"]])
    alone.note = "from the request until it is ready"
    section.rows.append(alone)
    titles = {
        "together": f"{COUNT} at once: until all are ready",
        "killed": f"the same, one killed half way: until {COUNT - 1} are ready",
    }
    for name, title in titles.items():
        found = samples[name]
        row = Row(title, "s", [sample["seconds"] for sample in found])
        row.note = f"the first after {min(sample['first_seconds'] for sample in found):.1f} s"
        share = Row("bytes that left the origin", "× the checkpoint", [sample["origin_share"] for sample in found])
        share.note = "at its link, headers of packets and all"
        if name == "together":
            row.targets.append(Target(alone.contender, TIMES, row.median / alone.median, "under"))
            share.under(ORIGIN)
        section.rows += [row, share]
    busy = [f"{name} {max(sample['cpu_share'] for sample in samples[name]):.0%}" for name in ("alone", "together")]
    section.notes.append(f"of this machine's CPU time, all nodes took at most: {', '.join(busy)}")


def _plot(session: Session, section: Section, samples: dict[str, Sample]) -> None:
    """What has landed on each node over time, of one run of each."""
    if importlib.util.find_spec("matplotlib") is None:
        section.notes.append("no plot: pip install matplotlib")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), sharey=True, layout="constrained")
    titles = {"together": "all at once", "killed": "one killed half way"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for number, series in enumerate(samples[name]["landed"]):
            killed = name == "killed" and number == VICTIM
            axis.plot(*_megabytes(series), linewidth=1.2, marker="x" if killed else None, markevery=[-1])
        (line,) = axis.plot(*_megabytes(samples["alone"]["landed"][0]), "--", color="black", linewidth=1.5)
        line.set_label("one alone, from the origin")
        axis.set(title=f"{COUNT} daemons, {title}", xlabel="seconds", ylabel="MB landed and verified")
        axis.legend(loc="lower right")
        axis.grid(alpha=0.3)
    path = session.beside.with_name(f"{session.beside.stem}-fleet.png")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    section.notes.append(f"landed bytes over time: {path}")


def _megabytes(series: Sequence[tuple[float, int]]) -> tuple[list[float], list[float]]:
    return [seconds for seconds, _ in series], [nbytes / 1e6 for _, nbytes in series]
