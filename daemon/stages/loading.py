"""Loading a planned stage: extents → filled, verified, sealed segments.

Blocks, in threads; the scheduler decides when.
"""

from __future__ import annotations

import itertools
import logging
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from weightd.daemon.checkpoints.cache import Cache
from weightd.daemon.devices.base import Device, Segment
from weightd.daemon.errors import (
    Cancelled,
    CheckpointChanged,
    CheckpointNotFound,
    CredentialsRefused,
    DaemonError,
    DigestMismatch,
)
from weightd.daemon.filling.account import ledger_for
from weightd.daemon.filling.fill import Fill, retry_pause
from weightd.daemon.filling.ledger import Ledger, fingerprint
from weightd.daemon.layouts.digests import LEAF, Leaves, checkpoint_digest, tensor_digest
from weightd.daemon.layouts.extents import Demands, Extent, plan_extents
from weightd.daemon.layouts.recipe import Recipe
from weightd.daemon.limits import FillLimits
from weightd.daemon.observing.clock import Clock
from weightd.daemon.sources.base import ANSWERS, Reader, Source, SourceFile, changed
from weightd.daemon.stages.planning import Plan, expected_sha256
from weightd.daemon.stages.request import StageRequest
from weightd.daemon.stages.resident import KIND
from weightd.daemon.tensors import TensorInfo

log = logging.getLogger(__name__)

_PARALLEL_STATS = 64
"""Files that are looked at at once, between the last byte and ready."""


class Peers(Protocol):
    """Other nodes, as a stage loads from them."""

    @property
    def off(self) -> str:
        """Why nothing can be read from them; empty while it can."""

    def reader(
        self,
        key: str,
        recipes: Sequence[Recipe],
        segments: Sequence[Segment],
        extents: Sequence[Extent],
        fill: Fill,
        origin: Callable[[], Reader] | None,
    ) -> Reader:
        """A reader for ``fill`` alone that has what peers can bring from them, by the stage's ``key``.

        What they do not bring comes from the reader that ``origin`` makes; None where all has to come from peers.
        """


