"""Origins as a whole, bucket by bucket: what is stored under any key, checkpoint or not, and since when."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from weightd.daemon.errors import CheckpointChanged, CheckpointNotFound
from weightd.daemon.sources.base import Object, Source
from weightd.daemon.sources.uris import Allow, open_source


class Bucket(Protocol):
    """What is stored at one origin. Methods block."""

    def head(self, key: str) -> Object:
        """One object. Raises CheckpointNotFound, and what asking the origin raises."""

    def objects(self, prefix: str, after: str) -> Iterator[Object]:
        """Objects sorted by key: at least those whose keys begin with ``prefix`` and follow ``after``."""

    def read(self, stored: Object, first: int, count: int) -> bytes:
        """Bytes of an object. Raises CheckpointChanged where it is not that one any more, or ends before."""

    def level(self, folder: str) -> list[Object]:
        """What is directly in a folder (empty, or ending with a slash), sorted; folders as objects of no size whose
        keys end with a slash."""


def open_bucket(root: str, allow: Allow) -> Bucket:
    """The bucket at ``s3://BUCKET``, ``gs://BUCKET``, ``az://CONTAINER``, ``hf://ORG/NAME`` or in a local folder."""
    if root.startswith(("hf://", "file://")):
        return _Listed(open_source(root, allow))
    from weightd.daemon.sources.object_store import StoredObjects

    return StoredObjects(root)


class _Listed:
    """A source whose list is short enough to be taken as a whole each time."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def head(self, key: str) -> Object:
        for found in self.objects("", ""):
            if found.key == key:
                return found
        raise CheckpointNotFound(f"{key}: not found")

    def objects(self, prefix: str, after: str) -> Iterator[Object]:
        yield from sorted(Object(file.name, file.size, file.version, 0.0) for file in self._source.list())

    def read(self, stored: Object, first: int, count: int) -> bytes:
        found = self.head(stored.key)
        data = self._source.read(stored.key, first, count)
        if len(data) != count or found.version != stored.version:
            raise CheckpointChanged(f"{stored.key} has changed meanwhile")
        return data

    def level(self, folder: str) -> list[Object]:
        return one_level(self.objects(folder, ""), folder)


def one_level(objects: Iterator[Object], folder: str) -> list[Object]:
    """Of ``objects`` those directly in a folder, and its folders."""
    found: dict[str, Object] = {}
    for stored in objects:
        if stored.key.startswith(folder):
            name, slash, _ = stored.key[len(folder) :].partition("/")
            key = folder + name + slash
            found[key] = Object(key, 0, "", 0.0) if slash else stored
    return [found[key] for key in sorted(found)]
