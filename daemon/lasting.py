"""Tasks that last as long as the process, which would live on without one of them and not do its work.

Crash-only: what ends of an exception that nobody expected ends the process, and whoever started it starts the next one.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from typing import NoReturn, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

EX_SOFTWARE = 70
"""Exit code of a process that is of no use any more: sysexits.h."""


def _told_nobody(reason: str) -> None:
    """Until somebody is to be told."""


_tell: Callable[[str], None] = _told_nobody


def before_the_end(tell: Callable[[str], None]) -> None:
    """Have this told why the process ends, just before it does. One only: the last one that was given."""
    global _tell
    _tell = tell


def lasting(coroutine: Coroutine[None, None, T], name: str) -> asyncio.Task[T]:
    """Run it as a task without which the process ends. It may be cancelled, and it may return."""
    task = asyncio.create_task(coroutine, name=name)
    task.add_done_callback(_ended)
    return task


def _ended(task: asyncio.Task[T]) -> None:
    if task.cancelled() or (error := task.exception()) is None:
        return
    end(f"{task.get_name()} has ended, and with it this process: {type(error).__name__}: {error}", error)


def end(reason: str, error: BaseException | None = None) -> NoReturn:
    """End the process at once: nothing is tidied up, as after a kill."""
    try:
        log.critical("%s", reason, exc_info=error)
        _tell(reason)
        logging.shutdown()
    finally:
        os._exit(EX_SOFTWARE)
