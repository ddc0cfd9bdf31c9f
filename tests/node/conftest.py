"""What tests of the node stage."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    rng = numpy.random.default_rng(6)
    tensors = {f"w{i}": rng.standard_normal((512 + 2 * i, 1024), numpy.float32) for i in range(6)}
    save_file(tensors, folder / "m.safetensors")
    (folder / "config.json").write_text("{}")
    return folder
