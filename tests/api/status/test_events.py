"""GET /v1/events of a real daemon, over TCP and its socket: what it tells, to whom, and what it costs."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
from safetensors.numpy import save_file

from tests.servers import Daemon, free_ports, until
from weightd.api import problems  # noqa: F401, which has errors of its own
from weightd.daemon.errors import DaemonError

Told = dict[str, dict[str, Any]]
KEYS = {"node": "version", "devices": "name", "stages": "id", "leases": "id", "peers": "address", "refusals": "id"}


class Listener:
    """A client of the event stream; ``told`` is what it has been told: kind → key → record."""

    def __init__(self, url: str, **headers: str) -> None:
        self.told: Told = {}
        self.names: list[str] = []
        self.at: list[float] = []
        """When each event was made, by the daemon's clock."""
        self._client = httpx.Client(base_url=url, headers=headers, timeout=60)
        self._answer = self._client.stream("GET", "/v1/events")

    def __enter__(self) -> Listener:
        self.answer = self._answer.__enter__()
        self._lines = self.answer.iter_lines()
        return self

    def __exit__(self, *error: Any) -> None:
        self._answer.__exit__(*error)
        self._client.close()

    def next(self) -> dict[str, Any] | None:
        """The next event; None where the stream has ended, as it should."""
        name = ""
        for line in self._lines:
            if line.startswith("event:"):
                name = line.removeprefix("event:").strip()
            if line.startswith("data:"):
                message: dict[str, Any] = json.loads(line.removeprefix("data:"))
                self.names.append(name)
                self.at.append(message["at"])
                if name == "snapshot" and message["part"] == 0:
                    self.told = {kind: {} for kind in KEYS}
                for kind, key in KEYS.items():
                    self.told[kind].update({record[key]: record for record in message.get(kind, [])})
                    for gone in message.get("gone", {}).get(kind, []):
                        self.told[kind].pop(gone, None)
                return message
        return None

    def until(self, condition: Callable[[Told], Any], what: str) -> Any:
        end = time.monotonic() + 60
        while not (found := condition(self.told)):
            assert self.next() is not None, f"the stream ended before: {what}"
            assert time.monotonic() < end, what
        return found


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    (port,) = free_ports(1)
    arguments = ("--listen", f"127.0.0.1:{port}", "--capacity", "cpu=64MiB", "--restart-limit", "0")
    with Daemon(tmp_path_factory.mktemp("events"), *arguments) as daemon:
        daemon.url = f"http://127.0.0.1:{port}"
        yield daemon


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_file({"w": numpy.ones((1024, 1024), numpy.float32)}, folder / "m.safetensors")
    return folder


@pytest.fixture
def listener(node: Daemon) -> Iterator[Listener]:
    with Listener(node.url) as found:
        found.until(lambda told: told, "the snapshot")
        yield found


def test_the_snapshot_is_what_the_other_routes_say(node: Daemon, listener: Listener, folder: Path) -> None:
    assert listener.names == ["snapshot"]
    about = listener.told["node"].popitem()[1]
    said = node.client.node()
    assert about["node"] == {name: said[name] for name in about["node"]}
    assert about["node"].keys() == said.keys() - {"devices", "mapped_elsewhere_bytes"}
    assert list(listener.told["devices"].values()) == said["devices"]
    assert listener.told["stages"].keys() == {stage["id"] for stage in node.client.stages()}
    assert listener.answer.headers["cache-control"] == "no-cache"


def test_a_stage_a_lease_and_a_refusal_come_and_go(node: Daemon, listener: Listener, folder: Path) -> None:
    record = node.stage(folder)
    stage = listener.until(
        lambda told: (found := told["stages"].get(record["id"])) and found["state"] == "ready" and found,
        "the stage is ready",
    )
    same = set(stage) & set(record) - {"at", "segments", "seconds"}
    assert {name: stage[name] for name in same} == {name: record[name] for name in same}
    assert stage["reserved"] == {"cpu": record["footprint_bytes"]}
    listener.until(lambda told: told["devices"]["cpu"]["used_bytes"] >= record["footprint_bytes"], "its bytes are used")
    with node.attach(stage=record["id"]):
        lease = listener.until(lambda told: list(told["leases"].values()), "the lease")[0]
        assert (lease["stage"], lease["pid"], lease["uid"]) == (record["id"], os.getpid(), os.geteuid())
        listener.until(lambda told: told["stages"][record["id"]]["leases"] == 1, "its count")
    listener.until(lambda told: not told["leases"], "the lease has gone")
    node.client.remove(record["id"])
    listener.until(lambda told: record["id"] not in told["stages"], "the stage has gone")


def test_errors_come_with_their_remedies(node: Daemon, listener: Listener, tmp_path: Path) -> None:
    failed = node.stage(tmp_path)
    stage = listener.until(lambda told: told["stages"].get(failed["id"]), "the failed stage")
    assert stage["error"]["code"] == "checkpoint_not_found"
    assert stage["error"]["remedy"] == failed["error"]["remedy"] != ""
    save_file({"w": numpy.zeros((65, 1024, 1024), numpy.uint8)}, tmp_path / "m.safetensors")
    for _ in range(3):
        refused = httpx.post(f"{node.url}/v1/stage", json={"model": str(tmp_path)}, timeout=60)
        assert refused.status_code == 507
    refusal = listener.until(lambda told: [found for found in told["refusals"].values() if found["count"] == 3], "it")[
        0
    ]
    assert (refusal["code"], refusal["message"]) == ("insufficient_capacity", refused.json()["detail"])
    assert "WEIGHTD_CAPACITY" in refusal["remedy"]


