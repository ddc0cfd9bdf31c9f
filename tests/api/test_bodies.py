"""What clients send at once: as much as is allowed is read, a byte more is refused."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import httpx
import pytest

from tests.servers import Daemon
from weightd.api.gate import MAX_BODY_BYTES
from weightd.ipc import wire


def padded(nbytes: int) -> bytes:
    """A request for nothing that is there, with so many bytes."""
    return json.dumps({"model": "/nowhere"}).encode().ljust(nbytes)


@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "in chunks"])
def test_a_body_has_so_many_bytes_and_no_more(daemon: Daemon, chunked: bool) -> None:
    transport = httpx.HTTPTransport(uds=str(daemon.runtime_dir / "api.sock"))
    with httpx.Client(transport=transport, base_url="http://weightd", timeout=120) as client:

        def post(nbytes: int) -> tuple[int, str]:
            body = padded(nbytes)
            content: Any = (body[at : at + (1 << 20)] for at in range(0, nbytes, 1 << 20)) if chunked else body
            answer = client.post("/v1/stage?wait=60", content=content, headers={"Content-Type": "application/json"})
            return answer.status_code, answer.text

        status, text = post(MAX_BODY_BYTES)
        assert (status, json.loads(text)["error"]["code"]) == (202, "checkpoint_not_found")
        assert post(MAX_BODY_BYTES + 1)[0] == 413


def asked(daemon: Daemon, nbytes: int) -> dict[str, Any]:
    """What the lease socket answers to a message of so many bytes."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(120)
        connection.connect(str(daemon.runtime_dir / "lease.sock"))
        body = json.dumps({"op": "lease", "stage": "st-none"}).encode().ljust(nbytes)
        connection.sendall(wire.LENGTH.pack(nbytes) + body)
        return wire.receive(connection)[0]


def test_a_message_to_the_lease_socket_has_so_many_bytes_and_no_more(daemon: Daemon) -> None:
    assert asked(daemon, wire.MAX_REQUEST_BYTES)["code"] == "unknown_stage"
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(120)
        connection.connect(str(daemon.runtime_dir / "lease.sock"))
        connection.sendall(wire.LENGTH.pack(wire.MAX_REQUEST_BYTES + 1))
        reply, _ = wire.receive(connection)
        assert (reply["code"], str(wire.MAX_REQUEST_BYTES) in reply["message"]) == ("invalid_request", True)


@pytest.mark.parametrize("more", [0, 1])
def test_a_message_from_a_daemon_has_so_many_bytes_and_no_more(more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_REPLY_BYTES", 1000)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        body = json.dumps({"type": "lease"}).encode().ljust(1000 + more)
        threading.Thread(target=theirs.sendall, args=(wire.LENGTH.pack(len(body)) + body,)).start()
        if more:
            with pytest.raises(ConnectionError, match="1001 bytes, allowed are 1000"):
                wire.receive(ours)
        else:
            assert wire.receive(ours) == ({"type": "lease"}, [])
