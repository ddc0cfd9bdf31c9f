"""How much is asked of an object store at once: no more than is set, however much there is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from tests.fault_proxy import FaultProxy, Request
from tests.servers import Daemon, SeaweedFS, until

MiB = 1 << 20


class Held:
    """Ranges of weights that wait until they are let go, and how many bytes they were of at most."""

    def __init__(self) -> None:
        self.bytes = self.most = 0
        self.enough = threading.Event()
        self._lock = threading.Lock()
        self.limit = 0
        """Bytes over which nothing more is waited for."""

    def __call__(self, request: Request) -> None:
        if request.nbytes < MiB // 2:
            return
        with self._lock:
            self.bytes += request.nbytes
            self.most = max(self.most, self.bytes)
            if self.bytes > self.limit:
                self.enough.set()
        self.enough.wait(1.0)
        with self._lock:
            self.bytes -= request.nbytes


@pytest.mark.parametrize("in_flight", [2, 4])
def test_no_more_is_in_flight_than_is_set(
    in_flight: int, start_daemon: Callable[..., Daemon], s3: SeaweedFS, tmp_path: Path
) -> None:
    for number in range(4):
        save_file(
            {f"w{number}": numpy.zeros(6 * MiB, numpy.uint8)}, tmp_path / f"m-{number + 1:05}-of-00004.safetensors"
        )
    uri = s3.upload(tmp_path, "in-flight")
    held = Held()
    held.limit = (in_flight + 1) * MiB  # what is asked for last may reach past it
    with FaultProxy(s3.url, held) as origin:
        settings = {"WEIGHTD_IN_FLIGHT": f"{in_flight}MiB", "WEIGHTD_EXTENT": "1MiB"}
        daemon = start_daemon(env={**s3.env, "AWS_ENDPOINT_URL": origin.url, **settings})
        record = daemon.stage(uri)
        assert record["state"] == "ready", record["error"]
        until(lambda: held.bytes == 0, "all have passed")
    assert held.most <= held.limit
    assert held.most >= 2 * MiB
