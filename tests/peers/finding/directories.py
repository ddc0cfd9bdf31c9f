"""Directories that a test opens, and what they come to know."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from weightd.daemon.peers.finding.directory import Directory, open_directory

DEADLINE = 60.0


async def eventually(condition: Callable[[], Any], what: str, deadline: float = DEADLINE) -> Any:
    """Wait until a condition holds; returns its value."""
    end = time.monotonic() + deadline
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {deadline} s: {what}"
        await asyncio.sleep(0.005)
    return value


@contextlib.asynccontextmanager
async def opened(text: str, node: str = "me", address: str = "127.0.0.1:7401") -> AsyncIterator[Directory]:
    async with started(open_directory(text, node=node, address=address)) as directory:
        yield directory


@contextlib.asynccontextmanager
async def started(directory: Directory) -> AsyncIterator[Directory]:
    await directory.start()
    try:
        yield directory
    finally:
        await directory.close()


def addresses(directory: Directory) -> list[str]:
    return [member.address for member in directory.members()]


def stages(directory: Directory, node: str) -> Mapping[str, float] | None:
    """What a node has, as the directory knows it; None where it does not know the node."""
    return next((member.stages for member in directory.members() if member.node == node), None)
