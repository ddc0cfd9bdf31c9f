"""Planning a stage of the daemon before again: how long its source is waited for, and when it is done without."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.filling.fills import Stored, store, tensor
from weightd.daemon.checkpoints.cache import Cache
from weightd.daemon.checkpoints.kept import KeptSource
from weightd.daemon.errors import CheckpointChanged, CheckpointNotFound, InvalidRequest, SourceFailed
from weightd.daemon.filling.ledger import Ledger
from weightd.daemon.stages import planner as planner_module
from weightd.daemon.stages.planner import Planner
from weightd.daemon.stages.planning import make_plan
from weightd.daemon.stages.request import parse_request
from weightd.daemon.stages.stage import Stage

AWAY = SourceFailed("503")


class Time:
    """In place of ``time``: a second goes by between two looks."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


class House:
    """A planner, a stage, and a source that answers as it is told."""

    def __init__(self, folder: Path, deadline: float) -> None:
        self.stored: Stored = store(folder / "m", {"a": tensor("U8", (1000,))})
        self.cache = Cache(folder / "cache")
        self.planner = Planner(self.cache, deadline, asyncio.to_thread)
        self.asked: list[tuple[str, tuple[str, ...]]] = []
        self.answers: list[Any] = []
        self.reopened: list[str] = []

    def stage(self, *, whole: bool = False, **request: Any) -> Stage:
        listing = self.stored.checkpoint.listing
        stage = Stage(listing.uri, ["cpu"], parse_request({"model": "/m", **request}), listing)
        stage.ledger = Ledger.private(2, 0)
        stage.ledger.landed[0] = 1
        stage.ledger.landed[1] = int(whole)
        return stage

    async def relist(self, uri: str, files: tuple[str, ...]) -> Any:
        self.asked.append((uri, files))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        if callable(answer):
            return await answer()
        return self.stored.source, answer

    def reopen(self, uri: str) -> Any:
        self.reopened.append(uri)
        return self.stored.source

    def keep(self) -> None:
        request = parse_request({"model": "/m"})
        self.cache.keep_headers(
            make_plan(self.stored.source, self.stored.checkpoint.listing, request, self.cache).checkpoint
        )

    async def plan(self, stage: Stage) -> Any:
        async with asyncio.timeout(60):
            return await self.planner.plan_again(stage, self.relist, self.reopen)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(planner_module, "retry_pause", lambda attempt: 0.5)

    def run(test: Callable[[House], Any], deadline: float = 1000.0) -> None:
        async def within() -> None:
            house = House(tmp_path, deadline)
            try:
                await test(house)
            finally:
                house.planner.close()

        asyncio.run(within())

    return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr(planner_module, "time", clock)
    return clock


def test_a_source_that_is_away_is_asked_again_until_it_answers_and_that_is_said_once(
    run: Callable[..., None], clock: Time, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(house: House) -> None:
        house.answers = [AWAY, AWAY, AWAY, house.stored.checkpoint.listing]
        source, plan = await house.plan(house.stage(weights=["b", "a"]))
        assert source is house.stored.source
        assert [info.tensors for info in plan.infos] == [1]
        assert house.asked == [(house.stored.checkpoint.listing.uri, ("a", "b"))] * 4
        assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
            "its source does not answer, it goes on once that does: 503"
        ]
        assert house.reopened == []

    run(test)


def test_what_lacks_bytes_is_given_up_after_as_long_as_a_failing_read_is(run: Callable[..., None], clock: Time) -> None:
    async def test(house: House) -> None:
        house.answers = [AWAY]
        with pytest.raises(SourceFailed, match=r"503; given up after (\d) tries in (\d+).0 s \(WEIGHTD") as error:
            await house.plan(house.stage())
        tries = error.value.details["attempts"]
        assert tries == len(house.asked)
        assert tries > 2
        assert f"after {tries} tries" in str(error.value)

    run(test, 10.0)


def test_one_that_says_nothing_does_not_answer(run: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner_module, "_ASKED", 0.01)

    async def test(house: House) -> None:
        house.answers = [asyncio.Event().wait]
        with pytest.raises(SourceFailed, match=r"its source does not answer; given up after 1 tries in 0.0 s"):
            await house.plan(house.stage())

    run(test, 0.0)


@pytest.mark.parametrize("whole", [False, True])
def test_what_a_source_says_for_certain_is_believed_at_once(whole: bool, run: Callable[..., None]) -> None:
    async def test(house: House) -> None:
        another = replace(house.stored.checkpoint.listing, identity="another", weights=())
        for answer, kind in (
            (CheckpointNotFound("404"), CheckpointNotFound),
            (InvalidRequest("no"), InvalidRequest),
            (another, CheckpointChanged),
        ):
            house.answers = [answer]
            with pytest.raises(kind):
                await house.plan(house.stage(whole=whole))
        assert len(house.asked) == 3

    run(test)


def test_a_stage_that_ends_meanwhile_is_not_planned(run: Callable[..., None]) -> None:
    async def test(house: House) -> None:
        stage = house.stage()

        async def ends() -> Any:
            stage.enter("cancelled")
            raise AWAY

        house.answers = [ends]
        assert await house.plan(stage) is None
        later, asked = house.stage(), asyncio.Event()

        async def is_away() -> Any:
            asked.set()
            raise AWAY

        house.answers = [is_away]
        planning = asyncio.create_task(house.plan(later))
        await asked.wait()
        later.enter("cancelled")
        assert await planning is None

    run(test)


def test_what_lacks_no_byte_is_finished_without_its_source_from_what_is_kept(
    run: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    async def test(house: House) -> None:
        house.keep()
        house.answers = [AWAY]
        stage = house.stage(whole=True)
        stage.listing = replace(house.stored.checkpoint.listing, rule="the rule")
        source, plan = await house.plan(stage)
        assert isinstance(source, KeptSource)
        assert (plan.checkpoint.listing.rule, len(house.asked)) == ("the rule", 1)
        assert plan.checkpoint.tensors == house.stored.checkpoint.tensors
        assert house.reopened == [stage.uri]
        assert "every byte is here, it is finished without: 503" in caplog.text

    run(test)


def test_what_cannot_be_finished_without_waits_for_its_source(run: Callable[..., None]) -> None:
    async def test(house: House) -> None:
        for request, keeps in ({}, False), ({"expect_digest": {"0.safetensors": "ab" * 32}}, True):
            if keeps:
                house.keep()
            house.answers = [AWAY, house.stored.checkpoint.listing]
            source, _ = await house.plan(house.stage(whole=True, **request))
            assert source is house.stored.source
        assert len(house.asked) == 4
        lacks = house.stage()
        house.answers = [AWAY, house.stored.checkpoint.listing]
        source, _ = await house.plan(lacks)
        assert source is house.stored.source, "it lacks bytes"
        assert len(house.reopened) == 1, "of what is kept no SHA-256 is known any more"

    run(test)
