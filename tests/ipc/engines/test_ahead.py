"""Layouts that are made ahead, and staged: by an engine that is no more than the protocol asks for."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.servers import Daemon
from weightd.ipc import attach
from weightd.ipc.engines import ahead
from weightd.ipc.engines.ahead import Asked, main
from weightd.ipc.engines.binding import Binding, Options
from weightd.ipc.recipe import Key
from weightd.ipc.trace import meta_parameters


class Rank(torch.nn.Module):
    """What one of several processes computes with: its rows, fused."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.rows = rank, 64 // size
        self.fused = torch.nn.Parameter(torch.empty(2 * self.rows, 32))

    def load_weights(self, tensors: Any) -> None:
        for name, tensor in tensors:
            mine = tensor.narrow(0, self.rank * self.rows, self.rows)
            self.fused.data.narrow(0, self.rows * int(name == "up.weight"), self.rows).copy_(mine)


def processes(asked: Asked) -> Iterator[Callable[[], dict[str, Any]]]:
    for rank in range(asked.tp_size):
        yield functools.partial(_trace, asked, rank)


def _trace(asked: Asked, rank: int) -> dict[str, Any]:
    with Binding(asked.model, Options(socket=asked.socket)) as binding:
        with meta_parameters():
            model = Rank(rank, asked.tp_size)
        key = Key(
            headers=binding.headers, engine="tiny", version="1", dtype="torch.float32", config="0" * 64, rank=rank,
            parallel={"tensor": asked.tp_size}, backends=[asked.processor],
        )  # fmt: skip
        return binding.teach(model, model.load_weights, key)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ahead.ENGINES, "tiny", __name__)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which running it sets


@pytest.fixture
def daemon(start_daemon: Callable[..., Daemon]) -> Daemon:
    """One in which nobody else has staged anything."""
    return start_daemon()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    torch.manual_seed(5)
    tensors = {name: torch.randn(64, 32) for name in ("gate.weight", "up.weight")}
    save_file(tensors, folder / "model.safetensors")
    return folder


def run(daemon: Daemon, model: Path, *arguments: str) -> tuple[str, ...]:
    return ("--engine", "tiny", "--model", str(model), "--socket", str(daemon.runtime_dir), *arguments)


def told(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_layout_that_is_made_ahead_stages_nothing_unless_it_is_asked_to(
    daemon: Daemon, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run(daemon, model)) == 0
    (layout,) = told(capsys)
    assert layout["model"] == str(model)
    assert daemon.client.stages() == []


def test_all_processes_of_a_plan_are_staged_at_once_and_a_second_time_finds_them(
    daemon: Daemon, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # As an engine's own command line says it.
    plan = run(daemon, model, "--tensor-parallel-size", "2", "--stage", '{"device": "cpu", "pin": true}', "--wait")
    assert main(plan) == 0
    *layouts, stage = told(capsys)
    keys = [layout["key"] for layout in layouts]
    assert len(set(keys)) == 2
    assert (stage["state"], stage["request"]["layout"], stage["pin"]) == ("ready", {"key": keys}, True)
    assert main(plan) == 0
    assert told(capsys)[-1]["id"] == stage["id"]
    assert [stage["id"] for stage in daemon.client.stages()] == [stage["id"]]
    with attach(model, layout=keys, tp_rank=1, socket=daemon.runtime_dir) as weights:
        stored = load_file(model / "model.safetensors")
        assert torch.equal(weights["fused"], torch.cat([stored["gate.weight"][32:], stored["up.weight"][32:]]))
        assert weights.manifest.stage == stage["id"]


def test_without_a_device_a_cpu_gets_host_memory_and_each_process_of_gpus_one_of_its_own(
    daemon: Daemon, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run(daemon, model, "--stage", "--wait")) == 0
    assert told(capsys)[-1]["request"]["device"] == "cpu"
    assert main(run(daemon, model, "--tp-size", "2", "--processor", "cuda 9.0", "--stage")) == 1
    assert "cuda:0" in capsys.readouterr().err, "which this daemon does not have"


def test_a_daemon_that_is_being_started_is_waited_for(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = Daemon(tmp_path)
    starting = threading.Timer(1.5, daemon.start)
    starting.start()
    try:
        assert main(run(daemon, model, "--timeout", "60")) == 0
        assert len(told(capsys)) == 1
    finally:
        starting.join()
        daemon.stop()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--timeout", "0", "--socket", "/nowhere"], "no daemon answers"),
        (["--stage", '{"device": "cpu:9"}'], "cpu:9"),
        (["--stage", f'{{"expect_digest": "xxh3:{"0" * 32}"}}', "--wait"], "is failed"),
    ],
)
def test_what_cannot_be_is_one_line_and_a_status(
    arguments: list[str], said: str, daemon: Daemon, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run(daemon, model, *arguments)) == 1
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("fields", ["pin", "[]", '"cpu"'])
def test_fields_of_a_stage_request_are_an_object(fields: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--engine", "tiny", "--model", "m", "--stage", fields])
    assert "--stage" in capsys.readouterr().err
