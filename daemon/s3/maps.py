"""Where the files of stages are in their segments: looked up once for each, in threads."""

from __future__ import annotations

import asyncio
from weakref import WeakKeyDictionary

from weightd.daemon.checkpoints.cache import Cache
from weightd.daemon.errors import CheckpointChanged
from weightd.daemon.s3 import file_map
from weightd.daemon.s3.file_map import FileMap
from weightd.daemon.s3.origins import Origins
from weightd.daemon.sources.uris import Allow, open_source
from weightd.daemon.stages.stage import Stage

_MAX_HEADER = 128 << 20


class Maps:
    """A map of each file that was asked for, as long as its stage is there. On the event loop only."""

    def __init__(self, cache: Cache, origins: Origins, allow: Allow) -> None:
        self._cache = cache
        self._origins = origins
        self._allow = allow
        self._drawn: WeakKeyDictionary[Stage, dict[tuple[int, bool], asyncio.Task[FileMap]]] = WeakKeyDictionary()
        """Stage → (index of a file, whether it was ready) → its map."""

    async def of(self, stage: Stage, file: int) -> FileMap | None:
        """The map of a stage's weights by their index; None where the stage has gone.

        Raises SourceFailed, InvalidCheckpoint, OSError.
        """
        while not stage.finished and stage.fill is None:  # until then it may begin anew, in other memory
            await stage.changed(1.0)
        ready = stage.state == "ready"
        if stage.finished and not ready:
            return None
        maps = self._drawn.setdefault(stage, {})
        if (task := maps.get((file, ready))) is None:
            task = maps[file, ready] = asyncio.ensure_future(self._draw(stage, file, ready))
            task.add_done_callback(lambda task: maps.pop((file, ready)) if _has_failed(task) else None)
        drawn = task.result() if task.done() else await asyncio.shield(task)
        return None if stage.finished and stage.state != "ready" else drawn

    async def _draw(self, stage: Stage, file: int, ready: bool) -> FileMap:
        plan = stage.plan
        if not ready and plan is not None:
            return await self._origins.run(stage.uri, file_map.of_plan, plan, file)
        return await self._origins.run(stage.uri, self._of_manifests, stage, file)

    def _of_manifests(self, stage: Stage, file: int) -> FileMap:
        """A header may be 128 MiB, and has to be read: blocks."""
        assert stage.listing is not None
        name = stage.listing.weights[file].name
        prefix = self._cache.kept_bytes(stage.listing.identity, name, 0, _MAX_HEADER)
        return file_map.of_manifests(stage, file, prefix if prefix is not None else self._read_prefix(stage, file))

    def _read_prefix(self, stage: Stage, file: int) -> bytes:
        assert stage.listing is not None
        source, (name, size, version) = open_source(stage.uri, self._allow), stage.listing.weights[file]
        if source.stat(name).version != version:
            raise CheckpointChanged(f"{stage.uri}: {name} has changed")
        length = int.from_bytes(source.read(name, 0, 8), "little")
        return source.read(name, 0, min(8 + length, size, _MAX_HEADER))


def _has_failed(task: asyncio.Task[FileMap]) -> bool:
    return task.cancelled() or task.exception() is not None
