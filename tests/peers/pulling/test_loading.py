"""Daemons that read from each other: real daemons, real NIXL, a real object store behind a proxy that counts."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

from tests.conftest import command
from tests.fault_proxy import FaultProxy
from tests.node.adopting import ended
from tests.peers.finding.etcd import Etcd
from tests.peers.fleet import Fleet, Start, from_peers, movers_at_work, same, weight_bytes
from tests.servers import Daemon, SeaweedFS, free_ports, until


def test_a_second_daemon_reads_no_weights_of_the_origin(
    fleet: Callable[[int], Fleet], origin: FaultProxy, s3: SeaweedFS, folder: Path
) -> None:
    uri = s3.upload(folder, "peers-second")
    both = fleet(2)
    first, second = both.start(), both.start()
    record = first.stage(uri)
    assert (record["state"], record["error"]) == ("ready", None)
    read = weight_bytes(origin)
    assert read > 0.9 * record["bytes_total"]
    again = second.stage(uri)
    assert (again["state"], again["error"]) == ("ready", None)
    assert again["checkpoint_digest"] == record["checkpoint_digest"]
    assert weight_bytes(origin) == read
    assert from_peers(second) >= record["bytes_total"]
    assert same(second, again["id"], folder)
    until(lambda: "memfd:weightd:window" not in maps(second), "nothing is left of what it landed in")
    until(lambda: not first.client.leases(), "the peer's lease has ended")
    first.client.remove(record["id"])
    until(lambda: not first.used_bytes, "its memory is free")


def maps(daemon: Daemon) -> str:
    """What memory of the daemon is."""
    return Path(f"/proc/{daemon.pid}/maps").read_text()


def test_ranks_come_from_peers_as_well(
    fleet: Callable[[int], Fleet], origin: FaultProxy, s3: SeaweedFS, folder: Path
) -> None:
    uri = s3.upload(folder, "peers-ranks")
    both = fleet(2)
    first, second = both.start(), both.start()
    parallel = {"tp_size": 2, "tp_rank": "all", "map": {"big": 1, "w*": "replicate"}}
    record = first.stage(uri, parallel=parallel)
    read = weight_bytes(origin)
    again = second.stage(uri, parallel=parallel)
    assert (again["state"], again["error"]) == ("ready", None)
    assert [s["digest"] for s in again["segments"]] == [s["digest"] for s in record["segments"]]
    assert weight_bytes(origin) == read


def test_daemons_that_start_together_read_the_origin_about_once(
    fleet: Callable[[int], Fleet], origin: FaultProxy, s3: SeaweedFS, folder: Path
) -> None:
    uri = s3.upload(folder, "peers-together")
    all_of_them = fleet(3)
    daemons = [all_of_them.start() for _ in range(3)]
    stages = [daemon.client.stage(uri)["id"] for daemon in daemons]
    records = [ended(d, s) for d, s in zip(daemons, stages, strict=True)]
    assert [record["state"] for record in records] == ["ready"] * 3, [record["error"] for record in records]
    assert len({record["checkpoint_digest"] for record in records}) == 1
    assert all(same(d, s, folder) for d, s in zip(daemons, stages, strict=True))
    assert weight_bytes(origin) <= 2 * records[0]["bytes_total"]
    assert sum(map(from_peers, daemons)) > 0


def test_a_peer_that_is_stopped_or_killed_is_replaced_by_the_origin(
    fleet: Callable[[int], Fleet], origin: FaultProxy, s3: SeaweedFS, folder: Path
) -> None:
    uri = s3.upload(folder, "peers-stopped")
    both = fleet(2)
    first, second = both.start(), both.start(WEIGHTD_PEER_STALL="2")
    first.stage(uri)

    def begun() -> bool:
        return bool(from_peers(second)) or second.client.show(stage)["state"] == "ready"

    stage = second.client.stage(uri)["id"]
    until(begun, "it has begun")
    os.kill(first.status["daemon_pid"], signal.SIGSTOP)
    try:
        record = ended(second, stage)
    finally:
        os.kill(first.status["daemon_pid"], signal.SIGCONT)
    assert (record["state"], record["error"]) == ("ready", None)
    assert same(second, stage, folder)


def test_a_peer_whose_daemon_is_killed_comes_back_with_what_it_had(
    fleet: Callable[[int], Fleet], origin: FaultProxy, s3: SeaweedFS, folder: Path
) -> None:
    uri = s3.upload(folder, "peers-killed")
    both = fleet(2)
    first, second = both.start(), both.start()
    kept = first.stage(uri)
    stage = second.client.stage(uri)["id"]
    os.kill(first.status["daemon_pid"], signal.SIGKILL)
    record = ended(second, stage)
    assert (record["state"], record["error"]) == ("ready", None)
    assert same(second, stage, folder)
    second.client.remove(stage)
    assert first.client.show(kept["id"])["state"] == "ready"
    read = weight_bytes(origin)
    assert second.stage(uri)["state"] == "ready"
    assert weight_bytes(origin) == read, "what was adopted is served as before"


def test_a_mover_that_is_stopped_is_noticed_although_its_daemon_lives(
    fleet: Callable[[int], Fleet], origin: FaultProxy, s3: SeaweedFS, folder: Path
) -> None:
    uri = s3.upload(folder, "peers-mover-stopped")
    both = fleet(2)
    first, second = both.start(), both.start(WEIGHTD_PEER_STALL="2")
    first.stage(uri)
    stage = second.client.stage(uri)["id"]
    stopped = until(lambda: movers_at_work(first), "peers read")
    for mover in stopped:
        os.kill(mover, signal.SIGSTOP)
    try:
        record = ended(second, stage)
    finally:
        for mover in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(mover, signal.SIGCONT)
    assert (record["state"], record["error"]) == ("ready", None)
    assert same(second, stage, folder)


def test_a_store_that_is_away_is_not_needed_for_what_a_peer_has(
    fleet: Callable[[int], Fleet], origin: FaultProxy, s3: SeaweedFS, folder: Path
) -> None:
    uri = s3.upload(folder, "peers-store-away")
    both = fleet(2)
    first, second = both.start(), both.start(WEIGHTD_RETRY_DEADLINE="5")
    first.stage(uri)
    large = [False]
    origin.fault = lambda request: "503" if large[0] and request.nbytes > 300_000 else None
    large[0] = True
    record = second.stage(uri)
    assert (record["state"], record["error"]) == ("ready", None)
    assert record["bytes_by_source"]["peer"] == record["bytes_total"]


def test_the_mover_has_no_credentials(fleet: Callable[[int], Fleet], s3: SeaweedFS, folder: Path) -> None:
    uri = s3.upload(folder, "peers-credentials")
    both = fleet(2)
    first, second = both.start(), both.start()
    first.stage(uri)
    second.client.stage(uri)
    (mover,) = until(lambda: movers_at_work(first), "peers read")
    environment = Path(f"/proc/{mover}/environ").read_bytes()
    assert b"PATH=" in environment
    assert b"AWS_" not in environment
    assert b"WEIGHTD_PEER_TOKEN" not in environment


def test_a_mover_that_is_killed_costs_nothing_but_time(
    fleet: Callable[[int], Fleet], origin: FaultProxy, s3: SeaweedFS, folder: Path
) -> None:
    uri = s3.upload(folder, "peers-mover")
    both = fleet(2)
    first, second = both.start(), both.start()
    first.stage(uri)
    for _ in range(2):
        stage = second.client.stage(uri)["id"]
        for mover in until(lambda: movers_at_work(first), "peers read"):
            os.kill(mover, signal.SIGKILL)
        record = ended(second, stage)
        assert (record["state"], record["error"]) == ("ready", None)
        assert same(second, stage, folder)
        second.client.remove(stage)
    read = weight_bytes(origin)
    assert second.stage(uri)["state"] == "ready"
    assert weight_bytes(origin) == read


def test_daemons_find_each_other_by_etcd(
    start_daemon: Start, origin: FaultProxy, s3: SeaweedFS, folder: Path, tmp_path: Path
) -> None:
    uri = s3.upload(folder, "peers-etcd")
    command("etcd", "apt-get install etcd-server")
    with Etcd(tmp_path / "etcd") as etcd:
        env = {**s3.env, "AWS_ENDPOINT_URL": origin.url, "UCX_TLS": "tcp", "WEIGHTD_PEERS": f"etcd:{etcd.url}"}
        daemons = [start_daemon(env={**env, "WEIGHTD_PEER_LISTEN": f"127.0.0.1:{port}"}) for port in free_ports(2)]
        record = daemons[0].stage(uri)
        key = record["key"]
        until(lambda: [p["stages"] for p in daemons[1].client.peers()["peers"]] == [{key: 1.0}], "it is published")
        read = weight_bytes(origin)
        assert daemons[1].stage(uri)["bytes_by_source"]["peer"] == record["bytes_total"]
        assert weight_bytes(origin) == read
        etcd.stop()
        daemons[1].client.remove(daemons[1].stage(uri)["id"])
        assert daemons[1].stage(uri)["state"] == "ready", "losing the directory fails nothing"
        assert weight_bytes(origin) == read, "and its members are known for a while"


def test_a_peer_without_the_fleets_token_gets_nothing_and_the_origin_serves(
    fleet: Callable[[int], Fleet], origin: FaultProxy, s3: SeaweedFS, folder: Path
) -> None:
    uri = s3.upload(folder, "peers-token")
    both = fleet(2)
    first, second = both.start(), both.start(WEIGHTD_PEER_TOKEN="another")
    first.stage(uri)
    read = weight_bytes(origin)
    record = second.stage(uri)
    assert record["state"] == "ready"
    assert weight_bytes(origin) > read
    assert from_peers(second) == 0


def test_a_request_may_leave_peers_out(
    fleet: Callable[[int], Fleet], origin: FaultProxy, s3: SeaweedFS, folder: Path
) -> None:
    uri = s3.upload(folder, "peers-out")
    both = fleet(2)
    first, second = both.start(), both.start()
    first.stage(uri)
    assert second.stage(uri, sources=["origin"])["state"] == "ready"
    assert from_peers(second) == 0
