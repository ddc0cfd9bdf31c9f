"""What a source of bytes offers. A new kind of source is one new file that offers this, and a line in OPENERS."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from weightd.daemon.errors import CheckpointChanged, CheckpointNotFound, InvalidCheckpoint, NotAllowed
from weightd.daemon.filling.sink import Sink


class SourceFile(NamedTuple):
    """One file or object: ``name`` relative to the checkpoint, ``size`` in bytes, ``version`` changes when it does.

    The version is an object's ETag, a local file's inode, mtime and ctime.
    """

    name: str
    size: int
    version: str


ANSWERS = (CheckpointNotFound, CheckpointChanged, InvalidCheckpoint, NotAllowed)
"""Errors that say what is at a URI: nothing, something else, nothing that can be used, nothing for this daemon to see.
Any other one is no answer, and says nothing of what was there before."""

_WITHOUT_CTIME = re.compile(r"\d+-\d+")


def are_still(kept: Sequence[SourceFile], found: Sequence[SourceFile]) -> bool:
    """Whether these are the files that a record names, as far as it tells: until ctime was in them, the versions of
    local files were their inode and mtime alone."""
    return len(kept) == len(found) and all(
        one == other
        or (
            one[:2] == other[:2]
            and _WITHOUT_CTIME.fullmatch(one.version)
            and other.version.startswith(one.version + "-")
        )
        for one, other in zip(kept, found, strict=True)
    )


def changed(planned: SourceFile, found: SourceFile) -> CheckpointChanged:
    """The error that says how a file differs from what was planned with."""
    return CheckpointChanged(
        f"{planned.name} changed between planning and reading: it had {planned.size} bytes and version "
        f"{planned.version}, now {found.size} and {found.version}: stage it again"
    )


class Reader(Protocol):
    """Moves a stage's bytes. Made for one stage by ``Source.reader``, used by one thread, closed once."""

    def run(self, sink: Sink) -> None:
        """Bring every extent of the sink, each to ``sink.landing(extent)``, and call ``sink.landed(extent, landing)``.

        Blocks. Failures of one extent go through ``sink.failed``, which says when to try again or raises.
        Returns early, leaving extents, where ``sink.stopped`` is set.
        """

    def close(self) -> None:
        """Return when nothing can write to any landing any more, however long that takes."""


class Source(Protocol):
    """A checkpoint's place. Methods block and may be called from many threads at once."""

    kind: str
    """Label in metrics and records: the URI's scheme, or ``peer``."""
    buffered: bool
    """Whether its reads can as well land in a buffer, to be written to segments from there."""
    max_extent: int
    """Longest read, in bytes, that is worth making at once."""
    max_runs: int
    """Destinations that its reader scatters one contiguous read over."""
    min_range: int
    """Shortest read, in bytes, that is worth making on its own."""
    copies: bool
    """Whether a local copy may answer in its place."""

    def list(self, *, anew: bool = False) -> list[SourceFile]:
        """All files below the URI. Raises CheckpointNotFound where there is nothing.

        ``anew``: as the origin has them, where a local copy, which may be less than all, has answered before.
        """

    def stat(self, name: str) -> SourceFile:
        """One file as it is now. Raises CheckpointNotFound."""

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes at ``offset``: for headers and configuration, never for weights."""

    def fetch(self, files: Sequence[SourceFile]) -> None:
        """Before anything of these is read: have them here, where that is how they are read. Raises as ``read``."""

    def reader(self, files: Sequence[SourceFile], *, native: bool = False) -> Reader:
        """A reader for extents whose ``file`` is an index into ``files``. Raises CheckpointChanged.

        ``native``: it has to be one that can write to a GPU's memory.
        """
