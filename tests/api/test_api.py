"""The HTTP API: what it answers, over the Unix socket and TCP."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
from safetensors.numpy import save_file

from tests.api.status.made import MadeNode
from tests.servers import Daemon, free_ports, until
from weightd.api import app
from weightd.api.models import SegmentManifest
from weightd.daemon.checkpoints.listing import Listing
from weightd.daemon.filling.ledger import Ledger
from weightd.daemon.keeper.deposits import Deposits
from weightd.daemon.lending.listeners import Listeners
from weightd.daemon.sources.base import SourceFile
from weightd.daemon.stages.manifests import SealedManifest
from weightd.ipc.manifest import Manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = numpy.random.default_rng(0)
    save_file({f"w{i}": rng.standard_normal((64, 1024), numpy.float32) for i in range(4)}, tmp_path / "m.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def http(daemon: Daemon) -> Iterator[httpx.Client]:
    transport = httpx.HTTPTransport(uds=str(daemon.runtime_dir / "api.sock"))
    with httpx.Client(transport=transport, base_url="http://weightd", timeout=120) as client:
        yield client


def assert_problem(answer: httpx.Response, status: int, code: str, *words: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert problem["status"] == status
    assert problem["code"] == code
    assert {"type", "title", "detail"} <= problem.keys()
    for word in words:
        assert word in problem["detail"]
    return problem


def test_staging_is_accepted_then_idempotent(http: httpx.Client, folder: Path) -> None:
    first = http.post("/v1/stage?wait=60", json={"model": str(folder)})
    assert first.status_code == 202
    assert first.headers["location"] == f"/v1/stage/{first.json()['id']}"
    assert first.json()["state"] == "ready"
    again = http.post("/v1/stage", json={"model": f"file://{folder}"})
    assert again.status_code == 200
    assert again.json()["id"] == first.json()["id"]
    assert http.get(first.headers["location"]).json() == again.json()
    assert first.json()["id"] in {record["id"] for record in http.get("/v1/stage").json()["stages"]}


def test_concurrent_identical_requests_share_one_stage(daemon: Daemon, folder: Path) -> None:
    with ThreadPoolExecutor(32) as pool:
        ids = {record["id"] for record in pool.map(lambda _: daemon.stage(folder), range(64))}
    assert len(ids) == 1


def test_requests_for_other_bytes_are_other_stages(daemon: Daemon, folder: Path) -> None:
    records = [
        daemon.stage(folder),
        daemon.stage(folder, tensors={"include": ["w[01]"]}),
        daemon.stage(folder, tensors={"exclude": ["w0"]}),
        daemon.stage(folder, parallel={"tp_size": 2, "tp_rank": 0, "map": {"*": 0}}),
        daemon.stage(folder, parallel={"tp_size": 2, "tp_rank": [0, 1], "map": {"*": 0}}),
    ]
    assert len({record["id"] for record in records}) == len(records)
    assert [sum(segment["tensors"] for segment in record["segments"]) for record in records] == [4, 2, 3, 4, 8]
    all_ranks = daemon.stage(folder, parallel={"tp_size": 2, "tp_rank": "all", "map": {"*": 0}})
    assert all_ranks["id"] == records[-1]["id"]


def test_a_large_manifest_is_put_together_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rendering one of many tensors takes long: the loop only passes on what a thread has rendered."""
    threads: list[str] = []
    render = app.manifest_json

    def rendering(*arguments: Any) -> bytes:
        threads.append(threading.current_thread().name)
        return render(*arguments) + b" "

    monkeypatch.setattr(app, "manifest_json", rendering)
    count = 3000
    names = [f"w{index}" for index in range(count)]
    with MadeNode(tmp_path) as made:
        manifest = Manifest(
            "st", "file:///x", "cpu", 0, 1, 256 * count, None, None, None, names, ["U8"] * count, [[256]] * count,
            [256 * index for index in range(count)], [f"xxh3:{index:032x}" for index in range(count)],
        )  # fmt: skip
        sealed = SealedManifest.seal(manifest, [index % 2 for index in range(count)])
        ledger = Ledger.new(0, count, bytes(16))
        ledger.leaves([count])[0][:] = memoryview(array("Q", range(count)))
        files = tuple(SourceFile(f"{index}.safetensors", 1, "v") for index in range(2))
        stage = made.add(
            "file:///x", manifests=[sealed], ledger=ledger, listing=Listing("file:///x", "id", files, None, ())
        )
        with httpx.Client(base_url=made.url, timeout=60) as client:
            answer = client.get(f"/v1/stage/{stage.id}/manifest?leaves=true")
            made.call(made.node.residency.release, stage)
            gone = client.get(f"/v1/stage/{stage.id}/manifest?leaves=true")
    assert answer.content.endswith(b"} "), "what the thread has rendered was rendered again"
    assert answer.headers["content-type"] == "application/json"
    assert len(threads) == 1
    assert "MainThread" not in threads[0]
    found = SegmentManifest.model_validate_json(answer.content)
    assert [(tensor.name, tensor.offset, tensor.file) for tensor in found.tensors] == [
        (name, 256 * index, f"{index % 2}.safetensors") for index, name in enumerate(names)
    ]
    assert [tensor.leaves for tensor in found.tensors] == [[f"{index:016x}"] for index in range(count)]
    assert found.tensors[-1].digest == f"xxh3:{count - 1:032x}"
    assert gone.status_code == 409


