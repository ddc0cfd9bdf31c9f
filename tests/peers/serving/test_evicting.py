"""Stages that go while peers read them: the eviction waits for these, and not for ever."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from tests.fault_proxy import FaultProxy
from tests.node.adopting import ended
from tests.peers.fleet import Fleet, movers_at_work, movers_of, same, weight_bytes
from tests.servers import Daemon, SeaweedFS, until
from tests.test_cli import weightd


def listening(address: str, key: str) -> httpx.Response:
    """A peer that reads for as long as it is let."""
    client = httpx.Client(base_url=f"http://{address}", headers={"Authorization": "Bearer fleet"}, timeout=60)
    asked = client.build_request("GET", f"/peer/v1/stages/{key}", params={"format": 1})
    return client.send(asked, stream=True)


def test_a_stage_that_a_peer_reads_goes_when_that_peer_has_let_go(
    fleet: Callable[[int], Fleet], s3: SeaweedFS, folder: Path
) -> None:
    one = fleet(1)
    daemon = one.start(WEIGHTD_PEER_GRACE="300")
    record = daemon.stage(s3.upload(folder, "peers-evicted"))
    answer = listening(one.addresses[0], record["key"])
    events = answer.iter_lines()
    told = set[str]()
    while not {"segments", "complete"} <= told:
        told.add(json.loads(next(line for line in events if line.startswith("data:"))[5:])["type"])
    assert daemon.client.leases() == [], "what peers read is nobody's lease"
    daemon.client.remove(record["id"])
    assert daemon.client.show(record["id"])["state"] == "ready"
    assert any('"gone"' in line for line in events), "it is told"
    assert daemon.client.show(record["id"])["state"] == "ready", "and waited for"
    again = listening(one.addresses[0], record["key"])
    assert again.status_code == 404, "nobody else is let in meanwhile"
    answer.close()
    until(lambda: not daemon.used_bytes, "it has hung up: the memory is free")


def test_a_peer_that_does_not_let_go_is_waited_for_as_long_as_is_set(
    fleet: Callable[[int], Fleet], s3: SeaweedFS, folder: Path
) -> None:
    one = fleet(1)
    daemon = one.start(WEIGHTD_PEER_GRACE="1")
    record = daemon.stage(s3.upload(folder, "peers-stuck"))
    answer = listening(one.addresses[0], record["key"])
    events = answer.iter_lines()
    assert any('"segments"' in line for line in events), "it is mapped for peers"
    began = time.monotonic()
    daemon.client.remove(record["id"])
    until(lambda: not daemon.used_bytes, "it is free although the peer never hangs up")
    assert time.monotonic() - began >= 1
    answer.close()
    until(lambda: not movers_at_work(daemon), "and nobody has it mapped")


def test_room_is_made_of_what_peers_read_and_their_stages_go_on(
    fleet: Callable[[int], Fleet], origin: FaultProxy, s3: SeaweedFS, folder: Path
) -> None:
    """The reader's stage goes on from the origin; the one that needed the room gets it."""
    uri = s3.upload(folder, "peers-room")
    both = fleet(2)
    first = both.start(WEIGHTD_CAPACITY="cpu=64MiB")
    second = both.start()
    held = first.stage(uri)
    stage = second.client.stage(uri)["id"]
    until(lambda: movers_at_work(first), "the peer reads")
    wanted = first.stage(uri, tensors={"exclude": ["w0"]})
    assert (wanted["state"], wanted["error"]) == ("ready", None)
    assert first.client.show(held["id"])["state"] == "evicted"
    record = ended(second, stage)
    assert (record["state"], record["error"]) == ("ready", None)
    assert same(second, stage, folder)


def test_a_reader_that_is_stopped_holds_no_eviction_up(
    fleet: Callable[[int], Fleet], s3: SeaweedFS, folder: Path
) -> None:
    uri = s3.upload(folder, "peers-reader-stopped")
    both = fleet(2)
    first, second = both.start(WEIGHTD_PEER_GRACE="2"), both.start()
    held = first.stage(uri)
    stage = second.client.stage(uri)["id"]
    until(lambda: movers_at_work(first), "the peer reads")
    stopped: list[int] = [second.status["daemon_pid"], *movers_of(second)]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        first.client.remove(held["id"])
        until(lambda: not first.used_bytes, "it is free")
        assert alive(first)
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):  # a mover that was about to end
                os.kill(pid, signal.SIGCONT)
    record = ended(second, stage)
    assert (record["state"], record["error"]) == ("ready", None)
    assert same(second, stage, folder)


def alive(daemon: Daemon) -> bool:
    return daemon.status["restarts"] == 0


def test_each_peer_and_what_it_brought_is_in_the_record_and_in_the_list(
    fleet: Callable[[int], Fleet], origin: FaultProxy, s3: SeaweedFS, folder: Path
) -> None:
    uri = s3.upload(folder, "peers-listed")
    both = fleet(2)
    first, second = both.start(), both.start()
    first.stage(uri)
    read = weight_bytes(origin)
    record = second.stage(uri)
    assert weight_bytes(origin) == read
    (use,) = record["peers"]
    assert use["address"] == both.addresses[0]
    assert use["bytes"] >= record["bytes_total"]
    assert (use["transport"], use["given_up"]) == ("tcp", None)
    assert use["bytes_per_second"] > 0
    assert "UCX_TLS=tcp leaves it out" in use["slow_path"], "both are on this machine"
    assert record["bytes_by_source"] == {"s3": 0, "peer": record["bytes_total"]}
    counted = dict(line.rsplit(" ", 1) for line in second.get("/metrics").splitlines() if not line.startswith("#"))
    assert float(counted[f'weightd_peer_read_bytes_total{{peer="{use["address"]}",transport="tcp"}}']) == use["bytes"]
    assert float(counted["weightd_origin_saved_bytes_total"]) == record["bytes_total"]
    assert float(counted['weightd_peer_slow_path_total{better="shm"}']) == 1
    (peer,) = second.client.peers()["peers"]
    assert (peer["address"], peer["bytes_from"], peer["transport"]) == (both.addresses[0], use["bytes"], "tcp")
    until(lambda: first.client.peers()["peers"][0]["bytes_to"] == use["bytes"], "the other end is told")
    table = weightd(second, "peers", COLUMNS="200").stdout
    assert both.addresses[0] in table
    assert "tcp" in table
    found = " ".join(weightd(second, "doctor", COLUMNS="200").stdout.split())
    assert f"1 daemons in the directory, found at {both.addresses[1]}" in found
    kept = second.client.show(record["id"])
    os.kill(second.status["daemon_pid"], signal.SIGKILL)
    until(lambda: second.client.show(record["id"])["state"] == "ready", "it is adopted")
    assert second.client.show(record["id"])["bytes_by_source"] == kept["bytes_by_source"]
