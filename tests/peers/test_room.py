"""Room on a node whose stages peers read: it is waited for, and what peers have on their way is nobody else's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.checkpoint_files import write_checkpoint
from tests.devices.cuda.fakes import SHARDS, Machine
from tests.peers.fleet import Fleet
from tests.peers.serving.test_evicting import listening
from tests.servers import SeaweedFS, free_ports, until

SLOTS = 16
"""Places that a GPU's stage has for what peers read of it."""


def told(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    """What a peer is told."""
    return (json.loads(line[5:]) for line in answer.iter_lines() if line.startswith("data:"))


def test_room_is_made_once_peers_have_let_go_of_what_goes_for_it(
    fleet: Callable[[int], Fleet], s3: SeaweedFS, folder: Path
) -> None:
    uri = s3.upload(folder, "peers-room-waits")
    one = fleet(1)
    daemon = one.start(WEIGHTD_CAPACITY="cpu=64MiB", WEIGHTD_PEER_GRACE="300")
    held = daemon.stage(uri)
    answer = listening(one.addresses[0], held["key"])
    events = told(answer)
    assert any(said["type"] == "complete" for said in events)
    wanted = daemon.client.stage(uri, tensors={"exclude": ["w0"]})["id"]
    assert any(said["type"] == "gone" for said in events), "it is told to let go"
    assert daemon.client.show(held["id"])["state"] == "ready", "it was taken away from under who reads it"
    assert daemon.client.show(wanted)["footprint_bytes"] == 0
    answer.close()
    until(lambda: daemon.client.show(wanted)["state"] == "ready", "it has the room", 60)
    assert daemon.client.show(held["id"])["state"] == "evicted"


@pytest.fixture
def machine(fake_library: Path, tmp_path: Path) -> Iterator[Machine]:
    made = Machine(fake_library, tmp_path / "machine", devices=2, memory=1 << 30, strict=True)
    yield made
    made.close()
    made.check_clean()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("gpu-model"), SHARDS, index=True)


def test_a_peer_gives_back_only_what_was_put_for_itself_and_only_once(
    machine: Machine, s3: SeaweedFS, model: Path
) -> None:
    uri = s3.upload(model, "peers-window")
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    peers = {"WEIGHTD_PEER_LISTEN": address, "WEIGHTD_PEERS": f"static:{address}", "WEIGHTD_PEER_TOKEN": "fleet"}
    daemon = machine.daemon(**s3.env, **peers, UCX_TLS="tcp", WEIGHTD_PEER_STALL="1")
    record = daemon.stage(uri, device="cuda:0")
    answers = [listening(address, record["key"]) for _ in range(2)]
    events = [told(answer) for answer in answers]  # kept: whoever forgets them has hung up
    names = [next(said for said in of if said["type"] == "segments")["reader"] for of in events]
    with httpx.Client(base_url=f"http://{address}", headers={"Authorization": "Bearer fleet"}, timeout=60) as client:

        def window(reader: str, *given: int, put: bool = True) -> int | None:
            pieces = [[0, 0, 256]] if put else []
            body = {"reader": reader, "given": list(given), "pieces": pieces}
            found: int | None = client.post("/peer/v1/window", json=body).raise_for_status().json()["address"]
            return found

        honest, other = names
        assert honest != other
        places = [window(honest) for _ in range(SLOTS)]
        assert None not in places
        assert len(set(places)) == SLOTS
        first = places[0]
        assert first is not None
        assert window(other) is None, "there is room for no more"
        assert window(other, *[place for place in places if place]) is None, "it gave back what is another's"
        assert window(other, first + 256, first - 1, 0, (1 << 62) - 1) is None
        assert window(honest, first, first) == first
        assert window(honest) is None, "it gave back one place twice"
        assert window(honest, first, put=False) is None
        assert window(honest, first, put=False) is None
        assert window(other) == first
        assert window(other) is None, "it gave back what it had given back before"
        answers[0].close()
        again: list[int | None] = []

        def taken() -> bool:
            again.append(window(other))
            return again[-1] is not None

        until(taken, "who hangs up has given all back", 60)
    answers[1].close()
