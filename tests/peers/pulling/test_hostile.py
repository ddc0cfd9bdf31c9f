"""Peers that lie, and whoever else comes to the port for peers."""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis

from tests.fault_proxy import FaultProxy, Request
from tests.node.adopting import ended
from tests.peers.fleet import Fleet, same, serve_events
from tests.servers import Daemon, SeaweedFS, free_ports, until
from weightd.daemon.peers.finding.listening import FORMAT


class Trap:
    """An honest daemon with a stage, and one that hears of it from a liar only, who tells what it was made to say."""

    def __init__(self, folder: Path, s3: SeaweedFS, model: Path) -> None:
        self.say: Callable[[dict[str, Any]], list[Any]] = lambda said: [said]
        self.asked = 0
        self.passes = threading.Event()
        """Set where the origin gives weights."""
        self.origin = FaultProxy(s3.url, self._hold)
        (port,) = free_ports(1)
        self._address = f"127.0.0.1:{port}"
        self._server = serve_events(self._answer)
        liar = f"127.0.0.1:{self._server.server_address[1]}"
        env = {**s3.env, "UCX_TLS": "tcp", "WEIGHTD_PEER_TOKEN": "fleet", "WEIGHTD_EXTENT": "1MiB"}
        self.honest = Daemon(folder / "honest", env={**env, "WEIGHTD_PEER_LISTEN": self._address})
        peers = {"WEIGHTD_PEERS": f"static:{liar}", "WEIGHTD_PEER_STALL": "2"}
        self._folder, self._env = folder, {**env, **peers}
        self.uri = s3.upload(model, "peers-lies")

    def __enter__(self) -> Trap:
        self.origin.__enter__()
        self.fooled = Daemon(self._folder / "fooled", env={**self._env, "AWS_ENDPOINT_URL": self.origin.url})
        self.honest.start()
        self.fooled.start()
        self.truth = self.honest.stage(self.uri)
        return self

    def __exit__(self, *_: object) -> None:
        self.passes.set()
        self.fooled.stop()
        self.honest.stop()
        self.origin.__exit__()
        self._server.shutdown()
        self._server.server_close()

    def _hold(self, request: Request) -> None:
        if request.nbytes > 300_000:
            self.passes.wait(120)

    def given_up(self, why: str) -> int:
        """How often the fooled one has given a peer up for it."""
        series = rf'^weightd_peers_dropped_total{{.*reason="{why}".*}} (\S+)$'
        return int(sum(map(float, re.findall(series, self.fooled.get("/metrics"), re.MULTILINE))))

    def _answer(self, path: str) -> Iterator[bytes]:
        """What the honest peer says, as this one would have it."""
        self.asked += 1
        headers = {"Authorization": "Bearer fleet"}
        with httpx.stream("GET", f"http://{self._address}{path}", headers=headers, timeout=30) as answer:
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    for said in self.say(json.loads(line[5:])):
                        text = said if isinstance(said, str) else json.dumps(said)
                        yield f"data: {text}\n\n".encode()


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory, s3: SeaweedFS, folder: Path) -> Iterator[Trap]:
    with Trap(tmp_path_factory.mktemp("trap"), s3, folder) as found:
        yield found


def other_digests(said: dict[str, Any]) -> list[Any]:
    return [{**said, "digests": "0" * len(said["digests"])}] if said["type"] == "leaves" else [said]


def shifted(said: dict[str, Any]) -> list[Any]:
    if said["type"] == "segments":
        said["segments"][0]["address"] += 4096
    return [said]


def far_away(said: dict[str, Any]) -> list[Any]:
    if said["type"] == "segments":
        said["segments"][0]["address"] = 1 << 60
    return [said]


def no_metadata(said: dict[str, Any]) -> list[Any]:
    if said["type"] == "segments":
        said["segments"][0]["metadata"] = "bm8="
    return [said]


def other_epoch(said: dict[str, Any]) -> list[Any]:
    return [{**said, "epoch": "another"}] if said["type"] == "leaves" else [said]


def one_leaf_more(said: dict[str, Any]) -> list[Any]:
    """The last leaf is followed by one that there is not."""
    return [{**said, "digests": said["digests"] + "f" * 16}] if said["type"] == "leaves" else [said]


def coming_past_the_end(said: dict[str, Any]) -> list[Any]:
    if said["type"] != "leaves":
        return [said]
    count = len(said.pop("digests")) // 16
    return [{**said, "type": "coming", "count": count + 1}]


