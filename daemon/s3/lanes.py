"""Threads with an event loop each, in which connections are served, and how they ask the daemon's own loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Home:
    """The daemon's own loop, as other threads reach it. Made there."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def tell(self, what: Callable[[], object]) -> None:
        """Have something done there."""
        with contextlib.suppress(RuntimeError):  # it is over
            self._loop.call_soon_threadsafe(what)

    async def ask(self, what: Coroutine[Any, Any, T]) -> T:
        """Have something found there."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(what, self._loop))


class Lane:
    """A thread with an event loop, and what runs there."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def begin(self, what: Coroutine[Any, Any, None]) -> None:
        """Run something there. From any thread."""

        def begin() -> None:
            task = self._loop.create_task(what)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self._loop.call_soon_threadsafe(begin)

    def close(self) -> None:
        """Cancel what runs there, and end."""

        def end() -> None:
            for task in self._tasks:
                task.cancel()
            self._loop.call_later(0.1, self._loop.stop)

        self._loop.call_soon_threadsafe(end)
