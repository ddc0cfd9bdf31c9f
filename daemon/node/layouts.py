"""Engines' own layouts: what was uploaded, by its key, and whoever waits for one to come. On the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from weightd.daemon.checkpoints.cache import Cache
from weightd.daemon.errors import LayoutDiffers, LayoutInUse, UnknownLayout
from weightd.daemon.layouts.uploaded import Layout, parse_layout
from weightd.daemon.stages.stage import Stage


class Layouts:
    """Kept by ``cache``. ``stages`` are the node's, ``in_thread`` runs what blocks, ``trim`` bounds the cache."""

    def __init__(
        self,
        cache: Cache,
        stages: Mapping[str, Stage],
        in_thread: Callable[..., Awaitable[Any]],
        trim: Callable[[], Awaitable[None]],
    ) -> None:
        self._cache = cache
        self._stages = stages
        self._in_thread = in_thread
        self._trim = trim
        self._writing = asyncio.Lock()
        self._came = asyncio.Event()

    async def put(self, key: str, document: dict[str, Any]) -> Layout:
        """Keep a layout. The same one again changes nothing.

        Raises InvalidRequest, CacheFailed, and LayoutDiffers where another one goes by the key.
        """
        layout: Layout = await self._in_thread(parse_layout, key, document)
        async with self._writing:
            with contextlib.suppress(UnknownLayout):
                here: Layout = await self._in_thread(self._cache.layout, key)
                if here.digest != layout.digest:
                    raise LayoutDiffers(f"layout {key}: another one is there, of digest {here.digest}, this one's is "
                                        f"{layout.digest}")  # fmt: skip
                return here
            await self._in_thread(self._cache.keep_layout, layout, document)
        self._came.set()
        self._came = asyncio.Event()
        await self._trim()
        return layout

    async def get(self, key: str, wait: float = 0) -> Layout:
        """A layout, once it is there. Raises UnknownLayout where none has come within ``wait`` seconds."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait
        while True:
            came = self._came
            try:
                found: Layout = await self._in_thread(self._cache.layout, key)
                return found
            except UnknownLayout:
                if (left := deadline - loop.time()) <= 0:
                    raise
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(came.wait(), left)

    async def all(self, most: int) -> list[Layout]:
        """Those that were used last, at most so many."""
        found = []
        for key in (await self._in_thread(self._cache.layouts))[:most]:
            with contextlib.suppress(UnknownLayout):  # it has gone meanwhile
                found.append(await self.get(key))
        return found

    async def remove(self, key: str) -> None:
        """Keep it no longer. Raises UnknownLayout, LayoutInUse."""
        for stage in self._stages.values():
            if key in stage.request.layouts and (stage.state == "ready" or not stage.finished):
                raise LayoutInUse(f"layout {key}: stage {stage.id} is in it")
        await self._in_thread(self._cache.forget_layout, key)