def coming_of_another_epoch(said: dict[str, Any]) -> list[Any]:
    return [{**said, "type": "coming", "count": 1, "epoch": "another"}] if said["type"] == "leaves" else [said]


def another_segment(said: dict[str, Any]) -> list[Any]:
    """The one after the last."""
    return [{**said, "segment": 1}] if said["type"] == "leaves" else [said]


def only_that_it_lives(said: dict[str, Any]) -> list[Any]:
    return [said] if said["type"] in ("hello", "segments", "alive") else []


def not_where(said: dict[str, Any]) -> list[Any]:
    return [] if said["type"] == "segments" else [said]


def address_without_end(said: dict[str, Any]) -> list[Any]:
    if said["type"] == "segments":
        return [json.dumps(said).replace(str(said["segments"][0]["address"]), "Infinity")]
    return [said]


def ghosts(said: dict[str, Any]) -> list[Any]:
    """Readers that there are not, for ever young; and nothing else but that they have begun with everything."""
    stamps = {f"10.9.8.{i}:7401": 1 << 60 for i in range(40)}
    if said["type"] == "leaves":
        count = len(said.pop("digests")) // 16
        return [{"type": "readers", "stamps": stamps}, {**said, "type": "coming", "count": count}]
    return [{**said, "ready": False}] if said["type"] == "hello" else [said] if said["type"] == "segments" else []


OF_NOTHING = {"type": "leaves", "segment": 99, "digests": "f" * 16}
Lie = Callable[[dict[str, Any]], list[Any]]
LIES: dict[str, tuple[Lie, str | None]] = {
    "digests that are not of its bytes": (other_digests, "wrong_bytes"),
    "an address beside the truth": (shifted, "wrong_bytes"),
    "an address far away": (far_away, "failed"),
    "metadata of nothing": (no_metadata, "unreachable"),
    "more segments than there are": (lambda said: [{**said, "segments": [*said.get("segments", []), {}]}], "nonsense"),
    "leaves that there are not": (
        lambda said: [said, {**OF_NOTHING, "epoch": said.get("epoch"), "first": 0}], "nonsense"
    ),
    "leaves from nowhere": (lambda said: [{**said, "first": None}] if said["type"] == "leaves" else [said], "nonsense"),
    "leaves from before the first": (
        lambda said: [{**said, "first": -1}] if said["type"] == "leaves" else [said], "nonsense"
    ),
    "a segment more than there are": (another_segment, "nonsense"),
    "a leaf more than there are": (one_leaf_more, "nonsense"),
    "that leaves come that there are not": (coming_past_the_end, "nonsense"),
    "that leaves of another epoch come": (coming_of_another_epoch, "nonsense"),
    "digests that are none": (
        lambda said: [{**said, "digests": "zz" * 8}] if said["type"] == "leaves" else [said], "nonsense"
    ),
    "no JSON": (lambda said: ["{"], "gone"),
    "no object": (lambda said: [[1, 2], 7, None, "x"], "nonsense"),
    "a number for everything": (
        lambda said: [{"type": 1}, {"type": "leaves"}, {"type": "segments", "segments": 5}], "nonsense"
    ),
    "nothing": (lambda said: [], None),
    "that it has all, then only that it lives": (only_that_it_lives, None),
    "that it has all, and not where": (not_where, "stalled"),
    "an address without end": (address_without_end, "nonsense"),
    "another epoch for its leaves": (other_epoch, "nonsense"),
    "ghosts that read everything": (ghosts, None),
    "another version": (
        lambda said: [{**said, "format": 99} if said["type"] == "hello" else {"type": "new"}], "version"
    ),
    "stamps that are none": (lambda said: [said, {"type": "readers", "stamps": [1]}, {"type": "readers"}], "nonsense"),
    "more than there is": (
        lambda said: [{**said, "first": 1 << 61}] if said["type"] == "leaves" else [said], "nonsense"
    ),
    "a very long line": (lambda said: ["x" * (2 << 20)], "gone"),
}  # fmt: skip
"""What a peer may say → why it is given up, before the origin has brought anything; None where it only is of no use."""


