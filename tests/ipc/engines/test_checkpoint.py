"""What engines call a checkpoint, and the files of its configuration that they are given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.servers import Daemon
from weightd.ipc import ModelMismatch, RequestRefused
from weightd.ipc.engines.checkpoint import configuration_digest, configure, uri


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    (folder / "tokens").mkdir(parents=True)
    save_file({"weight": torch.zeros(4)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"theta": 1}')
    (folder / "tokens" / "vocab.json").write_text("{}")
    return folder


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_comes_to_hold_what_a_checkpoint_has_beside_its_weights(
    daemon: Daemon, checkpoint: Path, tmp_path: Path
) -> None:
    engine = tmp_path / "engine"
    engine.mkdir()
    (engine / "generation_config.json").write_text("of an earlier one")
    (engine / ".config.json.1").write_text("of another engine, on its way")
    configure(str(checkpoint), engine)
    on_its_way = {".config.json.1": "of another engine, on its way"}
    assert files(engine) == {"config.json": '{"theta": 1}', "tokens/vocab.json": "{}"} | on_its_way
    (checkpoint / "config.json").write_text('{"theta": 2}')
    (checkpoint / "tokens" / "vocab.json").unlink()
    configure(str(checkpoint), engine)
    assert files(engine) == {"config.json": '{"theta": 2}'} | on_its_way


def test_files_that_are_still_right_are_left_alone(daemon: Daemon, checkpoint: Path, tmp_path: Path) -> None:
    configure(str(checkpoint), tmp_path / "engine")
    before = (tmp_path / "engine" / "config.json").stat()
    configure(str(checkpoint), tmp_path / "engine")
    assert (tmp_path / "engine" / "config.json").stat().st_ino == before.st_ino


def test_files_that_the_daemon_has_not_are_said_and_nothing_is_removed_for_them(
    checkpoint: Path, start_daemon: Callable[..., Daemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tmp_path / "engine"
    engine.mkdir()
    (engine / "config.json").write_text("of the engine")
    daemon = start_daemon(env={"WEIGHTD_CACHE_DIR": "/proc/nowhere"})
    monkeypatch.setenv("WEIGHTD_RUNTIME_DIR", str(daemon.runtime_dir))
    with pytest.raises(ModelMismatch, match="cannot be read from here"):
        configure(str(checkpoint), engine)
    with pytest.raises(RequestRefused):
        configure(str(tmp_path / "nothing"), engine)
    assert files(engine) == {"config.json": "of the engine"}


def test_a_name_becomes_what_the_daemon_calls_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    assert uri("s3://models/llama") == "s3://models/llama"
    assert uri("org") == uri(str(tmp_path / "org"), "main") == str(tmp_path / "org")
    assert uri("org/llama") == "hf://org/llama"
    assert uri("org/llama", "v2") == "hf://org/llama@v2"


def test_a_configuration_counts_by_what_is_in_it_and_not_by_where_it_lies() -> None:
    def config(**changed: object) -> str:
        return configuration_digest({"model": {"heads": 4, "dtype": torch.bfloat16, "_name_or_path": "/a"} | changed})

    assert config() == config(_name_or_path="/b") == config(dtype="torch.bfloat16")
    assert len({config(), config(heads=5), config(heads=None), config(rope=[1, 2])}) == 4
