"""A real etcd on loopback, and what daemons put into it."""

from __future__ import annotations

import json
import signal
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import command
from tests.servers import HERE, Place, Server, free_ports


class Etcd(Server):
    """A real etcd. Its data survive a kill."""

    def __init__(self, folder: Path, *arguments: str, scheme: str = "http", place: Place = HERE) -> None:
        with place.entered():
            port, peers = free_ports(2, host=place.host)
        self.url = f"{scheme}://{place.host}:{port}"
        self.peers = f"http://{place.host}:{peers}"
        self.data = folder / "data"
        self.arguments = list(arguments)
        self.verify: Any = True
        super().__init__([], folder, place=place)

    def start(self) -> None:
        self._command = [
            command("etcd", "apt-get install etcd-server"), "--name", self.log.parent.name,
            "--data-dir", str(self.data), "--unsafe-no-fsync",
            "--listen-client-urls", self.url, "--advertise-client-urls", self.url,
            "--listen-peer-urls", self.peers, *self.arguments,
        ]  # fmt: skip
        super().start()

    def ready(self) -> bool:
        try:
            # Grants and revokes, so that there is a leader, and room.
            self("lease/revoke", ID=self("lease/grant", TTL=60)["ID"])
        except (httpx.TransportError, AssertionError):
            return False
        return True

    def __call__(self, path: str, **body: Any) -> dict[str, Any]:
        answer = httpx.post(f"{self.url}/v3/{path}", json=body, timeout=10, verify=self.verify)
        assert answer.is_success, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def put(self, key: str, value: bytes) -> None:
        self("kv/put", key=b64(key), value=b64encode(value).decode())

    def entries(self, prefix: str = "/") -> dict[str, dict[str, Any]]:
        """Key → what etcd knows of it."""
        found = self("kv/range", key=b64(prefix), range_end=b64("\x7f"))
        return {b64decode(entry["key"]).decode(): entry for entry in found.get("kvs", [])}

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def b64(text: str) -> str:
    return b64encode(text.encode()).decode()


def entry(node: str, address: str, stages: object = None) -> tuple[str, bytes]:
    """Key and value as another daemon would put them."""
    value = {"node": node, "address": address, "stages": {} if stages is None else stages}
    return f"/weightd/peers/{node}/{address}", json.dumps(value).encode()
