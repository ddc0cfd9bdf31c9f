"""What peers bring is verified where it ends up, and where only they may bring it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.checkpoint_files import write_checkpoint
from tests.devices.cuda.fakes import SHARDS, Machine
from tests.fault_proxy import FaultProxy
from tests.node.adopting import ended
from tests.peers.fleet import Fleet, same, weight_bytes
from tests.peers.test_gpus import Pair, right
from tests.servers import SeaweedFS, until


@pytest.fixture
def machine(fake_library: Path, tmp_path: Path) -> Iterator[Machine]:
    made = Machine(fake_library, tmp_path / "machine", devices=2, memory=1 << 30, strict=True)
    yield made
    made.close()
    made.check_clean()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("gpu-model"), SHARDS, index=True)


@pytest.mark.parametrize("copy", [1, 3])
def test_a_bit_that_flips_between_a_peer_and_a_gpu_is_noticed(
    copy: int, machine: Machine, s3: SeaweedFS, origin: FaultProxy, model: Path
) -> None:
    uri = s3.upload(model, f"peers-flipped-{copy}")
    pair = Pair(machine, s3, origin)
    truth = pair.first.stage(uri, device="cpu")
    assert pair.second.stage(model, device="cuda:1", tensors={"include": ["norm"]})["state"] == "ready", "its self-test"
    read = weight_bytes(origin)
    machine.fake.set(flip_at=copy)
    record = pair.second.stage(uri, device="cuda:1")
    assert weight_bytes(origin) == read, "it came from the peer"
    assert record["state"] == "failed"
    assert record["error"]["code"] == "digest_mismatch"
    assert "bytes changed between the host and cuda:1" in record["error"]["message"]
    machine.fake.set(flip_at=0)
    again = pair.second.stage(uri, device="cuda:1")
    assert (again["state"], again["checkpoint_digest"]) == ("ready", truth["checkpoint_digest"])
    assert right(machine, pair.second, again["id"])


def test_what_may_come_from_peers_only_is_read_from_no_origin(
    fleet: Callable[[int], Fleet], origin: FaultProxy, s3: SeaweedFS, folder: Path
) -> None:
    uri = s3.upload(folder, "peers-only")
    both = fleet(2)
    first, second = both.start(), both.start(WEIGHTD_PEER_STALL="1")
    alone = second.client.stage(uri, sources=["peer"])["id"]
    record = ended(second, alone)
    assert (record["state"], record["error"]["code"]) == ("failed", "source_failed"), "nobody has it"
    assert weight_bytes(origin) == 0
    truth = first.stage(uri)
    read = weight_bytes(origin)
    assert read > 0.9 * truth["bytes_total"]
    record = second.stage(uri, sources=["peer"])
    assert (record["state"], record["error"]) == ("ready", None)
    assert weight_bytes(origin) == read
    assert record["bytes_by_source"] == {"s3": 0, "peer": record["bytes_total"]}
    assert same(second, record["id"], folder)


def test_what_may_come_from_the_origin_only_is_asked_of_no_peer(
    fleet: Callable[[int], Fleet], origin: FaultProxy, s3: SeaweedFS, folder: Path
) -> None:
    uri = s3.upload(folder, "peers-never")
    both = fleet(2)
    first, second = both.start(), both.start()
    first.stage(uri)
    until(lambda: second.client.peers()["peers"], "they know each other")
    read = weight_bytes(origin)
    record = second.stage(uri, sources=["origin"])
    assert (record["state"], record["error"]) == ("ready", None)
    assert record["bytes_by_source"] == {"s3": record["bytes_total"], "peer": 0}
    assert weight_bytes(origin) > read + 0.9 * record["bytes_total"]
    assert record["peers"] == []
