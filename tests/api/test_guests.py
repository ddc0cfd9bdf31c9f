"""Over TCP without a token: whoever is on the machine may look, and stage what fits, and change nothing of others'."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
from safetensors.numpy import save_file

from tests.servers import Daemon, free_ports
from weightd.daemon.lending.token import own_token
from weightd.ipc import Client, RequestRefused

MiB = 1 << 20
Start = Callable[..., Daemon]


def checkpoint(folder: Path, nbytes: int) -> Path:
    folder.mkdir()
    save_file({"w": numpy.full(nbytes, 7, numpy.uint8)}, folder / "m.safetensors")
    return folder


@pytest.fixture
def daemon(start_daemon: Start) -> Daemon:
    """One with room for 8 MiB, and a TCP port."""
    (port,) = free_ports(1)
    daemon = start_daemon("--listen", f"127.0.0.1:{port}", "--capacity", "cpu=8MiB")
    daemon.url = f"http://127.0.0.1:{port}"  # type: ignore[attr-defined]
    return daemon


@pytest.fixture
def guest(daemon: Daemon) -> Any:
    with httpx.Client(base_url=daemon.url, timeout=60) as client:  # type: ignore[attr-defined]
        yield client


def refused(answer: httpx.Response, *words: str) -> None:
    assert answer.status_code == 403, answer.text
    found = answer.json()
    assert found["code"] == "read_only"
    for word in words:
        assert word in found["detail"], found["detail"]


def test_a_guest_takes_nothing_away_from_anybody_and_is_told_how_one_may(
    daemon: Daemon, guest: httpx.Client, tmp_path: Path
) -> None:
    stage = daemon.stage(checkpoint(tmp_path / "root", 5 * MiB))["id"]
    how = (f"curl --unix-socket {daemon.runtime_dir}/api.sock", f"$(cat {daemon.runtime_dir}/token)")
    with daemon.attach(stage=stage):
        refused(guest.delete(f"/v1/stage/{stage}", params={"force": True, "grace": 0}), "DELETE", *how)
        refused(guest.patch(f"/v1/stage/{stage}", json={"pin": True}), "PATCH", *how)
        refused(guest.post(f"/v1/stage/{stage}/move", json={"device": "cpu"}), *how)
        refused(guest.post("/v1/leases", json={"stage": stage}), *how)
        refused(guest.delete("/v1/unadopted"), *how)
        refused(guest.request("POST", "/v1/stage/", json={"model": "/x"}), *how)
        assert daemon.client.show(stage)["leases"] == 1
    found = guest.get(f"/v1/stage/{stage}").json()
    assert (found["state"], found["pin"]) == ("ready", False)
    for path in ("/v1/stage", "/v1/node", "/v1/leases", "/metrics", "/livez", "/"):
        assert guest.get(path).is_success, path
    assert daemon.client.remove(stage)["state"] == "evicted"


def test_a_guest_stages_what_fits_and_nothing_goes_for_it(daemon: Daemon, guest: httpx.Client, tmp_path: Path) -> None:
    kept = daemon.stage(checkpoint(tmp_path / "kept", 5 * MiB))["id"]
    small = guest.post("/v1/stage?wait=60", json={"model": str(checkpoint(tmp_path / "small", MiB))})
    assert (small.status_code, small.json()["state"]) == (202, "ready")
    large = checkpoint(tmp_path / "large", 6 * MiB)
    refused(guest.post("/v1/stage?wait=60", json={"model": str(large)}), kept, "would have to go", "Unix socket")
    assert {record["id"] for record in guest.get("/v1/stage").json()["stages"]} == {kept, small.json()["id"]}
    assert daemon.client.show(kept)["state"] == "ready"
    assert daemon.stage(large)["state"] == "ready", "who is admitted may have it"
    assert daemon.client.show(kept)["state"] == "evicted"


def test_a_guest_joins_a_stage_and_leaves_it_as_it_is(daemon: Daemon, guest: httpx.Client, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", MiB)
    before = daemon.stage(model, ttl_seconds=3600)
    again = guest.post("/v1/stage", json={"model": str(model), "priority": -5})
    assert (again.status_code, again.json()["id"]) == (200, before["id"])
    for at_others_expense in ({"pin": True}, {"priority": 1}):
        answer = guest.post("/v1/stage", json={"model": str(model), **at_others_expense})
        refused(answer, "at others' expense", "Unix socket")
    after = daemon.client.show(before["id"])
    assert [after[key] for key in ("pin", "priority", "ttl_seconds")] == [False, 0, 3600]


def test_the_daemons_own_token_opens_its_port_and_is_for_its_user_alone(
    daemon: Daemon, guest: httpx.Client, tmp_path: Path
) -> None:
    file = daemon.runtime_dir / "token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    token = file.read_text().strip()
    stage = daemon.stage(checkpoint(tmp_path / "model", MiB))["id"]
    wrong = guest.delete(f"/v1/stage/{stage}", headers={"Authorization": f"Bearer {token[:-1]}x"})
    refused(wrong)
    assert guest.get("/v1/node", headers={"Authorization": "Bearer of-another-daemon"}).is_success
    assert guest.delete(f"/v1/stage/{stage}", headers={"Authorization": f"Bearer {token}"}).is_success
    os.kill(daemon.pid, 9)
    assert daemon.client.node()
    assert file.read_text().strip() == token, "the next daemon has the same"


def test_the_client_shows_the_token_by_itself_where_it_may_read_it(daemon: Daemon, tmp_path: Path) -> None:
    url: str = daemon.url  # type: ignore[attr-defined]
    model = checkpoint(tmp_path / "model", MiB)
    with Client(url=url, runtime_directory=daemon.runtime_dir) as client:
        stage = client.stage(str(model), wait=60)["id"]
        assert client.change(stage, pin=True)["pin"] is True
        assert client.remove(stage)["state"] == "evicted"
    with Client(url=url, runtime_directory=tmp_path) as client:
        assert client.node()["pid"] == daemon.pid
        with pytest.raises(RequestRefused, match="curl --unix-socket") as error:
            client.remove(stage)
        assert error.value.code == "read_only"


def test_with_a_token_of_the_operators_there_is_none_of_the_daemons_own(start_daemon: Start, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    daemon = start_daemon("--listen", f"127.0.0.1:{port}", "--token", "s3cret")
    assert not (daemon.runtime_dir / "token").exists()
    url = f"http://127.0.0.1:{port}"
    assert httpx.get(f"{url}/v1/node").status_code == 401
    answer = httpx.delete(f"{url}/v1/stage/st-none", headers={"Authorization": "Bearer s3cret"})
    assert answer.json()["code"] == "unknown_stage"


@pytest.mark.parametrize("address", ["0.0.0.0:7400", "[::]:7400", "10.0.0.7:7400", "somewhere:7400"])
def test_a_port_beyond_loopback_without_a_token_is_refused_at_the_start(tmp_path: Path, address: str) -> None:
    command = [sys.executable, "-m", "weightd.daemon.cli", "serve", "--listen", address]
    env = {**os.environ, "WEIGHTD_RUNTIME_DIR": str(tmp_path / "run"), "TERM": "dumb", "COLUMNS": "300"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 2
    assert "WEIGHTD_TOKEN" in result.stderr
    assert "127.0.0.1:7400" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_token_that_others_could_know_or_have_put_there_is_replaced(tmp_path: Path) -> None:
    first = own_token(tmp_path)
    assert own_token(tmp_path) == first
    file = tmp_path / "token"
    file.chmod(0o640)
    second = own_token(tmp_path)
    assert second != first
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    os.rename(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    third = own_token(tmp_path)
    assert third != second
    assert not file.is_symlink()
    assert (tmp_path / "elsewhere").read_text().strip() == second
    os.link(file, tmp_path / "known")
    assert own_token(tmp_path) != third
    file.write_text("short\n")
    assert len(own_token(tmp_path)) == 64
    if os.getuid() == 0:
        before = own_token(tmp_path)
        os.chown(file, 65534, 65534)
        assert own_token(tmp_path) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "known", "token"]


EVICTING = """
import json, os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
with socket.socket() as connection:
    connection.connect(("127.0.0.1", int(sys.argv[1])))
    head = f"DELETE {sys.argv[2]} HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n"
    connection.sendall(head.encode("ascii"))
    answer = b""
    while part := connection.recv(65536):
        answer += part
print(json.loads(answer.partition(b"\\r\\n\\r\\n")[2])["code"])
"""


def test_another_user_of_the_machine_cannot_evict_what_root_leases(daemon: Daemon, tmp_path: Path) -> None:
    if os.getuid():
        pytest.skip("needs root, to become another user")
    stage = daemon.stage(checkpoint(tmp_path / "model", MiB))["id"]
    port, path = daemon.url.rpartition(":")[2], f"/v1/stage/{stage}?force=true&grace=0"  # type: ignore[attr-defined]
    with daemon.attach(stage=stage):
        command = [sys.executable, "-c", EVICTING, port, path]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        assert done.stdout.split() == ["read_only"]
        assert daemon.client.show(stage)["state"] == "ready"
