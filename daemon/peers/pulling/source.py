"""A peer in the origin's place: for nodes without a way there, that were told to trust peers.

It gives what planning needs, the listing, headers and configuration files. Weights come from the fleet as ever.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from weightd.daemon.errors import CheckpointNotFound, SourceFailed
from weightd.daemon.filling.sink import Sink
from weightd.daemon.peers.finding.fleet import Fleet
from weightd.daemon.sources.base import Reader, SourceFile, is_file_name
from weightd.daemon.sources.object_store import MAX_OBJECTS

if TYPE_CHECKING:
    import httpx

_MAX_LISTING_BYTES = 64 << 20
_ASKED = 16
"""Peers that are asked for a listing, at most."""


def open_source(uri: str, weights: Sequence[str], fleet: Fleet) -> PeerSource:
    """The first peer that has a stage of a URI, of these weights (none: by the rule). Raises SourceFailed."""
    for name, _ in list(fleet.members())[:_ASKED]:
        try:
            return PeerSource(uri, weights, fleet, name)
        except SourceFailed:
            continue
    raise SourceFailed(f"{uri}: its origin does not answer, and no peer has it")


class PeerSource:
    """One peer that has a stage of a URI. Raises SourceFailed where it has none, or does not answer as expected."""

    kind = "peer"
    buffered = False
    max_extent = 1 << 30
    max_runs = 1
    min_range = 1 << 18
    min_gap = 0
    partial = ""

    def __init__(self, uri: str, weights: Sequence[str], fleet: Fleet, peer: str) -> None:
        self.uri = uri
        name = uri.partition("@")[0].rpartition("/")[2]
        self.single = name if is_file_name(name) else None
        self._fleet = fleet
        self._peer = peer
        found = self._get("/peer/v1/listing", _MAX_LISTING_BYTES, uri=uri, weights=tuple(weights))
        try:
            table = json.loads(found)
            # Peers of versions that did not choose say nothing of what was wanted.
            known = table["uri"] == uri and table.get("wanted", []) == sorted(weights)
            if not known or len(table["weights"]) + len(table["metadata"]) > MAX_OBJECTS:
                raise ValueError("not the listing that was asked for")
            self._identity = str(table["identity"])
            self._files = sorted(_file(*entry) for entry in [*table["weights"], *table["metadata"]])
        except (ValueError, TypeError, KeyError) as error:
            raise SourceFailed(f"{uri}: peer {peer} answers with no listing: {error!r}"[:500]) from None

    def list(self) -> list[SourceFile]:
        return self._files

    def stat(self, name: str) -> SourceFile:
        for file in self._files:
            if file.name == name:
                return file
        raise CheckpointNotFound(f"{self.uri}/{name}: peer {self._peer} knows no such file")

    def read(self, name: str, offset: int, length: int) -> bytes:
        if not length:
            return b""
        return self._get(
            "/peer/v1/file", length, identity=self._identity, name=name, offset=str(offset), length=str(length)
        )

    def fetch(self, files: Sequence[SourceFile]) -> None:
        """They are read where they are."""

    def reader(self, files: Sequence[SourceFile], *, native: bool = False) -> Reader:
        return _NoOrigin(self.uri)

    def _get(self, path: str, most: int, **params: str | Sequence[str]) -> bytes:
        import httpx

        try:
            with self._fleet.client(self._peer) as client, client.stream("GET", path, params=params) as answer:
                return _bounded(answer, most)
        except (httpx.HTTPError, ValueError) as error:
            raise SourceFailed(f"{self.uri}: peer {self._peer}: {error!r}"[:500]) from None


class _NoOrigin:
    """Reads no weights: they have to come from peers."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def run(self, sink: Sink) -> NoReturn:
        raise SourceFailed(f"{self._uri}: its origin cannot be reached, and peers have not all of it")

    def close(self) -> None:
        """There is nothing."""


def _bounded(answer: httpx.Response, most: int) -> bytes:
    answer.raise_for_status()
    found = b""
    for part in answer.iter_raw():
        found += part
        if len(found) > most:
            raise ValueError(f"more than the {most} bytes that were asked for")
    return found


def _file(name: object, size: object, version: object) -> SourceFile:
    if not isinstance(name, str) or not isinstance(version, str) or not isinstance(size, int) or size < 0:
        raise ValueError(f"a file {str((name, size, version))[:200]}")
    return SourceFile(name, size, version)
