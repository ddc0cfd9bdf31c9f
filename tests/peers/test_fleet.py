"""Daemons on machines of their own, with links between them that have a rate and can be cut: network namespaces."""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
from safetensors.numpy import save_file

from tests.checkpoint_files import write_index
from tests.conftest import command, lacking
from tests.network import PEER_PORT as PORT
from tests.network import Network, Node, at_once, daemons_on
from tests.peers.finding.etcd import Etcd
from tests.peers.fleet import from_peers, same
from tests.servers import Daemon, Missing, SeaweedFS, until

MB = 1_000_000
RATE = 30 * MB
"""Bytes a second that a link carries: little enough for two cores to keep up with nine of them."""
SLOW = 6 * MB
"""Of a peer's link until the test has done to it what it is about: that is not over meanwhile."""
DEADLINE = 90.0


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if importlib.util.find_spec("nixl_cu12") is None and importlib.util.find_spec("nixl_cu13") is None:
        lacking("NIXL: pip install nixl-cu12")
    try:
        with Network(1, RATE) as found:
            yield found
    except Missing as error:
        lacking(str(error))


class Origin:
    """The object store, on the network's first node."""

    def __init__(self, server: SeaweedFS, node: Node, folder: Path) -> None:
        self.server = server
        self.node = node
        self.folder = folder
        """A checkpoint, as it was uploaded."""
        self.uri = server.upload(folder, "model")
        self.nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def origin(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Origin]:
    folder = tmp_path_factory.mktemp("model")
    rng = numpy.random.default_rng(9)
    tensors = {f"w{i}": rng.standard_normal((512, 2048 + i), numpy.float32) for i in range(6)}
    save_file(tensors, folder / "a.safetensors")
    save_file({"big": rng.standard_normal((2048, 1024), numpy.float32)}, folder / "b.safetensors")
    write_index(folder)
    (folder / "config.json").write_text("{}")
    try:
        server = SeaweedFS(tmp_path_factory.mktemp("seaweedfs"), network.nodes[0])
    except Missing as error:
        lacking(str(error))
    with server:
        yield Origin(server, network.nodes[0], folder)


class Fleet:
    """Daemons, each on a node of its own, that know each other by a static list or by what ``peers`` says."""

    def __init__(self, network: Network, origin: Origin, folder: Path) -> None:
        self.daemons: list[Daemon] = []
        self.nodes: list[Node] = []
        self._network = network
        self._origin = origin
        self._folder = folder

    def start(self, count: int, peers: str = "", **env: str) -> list[Daemon]:
        """Start so many at once."""
        nodes = [self._network.add() for _ in range(count)]
        common = {**self._origin.server.env, "WEIGHTD_EXTENT": "1MiB", **env}
        started = daemons_on(nodes, self._folder, peers=peers, env=common)
        self.nodes += nodes
        self.daemons += started
        at_once(Daemon.start, started)
        return started

    def stop(self) -> None:
        at_once(Daemon.stop, self.daemons)


@pytest.fixture
def fleet(network: Network, origin: Origin, tmp_path: Path) -> Iterator[Fleet]:
    found = Fleet(network, origin, tmp_path)
    yield found
    found.stop()
    origin.node.mend()


def ended(daemon: Daemon, stage: str) -> dict[str, Any]:
    """The stage's record, once it is over."""
    until(lambda: daemon.client.show(stage)["state"] in ("ready", "failed"), "it has ended", DEADLINE)
    return daemon.client.show(stage)


def is_right(daemon: Daemon, record: dict[str, Any], origin: Origin) -> bool:
    assert record["error"] is None, record["error"]
    assert record["state"] == "ready"
    return same(daemon, record["id"], origin.folder)


def dropped(daemon: Daemon) -> bool:
    """Whether it has given up a peer."""
    return any(line.startswith("weightd_peers_dropped_total{") for line in daemon.get("/metrics").splitlines())


@pytest.mark.parametrize("count", [2, 8])
def test_daemons_that_start_together_all_get_every_byte(count: int, fleet: Fleet, origin: Origin) -> None:
    daemons = fleet.start(count)
    before = origin.node.sent
    stages = [daemon.client.stage(origin.uri)["id"] for daemon in daemons]
    records = [ended(*one) for one in zip(daemons, stages, strict=True)]
    assert all(is_right(daemon, record, origin) for daemon, record in zip(daemons, records, strict=True))
    assert len({record["checkpoint_digest"] for record in records}) == 1
    assert origin.node.sent - before < 1.5 * origin.nbytes, (origin.node.sent - before) / origin.nbytes


