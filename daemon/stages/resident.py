"""A checkpoint that is in memory already, as the source of another layout of it: its origin is not read again."""

from __future__ import annotations

import bisect
import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from weightd.daemon.errors import UnknownStage
from weightd.daemon.filling.sink import Landing, Sink
from weightd.daemon.layouts.extents import Extent
from weightd.daemon.sources.base import Reader, Source, SourceFile
from weightd.daemon.sources.reading import read_in_threads
from weightd.daemon.stages.planning import Plan
from weightd.daemon.stages.stage import Stage

KIND = "resident"


class Whole(NamedTuple):
    """A tensor that lies whole in a segment (its index): its bytes in the file, and where they are."""

    start: int
    end: int
    segment: int
    offset: int


class ResidentSource:
    """Weights from the segments of a ready stage, all else from ``origin``. Close it."""

    kind = KIND
    buffered = False
    max_extent = 8 << 20
    max_runs = 64
    min_range = 16 << 10
    min_gap = 0

    def __init__(self, origin: Source, stage: Stage, held: Mapping[int, Sequence[Whole]]) -> None:
        """``held`` has what is wanted of each file, in its order. On the event loop, while the stage is ready."""
        self.single = origin.single
        self.partial = origin.partial
        self._origin = origin
        self._held = held
        # Descriptors of its own: memory that is read stays, whatever becomes of the stage.
        self._fds = [segment.lend() for segment in stage.segments]

    def list(self) -> list[SourceFile]:
        return self._origin.list()

    def stat(self, name: str) -> SourceFile:
        return self._origin.stat(name)

    def read(self, name: str, offset: int, length: int) -> bytes:
        return self._origin.read(name, offset, length)

    def fetch(self, files: Sequence[SourceFile]) -> None:
        """Nothing of them is read."""

    def reader(self, files: Sequence[SourceFile], *, native: bool = False) -> Reader:
        return _ResidentReader(self._held, self._fds)

    def close(self) -> None:
        """Let the memory go, once nothing reads from it."""
        while self._fds:
            os.close(self._fds.pop())


def candidates(stages: Iterable[Stage], stage: Stage) -> list[Stage]:
    """Ready stages in host memory of the same checkpoint as it is stored. On the event loop."""
    assert stage.listing is not None
    what = stage.uri, stage.listing.identity
    return [
        other
        for other in stages
        if other.state == "ready"
        and not other.request.layouts
        and is_lendable(other)
        and other.listing is not None
        and (other.uri, other.listing.identity) == what
        and not any(segment.device.uuid for segment in other.segments)
    ]


def is_lendable(stage: Stage) -> bool:
    """Whether a stage is there to be read from now on."""
    return stage.state == "ready" and not stage.moving and stage.revoked_until is None


def held(stages: Sequence[Stage], plan: Plan, *, whole: bool) -> tuple[Stage, dict[int, list[Whole]]] | None:
    """The first of these that has every tensor that a plan wants, or with ``whole`` all of them; and by file where.

    None: none has. In a thread: there may be many tensors.
    """
    tensors = plan.checkpoint.tensors
    wanted = {copy.tensor for recipe in plan.recipes for copy in recipe.copies}
    if whole:
        wanted.update(range(len(tensors)))
    wanted = {index for index in wanted if tensors[index].nbytes}
    number = {tensor.name: index for index, tensor in enumerate(tensors)}
    for stage in stages:
        found: dict[int, Whole] = {}
        with contextlib.suppress(UnknownStage):  # it goes meanwhile
            for segment, sealed in enumerate(stage.manifests):
                for entry in sealed.read()[0]:
                    index = number.get(entry.name, -1)
                    tensor = tensors[index]
                    if index >= 0 and (entry.dtype, tuple(entry.shape)) == (tensor.dtype, tuple(tensor.shape)):
                        found[index] = Whole(tensor.start, tensor.start + tensor.nbytes, segment, entry.offset)
            if wanted <= found.keys():
                files: dict[int, list[Whole]] = {}
                for index in sorted(wanted, key=lambda index: tensors[index].start):
                    files.setdefault(tensors[index].file, []).append(found[index])
                return stage, files
    return None


class _ResidentReader:
    """Threads that take extents from the sink, and copy them from memory to where they belong."""

    def __init__(self, held: Mapping[int, Sequence[Whole]], fds: Sequence[int]) -> None:
        self._held = held
        self._fds = fds
        self._starts = {file: [whole.start for whole in of] for file, of in held.items()}

    def run(self, sink: Sink) -> None:
        read_in_threads(sink, "resident", partial(self._bring, sink))

    def _bring(self, sink: Sink, extent: Extent) -> None:
        landing = sink.landing(extent)
        if landing is None:
            return
        with sink.phase("source"):
            self._copy(extent, landing)
        sink.landed(extent, landing)

    def _copy(self, extent: Extent, landing: Landing) -> None:
        position = extent.offset
        for view in landing.views:
            done = 0
            while done < len(view):
                tensor = self._at(extent.file, position)
                left = min(len(view) - done, tensor.end - position)
                offset = tensor.offset + position - tensor.start
                count = os.preadv(self._fds[tensor.segment], [view[done : done + left]], offset)
                assert count, "a segment is as long as its layout"
                done += count
                position += count

    def _at(self, file: int, position: int) -> Whole:
        """The tensor that a byte of a file is of: extents bring no others than those that are wanted."""
        return self._held[file][bisect.bisect_right(self._starts[file], position) - 1]

    def close(self) -> None:
        """Nothing writes once ``run`` has returned."""