def test_every_error_has_a_remedy_of_its_own() -> None:
    kinds = DaemonError.__subclasses__()
    assert len(kinds) > 20
    for kind in kinds:
        assert kind.remedy, kind
        assert kind.remedy != DaemonError.remedy, kind


def test_changes_come_four_times_a_second_at_most(node: Daemon, listener: Listener, folder: Path) -> None:
    record = node.stage(folder)
    for number in range(100):
        node.client.change(record["id"], priority=number)
    told_last = listener.until(
        lambda told: (found := told["stages"].get(record["id"])) and found["priority"] == 99 and found,
        "the last change",
    )
    assert told_last["state"] == "ready"
    assert 1 < len(listener.at) < 100 / 5
    assert min(numpy.diff(listener.at), default=1) > 0.2


def test_every_connection_begins_with_a_snapshot_whatever_it_says_it_knows(node: Daemon) -> None:
    for last in ("0", "999999999", "-1", "nonsense\u00ff", "9" * 5000):
        with Listener(node.url, **{"Last-Event-ID": last.encode("latin-1")}) as listener:  # type: ignore[arg-type]
            listener.next()
            assert listener.names == ["snapshot"]


def test_without_following_it_ends_after_the_snapshot(node: Daemon) -> None:
    answer = httpx.get(f"{node.url}/v1/events?follow=false", timeout=20)
    assert answer.text.count("event: snapshot") == 1
    assert answer.text.count("event:") == 1


def descriptors(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.status['daemon_pid']}/fd"))


def memory(daemon: Daemon) -> int:
    status = Path(f"/proc/{daemon.status['daemon_pid']}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) << 10


def test_clients_that_never_read_cost_nothing_but_their_places(node: Daemon, folder: Path) -> None:
    record = node.stage(folder)
    before, used = descriptors(node), memory(node)
    port = int(node.url.rpartition(":")[2])
    sleepers = []
    for _ in range(64):
        sleeper = socket.socket()
        sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        sleeper.connect(("127.0.0.1", port))
        sleeper.sendall(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        sleepers.append(sleeper)
    try:
        refused = until(
            lambda: (found := httpx.get(f"{node.url}/v1/events?follow=false")).status_code == 429 and found,
            "all places are taken",
        )
        assert refused.json()["code"] == "too_many_watchers"
        assert refused.headers["retry-after"]
        for number in range(50):
            node.client.change(record["id"], priority=number)
        started = time.monotonic()
        with node.attach(stage=record["id"]):
            assert time.monotonic() - started < 2
        assert memory(node) - used < 40 << 20
    finally:
        for sleeper in sleepers:
            sleeper.close()
    until(lambda: httpx.get(f"{node.url}/v1/events?follow=false").is_success, "there is room again")
    until(lambda: descriptors(node) <= before + 2, "their connections are closed")


def test_a_restart_ends_the_stream_and_the_next_one_tells_of_what_was_adopted(node: Daemon, folder: Path) -> None:
    record = node.stage(folder)
    with Listener(node.url) as listener:
        listener.until(lambda told: told, "the snapshot")
        pid = next(iter(listener.told["node"].values()))["node"]["pid"]
        started = time.monotonic()
        os.kill(pid, signal.SIGTERM)  # to the daemon: makes room for the next one
        while listener.next() is not None:
            pass
        assert time.monotonic() - started < 1.5, "the daemon waited for who listens"
    with Listener(node.url) as listener:  # waits in the socket until somebody accepts
        listener.until(lambda told: told, "the snapshot")
        assert next(iter(listener.told["node"].values()))["node"]["pid"] != pid
        assert listener.told["stages"][record["id"]]["state"] == "ready"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "script"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example:7400"}, 403),
    ],
)
def test_pages_of_other_sites_get_neither_the_page_nor_the_events(
    node: Daemon, headers: dict[str, str], status: int
) -> None:
    for route in ("/", "/v1/events?follow=false", "/v1/node"):
        assert httpx.get(f"{node.url}{route}", headers=headers, timeout=20).status_code == status, route
    if "Origin" not in headers:
        own = {**headers, "Origin": node.url}
        assert httpx.get(f"{node.url}/", headers=own).status_code == status
    if status == 200 and headers.get("Sec-Fetch-Site") == "cross-site":
        answer = httpx.post(f"{node.url}/v1/stage", headers=headers, json={"model": "/nowhere"})
        assert answer.status_code == 403, "a form of another site may not ask for anything"


def test_the_route_is_in_the_api_document_with_every_field(node: Daemon) -> None:
    document = httpx.get(f"{node.url}/openapi.json").json()
    answer = document["paths"]["/v1/events"]["get"]["responses"]["200"]["content"]["text/event-stream"]
    schema = answer["itemSchema"]["properties"]["data"]["contentSchema"]["$ref"].rpartition("/")[2]
    assert document["components"]["schemas"][schema]["properties"].keys() >= KEYS.keys() | {"gone", "at", "more"}
    assert "429" in document["paths"]["/v1/events"]["get"]["responses"]
    assert "text/html" in document["paths"]["/"]["get"]["responses"]["200"]["content"]
