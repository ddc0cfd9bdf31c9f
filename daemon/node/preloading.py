"""Staging what is to be preloaded, again and again until it was ready once."""

from __future__ import annotations

import asyncio
import logging
import random

from weightd.daemon.errors import DaemonError, InvalidRequest, NotAllowed
from weightd.daemon.node.preload import Wanted
from weightd.daemon.node.service import Node
from weightd.daemon.stages.stage import Stage

log = logging.getLogger(__name__)

_PAUSE = (1.0, 60.0)
"""Seconds before what has failed is tried again: the first time, and at most."""


class Preloading:
    """Stages a node's preload list, each entry until it was ready once. On the event loop only."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin, in the order of the list."""
        for wanted in self._node.preload.wanted:
            task = asyncio.create_task(self._stage(wanted), name=f"preload {wanted.request.model}")
            self._tasks.append(task)

    async def close(self) -> None:
        """Ask for nothing more; stages that are on their way go on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _stage(self, wanted: Wanted) -> None:
        pause = _PAUSE[0]
        while True:
            wanted.attempts += 1
            try:
                stage, _ = await self._node.stage(wanted.request)
            except (InvalidRequest, NotAllowed) as error:
                wanted.state, wanted.error = "failed", f"{error} (not tried again)"
                log.error("preload: %s: %s", wanted.request.model, error)
                return
            except DaemonError as error:
                wanted.error = str(error)
            except Exception as error:
                log.exception("preload: %s", wanted.request.model)
                wanted.error = f"{type(error).__name__}: {error}"
            else:
                await self._follow(wanted, stage)
                if stage.state in ("ready", "evicted"):
                    wanted.was_ready, wanted.error = True, ""
                    return
                if stage.state == "cancelled":  # somebody wanted it so
                    log.warning("preload: %s was cancelled", wanted.request.model)
                    return
            seconds = pause * random.uniform(0.5, 1.0)
            log.warning("preload: %s: %s; trying again in %.0f s", wanted.request.model, wanted.error, seconds)
            wanted.state = "waiting"
            await asyncio.sleep(seconds)
            pause = min(2 * pause, _PAUSE[1])

    async def _follow(self, wanted: Wanted, stage: Stage) -> None:
        wanted.stage = stage.id
        while True:
            wanted.state, wanted.error = stage.state, str(stage.error or "")
            if stage.finished:
                return
            await stage.changed()
