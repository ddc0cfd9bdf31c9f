"""Daemons that are replaced under their stages, and what there is to compare before and after."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.fault_proxy import FaultProxy, Request
from tests.servers import Daemon, SeaweedFS, until
from weightd.ipc import RequestRefused, Weights

Start = Callable[..., Daemon]


def replaced(daemon: Daemon, number: int = signal.SIGKILL) -> None:
    """Signal the daemon, and wait for the one after it."""
    pid = daemon.status["daemon_pid"]
    os.kill(pid, number)
    serving(daemon, pid)


def serving(daemon: Daemon, before: int) -> None:
    def another() -> bool:
        status = daemon.status
        return bool(status["serving"] and status["daemon_pid"] != before)

    until(another, "another daemon serves", 60)


def dead(pid: int) -> bool:
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True


def everything(daemon: Daemon) -> dict[str, Any]:
    """All that the API says of stages, leaf digests included."""
    found = {}
    for stage in daemon.client.stages():
        ranks = [segment["tp_rank"] for segment in stage["segments"]]
        found[stage["id"]] = stage, [daemon.client.manifest(stage["id"], tp_rank=n, leaves=True) for n in ranks]
    return found


def same(weights: Weights, truth: dict[str, Any]) -> bool:
    return weights.keys() == truth.keys() and all(bytes(weights.raw(name)) == truth[name].tobytes() for name in truth)


def removed(daemon: Daemon, stage: str) -> bool:
    """Drop it; False where that is refused."""
    with contextlib.suppress(RequestRefused):
        return bool(daemon.client.remove(stage)["state"] == "evicted")
    return False


def bytes_read(daemon: Daemon) -> float:
    lines = daemon.get("/metrics").splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("weightd_source_read_bytes_total{"))


class Gate:
    """Lets so many large reads of an object store pass, and holds back all others until it is open."""

    def __init__(self, passing: int) -> None:
        self.opened = threading.Event()
        self._left = threading.Semaphore(passing)

    def __call__(self, request: Request) -> None:
        if request.nbytes > 300_000 and not self._left.acquire(blocking=False):
            self.opened.wait(120)


@contextlib.contextmanager
def half_loaded(
    start_daemon: Start, s3: SeaweedFS, uri: str, *settings: str, **request: Any
) -> Iterator[tuple[Daemon, FaultProxy, Gate, str]]:
    """A daemon that has got a part of a stage, and gets no more of it until the gate is open."""
    gate = Gate(4)
    with FaultProxy(s3.url, gate) as proxy:
        daemon = start_daemon("--extent", "1MiB", *settings, env={**s3.env, "AWS_ENDPOINT_URL": proxy.url})
        stage = daemon.client.stage(uri, **request)["id"]
        until(lambda: daemon.client.show(stage)["bytes_done"] > 0, "something of it has landed", 60)
        try:
            yield daemon, proxy, gate, stage
        finally:
            gate.opened.set()


def ended(daemon: Daemon, stage: str) -> dict[str, Any]:
    until(lambda: daemon.client.show(stage)["state"] in ("ready", "failed"), "it has ended", 120)
    return daemon.client.show(stage)
