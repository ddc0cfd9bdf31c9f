"""What the daemon stages by itself as it starts, and whether it has: until then it is not ready."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from weightd.daemon.errors import DaemonError, InvalidRequest, NotAllowed
from weightd.daemon.stages.request import StageRequest, describe_errors

if TYPE_CHECKING:
    from weightd.daemon.node.service import Node
    from weightd.daemon.stages.stage import Stage

log = logging.getLogger(__name__)

_MAX_BYTES = 16 << 20
_REQUESTS: TypeAdapter[list[StageRequest]] = TypeAdapter(list[StageRequest])
_PAUSE = (1.0, 60.0)
"""Seconds before what has failed is tried again: the first time, and at most."""


def read(text: str) -> list[StageRequest]:
    """The stage requests that the setting ``preload`` means: a JSON array, or the path of a file with one.

    Raises InvalidRequest, which says what is wrong with which of them.
    """
    if not text.strip():
        return []
    where = "preload"
    if not text.lstrip().startswith("["):
        where = f"preload: {text}"
        try:
            with Path(text).open("rb") as file:
                content = file.read(_MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InvalidRequest(
                f"{where}: neither a JSON array of stage requests nor a file with one: {reason}"
            ) from None
        if len(content) > _MAX_BYTES:
            raise InvalidRequest(f"{where}: more than {_MAX_BYTES} bytes")
        text = content.decode(errors="replace")
    try:
        requests = _REQUESTS.validate_python(json.loads(text))
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"{where}: not JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest(f"{where}: nested too deeply") from None
    except ValidationError as error:
        raise InvalidRequest(f"{where}: {'; '.join(describe_errors(list(error.errors())))}") from None
    return requests


@dataclass
class Wanted:
    """One entry of the list, and how far it is."""

    request: StageRequest
    state: str = "waiting"
    """Of its stage; ``waiting`` before there is one, and before the next try."""
    stage: str | None = None
    """Id of its stage, once there is one."""
    attempts: int = 0
    error: str = ""
    """Why it is not ready, where it has failed."""
    was_ready: bool = field(default=False, repr=False)
    """Once is enough: what becomes of the stage later is a matter of policy, and no reason to take engines down."""

    @property
    def why_not(self) -> str:
        return f"{self.request.model}: {self.state}" + (f", {self.error}" if self.error else "")


class Preload:
    """Stages a list of requests, each until it was ready once. On the event loop only."""

    def __init__(self, node: Node, requests: Sequence[StageRequest], problem: str = "") -> None:
        """``problem`` is why there is no list, where there should be one."""
        self.wanted = [Wanted(request) for request in requests]
        self._problem = problem
        self._node = node
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def missing(self) -> list[str]:
        """What is not ready and was not since the daemon started, each with the reason; empty where the node is."""
        missing = [wanted.why_not for wanted in self.wanted if not wanted.was_ready]
        return [self._problem, *missing] if self._problem else missing

    def start(self) -> None:
        """Begin, in the order of the list."""
        self._tasks = [
            asyncio.create_task(self._stage(wanted), name=f"preload {wanted.request.model}") for wanted in self.wanted
        ]

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