def test_the_manifest_says_what_lies_where(http: httpx.Client, folder: Path) -> None:
    record = http.post("/v1/stage?wait=60", json={"model": str(folder)}).json()
    manifest = http.get(f"/v1/stage/{record['id']}/manifest?leaves=true").json()
    assert [tensor["name"] for tensor in manifest["tensors"]] == ["w0", "w1", "w2", "w3"]
    assert all(tensor["offset"] % 256 == 0 and len(tensor["leaves"]) == 1 for tensor in manifest["tensors"])
    assert manifest["digest"] == record["checkpoint_digest"]
    split = {"model": str(folder), "parallel": {"tp_size": 2, "tp_rank": "all", "map": {"*": 1}}}
    split_id = http.post("/v1/stage?wait=60", json=split).json()["id"]
    assert_problem(http.get(f"/v1/stage/{split_id}/manifest"), 422, "invalid_request", "tp_rank")
    assert_problem(http.get(f"/v1/stage/{split_id}/manifest?tp_rank=2"), 422, "invalid_request", "tp_rank")
    second = http.get(f"/v1/stage/{split_id}/manifest?tp_rank=1").json()
    assert second["tp_rank"] == 1
    assert second["tensors"][0]["shape"] == [64, 512]


def test_events_tell_every_state_and_end_with_the_last(http: httpx.Client, folder: Path) -> None:
    record = http.post("/v1/stage", json={"model": str(folder)}).json()
    events, ids = [], []
    with http.stream("GET", f"/v1/stage/{record['id']}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data:"):
                events.append(json.loads(line.removeprefix("data:")))
            if line.startswith("id:"):
                ids.append(int(line.removeprefix("id:")))
    assert ids == sorted(ids)
    assert len(ids) == len(events)
    last = events[-1]
    assert last["state"] == "ready"
    assert last["bytes_done"] == last["bytes_total"] == 4 * 64 * 1024 * 4
    assert {"planning", "loading", "verifying"} <= last["state_seconds"].keys()
    assert {"source", "buffers", "copying", "verifying"} == last["phase_seconds"].keys()


def test_what_does_not_fit_is_refused_with_the_numbers_and_leaves_nothing(
    start_daemon: Callable[..., Daemon], folder: Path, tmp_path: Path
) -> None:
    daemon = start_daemon("--capacity", "cpu=1200KiB")
    kept = daemon.stage(folder, pin=True)
    (tmp_path / "other").mkdir()
    save_file({"x": numpy.zeros(1 << 18, numpy.uint8)}, tmp_path / "other" / "m.safetensors")
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(daemon.runtime_dir / "api.sock"))) as http:
        answer = http.post("http://weightd/v1/stage", json={"model": str(tmp_path / "other")})
        problem = assert_problem(answer, 507, "insufficient_capacity", "WEIGHTD_CAPACITY")
        assert problem["needed_bytes"] == 1 << 18
        assert problem["capacity_bytes"] == 1200 << 10
        assert problem["used_bytes"] == 1 << 20
        assert problem["missing_bytes"] == (1 << 20) + (1 << 18) - (1200 << 10)
        assert problem["resident"][0]["id"] == kept["id"]
    assert [record["id"] for record in daemon.client.stages()] == [kept["id"]]
    assert daemon.client.remove(kept["id"])["state"] == "evicted"
    assert daemon.stage(tmp_path / "other")["state"] == "ready"


def test_a_dropped_stage_gives_its_memory_back(daemon: Daemon, folder: Path) -> None:
    before = daemon.used_bytes
    fds = len(os.listdir(f"/proc/{daemon.pid}/fd"))
    for _ in range(5):
        record = daemon.stage(folder)
        assert daemon.used_bytes == before + record["footprint_bytes"]
        assert daemon.client.remove(record["id"])["state"] == "evicted"
    assert daemon.used_bytes == before
    until(lambda: len(os.listdir(f"/proc/{daemon.pid}/fd")) <= fds + 2, "no descriptor is left over")


