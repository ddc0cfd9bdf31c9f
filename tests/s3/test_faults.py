"""What goes wrong at the S3 endpoint: who hangs up, takes nothing or talks nonsense, and what goes meanwhile."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
from safetensors.numpy import save_file

from tests.conftest import command
from tests.fakecuda import FakeCuda
from tests.fault_proxy import FaultProxy, Request
from tests.node.adopting import Gate, serving
from tests.s3.conftest import SHARDS, Endpoint, MiB, Start, client
from tests.servers import SeaweedFS, until
from weightd.daemon.lending.entrance import KEPT, reserve


@contextlib.contextmanager
def asking(here: Endpoint, path: str, *headers: str, buffer: int = 4096) -> Iterator[socket.socket]:
    """A connection on which something was asked for, whose answer nobody reads."""
    host, port = here.address.split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.connect((host, int(port)))
        lines = [f"GET {path} HTTP/1.1", f"Host: {here.address}", *headers, "", ""]
        connection.sendall("\r\n".join(lines).encode())
        yield connection


def test_who_hangs_up_holds_no_lease_whether_bytes_were_coming_or_waited_for(
    start_daemon: Start, s3: SeaweedFS, model: Path
) -> None:
    s3.upload(model, "s3-hang-up")
    gate = Gate(0)
    with FaultProxy(s3.url, gate) as slow:
        here = Endpoint(start_daemon, slow.url, s3.env)
        leases = here.daemon.client.leases
        with asking(here, f"/models/s3-hang-up/{SHARDS[1]}"):
            until(leases, "it waits under a lease", 60)
        until(lambda: not leases(), "the lease of who waited is gone", 30)
        gate.opened.set()
        (stage,) = here.daemon.client.stages()
        until(lambda: here.daemon.client.show(stage["id"])["state"] == "ready", "it is ready")
        with asking(here, f"/models/s3-hang-up/{SHARDS[1]}") as connection:
            until(leases, "it is sent under a lease", 60)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            with pytest.raises(Exception, match="S3 at 127"):
                here.daemon.client.remove(stage["id"])
        until(lambda: not leases(), "the lease of who was sent to is gone", 30)
        here.daemon.client.remove(stage["id"])


def test_a_stage_that_is_taken_by_force_ends_what_is_sent_of_it_short(
    start_daemon: Start, s3: SeaweedFS, tmp_path: Path
) -> None:
    save_file({"w": numpy.arange(8_000_000, dtype=numpy.float32)}, tmp_path / "model.safetensors")
    truth = (tmp_path / "model.safetensors").read_bytes()
    here = Endpoint(start_daemon, s3.url, s3.env, "--revoke-grace", "0")
    stage = here.daemon.stage(tmp_path)["id"]
    with asking(here, f"/weightd/{stage}/model.safetensors") as connection:
        until(here.daemon.client.leases, "it is sent under a lease", 60)
        here.daemon.client.remove(stage, force=True)
        until(lambda: here.daemon.client.show(stage)["state"] == "evicted", "it has gone", 60)
        until(lambda: here.daemon.used_bytes == 0, "its memory is free")
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(1 << 20):
                found += data
        head, _, body = found.partition(b"\r\n\r\n")
        assert f"content-length: {len(truth)}".encode() in head
        assert len(body) < len(truth), "all of it was sent"
        assert truth.startswith(body), "other bytes were sent"
    until(lambda: not here.daemon.client.leases(), "the lease is gone")


def test_five_hundred_ranges_at_once_are_all_right_and_slow_readers_cost_no_memory(
    start_daemon: Start, s3: SeaweedFS, tmp_path: Path
) -> None:
    save_file(
        {"w": numpy.random.default_rng(1).integers(0, 256, 64 * MiB, numpy.uint8)}, tmp_path / "model.safetensors"
    )
    truth = (tmp_path / "model.safetensors").read_bytes()
    here = Endpoint(start_daemon, s3.url, s3.env)
    stage = here.daemon.stage(tmp_path)["id"]
    path = f"/weightd/{stage}/model.safetensors"
    before = _private_bytes(here.daemon.pid)
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(asking(here, path)) for _ in range(400)]
        until(lambda: len(here.daemon.client.leases()) == 400, "all are being sent", 120)
        with ThreadPoolExecutor(32) as pool, httpx.Client(base_url=here.url, timeout=120) as web:
            starts = [random.Random(i).randrange(60 * MiB) for i in range(500)]

            def right(start: int) -> bool:
                answer = web.get(path, headers={"Range": f"bytes={start}-{start + MiB}"})
                return answer.status_code == 206 and answer.content == truth[start : start + MiB + 1]

            assert all(pool.map(right, starts))
        assert _private_bytes(here.daemon.pid) - before < 128 * MiB, "what nobody takes is kept somewhere"
        assert here.daemon.get("/livez")
        for connection in slow:
            assert connection.recv(10) == b"HTTP/1.1 2"
    until(lambda: not here.daemon.client.leases(), "all have gone", 60)


@pytest.mark.parametrize("handle", ["fd", "cuda_ipc"])
def test_what_lies_on_a_gpu_is_sent_to_many_slow_readers_who_hold_none_of_its_pinned_memory(
    handle: str, start_daemon: Start, s3: SeaweedFS, fake_library: Path, tmp_path: Path
) -> None:
    save_file({"w": numpy.random.default_rng(3).integers(0, 256, 24 * MiB, numpy.uint8)}, tmp_path / "m.safetensors")
    truth = (tmp_path / "m.safetensors").read_bytes()
    fake = FakeCuda(fake_library, tmp_path / "fakecuda", memory=256 * MiB)
    here = Endpoint(start_daemon, s3.url, {**s3.env, **fake.env, "WEIGHTD_CUDA_RESERVE": "32MiB"})
    record = here.daemon.stage(tmp_path / "m.safetensors", device="cuda:0", handle=handle)
    assert record["state"] == "ready", record["error"]
    path = f"/weightd/{record['id']}/m.safetensors"
    before = _private_bytes(here.daemon.pid)
    with contextlib.ExitStack() as stack:
        for connection in [stack.enter_context(asking(here, path)) for _ in range(40)]:
            while len(connection.recv(1000, socket.MSG_PEEK)) < 1000:
                pass
        assert httpx.get(f"{here.url}{path}", headers={"Range": "bytes=1000-9000000"}).content == truth[1000:9_000_001]
        if handle == "fd":
            assert len(here.daemon.client.leases()) == 40
            assert _private_bytes(here.daemon.pid) - before < 240 * MiB, "each holds a buffer"
    assert httpx.get(f"{here.url}{path}").content == truth
    until(lambda: not here.daemon.client.leases(), "all have gone", 60)


def test_slow_readers_of_what_is_passed_on_cost_less_memory_the_more_they_are(
    start_daemon: Start, s3: SeaweedFS, tmp_path: Path
) -> None:
    (tmp_path / "model.bin").write_bytes(os.urandom(40 * MiB))
    s3.upload(tmp_path, "s3-slow-passed")
    here = Endpoint(start_daemon, s3.url, s3.env)
    before = _private_bytes(here.daemon.pid)
    with contextlib.ExitStack() as stack:
        path = "/models/s3-slow-passed/model.bin"
        for connection in [stack.enter_context(asking(here, path)) for _ in range(64)]:
            found = b""
            while len(found) < 2000:
                found += connection.recv(1000)
            assert found.startswith(b"HTTP/1.1 200")
        assert _private_bytes(here.daemon.pid) - before < 640 * MiB
    assert here.get("s3-slow-passed/model.bin") == (tmp_path / "model.bin").read_bytes()
    assert "Traceback" not in here.daemon.log.read_text()


def _private_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def test_a_client_that_tries_again_notices_no_restart(start_daemon: Start, s3: SeaweedFS, model: Path) -> None:
    here = Endpoint(start_daemon, s3.url, s3.env)
    stage = here.daemon.stage(model)["id"]
    over, found = threading.Event(), []
    truth = (model / SHARDS[0]).read_bytes()

    def read() -> None:
        again = client(here.url, connect_timeout=60, read_timeout=60)
        while not over.is_set():
            for attempt in range(20):
                try:
                    found.append(again.get_object(Bucket="weightd", Key=f"{stage}/{SHARDS[0]}")["Body"].read() == truth)
                    break
                except Exception as error:
                    if attempt == 19:
                        found.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(2):
            pid, count = here.daemon.status["daemon_pid"], len(found)
            until(lambda count=count: len(found) > count + 2, "it is read")  # type: ignore[misc]
            os.kill(pid, signal.SIGKILL)
            serving(here.daemon, pid)
        count = len(found)
        until(lambda: len(found) > count + 2, "it is read again")
    finally:
        over.set()
        reader.join()
    assert set(found) == {True}


def test_a_daemon_that_is_told_to_stop_does_in_time_and_what_it_was_sending_ends_short(
    start_daemon: Start, s3: SeaweedFS, tmp_path: Path
) -> None:
    save_file({"w": numpy.random.default_rng(2).integers(0, 256, 64 * MiB, numpy.uint8)}, tmp_path / "m.safetensors")
    truth = (tmp_path / "m.safetensors").read_bytes()
    here = Endpoint(start_daemon, s3.url, s3.env)
    path = f"/weightd/{here.daemon.stage(tmp_path)['id']}/m.safetensors"
    assert here.daemon.process is not None
    with contextlib.ExitStack() as stack:
        sent_to = [stack.enter_context(asking(here, path)) for _ in range(20)]
        waiting = stack.enter_context(httpx.Client(base_url=here.url))
        assert waiting.get(path, headers={"Range": "bytes=0-9"}).content == truth[:10]
        until(lambda: len(here.daemon.client.leases()) == 20, "all are being sent")
        began = time.monotonic()
        here.daemon.process.send_signal(signal.SIGTERM)
        assert here.daemon.process.wait(60) == 0
        assert time.monotonic() - began < 15, "it has waited for those who take nothing"
        for connection in sent_to:
            found = b""
            with contextlib.suppress(ConnectionResetError):
                while data := connection.recv(1 << 20):
                    found += data
            body = found.partition(b"\r\n\r\n")[2]
            assert len(body) < len(truth), "all of it was sent"
            assert truth.startswith(body), "other bytes were sent"
    assert "Traceback" not in here.daemon.log.read_text()


def test_crowds_that_say_or_take_nothing_leave_descriptors_for_others_and_are_told_in_the_words_of_s3(
    start_daemon: Start, s3: SeaweedFS, tmp_path: Path
) -> None:
    save_file({"w": numpy.random.default_rng(2).integers(0, 256, 64 * MiB, numpy.uint8)}, tmp_path / "m.safetensors")
    truth = (tmp_path / "m.safetensors").read_bytes()
    limit = 400
    prefix = [command("prlimit", "apt-get install util-linux"), f"--nofile={limit}:{limit}"]
    here = Endpoint(lambda *all, **more: start_daemon(*all, command=prefix, **more), s3.url, s3.env)
    path = f"/weightd/{here.daemon.stage(tmp_path)['id']}/m.safetensors"
    host, port = here.address.split(":")
    pid = here.daemon.pid
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection((host, int(port)), timeout=60)) for _ in range(350)]
        some = httpx.get(f"{here.url}{path}", headers={"Range": "bytes=5-1000"}, timeout=60)
        assert some.content == truth[5:1001], "who says nothing makes room for who does"
        # What is being sent goes for nobody: in the end the others are turned away.
        for _ in range(350):
            taking = stack.enter_context(asking(here, path))
            if (said := taking.recv(12)) != b"HTTP/1.1 200":
                break
        assert said == b"HTTP/1.1 503"
        assert b"<Code>SlowDown</Code>" in taking.recv(4096)
        assert len(os.listdir(f"/proc/{pid}/fd")) <= limit - reserve(limit) + 2 * KEPT
        with here.daemon.attach(tmp_path) as weights:
            assert weights["w"].shape == (64 * MiB,)
        for connection in silent:
            assert connection.recv(1) == b"", "it is still there"
    until(lambda: not here.daemon.client.leases(), "all have gone", 60)
    assert httpx.get(f"{here.url}{path}", timeout=60).content == truth
    assert here.daemon.pid == pid
    assert "Traceback" not in here.daemon.log.read_text()


def test_an_origin_that_fails_amid_what_is_passed_on_ends_it_short(
    start_daemon: Start, s3: SeaweedFS, tmp_path: Path
) -> None:
    save_file({"w": numpy.zeros(30 * MiB, numpy.uint8)}, tmp_path / "model.safetensors")
    s3.upload(tmp_path, "s3-fails")

    def later(request: Request) -> Any:
        return "403" if request.first and request.first > 8 * MiB else None

    with FaultProxy(s3.url, later) as failing:
        here = Endpoint(start_daemon, failing.url, s3.env, "--s3-absent", "pass")
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"{here.url}/models/s3-fails/model.safetensors", timeout=60)
    assert "ends short" in here.daemon.log.read_text()


HOSTILE = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET /%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /weightd/..%2f..%2fetc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET http://elsewhere/models/x HTTP/1.1\r\nHost: elsewhere\r\n\r\n",
    b"GET ftp://localhost/models/x HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/%ff%fe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/x?" + b"a=b&" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/?list-type=2&max-keys=-1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/?list-type=2&max-keys=" + b"9" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/?list-type=2&continuation-token=%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/?list-type=2&prefix=%ff%0a%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/?list-type=2&delimiter=%f0%9f%92%a9 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/?list-type=3 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/?uploads HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/x HTTP/1.1\r\nHost: " + b"a" * 60000 + b"\r\n\r\n",
    b"GET /models/x HTTP/1.1\r\nHost: localhost\r\nRange: bytes=" + b"1" * 9000 + b"-\r\n\r\n",
    b"GET /" + b"a" * 200_000,
    b"PUT /models/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1_000_000,
    b"PUT /models/x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n",
    b"PUT /models/x HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 10\r\n\r\n",
    b"POST /models/?delete HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8\r\n\r\n<Delete>",
    b"DELETE /models/x HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"BREW /models/x HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/x HTTP/9.9\r\n\r\n",
    b"GET /models/#x HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET /models/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nabcde",
    b"GET /models/x HTTP/1.1\r\nHost: localhost\r\nAuthorization: AWS4-HMAC-SHA256 \xff\r\n\r\n",
]


def test_whatever_comes_to_its_port_is_refused_in_the_words_of_s3_and_the_daemon_lives(
    start_daemon: Start, s3: SeaweedFS
) -> None:
    here = Endpoint(start_daemon, s3.url, s3.env)
    draw = random.Random(15)
    noise = [bytes(draw.choices(base, k=draw.randrange(1, len(base) + 1))) for base in HOSTILE[:10] for _ in range(5)]
    for sent in [*HOSTILE, *noise]:
        host, port = here.address.split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection, contextlib.suppress(OSError):
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while data := connection.recv(1 << 16):
                answer += data
            if answer:
                status = int(answer.split(b" ")[1])
                assert 400 <= status < 600 or sent.startswith(b"GET / ") or b"list-type=2" in sent, (
                    sent[:80],
                    answer[:200],
                )
                assert status != 500, (sent[:80], answer[:300])
            assert b"root:" not in answer
    assert here.daemon.status["restarts"] == 0
    assert "Traceback" not in here.daemon.log.read_text()
    assert here.s3.list_buckets()["Buckets"]
