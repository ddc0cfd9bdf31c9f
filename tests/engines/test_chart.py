"""What the chart tells an engine's container to run, run with the engine: its layout is made and staged before it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chart.helm import manifests, program
from tests.chart.manifests import container, env_of
from tests.conftest import lacking
from tests.engines.environment import beside, environment
from tests.servers import Daemon, Missing, SeaweedFS


@pytest.mark.timeout(1200)
def test_the_init_container_has_what_vllm_serves_staged_in_its_own_layout(
    model: str, s3: SeaweedFS, start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    try:
        program()
    except Missing as error:
        lacking(str(error))
    arguments = ["--port=8000", "--dtype=bfloat16", "--max-model-len=128", "--enforce-eager"]
    values = {
        "engine": {"model": model, "args": arguments},
        "image": {"variant": "cpu"},
        "credentials": {"s3": {"existingSecret": "s3", "endpoint": s3.url, "region": "us-east-1"}},
        "trace": {"enabled": True, "stage": {"pin": True}},
    }  # fmt: skip
    documents = manifests(values)
    tracer = container(documents, "weightd-trace-0")
    # Of the Secret, what it has; of the volumes, where they are here.
    secret = {
        "AWS_ACCESS_KEY_ID": s3.env["AWS_ACCESS_KEY_ID"],
        "AWS_SECRET_ACCESS_KEY": s3.env["AWS_SECRET_ACCESS_KEY"],
    }
    given = {name: secret.get(name, text) for name, text in env_of(tracer).items()}
    daemon = start_daemon(env=s3.env)
    own = environment("vllm", tmp_path / "home", [beside(tmp_path / "path")])
    folders = {"WEIGHTD_RUNTIME_DIR": str(daemon.runtime_dir), "PYTHONPATH": own["PYTHONPATH"]}
    known = {name: text for name, text in {**given, **folders}.items() if isinstance(text, str)}
    del known["WEIGHTD_DAEMON_UID"]  # which is the image's own user
    done = subprocess.run(
        [*tracer["command"], *tracer["args"]],
        env={**own, **known}, cwd=tmp_path / "home", capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(said) == 2, done.stderr[-5000:]
    layout, staged = said
    (stage,) = daemon.client.stages()
    assert (stage["id"], stage["state"], stage["pin"]) == (staged["id"], "ready", True)
    assert stage["request"]["layout"] == {"key": [layout["key"]]}
    assert (stage["model"], stage["request"]["device"]) == (model, "cpu")