def test_a_failed_stage_is_tried_anew_when_asked_again(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    first = daemon.stage(tmp_path / "m")
    assert first["state"] == "failed"
    assert first["error"]["code"] == "checkpoint_not_found"
    save_file({"w": numpy.zeros(10)}, tmp_path / "m" / "m.safetensors")
    second = daemon.stage(tmp_path / "m")
    assert second["state"] == "ready"
    assert second["id"] != first["id"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, ["model"]),
        ({"model": ""}, ["model"]),
        ({"model": "relative/path"}, ["neither an absolute path"]),
        ({"model": "ftp://x/y"}, ["known scheme"]),
        ({"model": "s3://"}, ["s3://name"]),
        ({"model": "s3://b/../c"}, ["'..'"]),
        ({"model": "/x\u0000y"}, ["control"]),
        ({"model": "/x", "devise": "cpu"}, ["devise"]),
        ({"model": "/x", "device": "cuda:9"}, ["cuda:9", "cpu"]),
        ({"model": "/x", "layout": "nice"}, ["layout"]),
        ({"model": "/x", "priority": 10**9}, ["priority"]),
        ({"model": "/x", "parallel": {"tp_size": 2}}, ["map"]),
        ({"model": "/x", "parallel": {"tp_size": 2, "tp_rank": 2, "map": {"*": 0}}}, ["tp_rank 2"]),
        ({"model": "/x", "parallel": {"tp_size": 2, "tp_rank": [], "map": {"*": 0}}}, ["empty"]),
        ({"model": "/x", "parallel": {"tp_size": 0}}, ["tp_size"]),
        ({"model": "/x", "expect_digest": "abc"}, ["SHA-256"]),
        ({"model": "/x", "ttl_seconds": -1}, ["ttl_seconds"]),
        ([], ["body"]),
    ],
)
def test_bad_requests_are_refused_with_the_field(http: httpx.Client, body: Any, words: list[str]) -> None:
    assert_problem(http.post("/v1/stage", json=body), 422, "invalid_request", *words)


def test_slices_that_cannot_be_are_refused_when_the_checkpoint_is_known(http: httpx.Client, folder: Path) -> None:
    def ask(**request: Any) -> httpx.Response:
        return http.post("/v1/stage", json={"model": str(folder), **request})

    assert_problem(
        ask(parallel={"tp_size": 3, "tp_rank": 0, "map": {"*": 0}}), 422, "invalid_request", "'w0'", "64", "tp_size 3"
    )
    assert_problem(ask(parallel={"tp_size": 2, "map": {"w0": 0}}), 422, "invalid_request", "'w1'", "replicate")
    assert_problem(ask(parallel={"tp_size": 2, "map": {"*": 2}}), 422, "invalid_request", "no dimension 2")
    assert_problem(ask(tensors={"include": ["nope"]}), 422, "invalid_request", "none of 4 tensors")


