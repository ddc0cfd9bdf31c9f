"""Whose turn it is: what may run at the same time, by priority."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable


class PrioritySemaphore:
    """A semaphore whose waiters go in the order of their priority, then of their coming."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._waiting: list[tuple[int, Callable[[], int], Callable[[], bool], asyncio.Future[None]]] = []
        self._order = itertools.count()

    @property
    def free(self) -> bool:
        return self._left > 0 and not self._waiting

    async def acquire(self, priority: Callable[[], int], given_up: Callable[[], bool]) -> None:
        """Wait for a turn; whoever has given up gets one at once, to find out that it does not want it."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((next(self._order), priority, given_up, future))
        self.changed()
        await future

    def release(self) -> None:
        self._left += 1
        self.changed()

    def changed(self) -> None:
        """Hand out what turns there are. Priorities are asked now: they may have been raised since."""
        for waiter in sorted(self._waiting, key=lambda waiter: (not waiter[2](), -waiter[1](), waiter[0])):
            if self._left <= 0 and not waiter[2]():
                break
            self._left -= 1
            self._waiting.remove(waiter)
            waiter[3].set_result(None)
