"""Where a stage's time went, as its record and the metrics have it."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
from safetensors.numpy import save_file

from tests.fault_proxy import FaultProxy, Request
from tests.servers import Daemon, SeaweedFS, until
from tests.test_cli import weightd

MiB = 1 << 20
DELAY = 0.4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_file({"w": numpy.arange(2 * MiB, dtype=numpy.float32)}, folder / "a.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


class Distant(NamedTuple):
    """A daemon, and the proxy that its object store is behind."""

    daemon: Daemon
    origin: FaultProxy


@pytest.fixture(scope="module")
def shared(s3: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Distant]:
    with FaultProxy(s3.url) as origin:
        env = {**s3.env, "AWS_ENDPOINT_URL": origin.url, "WEIGHTD_CONCURRENT_LOADS": "1"}
        with Daemon(tmp_path_factory.mktemp("weightd"), env=env) as daemon:
            yield Distant(daemon, origin)


@pytest.fixture
def distant(shared: Distant) -> Iterator[Distant]:
    """It, with an origin that breaks nothing again afterwards."""
    yield shared
    shared.origin.fault = lambda request: None


def adds_up(record: dict[str, Any]) -> None:
    assert sum(record["seconds"].values()) == pytest.approx(record["ready_at"] - record["created_at"], abs=0.05)
    assert sum(record["source_seconds"].values()) == pytest.approx(record["seconds"]["source"])


def value(daemon: Daemon, series: str) -> float:
    found = re.search(rf"^{re.escape(series)} (\S+)$", daemon.get("/metrics"), re.MULTILINE)
    return float(found.group(1)) if found else 0.0


def wall(daemon: Daemon) -> float:
    found = re.findall(r"^weightd_stage_wall_seconds_total\{.*\} (\S+)$", daemon.get("/metrics"), re.MULTILINE)
    return sum(map(float, found))


def late(request: Request, what: str) -> bool:
    """Whether a request is of listing, of headers and configuration, or of weights."""
    if request.first is None:
        return what == "listing" and request.method == "GET" and "list-type" in request.path
    return what == ("source" if request.nbytes > MiB else "headers")


@pytest.mark.parametrize("phase", ["listing", "headers", "source"])
def test_what_the_store_makes_wait_is_counted_where_it_waits(
    phase: str, distant: Distant, s3: SeaweedFS, folder: Path
) -> None:
    daemon, origin = distant
    uri = s3.upload(folder, f"seconds-{phase}")
    before = value(daemon, f'weightd_stage_wall_seconds_total{{phase="{phase}",source="s3"}}')

    def slow(request: Request) -> None:
        if late(request, phase):
            time.sleep(DELAY)

    origin.fault = slow
    record = daemon.stage(uri)
    assert record["state"] == "ready", record["error"]
    adds_up(record)
    shown = re.search(r"^ *time +([\d.]+) s: (\w+)", weightd(daemon, "show", record["id"]).stdout, re.MULTILINE)
    assert shown is not None
    seconds = record["seconds"]
    assert shown.group(2) == max(seconds, key=seconds.__getitem__), "most first"
    assert seconds[phase] >= DELAY
    assert record["source_seconds"].keys() == {"s3"}
    assert value(daemon, f'weightd_stage_wall_seconds_total{{phase="{phase}",source="s3"}}') >= before + DELAY
    latest = f'weightd_latest_stage_seconds{{device="cpu",model="{uri}",phase="{phase}",source="s3"}}'
    assert value(daemon, latest) == pytest.approx(seconds[phase])


def test_a_stage_that_waits_for_its_turn_is_queued_meanwhile(distant: Distant, s3: SeaweedFS, folder: Path) -> None:
    daemon, origin = distant
    first, second = (s3.upload(folder, f"turn-{number}") for number in range(2))

    def slow(request: Request) -> None:
        if late(request, "source") and "turn-0" in request.path:
            until(lambda: value(daemon, "weightd_queue_oldest_seconds") >= DELAY, "somebody waits")

    origin.fault = slow
    daemon.client.stage(first)
    until(lambda: any(late(request, "source") for request in origin.seen), "it loads")
    record = daemon.stage(second)
    adds_up(record)
    assert record["seconds"]["queued"] >= DELAY / 2
    assert value(daemon, "weightd_queue_oldest_seconds") == 0


def test_time_goes_on_while_it_loads_and_stops_when_it_fails(distant: Distant, s3: SeaweedFS, folder: Path) -> None:
    daemon, origin = distant
    uri = s3.upload(folder, "cancelled")
    before = wall(daemon)
    go = time.monotonic() + 60
    origin.fault = lambda request: time.sleep(max(0, go - time.monotonic())) if late(request, "source") else None
    record = daemon.client.stage(uri)

    def spent() -> float:
        return sum(daemon.client.show(record["id"])["seconds"].values())

    so_far = spent()
    until(lambda: spent() > so_far + 0.2, "it goes on")
    go = 0.0
    daemon.client.remove(record["id"])
    ended = daemon.client.show(record["id"])
    assert ended["state"] == "cancelled"
    assert ended["seconds"]["source"] >= 0.2
    total = sum(ended["seconds"].values())
    assert wall(daemon) - before == pytest.approx(total)
    assert spent() == total


def test_a_stage_keeps_its_seconds_across_a_restart_which_counts_as_other(
    distant: Distant, s3: SeaweedFS, folder: Path
) -> None:
    daemon, origin = distant
    ready = daemon.stage(s3.upload(folder, "kept"))
    asked: list[Request] = []

    def stalls(request: Request) -> None:
        if late(request, "source"):
            asked.append(request)
            if len(asked) == 1:
                time.sleep(1)

    origin.fault = stalls
    record = daemon.client.stage(s3.upload(folder, "interrupted"))
    until(lambda: asked, "it loads")
    os.kill(daemon.pid, signal.SIGKILL)
    until(lambda: daemon.ready() and daemon.client.show(record["id"])["state"] == "ready", "it goes on")
    assert daemon.client.show(ready["id"])["seconds"] == ready["seconds"]
    again = daemon.client.show(record["id"])
    adds_up(again)
    assert again["seconds"]["other"] > 0.1, "the daemon that was killed has not noted its last seconds"
    assert wall(daemon) < sum(again["seconds"].values()), "what was before the restart counts once"
    assert value(daemon, 'weightd_stages_adopted_total{state="ready"}') >= 1
    assert value(daemon, 'weightd_stages_adopted_total{state="interrupted"}') == 1
    assert value(daemon, "weightd_adopted_bytes_total") == value(daemon, 'weightd_used_bytes{device="cpu"}')
    assert value(daemon, 'weightd_keeper_daemon_ends_total{how="killed"}') == 1
    assert 0 < value(daemon, "weightd_start_duration_seconds") < 30