@dataclass
class Loading:
    """One load, from its plan to sealed segments: ``lay_out``, ``prepare``, ``run`` in a thread, and ``close``.

    ``devices`` has each segment's. ``peers`` are whom to load from besides the source what goes by ``key`` there;
    ``clock`` is told where the time goes.
    """

    source: Source
    plan: Plan
    request: StageRequest
    devices: Sequence[Device]
    cache: Cache
    limits: FillLimits
    peers: Peers | None = None
    key: str = ""
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self._fill: Fill | None = None
        self._second: Fill | None = None
        self._reader: Reader | None = None

    def lay_out(self) -> None:
        """Lay out all reads."""
        checkpoint, request = self.plan.checkpoint, self.request
        self._sha256 = expected_sha256(checkpoint, request)
        digest = request.expect_digest if isinstance(request.expect_digest, str) else None
        self._digest = digest if digest and digest.startswith("xxh3:") else None
        on_host = all(device.uuid is None for device in self.devices)
        # The library is not known to let go of what it had on several GPUs in the right contexts.
        several = len(set(self.devices)) > 1
        streams = not on_host and not several and self.source.kind != KIND
        self._native = streams and self.devices[0].streams_into() is not None
        # What is worth reading at once is a matter of the processor's caches, which GPUs do not hash from, and which
        # what another process has read is not in.
        in_cache = on_host and not self._asks_peers()
        demands = Demands(
            min(self.limits.extent_bytes, self.source.max_extent) if in_cache else self.limits.extent_bytes,
            1 if self._native else self.source.max_runs,
            self.source.min_range,
            0 if self._native else self.source.min_gap,
            whole_tensors=self._digest is not None,
            whole_files=frozenset(self._sha256),
        )
        self._extents = plan_extents(checkpoint.tensors, self.plan.recipes, demands)
        if self._sha256:
            self._extents = _interleave(self._extents)
        self.bytes_total = sum(extent.nbytes for extent in self._extents)

    def ledger(self) -> Ledger:
        """An empty ledger for this load."""
        return ledger_for(self.plan.checkpoint.tensors, self.plan.recipes, self._extents)

    def goes_on(self, ledger: Ledger) -> bool:
        """Whether another process's ledger is of the same load, which can then go on where that one ended.

        Not where files are hashed in their order: nothing of that outlives a process.
        """
        return not self._sha256 and ledger.fingerprint == fingerprint(self.plan.recipes, self._extents)

    def prepare(
        self, segments: Sequence[Segment], ledger: Ledger, on_verified: Callable[[int, list[int]], None]
    ) -> Fill:
        """After ``lay_out``. ``on_verified(segment, entries)`` is told what streaming clients may use already."""
        checkpoint = self.plan.checkpoint
        known: dict[str, array[int]] = {}
        for expected in (self._digest, *self._sha256.values()):
            if self.request.layouts:
                break  # its entries are called as the engine has it, and what is so called is another tensor
            known |= self.cache.load_leaves(expected) if expected else {}
        self._segments = segments
        expecting = bool(self._digest or self._sha256)

        def verified(segment: int, entries: list[int]) -> None:
            if expecting:
                # What was computed says nothing until it has been compared: leaf by leaf where leaves are known,
                # else only at the end.
                names = self.plan.recipes[segment].entries
                entries = [entry for entry in entries if names[entry].name in known]
            if entries:
                on_verified(segment, entries)

        self._fill = Fill(
            checkpoint.tensors,
            self.plan.recipes,
            segments,
            self._extents,
            self.limits,
            ledger=ledger,
            buffered=self.source.buffered,
            native=self._native,
            expected_leaves=known,
            sha256_prefixes={file: checkpoint.prefixes[file] for file in self._sha256},
            on_verified=verified,
            clock=self.clock,
        )
        files = checkpoint.listing.weights
        if not self._fill.account.queued:
            self._reader = None  # all of it is there: nobody need be asked for it
        elif self._asks_peers():
            assert self.peers is not None

            def origin() -> Reader:
                return self.source.reader(files, native=self._native)

            wanted = origin if "origin" in self.request.sources else None
            self._reader = self.peers.reader(self.key, self.plan.recipes, segments, self._extents, self._fill, wanted)
        else:
            self._reader = self.source.reader(files, native=self._native)
        return self._fill

    def _asks_peers(self) -> bool:
        """Whether there are peers that can bring it: not where what is expected is told by the origin's bytes only,
        SHA-256 of files, and the digest of a checkpoint of which there are but slices here."""
        tellable = not self._sha256 and (self._digest is None or self._is_whole())
        wanted = "peer" in self.request.sources and self.source.kind != KIND
        return self.peers is not None and bool(self.key) and tellable and wanted

    @property
    def fill(self) -> Fill:
        """Once prepared."""
        assert self._fill is not None
        return self._fill

    def run(self, on_landed: Callable[[], None]) -> None:
        """Bring all bytes, verify them, seal the segments; ``on_landed()`` is told when reading is over.

        Raises Cancelled, CheckpointChanged, DigestMismatch, SourceFailed. Results are in ``tensor_digests``,
        ``segment_digests``, ``checkpoint_digest`` and ``satisfied``.
        """
        self.fill.write_constants()
        if self._reader is not None:
            self._reader.run(self.fill)
        self.fill.finish()
        self._check_cancelled()
        self.fill.account.check_complete()
        on_landed()
        self.clock.enter("source")
        self._check_unchanged()
        self.clock.enter("verifying")
        self._summarise()
        if self._digest not in (None, self.checkpoint_digest) and self._without_peers():
            self._summarise()
        self._check_expected(self._whole_leaves())
        self._check_cancelled()
        self.clock.enter("other")
        for segment in self._segments:
            segment.seal()

    def _without_peers(self) -> bool:
        """The bytes are not the expected ones: have what came from peers from the origin instead, if that can be."""
        account = self.fill.account
        again = account.from_peers(self._extents)
        if not again or "origin" not in self.request.sources or not account.forget(again):
            return False
        log.warning("%d extents that came from peers are not what is expected: reading the origin", len(again))
        self.fill.mismatched("peer")
        if self._reader is not None:
            self._reader.close()
        self._reader = self.source.reader(self.plan.checkpoint.listing.weights, native=self._native)
        self.fill.restore_constants({(piece.segment, piece.entry) for extent in again for piece in extent.pieces})
        account.requeue(again)
        self._reader.run(self.fill)
        self.fill.finish()
        self._check_cancelled()
        account.check_complete()
        return True

    def _summarise(self) -> None:
        """Digests of tensors, segments and the checkpoint from those of leaves."""
        self.tensor_digests = [self.fill.account.digests(index) for index in range(len(self.plan.recipes))]
        self.segment_digests = [
            checkpoint_digest((entry.name, digest) for entry, digest in zip(recipe.entries, digests, strict=True))
            for recipe, digests in zip(self.plan.recipes, self.tensor_digests, strict=True)
        ]
        self.checkpoint_digest = self._checkpoint_digest(self._whole_leaves())

    def stop(self) -> None:
        """Make ``run`` raise Cancelled soon. Callable from any thread, more than once."""
        if self._fill is not None:
            self._fill.stop()
        if self._second is not None:
            self._second.stop()

    def close(self) -> None:
        """Return when nothing can write to the segments any more, which may take as long as a stalled request."""
        if self._fill is None:
            return
        self.stop()
        try:
            if self._reader is not None:
                self._reader.close()
        finally:
            self._fill.close()

    def _check_cancelled(self) -> None:
        if self.fill.stopped:
            raise Cancelled("the stage was cancelled")

    def _check_unchanged(self) -> None:
        if self.fill.account.peer_bytes >= self.bytes_total:
            return  # nothing was read there, and what peers have is of the identity that was planned with
        files = self.plan.checkpoint.listing.weights
        deadline = time.monotonic() + self.limits.retry_deadline
        with ThreadPoolExecutor(min(_PARALLEL_STATS, len(files)), thread_name_prefix="unchanged") as pool:
            unanswered = [why for why in pool.map(lambda file: self._check_file(file, deadline), files) if why]
        if unanswered:
            log.warning(
                "every byte is here, and whether its source has changed meanwhile cannot be told of %d of %d files: %s",
                len(unanswered), len(files), unanswered[0],
            )  # fmt: skip

    def _check_file(self, planned: SourceFile, deadline: float) -> str:
        """Raise CheckpointChanged where a file is another one by now; why that cannot be told, empty where it can.

        What lacks no byte is not thrown away for that.
        """
        for attempt in itertools.count(1):
            try:
                found = self.source.stat(planned.name)
            except CheckpointNotFound:
                raise CheckpointChanged(f"{planned.name} was removed while it was read: stage it again") from None
            except DaemonError as error:
                if isinstance(error, ANSWERS):
                    raise
                if isinstance(error, CredentialsRefused) or time.monotonic() >= deadline or self.fill.stopped:
                    return str(error)
                self.fill.wait(retry_pause(attempt))
                continue
            if found != planned:
                raise changed(planned, found)
            break
        return ""

    def _whole_leaves(self) -> dict[int, Leaves]:
        """Leaf digests of the checkpoint tensors that were read whole, by index."""
        tensors = self.plan.checkpoint.tensors
        found: dict[int, Leaves] = dict(self.fill.account.tensor_leaves)
        for recipe, leaves in zip(self.plan.recipes, self.fill.account.leaves, strict=True):
            for copy in recipe.copies:
                if copy.source is None and copy.target is None:
                    found.setdefault(copy.tensor, leaves[copy.entry])
        for index, tensor in enumerate(tensors):
            if not tensor.nbytes:
                found.setdefault(index, array("Q"))
        return found

    def _checkpoint_digest(self, leaves: dict[int, Leaves]) -> str | None:
        tensors = self.plan.checkpoint.tensors
        if len(leaves) != len(tensors):
            return None
        if self._is_whole():
            return self.segment_digests[0]
        return checkpoint_digest(
            (tensor.name, tensor_digest(tensor.dtype, tensor.shape, tensor.nbytes, leaves[index]))
            for index, tensor in enumerate(tensors)
        )

    def _is_whole(self) -> bool:
        """Whether the one segment holds all tensors as they are, so that its digest is the checkpoint's."""
        copies = self.plan.recipes[0].copies
        return (
            not self.request.layouts  # there, entries have names of their own
            and len(self.plan.recipes) == 1
            and len(copies) == len(self.plan.checkpoint.tensors)
            and all(copy.source is None and copy.target is None for copy in copies)
        )

    def _check_expected(self, leaves: dict[int, Leaves]) -> None:
        tensors = self.plan.checkpoint.tensors
        self.satisfied: set[str] = set()
        if self._digest and self.checkpoint_digest != self._digest:
            self._explain(
                f"the checkpoint's digest is {self.checkpoint_digest}, expected {self._digest}",
                range(len(tensors)),
                leaves,
            )
        for file, expected in self._sha256.items():
            name = self.plan.checkpoint.listing.weights[file].name
            found = "sha256:" + self.fill.sha256[file].hexdigest()
            inside = [index for index, tensor in enumerate(tensors) if tensor.file == file]
            if found != expected:
                self._explain(f"{name}: the file's digest is {found}, expected {expected}", inside, leaves)
            self.satisfied.add(f"{name}={expected}")
            self.cache.save_leaves(expected, {tensors[index].name: leaves[index] for index in inside})
        if self.checkpoint_digest:
            self.satisfied.add(self.checkpoint_digest)
            self.cache.save_leaves(
                self.checkpoint_digest, {tensor.name: leaves[index] for index, tensor in enumerate(tensors)}
            )

    def _explain(self, found: str, suspects: Sequence[int], leaves: dict[int, Leaves]) -> None:
        """Bytes are not the expected ones: read them again to name those that changed on the way. Always raises."""
        tensors = self.plan.checkpoint.tensors
        chosen: set[int] = set(suspects)
        again = [tensor if index in chosen else _emptied(tensor) for index, tensor in enumerate(tensors)]
        demands = Demands(self.limits.extent_bytes, 1, 0, whole_tensors=True)
        fill = self._second = Fill(again, [], [], plan_extents(again, [], demands), self.limits)
        reader = self.source.reader(self.plan.checkpoint.listing.weights)
        try:
            reader.run(fill)
        finally:
            reader.close()
            reread = dict(fill.account.tensor_leaves)
            fill.close()
        self._check_cancelled()
        differing = [
            (tensor, leaf)
            for tensor in sorted(chosen)
            for leaf, (first, second) in enumerate(zip(leaves.get(tensor, ()), reread.get(tensor, ()), strict=False))
            if first != second
        ]
        if not differing:
            raise DigestMismatch(
                f"{found}; a second reading gave the same bytes, so the source itself holds others than expected"
            )
        tensor, leaf = differing[0]
        more = f" and {len(differing) - 1} more leaves" if len(differing) > 1 else ""
        raise DigestMismatch(
            f"{found}; bytes changed on the way: tensor {tensors[tensor].name!r}, leaf {leaf} "
            f"(bytes {leaf * LEAF} and up of the tensor){more} differ between two readings",
            tensor=tensors[tensor].name,
            leaf=leaf,
        )


def _emptied(tensor: TensorInfo) -> TensorInfo:
    return tensor._replace(nbytes=0)


def _interleave(extents: Sequence[Extent]) -> list[Extent]:
    """The files' extents in turn: SHA-256 runs along each file, so files are what can be hashed in parallel."""
    counts: dict[int, int] = {}
    order = []
    for extent in extents:
        counts[extent.file] = counts.get(extent.file, 0) + 1
        order.append((counts[extent.file], extent.file))
    return [extent for _, extent in sorted(zip(order, extents, strict=True), key=lambda item: item[0])]
