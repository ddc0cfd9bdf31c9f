"""What a source of bytes offers. A new kind of source is one new file that offers this, and a line in OPENERS."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from weightd.daemon.errors import (
    AmbiguousCheckpoint,
    CheckpointChanged,
    CheckpointNotFound,
    InvalidCheckpoint,
    NotAllowed,
)
from weightd.daemon.filling.sink import Sink


class SourceFile(NamedTuple):
    """One file or object: ``name`` relative to the checkpoint, ``size`` in bytes, ``version`` changes when it does.

    The version is an object's ETag, a local file's inode, mtime and ctime.
    """

    name: str
    size: int
    version: str


class Object(NamedTuple):
    """One stored object: ``size`` in bytes, ``version`` as ``SourceFile`` has it, ``modified`` in seconds since the
    epoch; 0 where that is not known."""

    key: str
    size: int
    version: str
    modified: float


ANSWERS = (CheckpointNotFound, CheckpointChanged, AmbiguousCheckpoint, InvalidCheckpoint, NotAllowed)
"""Errors that say what is at a URI: nothing, something else, nothing that can be used, nothing for this daemon to see.
Any other one is no answer, and says nothing of what was there before."""

_INDEX = re.compile(r"(?:.*/)?[^/]+\.safetensors\.index(?:\.[^/.]+)*\.json")
_WITHOUT_CTIME = re.compile(r"\d+-\d+")


def is_index(name: str) -> bool:
    """Whether a file says which tensor is in which, by its name; variants' end in ``.index.VARIANT.json``."""
    return _INDEX.fullmatch(name) is not None


def is_file_name(path: str) -> bool:
    """Whether a path without folders behind it names one file of a checkpoint, not a checkpoint's folder."""
    return path.endswith(".safetensors") or is_index(path)


def is_hidden(name: str) -> bool:
    """Whether a file is in a hidden folder (``.git/``), which holds nothing of a checkpoint."""
    return any(part.startswith(".") for part in name.split("/")[:-1])


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
    min_gap: int
    """Bytes between rows that are worth leaving out of a read; 0 where it reads but contiguous ranges."""
    single: str | None
    """The file that the URI names, where it names one: an index is listed with its folder, weights alone."""
    partial: str
    """Why what was listed may be less than all, in words: a local copy answered. Empty where it is all."""

    def list(self) -> list[SourceFile]:
        """All files below the URI that are in no hidden folder. Raises CheckpointNotFound where there is nothing."""

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
