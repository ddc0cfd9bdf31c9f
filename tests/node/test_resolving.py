"""Which stage a request joins: what the source says, what was there before, where bytes may have come from."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from weightd.daemon.checkpoints.listing import Listing, list_checkpoint
from weightd.daemon.devices.cpu import CpuDevice
from weightd.daemon.errors import (
    AmbiguousCheckpoint,
    CheckpointChanged,
    CheckpointNotFound,
    CredentialsRefused,
    InvalidCheckpoint,
    InvalidRequest,
    SourceFailed,
    UnreadableFile,
)
from weightd.daemon.node import resolving
from weightd.daemon.node.resolving import Joined, Listed, Resolver, Unlisted
from weightd.daemon.sources.base import Source
from weightd.daemon.sources.uris import Allow, open_source
from weightd.daemon.stages.request import StageRequest
from weightd.daemon.stages.source_threads import SourceThreads
from weightd.daemon.stages.stage import Stage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"w": numpy.arange(1000)}, tmp_path / "model.safetensors")
    return tmp_path


def listed(folder: Path) -> Listing:
    uri = f"file://{folder}"
    return list_checkpoint(uri, open_source(uri, Allow()))


def staged(folder: Path, state: str = "ready", **request: Any) -> Stage:
    """A stage of what is in a folder now."""
    stage = Stage(f"file://{folder}", ["cpu"], StageRequest(model=str(folder), **request), listed(folder))
    stage.source_kind = "file"
    stage.state = state
    return stage


def resolve(folder: Path, *stages: Stage, fleet: Any = None, **request: Any) -> Joined | Listed | Unlisted:
    async def run() -> Joined | Listed | Unlisted:
        resolver = Resolver(
            {stage.id: stage for stage in stages},
            {"cpu": CpuDevice("cpu", 1 << 20)},
            "cpu",
            allow=Allow(),
            fleet=fleet,
            trust_peers=False,
            in_thread=asyncio.to_thread,
            listing=SourceThreads("listing"),
        )
        return await resolver.resolve(StageRequest(model=str(folder), **request))

    return asyncio.run(run())


def failing(error: Exception) -> Callable[[str, Source, tuple[str, ...]], Listing]:
    def fail(uri: str, source: Source, weights: tuple[str, ...]) -> Listing:
        raise error

    return fail


@pytest.mark.parametrize("state", ["ready", "loading", "queued"])
@pytest.mark.parametrize(
    "error",
    [
        SourceFailed("503"),
        CredentialsRefused("403"),
        UnreadableFile("Permission denied"),
        InvalidRequest("more than 100000 objects"),
        OSError(116, "Stale file handle"),
        RuntimeError("whatever the library of a store raises"),
    ],
)
def test_a_source_that_cannot_be_listed_is_no_answer_whatever_the_reason(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, state: str
) -> None:
    stage = staged(folder, state)
    monkeypatch.setattr(resolving, "list_checkpoint", failing(error))
    found = resolve(folder, stage)
    assert isinstance(found, Joined)
    assert found.stage is stage
    assert found.listing is None
    assert found.unanswered is not None


@pytest.mark.parametrize(
    "error",
    [
        CheckpointNotFound("404"),
        CheckpointChanged("another"),
        AmbiguousCheckpoint("two files"),
        InvalidCheckpoint("a broken index"),
    ],
)
def test_a_source_that_says_that_nothing_usable_is_there_has_answered(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    stage = staged(folder)
    monkeypatch.setattr(resolving, "list_checkpoint", failing(error))
    found = resolve(folder, stage)
    assert isinstance(found, Unlisted)
    assert found.error is error


def test_a_source_that_is_silent_is_waited_for_only_where_something_is_ready(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolving, "_RELIST_DEADLINE", 0.05)
    stage, listing = staged(folder), listed(folder)
    over = asyncio.Event()

    async def silent(self: Resolver, uri: str, weights: tuple[str, ...]) -> tuple[Source, Listing]:
        await over.wait()
        return open_source(uri, Allow()), listing

    monkeypatch.setattr(Resolver, "list", silent)
    found = resolve(folder, stage)
    assert isinstance(found, Joined)
    assert "no answer" in str(found.unanswered)


def test_what_a_source_was_last_seen_to_hold_counts_where_it_does_not_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = staged(folder)
    save_file({"w": numpy.arange(1000) + 1}, folder / "model.safetensors")
    second = staged(folder, "loading")
    second.listed_at = first.listed_at + 1
    monkeypatch.setattr(resolving, "list_checkpoint", failing(SourceFailed("503")))
    found = resolve(folder, first, second)
    assert isinstance(found, Joined)
    assert found.stage is second, "a checkpoint that is known to have been replaced was lent"
    second.state = "failed"
    assert isinstance(resolve(folder, first, second), Unlisted)
    first.listed_at = second.listed_at + 1  # it was put back, and that was seen
    found = resolve(folder, first, second)
    assert isinstance(found, Joined)
    assert found.stage is first


def test_a_request_for_the_origins_bytes_joins_nothing_that_peers_brought_or_may_bring(folder: Path) -> None:
    own = staged(folder)
    found = resolve(folder, own, sources=["origin"])
    assert isinstance(found, Joined)
    assert found.stage is own
    mixed = staged(folder)
    mixed.bytes_read, mixed.peer_bytes = 8000, 1
    trusted = staged(folder)
    trusted.source_kind = "peer"
    for stage in (mixed, trusted):
        assert isinstance(resolve(folder, stage), Joined)
        assert isinstance(resolve(folder, stage, sources=["peer"]), Joined)
        assert isinstance(resolve(folder, stage, sources=["origin"]), Listed)
    coming = staged(folder, "loading")
    assert isinstance(resolve(folder, coming, sources=["origin"]), Joined), "there are no peers here"
    fleet = object()
    assert isinstance(resolve(folder, coming, fleet=fleet, sources=["origin"]), Listed)
    alone = staged(folder, "loading", sources=["origin"])
    assert isinstance(resolve(folder, alone, fleet=fleet, sources=["origin"]), Joined)


def test_a_record_of_before_ctime_was_in_versions_is_of_the_same_files_until_one_of_them_differs(folder: Path) -> None:
    stage = staged(folder)
    assert stage.listing is not None
    before = [file._replace(version=file.version.rpartition("-")[0]) for file in stage.listing.weights]
    stage.listing = replace(stage.listing, identity="as it was computed then", weights=tuple(before))
    found = resolve(folder, stage)
    assert isinstance(found, Joined)
    assert found.listing == listed(folder), "what is there now is not told"
    path = folder / "model.safetensors"
    stamp = path.stat().st_mtime_ns
    save_file({"w": numpy.arange(1000) + 1}, path)
    assert path.stat().st_mtime_ns != stamp
    assert isinstance(resolve(folder, stage), Listed)
    # Once ctime is in its versions, it counts.
    stage = staged(folder)
    path.chmod(0o600 if path.stat().st_mode & 0o77 else 0o644)
    assert isinstance(resolve(folder, stage), Listed)
