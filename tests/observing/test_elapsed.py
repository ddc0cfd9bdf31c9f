"""Seconds are seconds: no more of them than have passed, in every family that counts or times."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from tests.fault_proxy import FaultProxy, Request
from tests.servers import Daemon, SeaweedFS
from weightd.daemon.observing.families import FAMILIES

MiB = 1 << 20
THREADS = 2
HELD = 0.5
"""Seconds that the store takes for a range of weights."""
SIDE_BY_SIDE = {"weightd_stage_phase_seconds_total"}
"""Families that count what threads do at the same time, each for itself."""


def sums(text: str) -> dict[str, float]:
    """Seconds of each family, all its series together: counters' values, histograms' sums, gauges' largest."""
    found: dict[str, float] = {}
    for name in FAMILIES:
        if "seconds" in name and "timestamp" not in name:
            values = [float(v) for v in re.findall(rf"^{name}(?:_sum)?(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)]
            if values:
                found[name] = max(values) if "start" in name else sum(values)
    return found


def test_no_family_has_more_seconds_than_have_passed_nor_a_thousandth_of_them(
    start_daemon: Callable[..., Daemon], s3: SeaweedFS, tmp_path: Path
) -> None:
    save_file({"w": numpy.zeros(4 * MiB, numpy.uint8)}, tmp_path / "m.safetensors")
    uri = s3.upload(tmp_path, "elapsed")

    def slow(request: Request) -> None:
        if request.nbytes >= MiB:
            time.sleep(HELD)

    began = time.monotonic()
    with FaultProxy(s3.url, slow) as origin:
        env = {**s3.env, "AWS_ENDPOINT_URL": origin.url, "WEIGHTD_READ_THREADS": str(THREADS)}
        daemon = start_daemon(env=env)
        record = daemon.stage(uri)
        assert record["state"] == "ready", record["error"]
        daemon.attach(uri).close()
        found = sums(daemon.get("/metrics"))
        passed = time.monotonic() - began
    for name, seconds in found.items():
        # Requests that wait are counted as long as what they wait for; listings and loads run side by side.
        most = passed * (8 if name in SIDE_BY_SIDE or "request" in name else 1)
        assert 0 <= seconds <= most, f"{name}: {seconds} s of {passed}"
    for name in ("weightd_stage_wall_seconds_total", "weightd_stage_phase_seconds_total",
                 "weightd_stage_duration_seconds", "weightd_api_request_duration_seconds"):  # fmt: skip
        assert found[name] >= HELD, f"{name}: {found[name]} s, {HELD} at least have passed"
    assert found["weightd_attach_duration_seconds"] > 0
    assert found["weightd_start_duration_seconds"] == pytest.approx(passed / 2, abs=passed / 2)