def test_malformed_and_oversized_bodies_are_problems(http: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    assert_problem(http.post("/v1/stage", content=b"{", headers=headers), 422, "invalid_request")
    assert_problem(http.post("/v1/stage", content=b"[" * 100_000, headers=headers), 400, "malformed")
    assert_problem(http.post("/v1/stage", content=b"\xff", headers=headers), 400, "malformed")
    huge = b'{"model": "' + b"x" * (17 << 20) + b'"}'
    assert_problem(http.post("/v1/stage", content=huge, headers=headers), 413, "body_too_large")


def test_unknown_things_are_problems(http: httpx.Client) -> None:
    for route in ("/v1/stage/st-nope", "/v1/stage/st-nope/manifest", "/v1/stage/st-nope/events"):
        assert_problem(http.get(route), 404, "unknown_stage", "st-nope")
    assert_problem(http.delete("/v1/stage/st-nope"), 404, "unknown_stage")
    assert_problem(http.get("/v2"), 404, "not_found")
    assert_problem(http.put("/v1/stage"), 405, "method_not_allowed")


def test_the_node_describes_itself_and_probes_answer(http: httpx.Client, daemon: Daemon) -> None:
    node = http.get("/v1/node").json()
    assert node["pid"] == daemon.status["daemon_pid"]
    assert node["default_device"] == node["devices"][0]["name"] == "cpu"
    assert node["devices"][0]["capacity_bytes"] == 6 << 30
    assert node["versions"]["weightd"]
    for probe in ("/livez", "/readyz", "/healthz"):
        assert http.get(probe).json() == {"status": "ok"}
    for schema in http.get("/openapi.json").json()["components"]["schemas"].values():
        for name, field in schema.get("properties", {}).items():
            assert "description" in field, f"{schema['title']}.{name}"


def test_sockets_are_for_owner_and_group_only(daemon: Daemon) -> None:
    for name in ("api.sock", "lease.sock"):
        assert stat.S_IMODE((daemon.runtime_dir / name).stat().st_mode) == 0o660


@pytest.fixture
def tcp(start_daemon: Callable[..., Daemon]) -> tuple[Daemon, str]:
    (port,) = free_ports(1)
    daemon = start_daemon("--listen", f"127.0.0.1:{port}", "--token", "s3cret")
    return daemon, f"http://127.0.0.1:{port}"


def test_tcp_serves_the_same_routes_to_who_has_the_token(tcp: tuple[Daemon, str]) -> None:
    daemon, url = tcp
    assert_problem(httpx.get(f"{url}/v1/node"), 401, "unauthorized", "WEIGHTD_TOKEN")
    assert_problem(httpx.get(f"{url}/v1/node", headers={"Authorization": "Bearer nope"}), 401, "unauthorized")
    assert httpx.get(f"{url}/livez").is_success
    node = httpx.get(f"{url}/v1/node", headers={"Authorization": "Bearer s3cret"}).json()
    assert node["pid"] == daemon.client.node()["pid"]


def test_what_is_sent_over_tcp_does_not_wait_for_more(tmp_path: Path) -> None:
    listener = Listeners(tmp_path, Deposits(), {}).tcp("127.0.0.1:0")
    with listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        connection.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_a_web_page_that_rebinds_its_name_to_loopback_is_refused(
    host: str, start_daemon: Callable[..., Daemon]
) -> None:
    (port,) = free_ports(1)
    start_daemon("--listen", f"{host}:{port}")
    url = f"http://{host}:{port}/v1/node"
    assert httpx.get(url).is_success
    assert_problem(httpx.get(url, headers={"Host": "evil.example:7400"}), 403, "host_not_allowed", "evil.example")


def test_what_may_be_staged_is_limited_and_the_refusal_names_the_setting(
    start_daemon: Callable[..., Daemon], folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    allowed = tmp_path_factory.mktemp("allowed")
    save_file({"x": numpy.zeros(4)}, allowed / "m.safetensors")
    sibling = Path(f"{allowed}-secret")
    sibling.mkdir()
    save_file({"x": numpy.zeros(4)}, sibling / "m.safetensors")
    (allowed / "link").symlink_to(folder)
    (allowed / "mixed").mkdir()
    (allowed / "mixed" / "m.safetensors").symlink_to(folder / "m.safetensors")
    (allowed / "inside").symlink_to(allowed)
    daemon = start_daemon("--allow", str(allowed), "--allow", "s3://models/public")
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(daemon.runtime_dir / "api.sock")), timeout=60) as http:

        def ask(model: object) -> httpx.Response:
            return http.post("http://weightd/v1/stage?wait=60", json={"model": str(model)})

        for fine in (allowed, f"file://{allowed}/m.safetensors", allowed / "inside"):
            assert ask(fine).json()["state"] == "ready"
        for bad in (folder, sibling, allowed / "link", f"{allowed}/../{folder.name}", "s3://models/publicity",
                    "s3://other/public", "gs://models/public", "hf://org/name"):  # fmt: skip
            assert_problem(ask(bad), 403, "not_allowed", "WEIGHTD_ALLOW")
        mixed = ask(allowed / "mixed")
        assert mixed.status_code == 403 or mixed.json()["error"]["code"] == "not_allowed"


def test_metrics_follow_the_conventions_and_count(daemon: Daemon, http: httpx.Client, folder: Path) -> None:
    import subprocess

    from tests.conftest import command

    record = daemon.stage(folder)
    daemon.attach(folder).close()
    daemon.stage("/nowhere")
    text = http.get("/metrics").text
    values = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if not line.startswith("#")
    }
    assert values['weightd_source_read_bytes_total{source="file"}'] >= record["bytes_total"]
    assert values['weightd_stages{state="ready"}'] >= 1
    assert values[f'weightd_resident_bytes{{device="cpu",model="file://{folder}"}}'] == record["footprint_bytes"]
    assert values["weightd_attach_duration_seconds_count"] >= 1
    assert values['weightd_errors_total{code="checkpoint_not_found"}'] >= 1
    assert values['weightd_api_request_duration_seconds_count{method="POST",route="/v1/stage",status="202"}'] >= 1
    for phase in ("source", "buffers", "copying", "verifying"):
        assert f'weightd_stage_phase_seconds_total{{phase="{phase}",source="file"}}' in values
    promtool = command("promtool", "apt-get install prometheus")
    result = subprocess.run([promtool, "check", "metrics"], input=text, text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not result.stdout + result.stderr
