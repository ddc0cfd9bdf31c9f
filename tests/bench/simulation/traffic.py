"""Control traffic, in bytes as the daemon writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tests.bench.simulation.scenario import KEY


def event_bytes(kind: str, leaves: int = 0, stamps: Mapping[str, int] | None = None) -> int:
    """Bytes of one event, about so many leaves, or with these stamps."""
    event: dict[str, Any] = {"type": kind}
    if kind in ("leaves", "coming"):
        event |= {"epoch": "0" * 16, "segment": 0, "entry": 300, "first": 300}
        event |= {"digests": "0" * 16 * leaves} if kind == "leaves" else {"count": leaves}
    elif kind == "readers":
        event["stamps"] = stamps
    return len(f"event: {kind}\ndata: {json.dumps(event)}\n\n") + len("1ff\r\n\r\n")


def watched_bytes(address: str, share: float) -> int:
    """Bytes of one entry's change as etcd tells each of those who watch."""
    entry = json.dumps({"node": f"node-{address[:-5]}", "address": address, "stages": {KEY: share}})
    return 350 + (len(entry) + 2 * len(address) + 30) * 4 // 3


REQUEST_BYTES = len(f"GET /peer/v1/stages/{KEY}?format=1&by=10.0.0.1%3A7401 HTTP/1.1\r\n") + 250
"""Of beginning to listen, with usual headers and a token."""
SEGMENTS_BYTES = 200 + 1000
"""The answer's headers, and the event that says where one segment is: the most of it is NIXL's, 700 bytes."""
REPORT_BYTES = 300 + 100
"""Saying how much was read, and the answer."""
