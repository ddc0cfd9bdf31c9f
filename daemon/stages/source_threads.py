"""Threads that wait for sources, apart from each other: one that says nothing keeps nobody waiting but its own."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

T = TypeVar("T")

_OF_A_KIND = 32
"""Threads for each kind of source."""
_AT_A_PLACE = 16
"""Of those, for each place."""


def place_of(uri: str) -> str:
    """What a URI shares with others that stall when it does: the bucket, or the folder that may be a mount."""
    scheme, _, path = uri.partition("://")
    parts = path.split("/")
    return f"{scheme}://" + ("/".join(parts[:3]) if scheme == "file" else parts[0])


class SourceThreads:
    """Runs what blocks on sources. Make it on the event loop that it is used on."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._turns: dict[str, asyncio.Semaphore] = {}
        self._waiting: dict[str, int] = {}
        """Place → calls that run, or wait for their turn."""

    async def run(self, uri: str, function: Callable[..., T], *arguments: object) -> T:
        """Run what asks the source of ``uri``, once it is this place's turn.

        A turn ends with its call, not with who waits for it: a call that hangs goes on when its waiter is cancelled.
        """
        place = place_of(uri)
        turns = self._turns.setdefault(place, asyncio.Semaphore(_AT_A_PLACE))
        self._waiting[place] = self._waiting.get(place, 0) + 1
        try:
            await turns.acquire()
        except asyncio.CancelledError:
            self._leave(place)
            raise
        context = contextvars.copy_context()  # so that what is logged there is known to be of the stage
        try:
            call = self._pool(place).submit(partial(context.run, function, *arguments))
        except RuntimeError:  # closed meanwhile
            turns.release()
            self._leave(place)
            raise
        call.add_done_callback(lambda _: self._ended(place, turns))
        return await asyncio.wrap_future(call)

    def _ended(self, place: str, turns: asyncio.Semaphore) -> None:
        """A call is over; in whichever thread it was."""

        def give_back() -> None:
            turns.release()
            self._leave(place)

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for a turn any more
            self._loop.call_soon_threadsafe(give_back)

    def _leave(self, place: str) -> None:
        self._waiting[place] -= 1
        if not self._waiting[place]:
            del self._waiting[place], self._turns[place]

    def _pool(self, place: str) -> ThreadPoolExecutor:
        kind = place.partition(":")[0]
        if kind not in self._pools:
            self._pools[kind] = ThreadPoolExecutor(_OF_A_KIND, thread_name_prefix=f"{self._name}-{kind}")
        return self._pools[kind]

    def close(self) -> None:
        """Start nothing any more; what runs is left to end by itself."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
