"""Engines as they come, with no package of weightd beside them, start through the S3 endpoint: same tokens, and the
second start reads no weights at the origin."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engines.environment import installed
from tests.engines.starting import started
from tests.fault_proxy import FaultProxy, Request
from tests.servers import Daemon, SeaweedFS, free_ports


def pointed_at(url: str) -> dict[str, str]:
    """The one variable, and keys of any kind."""
    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
    return {**keys, "AWS_ENDPOINT_URL": url}


def weights(seen: list[Request]) -> list[Request]:
    """Of what an object store was asked for, what was weights."""
    return [asked for asked in seen if asked.method == "GET" and asked.path.endswith(".safetensors")]


@pytest.mark.timeout(2000)
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_starts_from_resident_weights_by_one_variable(
    engine: str, model: str, s3: SeaweedFS, start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    program = f"run_{engine}.py"
    with FaultProxy(s3.url) as origin:
        truth = started(engine, program, model, pointed_at(origin.url), tmp_path / "origin")
        assert all(len(tokens) == 12 for tokens in truth)
        (port,) = free_ports(1)
        daemon = start_daemon("--s3-listen", f"127.0.0.1:{port}", env={**s3.env, "AWS_ENDPOINT_URL": origin.url})
        here = pointed_at(f"http://127.0.0.1:{port}")
        for home in ("first", "second"):
            before = len(origin.seen)
            assert started(engine, program, model, here, tmp_path / home) == truth
            assert bool(weights(origin.seen[before:])) == (home == "first")
        (stage,) = daemon.client.stages()
        assert (stage["model"], stage["state"]) == (model, "ready")
        assert daemon.client.leases() == []


@pytest.mark.timeout(2000)
def test_model_express_brings_resident_weights_into_vllm_where_mx_model_uri_names_them(
    model: str, llama: Path, s3: SeaweedFS, start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    path = str(installed("modelexpress"))
    truth = started("vllm", "run_vllm.py", model, pointed_at(s3.url), tmp_path / "origin")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(llama / "config.json", bare)  # no weights that it could fall back to
    with FaultProxy(s3.url) as origin:
        (port,) = free_ports(1)
        start_daemon("--s3-listen", f"127.0.0.1:{port}", env={**s3.env, "AWS_ENDPOINT_URL": origin.url})
        here = pointed_at(f"http://127.0.0.1:{port}")
        own = {**here, "MX_MODEL_URI": model, "PYTHONPATH": path}
        for home in ("first", "second"):
            before = len(origin.seen)
            assert started("vllm", "run_modelexpress.py", str(bare), own, tmp_path / home) == truth
            assert bool(weights(origin.seen[before:])) == (home == "first")
