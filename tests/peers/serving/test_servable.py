"""Which stages peers may read, how much there is of each, and whose identity is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from weightd.daemon.checkpoints.listing import Listing
from weightd.daemon.errors import DeviceFailed, InvalidRequest, UnknownStage
from weightd.daemon.peers.serving.server import Serving
from weightd.daemon.stages.request import parse_request
from weightd.daemon.stages.stage import Stage
from weightd.ipc.errors import CudaError


def made(key: str, state: str = "ready", done: int = 0, total: int = 0, **more: Any) -> Stage:
    weights = more.pop("weights", None)
    listing = Listing("file:///m", f"identity of {key}", (), None, ())
    stage = Stage("file:///m", ["cpu"], parse_request({"model": "/m", "weights": weights}), listing)
    stage.key, stage.bytes_total = key, total
    stage.segments = cast(Any, [object()])
    stage.enter(state)
    if state == "loading":
        stage.fill = cast(Any, SimpleNamespace(account=SimpleNamespace(bytes_read=done)))
    for name, value in more.items():
        setattr(stage, name, value)
    return stage


def serving(*stages: Stage) -> Serving:
    return Serving(
        cast(Any, SimpleNamespace(stages={stage.id: stage for stage in stages})), cast(Any, None), cast(Any, None)
    )


@pytest.mark.parametrize(
    ("stage", "share", "quarters"),
    [
        (lambda: made("k"), 1.0, 1.0),
        (lambda: made("k", total=10), 1.0, 1.0),
        (lambda: made("k", "loading"), 0.0, 0.0),
        (lambda: made("k", "loading", 3, 10), 0.3, 0.25),
        (lambda: made("k", "loading", 5, 10), 0.5, 0.5),
        (lambda: made("k", "loading", 10, 10), 0.99, 0.75),
        (lambda: made("k", "verifying"), None, None),
        (lambda: made("k", "failed"), None, None),
        (lambda: made("k", segments=[]), None, None),
        (lambda: made(""), None, None),
        (lambda: made("k", dismissals=1), None, None),
        (lambda: made("k", revoked_until=5.0), None, None),
        (lambda: made("k", moving="cpu:1"), None, None),
    ],
)
def test_what_is_ready_or_loads_and_is_not_about_to_go_can_be_read_as_far_as_it_is(
    stage: Callable[[], Stage], share: float | None, quarters: float | None
) -> None:
    served = serving(stage())
    assert served.stages() == ({} if share is None else {"k": share})
    assert served.published() == ({} if quarters is None else {"k": quarters})


def test_the_identity_is_that_of_the_latest_stage_of_just_these_weights() -> None:
    one, two, other = made("1"), made("2"), made("3", weights=["b", "a"])
    served = serving(one, two, other, made("4", "failed"))
    assert served.identity_of("file:///m", []) == "identity of 2"
    assert served.identity_of("file:///m", ["a", "b"]) == "identity of 3"
    assert served.identity_of("file:///m", ["a"]) is None
    assert served.identity_of("file:///other", []) is None


def test_who_does_not_listen_is_given_nothing_and_errors_say_whose_they_are() -> None:
    released: list[Any] = []

    def fetch(reader: str, pieces: list[Any], timeout: float) -> int:
        if pieces[0] == "bad":
            raise ValueError("not there")
        if pieces[0] == "broken":
            raise CudaError("illegal address", 700)
        assert (reader, timeout) == ("r", 2.0)
        return 77

    async def within() -> None:
        served = serving()
        offer = SimpleNamespace(window=object(), release=lambda *given: released.append(given), fetch=fetch)
        served._readers.update({"r": cast(Any, offer), "host": cast(Any, SimpleNamespace(window=None))})
        for nobody in ("x", "host"):
            with pytest.raises(UnknownStage):
                await served.fetch(nobody, [], cast(Any, ["piece"]), 2.0)
        assert await served.fetch("r", [5], [], 2.0) is None
        assert await served.fetch("r", [6], cast(Any, ["piece"]), 2.0) == 77
        assert released == [("r", [5]), ("r", [6])]
        with pytest.raises(InvalidRequest, match="not there"):
            await served.fetch("r", [], cast(Any, ["bad"]), 2.0)
        with pytest.raises(DeviceFailed, match="illegal address"):
            await served.fetch("r", [], cast(Any, ["broken"]), 2.0)

    asyncio.run(within())
