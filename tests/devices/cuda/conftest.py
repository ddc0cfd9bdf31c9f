from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint_files import write_checkpoint
from tests.devices.cuda.fakes import SHARDS, Machine, NewMachine


@pytest.fixture
def machine(fake_library: Path, tmp_path: Path) -> Iterator[NewMachine]:
    """Make a machine: ``machine(devices=2)``. What its daemons leave behind fails the test."""
    made: list[Machine] = []

    def make(*, devices: int = 1, memory: int = 1 << 30, strict: bool = True, clean: bool = True) -> Machine:
        found = Machine(fake_library, tmp_path / f"machine{len(made)}", devices, memory, strict)
        found.clean = clean  # type: ignore[attr-defined]
        made.append(found)
        return found

    yield make
    for found in made:
        found.close()
    for found in made:
        if found.clean:  # type: ignore[attr-defined]
            found.check_clean()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), SHARDS, index=True)
    (folder / "config.json").write_text("{}")
    return folder
