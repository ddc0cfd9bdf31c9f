"""A store that takes connections and says nothing: who asks it waits, and nobody else does."""

from __future__ import annotations

import contextlib
import json
import select
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from tests.servers import Daemon, until
from weightd.daemon.stages.source_threads import place_of

REQUESTS = 70


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server whose kernel takes connections, which nobody ever accepts."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def ask(daemon: Daemon, model: str) -> socket.socket:
    """Ask for a stage, and wait for no answer."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(daemon.runtime_dir / "api.sock"))
    body = json.dumps({"model": model})
    head = "POST /v1/stage HTTP/1.1\r\nHost: weightd\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return connection


def test_requests_to_a_store_that_says_nothing_keep_nobody_else_waiting_and_are_bounded(
    start_daemon: Callable[..., Daemon], silent: str, tmp_path: Path
) -> None:
    save_file({"w": numpy.zeros(1000)}, tmp_path / "model.safetensors")
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true"}
    daemon = start_daemon(env={"AWS_ENDPOINT_URL": silent, **keys})
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(ask(daemon, f"s3://silent/{i}")) for i in range(REQUESTS)]
        refused = until(lambda: (r := select.select(waiting, [], [], 0)[0])[5:] and r, "six are refused", 60)
        assert len(refused) == REQUESTS - 64
        for connection in refused:
            answer = b""
            while b"}" not in answer:  # its head may come before the rest
                came = connection.recv(1 << 16)
                assert came
                answer += came
            assert answer.startswith(b"HTTP/1.1 429")
            assert b"64 requests wait for s3://silent" in answer
        assert daemon.stage(tmp_path)["state"] == "ready"
        still = [connection for connection in waiting if connection not in refused]
        assert not select.select(still, [], [], 0)[0], "it was ready while all the others waited"


def test_what_stalls_together_is_a_bucket_or_a_folder_that_may_be_a_mount() -> None:
    assert place_of("s3://bucket/a/b") == place_of("s3://bucket/c") != place_of("s3://other/a/b")
    assert place_of("file:///mnt/nfs/a") == place_of("file:///mnt/nfs/b/c") != place_of("file:///mnt/disk/a")
