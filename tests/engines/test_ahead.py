"""Layouts that are made ahead of an engine's first start are those that it asks for then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engines.environment import Driven, environment
from tests.engines.models import make
from tests.engines.starting import ahead
from tests.servers import Daemon

pytestmark = pytest.mark.timeout(1200)


@pytest.mark.parametrize(
    ("engine", "options"),
    [("sglang", ["--ep-size", "2"]), ("vllm", ["--enable-expert-parallel", "--enforce-eager"])],
)
def test_each_process_of_a_plan_has_a_layout_of_its_own(
    engine: str, options: list[str], shim: Path, start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = start_daemon()
    model = make("moe", tmp_path / "moe")
    plan = ["--tp-size", "2", "--dtype", "bfloat16", *options]
    told = ahead(engine, shim, daemon, tmp_path / "home", "--model", str(model), *plan)
    assert [one["about"]["rank"] for one in told] == [0, 1]
    assert len({one["digest"] for one in told}) == 2
    # Experts that a process does not have are in no copy of its layout.
    assert all(one["opaque"] == [] and one["copies"] < 50 for one in told)
    assert {layout["key"] for layout in daemon.client.layouts()} == {one["key"] for one in told}
    assert daemon.client.stages() == []


def test_vllm_asks_for_the_layout_that_was_made_ahead(
    shim: Path, start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = start_daemon()
    model = str(make("llama", tmp_path / "llama"))
    plan = ["--dtype", "bfloat16", "--max-model-len", "128", "--enforce-eager"]
    (told,) = ahead("vllm", shim, daemon, tmp_path / "home", "--model", model, *plan)
    home = tmp_path / "engine"
    variables = environment("vllm", home, [shim]) | {"WEIGHTD_RUNTIME_DIR": str(daemon.runtime_dir)}
    arguments = {"load_format": "weightd", "worker_extension_cls": "probe_vllm.Probe"}
    settings = {"model": model, "prompts": [[1, 5, 9]], "arguments": arguments}
    with Driven("vllm", "drive_vllm.py", settings, variables, home) as engine:
        assert len(engine.answer()) == 1
        assert [layout["key"] for layout in daemon.client.layouts()] == [told["key"]]
        (stage,) = daemon.client.stages()
        assert stage["request"]["layout"] == {"key": [told["key"]]}


def test_an_engine_that_is_not_in_this_python_is_said_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from weightd.ipc.engines.ahead import main

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["--engine", "vllm", "--model", "/models/m"]) == 1
    assert "this has to run in vllm's own image" in capsys.readouterr().err
