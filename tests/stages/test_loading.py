"""Between the last byte and ready: whether the source is still what was planned with, asked of all files at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.filling.fills import LIMITS, store, tensor
from weightd.daemon.checkpoints.cache import Cache
from weightd.daemon.devices.cpu import CpuDevice
from weightd.daemon.errors import CheckpointChanged, CheckpointNotFound, CredentialsRefused, SourceFailed
from weightd.daemon.limits import FillLimits
from weightd.daemon.sources.base import SourceFile
from weightd.daemon.sources.file import FileSource
from weightd.daemon.sources.uris import Allow
from weightd.daemon.stages.loading import Loading
from weightd.daemon.stages.planning import make_plan
from weightd.daemon.stages.request import StageRequest

SHARDS = 24


class AskedLast(FileSource):
    """A folder that is told what to say once all has been read."""

    def __init__(self, folder: Path, answer: Callable[[SourceFile], SourceFile]) -> None:
        super().__init__(folder, Allow())
        self._answer = answer

    def stat(self, name: str) -> SourceFile:
        return self._answer(super().stat(name))


@contextlib.contextmanager
def loading(folder: Path, answer: Callable[[SourceFile], SourceFile], limits: FillLimits = LIMITS) -> Iterator[Loading]:
    """A load of some shards, ready to run."""
    stored = store(folder, *({f"t{number}": tensor("U8", (1000,), number)} for number in range(SHARDS)))
    source, request = AskedLast(folder, answer), StageRequest(model=str(folder))
    device, cache = CpuDevice("cpu", 1 << 30), Cache(folder / "cache")
    plan = make_plan(source, stored.checkpoint.listing, request, cache)
    found = Loading(source, plan, request, [device], cache, limits)
    found.lay_out()
    with (
        contextlib.closing(device.allocate(plan.recipes[0].nbytes, "test")) as segment,
        contextlib.closing(found.ledger()) as ledger,
        contextlib.closing(found),
    ):
        found.prepare([segment], ledger, lambda *_: None)
        yield found


def test_all_files_are_asked_after_at_once_as_each_answer_may_take_a_round_trip(tmp_path: Path) -> None:
    together = threading.Barrier(SHARDS)  # broken, and so an error, where they do not come together

    def answer(file: SourceFile) -> SourceFile:
        together.wait(60)
        return file

    with loading(tmp_path, answer) as load:
        load.run(lambda: None)
        assert load.checkpoint_digest


@pytest.mark.parametrize("which", [0, SHARDS - 1])
def test_one_file_that_has_changed_or_gone_fails_the_load(tmp_path: Path, which: int) -> None:
    def another(file: SourceFile) -> SourceFile:
        return file._replace(version="other") if file.name == f"{which}.safetensors" else file

    def gone(file: SourceFile) -> SourceFile:
        if file.name == f"{which}.safetensors":
            raise CheckpointNotFound("404")
        return file

    for number, answer in enumerate((another, gone)):
        (tmp_path / str(number)).mkdir()
        with loading(tmp_path / str(number), answer) as load, pytest.raises(CheckpointChanged, match=f"^{which}.safe"):
            load.run(lambda: None)


def test_a_source_that_does_not_answer_is_asked_again_and_what_lacks_no_byte_is_not_thrown_away(tmp_path: Path) -> None:
    asked: list[str] = []

    def away(file: SourceFile) -> SourceFile:
        asked.append(file.name)
        if asked.count(file.name) < 3:
            raise SourceFailed("503")
        return file._replace(version="other")

    with loading(tmp_path, away) as load, pytest.raises(CheckpointChanged):
        load.run(lambda: None)
    for number, error in enumerate((SourceFailed("503"), CredentialsRefused("ExpiredToken"))):

        def refusing(file: SourceFile, error: Exception = error) -> SourceFile:
            raise error

        folder = tmp_path / str(number)
        folder.mkdir()
        impatient = FillLimits(2, 1 << 20, 1 << 20, 2, retry_deadline=0.1 if not number else 3600.0)
        with loading(folder, refusing, impatient) as load:
            load.run(lambda: None)
            assert load.checkpoint_digest