@pytest.mark.parametrize("lie", LIES)
def test_a_liar_is_given_up_and_no_wrong_byte_gets_into_a_stage(lie: str, trap: Trap, folder: Path) -> None:
    (trap.say, why), trap.asked = LIES[lie], 0
    trap.passes.clear()
    before = trap.given_up(why) if why else 0
    stage = trap.fooled.client.stage(trap.uri)["id"]
    if why:
        until(lambda: trap.given_up(why) > before, f"it is given up: {why}", 60)
    else:
        until(lambda: trap.asked, "it is listened to")
    trap.passes.set()
    record = ended(trap.fooled, stage)
    assert (record["state"], record["error"]) == ("ready", None)
    assert record["checkpoint_digest"] == trap.truth["checkpoint_digest"]
    assert record["bytes_by_source"] == {"s3": record["bytes_total"], "peer": 0}, "something of it was kept"
    assert same(trap.fooled, record["id"], folder)
    assert trap.fooled.status["restarts"] == trap.honest.status["restarts"] == 0
    trap.fooled.client.remove(record["id"])


def test_the_port_for_peers_wants_the_token_and_knows_no_other_routes(
    fleet: Callable[[int], Fleet], s3: SeaweedFS, folder: Path
) -> None:
    one = fleet(1)
    daemon = one.start()
    record = daemon.stage(s3.upload(folder, "peers-port"))
    with httpx.Client(base_url=f"http://{one.addresses[0]}", timeout=30) as client:
        assert client.get("/peer/v1/stages").status_code == 401
        client.headers["Authorization"] = "Bearer fleet"
        assert client.get("/peer/v1/stages").json()["stages"] == {record["key"]: 1.0}
        for path in ("/v1/stage", "/v1/node", "/metrics", "/docs", "/peer/v1/stages/" + "0" * 32, "/peer/v1/stages/x"):
            assert client.get(path).status_code in (404, 422), path
        assert client.post("/peer/v1/stages", json={}).status_code == 405
        with client.stream("GET", f"/peer/v1/stages/{record['key']}", params={"format": FORMAT}) as answer:
            said = (json.loads(line[5:])["type"] for line in answer.iter_lines() if line.startswith("data:"))
            assert [next(said), next(said)] == ["hello", "segments"], "where it lies comes before what it is"
    assert daemon.client.peers() == {"directory": "ok", "off": None, "peers": []}


@pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")
def test_whatever_comes_to_the_port_for_peers_the_daemon_lives(
    fleet: Callable[[int], Fleet], s3: SeaweedFS, folder: Path
) -> None:
    """Not HTTP at all, by chance and by intent; requests by the API's own description; lines and bodies without end."""
    one = fleet(1)
    daemon = one.start()
    record = daemon.stage(s3.upload(folder, "peers-fuzzed"))
    address = one.addresses[0]
    place = address.partition(":")[0], int(address.partition(":")[2])
    rng = random.Random(7)
    heads = [b"GET /peer/v1/stages HTTP/1.1\r\n", b"\x16\x03\x01\x02\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b""]
    for _ in range(60):
        with contextlib.suppress(OSError), socket.create_connection(place, timeout=10) as connection:  # it may hang up
            connection.sendall(rng.choice(heads) + rng.randbytes(rng.randrange(4000)))
    held = [socket.create_connection(place, timeout=10) for _ in range(50)]  # that say nothing
    auth = {"Authorization": "Bearer fleet"}
    with httpx.Client(base_url=f"http://{address}", timeout=30, headers=auth) as client:
        assert client.post("/peer/v1/read", content=b"x" * (1 << 20)).status_code == 413
        assert client.get("/peer/v1/stages/" + "0" * 5000).status_code == 422
        astray = {"identity": "../..", "name": "x", "offset": 0, "length": 1}
        assert client.get("/peer/v1/file", params=astray).status_code == 422
        for name in ("../../../etc/passwd", "listing.json", "/etc/passwd"):
            query = {"identity": "0" * 32, "name": name, "offset": 0, "length": 100}
            assert client.get("/peer/v1/file", params=query).status_code == 404
        asked = client.get(f"/peer/v1/stages/{record['key']}", params={"format": 99})
        assert (asked.status_code, "format" in asked.json()["detail"]) == (400, True)
        schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
        checked = 0
        for operation in schema.get_all_operations():
            found = operation.ok()
            if found.path == "/peer/v1/stages/{key}":
                continue  # it answers for as long as one listens
            for _ in range(30):
                case = found.as_strategy().example()
                answer = case.call(base_url=f"http://{address}", headers=auth, timeout=30)
                assert answer.status_code < 500, (found.path, answer.text)
                checked += 1
        assert checked
    for connection in held:
        connection.close()
    assert daemon.status["restarts"] == 0
    assert daemon.client.show(record["id"])["state"] == "ready"
