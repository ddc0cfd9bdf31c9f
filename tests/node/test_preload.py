"""What the daemon stages by itself, when it is ready, and the ports that say so."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.checkpoint_files import write_checkpoint
from tests.fault_proxy import FaultProxy
from tests.servers import Daemon, SeaweedFS, free_ports, s3_env, until
from weightd.daemon.errors import InvalidRequest
from weightd.daemon.node.preload import read

DEADLINE = 120.0


def checkpoint(folder: Path, rows: int = 256) -> Path:
    write_checkpoint(folder, {"model.safetensors": {"w": ("F32", (rows, 256), b"\1" * (rows * 256 * 4))}})
    return folder


def readyz(daemon: Daemon) -> tuple[int, dict[str, Any]]:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(daemon.runtime_dir / "api.sock"))) as client:
        answer = client.get("http://weightd/readyz", timeout=30)
        return answer.status_code, answer.json()


def weightd(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "WEIGHTD_RUNTIME_DIR": str(daemon.runtime_dir)}
    command = [sys.executable, "-m", "weightd.daemon.cli", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_a_daemon_is_ready_once_all_that_it_preloads_is_and_stays_so(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    there, later = checkpoint(tmp_path / "there"), tmp_path / "later"
    health, metrics = (f"127.0.0.1:{port}" for port in free_ports(2))
    daemon = start_daemon(
        "--preload", json.dumps([{"model": str(there), "pin": True}, {"model": str(later)}]),
        "--health-listen", health, "--metrics-listen", metrics,
    )  # fmt: skip
    until(lambda: [p["was_ready"] for p in daemon.client.node()["preload"]] == [True, False], "one is there", DEADLINE)
    status, answer = readyz(daemon)
    assert (status, answer["code"]) == (503, "not_ready")
    assert str(later) in answer["detail"], answer
    assert str(there) not in answer["detail"], answer
    probe = httpx.get(f"http://{health}/readyz")
    assert probe.status_code == 503
    assert str(later) not in probe.text, "an open port names what is staged"
    assert httpx.get(f"http://{health}/livez").status_code == 200
    quick, ready = weightd(daemon, "doctor", "--quick"), weightd(daemon, "doctor", "--ready")
    assert (quick.returncode, ready.returncode) == (0, 1), quick.stdout + ready.stdout
    assert str(later) in ready.stdout

    checkpoint(later)
    until(lambda: readyz(daemon)[0] == 200, "what failed was tried again", DEADLINE)
    assert httpx.get(f"http://{health}/readyz").status_code == 200
    assert weightd(daemon, "doctor", "--ready").returncode == 0
    wanted = daemon.client.node()["preload"][1]
    assert wanted["attempts"] >= 2
    assert wanted["error"] == ""
    assert [stage["pin"] for stage in daemon.client.stages() if stage["state"] == "ready"] == [True, False]

    daemon.client.remove(wanted["stage"])
    assert readyz(daemon)[0] == 200, "what becomes of a stage later takes no engine down"

    pid = daemon.pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: httpx.get(f"http://{health}/readyz", timeout=60).status_code == 200, "the next daemon", DEADLINE)
    assert daemon.pid != pid


def test_the_ports_for_probes_and_scrapes_serve_nothing_else(start_daemon: Callable[..., Daemon]) -> None:
    health, metrics = (f"127.0.0.1:{port}" for port in free_ports(2))
    daemon = start_daemon("--health-listen", health, "--metrics-listen", metrics)
    routes = list(json.loads(daemon.get("/openapi.json"))["paths"])
    assert {"/livez", "/readyz", "/healthz", "/metrics", "/v1/stage"} <= set(routes)
    with httpx.Client(timeout=30) as client:
        for path in [*routes, "/", "/docs", "/openapi.json", "/v1/events", "/peer/v1/stages"]:
            for method in ("GET", "POST", "DELETE"):
                found = client.request(method, f"http://{health}{path}").status_code
                assert (found == 200) == (method == "GET" and path in ("/livez", "/readyz", "/healthz")), (method, path)
                found = client.request(method, f"http://{metrics}{path}").status_code
                assert (found == 200) == (method == "GET" and path == "/metrics"), (method, path)
    assert httpx.post(f"http://{health}/livez", content=b"x" * 100_000).status_code in (405, 413)
    assert "weightd_capacity_bytes" in httpx.get(f"http://{metrics}/metrics").text


def test_a_port_for_probes_that_is_flooded_with_connections_lets_the_api_work(
    start_daemon: Callable[..., Daemon],
) -> None:
    (port,) = free_ports(1)
    daemon = start_daemon("--health-listen", f"127.0.0.1:{port}")
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(300)]
    try:
        assert daemon.client.node()["pid"]
    finally:
        for connection in idle:
            connection.close()
    until(lambda: httpx.get(f"http://127.0.0.1:{port}/livez").status_code == 200, "it answers again", DEADLINE)


def test_one_that_cannot_be_had_does_not_keep_others_waiting(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    there = checkpoint(tmp_path / "there")
    listed = tmp_path / "preload.json"
    listed.write_text(json.dumps([{"model": "s3://bucket/x", "device": "cuda:99"}, {"model": str(there)}]))
    daemon = start_daemon("--preload", str(listed))
    until(lambda: daemon.client.node()["preload"][1]["was_ready"], "the other one", DEADLINE)
    first = until(lambda: [p for p in daemon.client.node()["preload"] if p["state"] == "failed"], "it failed")[0]
    assert "cuda:99" in first["error"]
    assert "not tried again" in first["error"]
    assert readyz(daemon)[0] == 503

    # A list that cannot be read any more does not keep the next daemon from adopting.
    listed.write_text("nonsense")
    os.kill(daemon.pid, signal.SIGKILL)
    until(lambda: readyz(daemon)[0] == 503 and "not JSON" in readyz(daemon)[1]["detail"], "it says so", DEADLINE)
    assert [stage["state"] for stage in daemon.client.stages() if stage["model"].endswith("there")] == ["ready"]


def test_one_that_somebody_cancels_is_not_begun_again(
    start_daemon: Callable[..., Daemon], s3: SeaweedFS, tmp_path: Path
) -> None:
    uri = s3.upload(checkpoint(tmp_path / "m", 4096), "preload-cancelled")
    with FaultProxy(s3.url) as origin:
        origin.fault = lambda request: "stall" if request.nbytes > 1 << 20 else None
        daemon = start_daemon("--preload", json.dumps([{"model": uri}]), env=s3_env(origin.url))
        until(lambda: origin.done, "its bytes are waited for", DEADLINE)
        (stage,) = daemon.client.stages()
        daemon.client.remove(stage["id"])
        until(lambda: daemon.client.node()["preload"][0]["state"] == "cancelled", "it is cancelled", DEADLINE)
        status, answer = readyz(daemon)
        assert status == 503
        assert "cancelled" in answer["detail"]
        assert daemon.client.node()["preload"][0]["attempts"] == 1


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[", "not JSON"),
        ("[1]", "0: "),
        ('[{"model": "s3://b/p", "modle": 1}]', "0.modle"),
        ('[{"model": "s3://b/p"}, {"priority": 4}]', "1.model"),
        ('[{"model": "s3://b/p", "ttl_seconds": -1}]', "0.ttl_seconds"),
        ("[" * 100_000, "preload: n"),
        ("/does/not/exist.json", "neither a JSON array"),
        ("/", "neither a JSON array"),
        ('{"model": "s3://b/p"}', "neither a JSON array"),
        ("\0", "neither a JSON array"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused_by_name(text: str, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match="preload") as found:
        read(text)
    assert complaint in str(found.value)


def test_an_empty_setting_preloads_nothing() -> None:
    assert read("") == read("  ") == read("[]") == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--preload", '[{"model": 1}]'],
        ["--health-listen", "7402"],
        ["--health-listen", "127.0.0.1:7402", "--metrics-listen", "127.0.0.1:7402"],
        ["--log-format", "xml"],
    ],
)
def test_serve_refuses_settings_that_make_no_sense(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "weightd.daemon.cli", "serve", "--no-listen", *arguments]
    env = {**os.environ, "WEIGHTD_RUNTIME_DIR": str(tmp_path / "run")}
    found = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert found.returncode == 2, found.stderr
    assert "setting" in found.stderr
    assert not (tmp_path / "run").exists()