@pytest.fixture
def reading(fleet: Fleet, origin: Origin) -> Callable[..., tuple[Daemon, Daemon, str]]:
    """Two daemons, of which the second has begun to read from the first, which has all of it, over a slow link."""

    def start(**env: str) -> tuple[Daemon, Daemon, str]:
        first, second = fleet.start(2, **env)
        assert first.stage(origin.uri)["state"] == "ready"
        fleet.nodes[0].limit(SLOW)
        stage = second.client.stage(origin.uri)["id"]
        until(lambda: from_peers(second), "it has begun", DEADLINE)
        assert second.client.show(stage)["state"] == "loading"
        return first, second, stage

    return start


Reading = Callable[..., tuple[Daemon, Daemon, str]]


def test_a_peer_whose_link_is_cut_is_replaced_by_the_origin(reading: Reading, fleet: Fleet, origin: Origin) -> None:
    first, second, stage = reading(WEIGHTD_PEER_STALL="3")
    before = origin.node.sent
    fleet.nodes[0].cut()
    assert is_right(second, ended(second, stage), origin)
    assert origin.node.sent - before > origin.nbytes / 4
    assert first.status["restarts"] == second.status["restarts"] == 0


def test_a_cut_that_is_mended_soon_costs_only_time(reading: Reading, fleet: Fleet, origin: Origin) -> None:
    _, second, stage = reading(WEIGHTD_PEER_STALL="60")
    before, timeouts = origin.node.sent, fleet.nodes[0].timeouts
    fleet.nodes[0].cut()
    until(lambda: fleet.nodes[0].timeouts > timeouts, "packets are missed", DEADLINE)
    fleet.nodes[0].limit(RATE)
    fleet.nodes[0].mend()
    assert is_right(second, ended(second, stage), origin)
    assert origin.node.sent - before < origin.nbytes / 4


def test_a_peer_that_was_cut_off_is_read_again_once_it_is_back(reading: Reading, fleet: Fleet, origin: Origin) -> None:
    first, second, stage = reading(WEIGHTD_PEER_STALL="3")
    fleet.nodes[0].cut()
    until(lambda: dropped(second), "it is given up", DEADLINE)
    fleet.nodes[0].limit(RATE)
    fleet.nodes[0].mend()
    assert is_right(second, ended(second, stage), origin)
    second.client.remove(stage)
    record = second.stage(origin.uri)
    assert is_right(second, record, origin)
    assert record["bytes_by_source"]["peer"] == record["bytes_total"]
    assert first.status["restarts"] == second.status["restarts"] == 0


def test_an_origin_that_is_cut_off_is_not_needed_for_what_a_peer_has(
    reading: Reading, fleet: Fleet, origin: Origin
) -> None:
    _, second, stage = reading(WEIGHTD_RETRY_DEADLINE="5")
    origin.node.cut()
    fleet.nodes[0].limit(RATE)
    record = ended(second, stage)
    assert is_right(second, record, origin)
    assert record["bytes_by_source"]["peer"] == record["bytes_total"]


def test_a_directory_that_is_killed_under_load_fails_no_stage_and_comes_back(
    network: Network, fleet: Fleet, origin: Origin, tmp_path: Path
) -> None:
    command("etcd", "apt-get install etcd-server")
    uris = [origin.uri, origin.server.upload(origin.folder, "etcd")]
    with Etcd(tmp_path / "etcd", place=network.add()) as etcd:
        daemons = fleet.start(4, f"etcd:{etcd.url}")
        stages = [(daemon, daemon.client.stage(uri)["id"]) for daemon in daemons for uri in uris]
        until(lambda: any(d.client.show(stage)["bytes_done"] for d, stage in stages), "bytes come", DEADLINE)
        etcd.kill()
        etcd.start()
        records = [ended(*stage) for stage in stages]
        assert all(is_right(daemon, record, origin) for (daemon, _), record in zip(stages, records, strict=True))
        wanted = [{record["key"]: 1.0 for record in records}] * (len(daemons) - 1)
        for daemon in daemons:
            until(
                lambda: [peer["stages"] for peer in daemon.client.peers()["peers"]] == wanted,  # noqa: B023
                "it knows all the others, and what they have",
                DEADLINE,
            )


