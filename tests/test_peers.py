"""Daemons that read from each other: real daemons, real NIXL, a real object store behind a proxy that counts."""

from __future__ import annotations

import contextlib
import http.server
import importlib.util
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import command, lacking
from tests.fault_proxy import FaultProxy
from tests.servers import Daemon, SeaweedFS, free_ports, until
from tests.test_adoption import ended
from tests.test_directories import Etcd

MiB = 1 << 20
Start = Callable[..., Daemon]


@pytest.fixture(autouse=True)
def _nixl() -> None:
    if importlib.util.find_spec("nixl_cu12") is None and importlib.util.find_spec("nixl_cu13") is None:
        lacking("NIXL: pip install nixl-cu12")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    rng = numpy.random.default_rng(8)
    save_file(
        {f"w{i}": rng.standard_normal((512, 2048 + i), numpy.float32) for i in range(6)}, folder / "a.safetensors"
    )
    save_file({"big": rng.standard_normal((4096, 1024), numpy.float32)}, folder / "b.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def origin(s3: SeaweedFS) -> Iterator[FaultProxy]:
    """The object store, behind a proxy that sees every request."""
    with FaultProxy(s3.url) as proxy:
        yield proxy


def weight_bytes(proxy: FaultProxy) -> int:
    """Bytes of weights that were asked of the origin: large ranges; headers are small."""
    return sum(request.nbytes for request in proxy.seen if request.nbytes > 300_000)


class Fleet:
    """Daemons that know each other by a static list."""

    def __init__(self, start: Start, proxy: FaultProxy, s3: SeaweedFS, count: int) -> None:
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
        self._start = start
        self._env = {**s3.env, "AWS_ENDPOINT_URL": proxy.url, "UCX_TLS": "tcp", "WEIGHTD_EXTENT": "1MiB"}
        self.daemons: list[Daemon] = []

    def start(self, **env: str) -> Daemon:
        """The next one."""
        address = self.addresses[len(self.daemons)]
        own = {"WEIGHTD_PEER_LISTEN": address, "WEIGHTD_PEERS": "static:" + ",".join(self.addresses)}
        self.daemons.append(self._start(env={**self._env, **own, "WEIGHTD_PEER_TOKEN": "fleet", **env}))
        return self.daemons[-1]


@pytest.fixture
def fleet(origin: FaultProxy, s3: SeaweedFS, start_daemon: Start) -> Callable[[int], Fleet]:
    return lambda count: Fleet(start_daemon, origin, s3, count)


def same(daemon: Daemon, stage: str, folder: Path) -> bool:
    truth: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        truth |= load_file(file)
    with daemon.attach(stage=stage) as weights:
        return set(weights) == set(truth) and all(
            numpy.frombuffer(weights.raw(name), numpy.uint8).tobytes() == truth[name].tobytes()  # type: ignore[arg-type]
            for name in truth
        )


def from_peers(daemon: Daemon) -> int:
    lines = daemon.get("/metrics").splitlines()
    return sum(int(float(line.split()[1])) for line in lines if line.startswith("weightd_peer_read_bytes_total"))


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
    until(lambda: not first.client.leases(), "the peer's lease has ended")
    first.client.remove(record["id"])
    until(lambda: not first.used_bytes, "its memory is free")


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
    stopped = until(lambda: movers_of(first), "peers read")
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
    (mover,) = until(lambda: movers_of(first), "peers read")
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
        for mover in until(lambda: movers_of(first), "peers read"):
            os.kill(mover, signal.SIGKILL)
        record = ended(second, stage)
        assert (record["state"], record["error"]) == ("ready", None)
        assert same(second, stage, folder)
        second.client.remove(stage)
    read = weight_bytes(origin)
    assert second.stage(uri)["state"] == "ready"
    assert weight_bytes(origin) == read


def movers_of(daemon: Daemon) -> list[int]:
    """Processes of a daemon that move bytes."""
    pid = daemon.status["daemon_pid"]
    found = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            found.update(int(child) for child in task.read_text().split() if is_mover(int(child)))
    return sorted(found)


def is_mover(pid: int) -> bool:
    """Whether it has become one: until then a new process is a copy of its parent, environment and all."""
    try:
        return b"weightd.daemon.peers.mover" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


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


# ---------------------------------------------------------------------- peers that lie


class Liar:
    """A peer that is asked for a stage and answers with whatever it was made to say."""

    def __init__(self, say: Callable[[dict[str, Any]], list[Any]], truth: Daemon, address: str) -> None:
        self._say = say
        self._truth = truth
        self._address = address
        self.asked = 0
        self._server = socketserver_at(self._answer)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"

    def _answer(self, path: str) -> Iterator[bytes]:
        """What the honest peer says, as this one would have it."""
        self.asked += 1
        headers = {"Authorization": "Bearer fleet"}
        with httpx.stream("GET", f"http://{self._address}{path}", headers=headers, timeout=30) as answer:
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    for said in self._say(json.loads(line[5:])):
                        text = said if isinstance(said, str) else json.dumps(said)
                        yield f"data: {text}\n\n".encode()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def socketserver_at(answer: Callable[[str], Iterator[bytes]]) -> http.server.ThreadingHTTPServer:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            try:
                for part in answer(self.path):
                    self.wfile.write(part)
            except OSError:
                pass  # whoever asked has heard enough

        def log_message(self, *_: object) -> None:
            """Not on stderr."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


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


OF_NOTHING = {"type": "leaves", "segment": 99, "entry": -1, "digests": "f" * 16}
LIES: dict[str, Callable[[dict[str, Any]], list[Any]]] = {
    "digests that are not of its bytes": other_digests,
    "an address beside the truth": shifted,
    "an address far away": far_away,
    "metadata of nothing": no_metadata,
    "more segments than there are": lambda said: [{**said, "segments": [*said.get("segments", []), {}]}],
    "leaves that there are not": lambda said: [said, {**OF_NOTHING, "first": 1 << 40}, {**OF_NOTHING, "first": None}],
    "digests that are none": lambda said: [{**said, "digests": "zz" * 8}] if said["type"] == "leaves" else [said],
    "no JSON": lambda said: ["{"],
    "no object": lambda said: [[1, 2], 7, None, "x"],
    "a number for everything": lambda said: [{"type": 1}, {"type": "leaves"}, {"type": "segments", "segments": 5}],
    "nothing": lambda said: [],
    "that it has all, then only that it lives": lambda said: [said] if said["type"] in ("segments", "alive") else [],
    "an address without end": lambda said: ['{"type": "segments", "ready": true, "segments": [{"address": Infinity}]}'],
    "a very long line": lambda said: ["x" * (2 << 20)],
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_no_lie_of_a_peer_gets_a_wrong_byte_into_a_stage(
    lie: str, start_daemon: Start, origin: FaultProxy, s3: SeaweedFS, folder: Path
) -> None:
    uri = s3.upload(folder, "peers-lies")
    (port,) = free_ports(1)
    env = {**s3.env, "AWS_ENDPOINT_URL": origin.url, "UCX_TLS": "tcp", "WEIGHTD_PEER_TOKEN": "fleet"}
    honest = start_daemon(env={**env, "WEIGHTD_PEER_LISTEN": f"127.0.0.1:{port}", "WEIGHTD_EXTENT": "1MiB"})
    truth = honest.stage(uri)
    liar = Liar(LIES[lie], honest, f"127.0.0.1:{port}")
    try:
        fooled = start_daemon(
            env={**env, "WEIGHTD_PEERS": f"static:{liar.address}", "WEIGHTD_EXTENT": "1MiB", "WEIGHTD_PEER_STALL": "2"}
        )
        record = fooled.stage(uri)
        assert liar.asked
        assert (record["state"], record["error"]) == ("ready", None)
        assert record["checkpoint_digest"] == truth["checkpoint_digest"]
        assert same(fooled, record["id"], folder)
        assert fooled.status["restarts"] == honest.status["restarts"] == 0
    finally:
        liar.close()


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
    assert daemon.client.peers() == {"directory": "ok", "off": None, "peers": []}
