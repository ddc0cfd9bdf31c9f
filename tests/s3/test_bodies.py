"""Bodies, their leases, and which thread looks for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.s3.in_process import endpoint
from weightd.daemon.checkpoints.cache import Cache
from weightd.daemon.s3 import bodies
from weightd.daemon.s3.answers import Range
from weightd.daemon.s3.bodies import Bodies, Body
from weightd.daemon.s3.file_map import FileMap, Span
from weightd.daemon.s3.holders import Holder
from weightd.daemon.s3.objects import Found
from weightd.daemon.sources.base import Object, SourceFile
from weightd.daemon.stages.leases import Leases


def test_who_hung_up_before_a_body_is_opened_begins_no_lease_that_nobody_would_end() -> None:
    stage: Any = mock.MagicMock(
        id="st-1", uri="s3://models/m", state="ready", finished=True, revoked_until=None, leases={}, segments=[],
        ledger=None,
    )  # fmt: skip
    stage.request = SimpleNamespace(handle="fd", ranks=[0], sources=("origin",))
    leases = Leases({stage.id: stage}, grace=0, most_per_user=1, changed=lambda: None)
    node: Any = SimpleNamespace(residency=SimpleNamespace(leases=leases), fleet=None)
    found = Found(
        "s3://models/m/a.safetensors",
        Object("m/a.safetensors", 10, "1", 0.0),
        Holder(stage, SourceFile("a.safetensors", 10, "1"), 0),
    )

    async def leases_after(ended: str) -> int:
        maps: Any = mock.MagicMock()
        found_bodies = Bodies(node, mock.MagicMock(), mock.MagicMock(), maps, absent="stage", device=None)
        drawn = asyncio.Event()

        async def draw(*_: object) -> FileMap:
            await drawn.wait()
            return FileMap(b"", [Span(0, 10, 0, 0, 0)], 10)

        maps.of = draw
        body = Body()
        opening = asyncio.create_task(found_bodies.open(found, Range(0, 10, False), body, "127.0.0.1:1"))
        await asyncio.sleep(0)
        if ended == "before":
            found_bodies.end(body)
        drawn.set()
        # Cancelled it would be a moment later, when it has come to its end already.
        await asyncio.gather(opening, return_exceptions=True)
        count = len(stage.leases)
        if ended == "after":
            found_bodies.end(body)
        assert not stage.leases
        return count

    assert asyncio.run(leases_after("after")) == 1
    assert asyncio.run(leases_after("before")) == 0


def test_a_header_is_read_and_cut_in_threads_as_it_may_be_large(tmp_path: Path) -> None:
    threads: list[str] = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            threads.append(threading.current_thread().name)
            return function(*arguments)

        return called

    async def served() -> None:
        async with endpoint(tmp_path) as (_, stage, (host, port)):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(f"GET /weightd/{stage}/m.safetensors HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert body == (tmp_path / "m.safetensors").read_bytes()
            writer.close()

    with (
        mock.patch.object(Cache, "kept_bytes", noted(Cache.kept_bytes)),
        mock.patch.object(FileMap, "parts", noted(FileMap.parts)),
        mock.patch.object(bodies, "_FEW", 0),
    ):
        asyncio.run(asyncio.wait_for(served(), 60))
    assert len(threads) >= 2
    assert threading.main_thread().name not in threads
