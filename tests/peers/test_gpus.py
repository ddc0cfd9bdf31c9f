"""Peers with GPUs, over the fake driver: bytes go through host memory at whichever end there is one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint_files import write_checkpoint
from tests.devices.cuda.fakes import EXPECTED, SHARDS, Machine
from tests.fault_proxy import FaultProxy
from tests.node.adopting import ended
from tests.peers.fleet import weight_bytes
from tests.servers import Daemon, SeaweedFS, free_ports, until

PARALLEL = {"tp_size": 2, "tp_rank": "all", "map": {"q": 1, "o": 0, "*": "replicate"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("gpu-model"), SHARDS, index=True)


@pytest.fixture
def machine(fake_library: Path, tmp_path: Path) -> Iterator[Machine]:
    made = Machine(fake_library, tmp_path / "machine", devices=2, memory=1 << 30, strict=True)
    yield made
    made.close()
    made.check_clean()


class Pair:
    """Two daemons on one machine with fake GPUs that know each other."""

    def __init__(self, machine: Machine, s3: SeaweedFS, origin: FaultProxy) -> None:
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
        env = {**s3.env, "AWS_ENDPOINT_URL": origin.url, "UCX_TLS": "tcp", "WEIGHTD_EXTENT": "1MiB"}
        peers = {"WEIGHTD_PEERS": "static:" + ",".join(self.addresses), "WEIGHTD_PEER_TOKEN": "fleet"}
        self.first, self.second = (
            machine.daemon(**env, **peers, WEIGHTD_PEER_LISTEN=address, WEIGHTD_PEER_STALL="5")
            for address in self.addresses
        )


def right(machine: Machine, daemon: Daemon, stage: str) -> bool:
    reader = machine.attach(daemon, stage=stage)
    found = reader.found["digests"] == EXPECTED
    reader.end()
    return found


@pytest.mark.parametrize(("here", "there"), [("cpu", "cuda:0"), ("cuda:0", "cpu"), ("cuda:0", "cuda:1")])
def test_a_gpus_stage_goes_to_and_comes_from_peers(
    here: str, there: str, machine: Machine, s3: SeaweedFS, origin: FaultProxy, model: Path
) -> None:
    uri = s3.upload(model, f"peers-{here}-{there}".replace(":", ""))
    pair = Pair(machine, s3, origin)
    truth = pair.first.stage(uri, device=here)
    assert (truth["state"], truth["error"]) == ("ready", None)
    read = weight_bytes(origin)
    record = pair.second.stage(uri, device=there)
    assert (record["state"], record["error"]) == ("ready", None)
    assert weight_bytes(origin) == read
    assert record["checkpoint_digest"] == truth["checkpoint_digest"]
    assert record["bytes_by_source"] == {"s3": 0, "peer": record["bytes_total"]}
    (use,) = record["peers"]
    assert use["through_host"]
    if there != "cpu":
        assert right(machine, pair.second, record["id"])
    until(lambda: not pair.first.client.remove(truth["id"])["footprint_bytes"] or not pair.first.used_bytes, "it goes")


def test_ranks_on_two_gpus_come_from_ranks_in_host_memory(
    machine: Machine, s3: SeaweedFS, origin: FaultProxy, model: Path
) -> None:
    uri = s3.upload(model, "peers-gpu-ranks")
    pair = Pair(machine, s3, origin)
    truth = pair.first.stage(uri, device="cpu", parallel=PARALLEL)
    read = weight_bytes(origin)
    record = pair.second.stage(uri, device=["cuda:0", "cuda:1"], parallel=PARALLEL)
    assert (record["state"], record["error"]) == ("ready", None)
    assert weight_bytes(origin) == read
    assert [s["digest"] for s in record["segments"]] == [s["digest"] for s in truth["segments"]]


def test_a_peer_with_a_gpu_that_dies_is_replaced_by_the_origin(
    machine: Machine, s3: SeaweedFS, origin: FaultProxy, model: Path
) -> None:
    uri = s3.upload(model, "peers-gpu-dies")
    pair = Pair(machine, s3, origin)
    pair.first.stage(uri, device="cuda:0")
    stage = pair.second.client.stage(uri, device="cuda:1")["id"]
    pid = pair.first.status["daemon_pid"]
    machine.killed.add(pid)
    os.kill(pid, signal.SIGKILL)
    record = ended(pair.second, stage)
    assert (record["state"], record["error"]) == ("ready", None)
    assert right(machine, pair.second, stage)
