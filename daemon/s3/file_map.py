"""Where the bytes of a checkpoint's file are in a stage's segments."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from weightd.daemon.checkpoints.header import parse_header
from weightd.daemon.layouts.digests import LEAF, leaf_count
from weightd.daemon.stages.planning import Plan
from weightd.daemon.stages.stage import Stage


class Span(NamedTuple):
    """Bytes ``start`` to ``end`` of a file, whole tensors, which lie at ``offset`` in a segment (its index).

    ``entry`` is the tensor's, the first one's where there are several: so one each until all are verified.
    """

    start: int
    end: int
    segment: int
    entry: int
    offset: int


class Held(NamedTuple):
    """Bytes of a file that a segment holds: ``nbytes`` of them at ``offset``, ``at`` bytes into ``entry``."""

    segment: int
    entry: int
    at: int
    offset: int
    nbytes: int


class Lacking(NamedTuple):
    """Bytes of a file that no segment holds as they are: ``nbytes`` at ``start`` of the file."""

    start: int
    nbytes: int


class FileMap:
    """One file: its bytes in front of the first tensor, and which of its tensors are held whole, where."""

    def __init__(self, prefix: bytes, spans: Sequence[Span], size: int) -> None:
        self.prefix = prefix
        self.size = size
        self._spans = spans
        self._starts = [span.start for span in spans]
        self._ends = [span.end for span in spans]

    def count(self, first: int, nbytes: int) -> int:
        """How many tensors ``nbytes`` bytes from ``first`` on are of, of those that are held."""
        return bisect.bisect_left(self._starts, first + nbytes) - bisect.bisect_right(self._ends, first)

    def parts(self, first: int, nbytes: int) -> Iterator[memoryview | Held | Lacking]:
        """What ``nbytes`` bytes from ``first`` on are, in order, without a gap."""
        end = first + nbytes
        if first < len(self.prefix):
            yield memoryview(self.prefix)[first : min(end, len(self.prefix))]
            first = min(end, len(self.prefix))
        for span in self._spans[bisect.bisect_right(self._ends, first) :]:
            if first >= end or span.start >= end:
                break
            if span.start > first:
                yield Lacking(first, span.start - first)
                first = span.start
            taken = min(end, span.end) - first
            at = first - span.start
            yield Held(span.segment, span.entry, at, span.offset + at, taken)
            first += taken
        if first < end:
            yield Lacking(first, end - first)


def of_plan(plan: Plan, file: int) -> FileMap:
    """Of a stage that is planned and not ready yet; ``file`` is an index into its listing's weights."""
    tensors = plan.checkpoint.tensors
    found: dict[int, Span] = {}
    for segment, recipe in enumerate(plan.recipes):
        for copy in recipe.copies:
            tensor, entry = tensors[copy.tensor], recipe.entries[copy.entry]
            if tensor.file == file and copy.source is None and copy.target is None and tensor.nbytes:
                end = tensor.start + tensor.nbytes
                found.setdefault(tensor.start, Span(tensor.start, end, segment, copy.entry, entry.offset))
    size = plan.checkpoint.listing.weights[file].size
    return FileMap(plan.checkpoint.prefixes[file], [found[start] for start in sorted(found)], size)


def of_manifests(stage: Stage, file: int, prefix: bytes) -> FileMap:
    """Of a ready stage. ``prefix``: the file's length and header. Raises UnknownStage, InvalidCheckpoint."""
    assert stage.listing is not None
    if stage.request.layouts:
        return FileMap(prefix, [], stage.listing.weights[file].size)  # names there say nothing of what was stored
    name, size, _ = stage.listing.weights[file]
    stored = {tensor.name: tensor for tensor in parse_header(name, file, prefix[8:], size)}
    found: dict[int, Span] = {}
    for segment, sealed in enumerate(stage.manifests):
        manifest, files = sealed.read()
        for index, (tensor_name, of) in enumerate(zip(manifest.names, files, strict=True)):
            tensor = stored.get(tensor_name) if of == file else None
            if tensor is None or not tensor.nbytes or tensor.start in found:
                continue
            entry = manifest.entry(index)
            if (entry.dtype, entry.shape) == (tensor.dtype, tuple(tensor.shape)):
                end = tensor.start + tensor.nbytes
                found[tensor.start] = Span(tensor.start, end, segment, index, entry.offset)
    return FileMap(prefix, list(_joined(found[start] for start in sorted(found))), size)


def _joined(spans: Iterable[Span]) -> Iterator[Span]:
    """Tensors that follow each other in the file and in a segment as one: they are sent by fewer calls."""
    last: Span | None = None
    for span in spans:
        if last is not None and (last.end, last.segment, last.offset + last.end - last.start) == (
            span.start, span.segment, span.offset,
        ):  # fmt: skip
            last = last._replace(end=span.end)
            continue
        if last is not None:
            yield last
        last = span
    if last is not None:
        yield last


def verified(stage: Stage, held: Held, *, by_leaf: bool) -> int:
    """How many bytes of ``held``, from its first on, are there and were verified. Callable from any thread.

    ``by_leaf``: what was verified of a tensor counts before the rest of it is there. Not where bytes may come from
    peers: until a whole tensor was announced, what they brought may still be taken back.
    """
    if stage.state == "ready":
        return held.nbytes
    fill = stage.fill
    if fill is None or stage.request.expect_digest is not None:
        return 0
    if not by_leaf:
        return held.nbytes if held.entry in stage.verified[held.segment] else 0
    account = fill.account
    first = account.leaf_starts(held.segment)[held.entry]
    leaf, end = held.at // LEAF, leaf_count(held.at + held.nbytes)
    lacks = account.there[held.segment].find(0, first + leaf, first + end)
    there = end if lacks < 0 else lacks - first
    return max(0, min(held.nbytes, there * LEAF - held.at))
