"""uvicorn's server, as the daemon runs it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn


class Server(uvicorn.Server):
    """uvicorn without its own signal handling, which ends the process by the signal even after a clean stop.

    And without the tick by which it looks ten times a second whether to stop: an idle daemon sleeps. ``on_end`` ends
    answers that would go on by themselves, and which it would wait for. ``options`` are those of ``uvicorn.Config``.
    """

    def __init__(self, app: Any, *, on_end: Callable[[], None] = lambda: None, **options: Any) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,  # the tick would keep it up to date
                **options,
            )
        )
        self._on_end = on_end
        self._ending = asyncio.Event()

    async def main_loop(self) -> None:
        await self._ending.wait()

    def end(self) -> None:
        self.should_exit = True
        self._on_end()
        self._ending.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