# ---------------------------------------------------------------------- peers of another version


class Stranger:
    """What answers at a peer's port; ``answer(path)`` gives the status, and the body in parts."""

    def __init__(self, node: Node, port: int, answer: Callable[[str], tuple[int, Iterator[bytes]]]) -> None:
        self.address = f"{node.host}:{port}"
        self.asked = 0
        stranger = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stranger.asked += 1
                status, body = answer(self.path)
                self.send_response(status)
                self.send_header("Content-Type", "text/event-stream" if status == 200 else "application/problem+json")
                self.end_headers()
                try:
                    for part in body:
                        self.wfile.write(part)
                except OSError:
                    pass  # whoever asked has heard enough

            def log_message(self, *_: object) -> None:
                """Not on stderr."""

        with node.entered():  # its threads are of the node as well
            self._server = http.server.ThreadingHTTPServer((node.host, port), Handler)
            self._server.daemon_threads = True
            threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def event(**said: Any) -> bytes:
    return f"data: {json.dumps(said)}\n\n".encode()


OF_THE_FUTURE = [
    event(type="greeting", version=9, formats=["segments-v9"]),
    b': a comment\nevent: layout\nid: 7\ndata: {"type": "layout"}\n\n',
    event(kind="no type at all"),
    event(type=["a", "list"], version={}),
]
ANSWERS: dict[str, tuple[int, list[bytes]]] = {
    "426": (426, [b'{"type": "about:blank", "title": "upgrade", "status": 426}']),
    "404": (404, [b"<html>nothing here</html>"]),
    "501": (501, [b""]),
    "another format": (200, [b"\x00\xffWEIGHTS\x09" + os.urandom(4096)]),
    "JSON in one piece": (200, [b'{"version": 9, "segments": []}']),
    "events of the future": (200, OF_THE_FUTURE),
    "known events in another form": (
        200,
        [*OF_THE_FUTURE[:2], event(type="segments", ready=True, segments=[{"handle": "x", "rkey": 1}])],
    ),
}


def test_peers_that_answer_like_another_version_cost_nothing_but_the_origins_bytes(
    network: Network, fleet: Fleet, origin: Origin
) -> None:
    node = network.add()
    strangers = {
        name: Stranger(node, PORT + number, lambda _, status=status, body=body: (status, iter(body)))  # type: ignore[misc]
        for number, (name, (status, body)) in enumerate(ANSWERS.items())
    }
    try:
        addresses = ",".join(stranger.address for stranger in strangers.values())
        (daemon,) = fleet.start(1, f"static:{addresses}", WEIGHTD_PEER_STALL="2")
        assert is_right(daemon, daemon.stage(origin.uri), origin)
        assert [name for name, stranger in strangers.items() if not stranger.asked] == []
        assert from_peers(daemon) == 0
        assert daemon.status["restarts"] == 0
    finally:
        for stranger in strangers.values():
            stranger.close()


def test_what_a_newer_peer_says_besides_is_passed_over(fleet: Fleet, origin: Origin) -> None:
    (first,) = fleet.start(1)
    record = first.stage(origin.uri)
    node = fleet.nodes[0]

    def newer(path: str) -> tuple[int, Iterator[bytes]]:
        """What the real one says, with words between that nobody knows yet."""

        def body() -> Iterator[bytes]:
            headers = {"Authorization": "Bearer fleet"}
            with httpx.stream("GET", f"http://{node.host}:{PORT}{path}", headers=headers, timeout=30) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data:"):
                        yield from OF_THE_FUTURE[:2]
                        yield event(**json.loads(line[5:]), version=9, transports=["rdma", {"of": "the future"}])

        return 200, body()

    stranger = Stranger(node, PORT + 1, newer)
    try:
        (second,) = fleet.start(1, f"static:{stranger.address}")
        again = second.stage(origin.uri)
        assert is_right(second, again, origin)
        assert again["bytes_by_source"]["peer"] == record["bytes_total"]
    finally:
        stranger.close()
