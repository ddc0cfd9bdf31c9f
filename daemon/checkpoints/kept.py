"""A checkpoint as it was listed, from what the cache keeps of it: for what has all of its bytes, and no answer from
their origin."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence

from weightd.daemon.checkpoints.cache import Cache
from weightd.daemon.checkpoints.listing import Listing
from weightd.daemon.checkpoints.selection import index_map
from weightd.daemon.errors import InvalidCheckpoint, SourceFailed
from weightd.daemon.sources.base import Reader, Source, SourceFile


def kept_listing(cache: Cache, identity: str) -> Listing | None:
    """What the cache keeps of a listing; None where it keeps nothing."""
    table = cache.kept_listing(identity)
    if table is None:
        return None
    try:
        weights, metadata = (tuple(SourceFile(*file) for file in table[kind]) for kind in ("weights", "metadata"))
        index = table.get("index")
        if index is None:
            return Listing(table["uri"], identity, weights, None, metadata)
        text = cache.kept_bytes(identity, index, 0, next(file.size for file in metadata if file.name == index)) or b""
        # Its shards are in its own folder, or where config.json has named it, in the checkpoint's.
        maps = (index_map(index, text, folder) for folder in (posixpath.dirname(index), ""))
        weight_map = next(found for found in maps if set(found.values()) == {file.name for file in weights})
        return Listing(table["uri"], identity, weights, weight_map, metadata, index)
    except (KeyError, TypeError, StopIteration, InvalidCheckpoint):
        return None


class KeptSource:
    """Headers and configuration from the cache, and everything else from ``origin``, as whose it counts."""

    def __init__(self, origin: Source, cache: Cache, listing: Listing) -> None:
        self.kind = origin.kind
        self.buffered = origin.buffered
        self.max_extent = origin.max_extent
        self.max_runs = origin.max_runs
        self.min_range = origin.min_range
        self.min_gap = origin.min_gap
        self.single = origin.single
        self.partial = origin.partial
        self._origin = origin
        self._cache = cache
        self._listing = listing
        self._is_read = False

    def list(self) -> list[SourceFile]:
        return [*self._listing.weights, *self._listing.metadata]

    def stat(self, name: str) -> SourceFile:
        """As it was listed; as it is now once weights are read after all."""
        known = {file.name: file for file in self.list()}
        return known[name] if name in known and not self._is_read else self._origin.stat(name)

    def read(self, name: str, offset: int, length: int) -> bytes:
        found = self._cache.kept_bytes(self._listing.identity, name, offset, length)
        if found is None:
            raise SourceFailed(f"{self._listing.uri}: {name} is not in the cache, and its origin does not answer")
        return found

    def fetch(self, files: Sequence[SourceFile]) -> None:
        """Nothing of them is read."""

    def reader(self, files: Sequence[SourceFile], *, native: bool = False) -> Reader:
        self._is_read = True
        return self._origin.reader(files, native=native)
