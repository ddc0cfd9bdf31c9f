"""Restarts: how soon stages are ready again after kill -9, what an engine notices, and what waiting costs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median

import httpx

from tests.bench.checkpoints import language_model, many_tensors
from tests.bench.measure import Row, Section
from tests.bench.session import Session
from tests.servers import Daemon, until
from weightd.ipc import attach

SEGMENTS = (1, 20, 200)
ADOPTED_WITHIN = 1.0
IDLE_CPU = 0.2
"""Percent of a core."""
IDLE_RSS = 90
"""MB of the daemon."""
KEEPER_RSS = 15
LIVEZ_P99 = 50
IDLE_SECONDS = 10.0
_STEPS = ("the interpreter", "pydantic and settings", "fastapi and uvicorn", "prometheus, xxhash, the daemon's own")
_IMPORTS = (
    "pass",
    "import weightd.daemon.settings",
    "import weightd.daemon.settings, fastapi, uvicorn",
    "import weightd.daemon.settings, fastapi, uvicorn, weightd.api.server",
)


def run(session: Session) -> Section:
    """Measure; everything is made here and removed by the session."""
    section = Section("restart", "restarts, and what an idle daemon costs")
    models = []
    session.progress("making small checkpoints")
    for number in range(max(SEGMENTS)):
        folder = session.folder / f"small-{number}"
        many_tensors(folder, 100, 1 << 20, 1)
        models.append(folder)
    large = session.folder / "large"
    language_model(large, session.size // 4)
    capacity = (max(SEGMENTS) << 21) + session.size // 2
    with session.daemon("restart", capacity, {"WEIGHTD_RESTART_LIMIT": "0", "WEIGHTD_RESTART_WINDOW": "1"}) as daemon:
        _idle(session, section, daemon)
        _adoption(session, section, daemon, models)
        _pause(session, section, daemon, models[0])
        _livez(session, section, daemon, large)
    return section


def _adoption(session: Session, section: Section, daemon: Daemon, models: list[Path]) -> None:
    staged = 0
    for count in SEGMENTS:
        for model in models[staged:count]:
            daemon.stage(model)
        staged = count
        seconds = []
        for repetition in range(session.repetitions):
            session.progress(f"kill -9 with {count} ready stages: repetition {repetition + 1}")
            pid = daemon.status["daemon_pid"]
            start = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            # The socket is the keeper's: the request waits in it for the next daemon.
            states = [stage["state"] for stage in daemon.client.stages()]
            seconds.append(time.perf_counter() - start)
            if states != ["ready"] * count:
                raise RuntimeError(f"of {count} stages {states.count('ready')} are ready after the restart")
            until(lambda: daemon.status["state"] == "running", "the keeper says so as well")
        row = Row(f"kill -9 until {count} stages are ready again", "s", seconds)
        row.under(ADOPTED_WITHIN)
        section.rows.append(row)


def _pause(session: Session, section: Section, daemon: Daemon, model: Path) -> None:
    """The longest that one ``attach()`` takes while the daemon is killed, of an engine that does nothing else."""
    pauses = []
    for repetition in range(session.repetitions):
        session.progress(f"attaching across a restart: repetition {repetition + 1}")
        longest, done, began = 0.0, threading.Event(), threading.Event()

        def engine() -> None:
            nonlocal longest
            while not done.is_set():  # noqa: B023
                start = time.perf_counter()
                attach(model, socket=daemon.runtime_dir).close()
                longest = max(longest, time.perf_counter() - start)
                began.set()  # noqa: B023

        thread = threading.Thread(target=engine)
        thread.start()
        began.wait()
        pid = daemon.status["daemon_pid"]
        os.kill(pid, signal.SIGKILL)
        until(lambda: daemon.status["daemon_pid"] not in (0, pid) and daemon.status["serving"], "it serves again")  # noqa: B023
        done.set()
        thread.join()
        pauses.append(longest)
    section.rows.append(Row("longest attach() across kill -9", "s", pauses, "none failed"))


def _idle(session: Session, section: Section, daemon: Daemon) -> None:
    session.progress(f"idle for {IDLE_SECONDS:g} s")
    daemon.client.node()
    pid = daemon.status["daemon_pid"]
    before = _cpu_seconds(pid)
    time.sleep(IDLE_SECONDS)
    cpu = Row("idle daemon: CPU", "% of a core", [100 * (_cpu_seconds(pid) - before) / IDLE_SECONDS])
    cpu.under(IDLE_CPU + 1e-9)
    memory = Row("idle daemon: RSS", "MB", [_rss(pid)])
    memory.under(IDLE_RSS)
    keeper = Row("keeper: RSS", "MB", [_rss(daemon.status["pid"])])
    keeper.under(KEEPER_RSS)
    section.rows += [keeper, memory, cpu]
    last, parts = 0.0, []
    for name, code in zip(_STEPS, _IMPORTS, strict=True):
        found = median(_import_rss(code) for _ in range(3))
        parts.append(f"{name} {found - last:.0f}")
        last = found
    section.notes.append(f"of the idle daemon's RSS, in MB, by what is imported in turn: {', '.join(parts)}")


def _livez(session: Session, section: Section, daemon: Daemon, model: Path) -> None:
    """How soon ``/livez`` is answered while the machine stages at full speed."""
    session.progress("/livez while staging")
    milliseconds: list[float] = []
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(daemon.runtime_dir / "api.sock"))) as http:
        for _ in range(session.repetitions):
            stage = daemon.client.stage(str(model))
            while daemon.client.show(stage["id"])["state"] not in ("ready", "failed"):
                for _ in range(20):
                    start = time.perf_counter()
                    http.get("http://weightd/livez")
                    milliseconds.append(1e3 * (time.perf_counter() - start))
            daemon.client.remove(stage["id"])
    milliseconds.sort()
    p99 = Row("/livez while staging: p99", "ms", [milliseconds[int(0.99 * (len(milliseconds) - 1))]])
    p99.note = (
        f"of {len(milliseconds)} requests; median {median(milliseconds):.1f} ms, longest {milliseconds[-1]:.1f} ms"
    )
    p99.under(LIVEZ_P99)
    section.rows.append(p99)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rss(pid: int) -> float:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) * 1024 / 1e6


def _import_rss(code: str) -> float:
    code += "; print(open('/proc/self/status').read().split('VmRSS:')[1].split()[0])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return int(out) * 1024 / 1e6
