"""Filling segments: where a stage's bytes land, are scattered, hashed and counted.

A source's reader takes extents from a Fill, writes their bytes to their landing, and says so; everything that is the
same for all sources happens here. Methods may be called from any thread.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import logging
import mmap
import random
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightd.daemon.arrivals import Arrivals
from weightd.daemon.devices.cpu import HostBuffers
from weightd.daemon.digests import LEAF, leaf_count, leaf_digest, tensor_digest
from weightd.daemon.errors import DigestMismatch, SourceFailed
from weightd.daemon.extents import Extent, Scatter
from weightd.daemon.header import TensorInfo
from weightd.daemon.ledger import Ledger, fingerprint, leaf_counts
from weightd.daemon.limits import FillLimits
from weightd.daemon.ordered_hash import OrderedHash
from weightd.daemon.recipe import Block, Recipe, copy_block
from weightd.daemon.slots import Slots, address_of

if TYPE_CHECKING:
    from prometheus_client import Counter

    from weightd.daemon.devices import Segment
    from weightd.daemon.metrics import Metrics

log = logging.getLogger(__name__)

_FROM_PEER = 2
"""What the ledger has for an extent that came from a peer."""
PHASES = ("source", "buffers", "copying", "verifying")
"""Where a loading thread's time goes: waiting on the source, waiting for a bounce buffer, copying, hashing."""


@dataclass
class PeerUse:
    """What a stage has had from one peer."""

    nbytes: int = 0
    """Bytes that came from it, verified."""
    seconds: float = 0.0
    """While any were asked of it."""
    transport: str = ""
    """By what they came: rdma, cuda_ipc, shm, tcp; unknown where that cannot be told; empty where none have come."""
    through_host: bool = False
    """Whether a GPU is at either end, so that its bytes go through host memory there."""
    slow_path: str = ""
    """What better way there is here than the one that was taken, and how to take it."""
    given_up: str = ""
    """Why nothing more is had from it."""


class Landing:
    """Where one extent's bytes go: host memory at ``address``, as ``views`` in order, or device memory there.

    ``device`` is the GPU's number, as libstreamer counts them; None for host memory.
    """

    __slots__ = ("address", "device", "holders", "slot", "views")

    def __init__(
        self, views: list[memoryview], address: int, slot: mmap.mmap | None = None, device: int | None = None
    ) -> None:
        self.views = views
        self.address = address
        self.slot = slot
        self.device = device
        self.holders = 1
        """Who still reads from it: what puts its bytes to their places, and the file's SHA-256 in its turn."""


class Fill:
    """One filling of segments by ``extents``. Counters are for watching: they only grow, and are read unlocked.

    ``segments`` and ``recipes`` are parallel. ``ledger`` is where marks and digests go, as ``ledger_for`` makes it;
    what it says has landed already is not read again. Without one, they go with this object. ``buffered`` says that the
    source would as well read into buffers, ``native`` that its reader can write to device memory. ``expected_leaves``
    maps a tensor's name to the leaf digests that are known of it: a leaf that differs fails the fill at once.
    ``sha256_prefixes`` maps a file's index to the bytes in front of its tensors, for files whose SHA-256 is wanted.
    ``on_verified(segment, entries)`` is told of entries (their indices) all of whose leaves are hashed.
    """

    def __init__(
        self,
        tensors: Sequence[TensorInfo],
        recipes: Sequence[Recipe],
        segments: Sequence[Segment],
        extents: Sequence[Extent],
        limits: FillLimits,
        *,
        ledger: Ledger | None = None,
        buffered: bool = False,
        native: bool = False,
        expected_leaves: Mapping[str, array[int]] | None = None,
        sha256_prefixes: Mapping[int, bytes] | None = None,
        on_verified: Callable[[int, list[int]], None] = lambda segment, entries: None,
    ) -> None:
        self.threads = limits.threads
        self.in_flight_bytes = limits.in_flight_bytes
        self.extent_bytes = limits.extent_bytes
        self.bytes_read = 0
        self.peer_bytes = 0
        self.peers: dict[str, PeerUse] = {}
        """Peer → what came from it."""
        self.retries = 0
        self.seconds = dict.fromkeys(PHASES, 0.0)
        hashed = _hashed_tensors(extents)
        counts = leaf_counts(recipes) + [leaf_count(tensors[index].nbytes) for index in hashed]
        ledger = ledger or Ledger.private(len(extents), sum(counts))
        self._landed = ledger.landed
        found = iter(ledger.leaves(counts))
        self.leaves = [[next(found) for _ in recipe.entries] for recipe in recipes]
        self.tensor_leaves = dict(zip(hashed, found, strict=True))
        """Checkpoint tensors (by index) that are hashed in a bounce buffer, whole, as the checkpoint has them."""
        self.sha256 = {file: OrderedHash(prefix) for file, prefix in (sha256_prefixes or {}).items()}
        starts = [list(itertools.accumulate(map(len, of_segment), initial=0)) for of_segment in self.leaves]
        self._leaf_starts = starts
        self.there = [bytearray(of_segment[-1]) for of_segment in starts]
        """For each segment a byte for each leaf of its entries, one after another: 1 once it is there, and hashed."""
        self.coming = [bytearray(of_segment[-1]) for of_segment in starts]
        """The same of leaves that are being read from the source, or are there."""
        self.on_landed: Callable[[Extent], None] = lambda extent: None
        """Told of each extent that is there, in any thread."""
        self.take_back: Callable[[set[tuple[int, int]]], bool] = lambda entries: True
        """Asked to take back that entries (segment, entry) are verified; False where clients use them already."""
        self._tensors = tensors
        self._recipes = recipes
        self._segments = segments
        self._limits = limits
        self._expected = expected_leaves or {}
        self._on_verified = on_verified
        self._queue = deque(extent for extent, landed in zip(extents, self._landed, strict=True) if not landed)
        self._pending = [[entry.nbytes for entry in recipe.entries] for recipe in recipes]
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._sent: dict[tuple[int, int, int], int] = {}
        """(segment, entry, leaf) → its digest, of what is on its way from a peer to a device."""
        self._by_peers: set[int] = set()
        """Extents on that way."""
        self._bytes_counter: Counter | None = None
        self._saved_counter: Counter | None = None
        self._retry_counter: Counter | None = None
        self._phase_counters: dict[str, Counter] = {}
        self._failure: BaseException | None = None
        on_device = bool(segments) and segments[0].device.uuid is not None
        self._arrivals = Arrivals(segments, self._digest, self._fail) if on_device else None
        self._native = native
        self._buffered = on_device or (buffered and all(segment.buffered for segment in segments))
        # Each reading thread has one at a time, and the last one is kept for the urgent; on the way to a GPU as many
        # again are being copied.
        least = limits.threads * (2 if on_device else 1) + 1
        count = max(limits.bounce_buffers, least) if self._buffered else limits.bounce_buffers
        largest = max((extent.nbytes for extent in extents), default=0)
        # Those of a device are kept for the next stage: all of one size, then.
        size = max(largest, limits.extent_bytes) if on_device else largest
        self._slots = Slots(count, segments[0].device.buffers(size) if segments else HostBuffers(size))
        for index, extent in enumerate(extents):
            extent.index = index
            if self._landed[index]:
                if self._landed[index] == _FROM_PEER:
                    self._without_leaves(extent)
                self.bytes_read += extent.nbytes
                for piece in extent.pieces:
                    self._pending[piece.segment][piece.entry] -= piece.nbytes
                whole = [
                    (piece.segment, piece.entry)
                    for piece in extent.pieces
                    if piece.leaf < 0 and not self._pending[piece.segment][piece.entry]
                ]
                self._mark(extent, whole, self._landed[index])
        for segment, pending in enumerate(self._pending):
            if there := [index for index, nbytes in enumerate(pending) if not nbytes]:
                on_verified(segment, there)

    def count_with(self, metrics: Metrics, source: str) -> None:
        """Add to a daemon's counters from now on, under the source's kind."""
        self._bytes_counter = metrics.source_bytes.labels(source)
        self._saved_counter = metrics.saved_bytes
        self._retry_counter = metrics.source_retries.labels(source)
        self._phase_counters = {phase: metrics.phase_seconds.labels(source, phase) for phase in PHASES}

    @property
    def stopped(self) -> bool:
        """Whether readers are to give up."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Make readers give up soon, and let go of what waits for them."""
        self._stop.set()
        self._slots.wake()
        for ordered in self.sha256.values():
            ordered.clear()

    def finish(self) -> None:
        """Wait for what still is on its way once all has been read. Raises what failed meanwhile."""
        if self._arrivals is not None:
            self._arrivals.finish()
        if self._failure is not None:
            raise self._failure

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self.stop()

    def close(self) -> None:
        """Let go of bounce buffers and of the ledger. Only once nothing reads any more."""
        if self._arrivals is not None:
            self._arrivals.close()
        self._failure = None
        self._slots.close()
        # Views, which would keep the ledger's memory and descriptor until the garbage collector comes by.
        self.leaves, self.tensor_leaves, self._landed = [], {}, memoryview(b"")

    def check_complete(self) -> None:
        """Raise where a reader has returned before every byte has landed: nothing may be sealed then."""
        if missing := sum(not landed for landed in self._landed):
            raise SourceFailed(f"{missing} of {len(self._landed)} extents have not come")
        for recipe, pending in zip(self._recipes, self._pending, strict=True):
            for entry, nbytes in zip(recipe.entries, pending, strict=True):
                if nbytes:
                    raise SourceFailed(f"tensor {entry.name!r}: {nbytes} of {entry.nbytes} bytes have not come")

    def wait(self, seconds: float) -> None:
        """Sleep, but no longer than until the fill is stopped."""
        self._stop.wait(seconds)

    def next(self) -> Extent | None:
        """The next extent to read, in order; None when there is no more, or the fill is stopped."""
        try:
            return None if self.stopped else self._queue.popleft()
        except IndexError:
            return None

    def landing(self, extent: Extent, *, wait: bool = True) -> Landing | None:
        """Where the extent's bytes go; None where no bounce buffer is free and waiting is not wanted (any more)."""
        if extent.scatters is None and self._native and extent.file not in self.sha256 and len(extent.runs) == 1:
            run = extent.runs[0]
            target = self._segments[run.segment]
            return Landing([], target.address + run.offset, device=target.device.streams_into())
        if extent.scatters is None and not self._buffered:
            first = extent.runs[0]
            views = [self._segments[run.segment].view[run.offset : run.offset + run.nbytes] for run in extent.runs]
            return Landing(views, self._segments[first.segment].address + first.offset)
        ordered = self.sha256.get(extent.file)
        with self.phase("buffers"):
            slot = self._slots.take(wait, self._stop, lambda: ordered is None or ordered.position == extent.offset)
        if slot is None:
            return None
        return Landing([memoryview(slot)[: extent.nbytes]], address_of(slot), slot)

    def abandon(self, landing: Landing) -> None:
        """Give a landing back that nothing writes to any more."""
        landing.views.clear()
        if landing.slot is not None:
            self._slots.give(landing.slot)

    def _let_go(self, landing: Landing) -> None:
        with self._lock:
            landing.holders -= 1
            last = not landing.holders
        if last:
            self.abandon(landing)

    def landed(self, extent: Extent, landing: Landing) -> None:
        """All bytes of the extent are where ``landing`` said. Raises DigestMismatch."""
        if extent.tensor is not None:
            with self.phase("verifying"):
                tensor, leaf = extent.tensor
                leaves = self.tensor_leaves.get(tensor)
                if leaves is not None:
                    self._hash(leaves, leaf, landing.views[0], 0, extent.nbytes)
                    self._compare(self._tensors[tensor].name, leaves, leaf, leaf_count(extent.nbytes))
        ordered = self.sha256.get(extent.file)
        landing.holders = 2 if ordered else 1
        if self._arrivals is None:
            self._land_on_host(extent, landing)
        else:
            self._send(extent, landing, self._arrivals, read_back=ordered is not None or extent.tensor is not None)
        if ordered:
            with self.phase("verifying"):
                ordered.add(extent.offset, extent.nbytes, landing.views[:], lambda: self._let_go(landing))
            self._slots.wake()

    # ------------------------------------------------------------------ host memory

    def _land_on_host(self, extent: Extent, landing: Landing) -> None:
        through = extent.scatters is None and landing.slot is not None
        if extent.scatters is not None:
            with self.phase("copying"):
                for scatter in extent.scatters:
                    self._scatter(scatter, landing)
        with self.phase("verifying"):
            position = 0
            for piece in extent.pieces:
                if piece.leaf >= 0:
                    if through:
                        view, offset = landing.views[0], position
                    else:
                        view, offset = self._segments[piece.segment].view, piece.offset
                    self._hash(self.leaves[piece.segment][piece.entry], piece.leaf, view, offset, piece.nbytes)
                    self._compare_entry(piece.segment, piece.entry, piece.leaf, leaf_count(piece.nbytes))
                position += piece.nbytes
        if through:
            with self.phase("copying"):
                position = 0
                for run in extent.runs:
                    self._segments[run.segment].write(run.offset, landing.views[0][position : position + run.nbytes])
                    position += run.nbytes
        with self.phase("verifying"):
            complete = self._count(extent)
            late = self._deferred(extent, complete)
            for segment, index in late:
                entry = self._recipes[segment].entries[index]
                self._hash(self.leaves[segment][index], 0, self._segments[segment].view, entry.offset, entry.nbytes)
        self._mark(extent, late)
        self._let_go(landing)
        self._tell(complete)

    # ------------------------------------------------------------------ device memory

    def _send(self, extent: Extent, landing: Landing, arrivals: Arrivals, *, read_back: bool) -> None:
        """Copy it on; ``read_back`` where something is expected of the bytes that came, which no digest of what lies in
        the GPU's memory can be compared with."""
        if landing.device is not None:  # it is there already
            arrivals.add(extent)
            return
        with self.phase("copying"):
            scatters = extent.scatters
            if scatters is None:
                position, scatters = 0, []
                for run in extent.runs:
                    scatters.append(Scatter(run.segment, Block(position, 0, run.offset, 0, run.nbytes, 1)))
                    position += run.nbytes
            for scatter in scatters:
                arrivals.put(scatter.segment, scatter.block, landing.address)
            marks = arrivals.marks({scatter.segment for scatter in scatters})

        def copied() -> None:
            if read_back:
                for scatter in scatters:
                    if not arrivals.check(scatter.segment, scatter.block, landing.address):
                        self._changed_on_the_way(extent)
            self._let_go(landing)

        arrivals.add(extent, marks, copied)

    def _changed_on_the_way(self, extent: Extent) -> None:
        piece = extent.pieces[0]
        name = self._recipes[piece.segment].entries[piece.entry].name
        raise DigestMismatch(
            f"tensor {name!r}: bytes changed between the host and {self._segments[piece.segment].device.name}",
            tensor=name,
        )

    def _digest(self, extents: Sequence[Extent]) -> None:
        """These extents' bytes are in device memory: hash what lies there. Raises DigestMismatch."""
        assert self._arrivals is not None
        complete: dict[int, list[int]] = {}
        with self.phase("verifying"):
            whole = [
                (piece.segment, piece.entry, piece.leaf, piece.offset, piece.nbytes)
                for extent in extents
                for piece in extent.pieces
                if piece.leaf >= 0
            ]
            self._hash_on_device(whole)
            for segment, index, leaf, _, nbytes in whole:
                self._compare_entry(segment, index, leaf, leaf_count(nbytes))
            late = []
            whole_of: dict[int, list[tuple[int, int]]] = {}
            for extent in extents:
                from_peer = extent.index in self._by_peers
                if from_peer:
                    self._save([extent])
                    self._without_leaves(extent)
                done = self._count(extent, by_source=not from_peer)
                whole_of[extent.index] = self._deferred(extent, done)
                for segment, index in whole_of[extent.index]:
                    entry = self._recipes[segment].entries[index]
                    late.append((segment, index, 0, entry.offset, entry.nbytes))
                for segment, entries in done.items():
                    complete.setdefault(segment, []).extend(entries)
            self._hash_on_device(late)
            for segment, index, leaf, _, nbytes in (*whole, *late):
                self._compare_sent(segment, index, leaf, leaf_count(nbytes))
        for extent in extents:
            self._mark(extent, whole_of[extent.index], _FROM_PEER if extent.index in self._by_peers else 1)
        self._by_peers.difference_update(extent.index for extent in extents)
        self._tell(complete)

    def _compare_sent(self, segment: int, entry: int, first: int, count: int) -> None:
        """What a peer has brought was verified on the host: what lies on the device has to be the same."""
        for leaf in range(first, first + count):
            came = self._sent.pop((segment, entry, leaf), None)
            if came is not None and came != self.leaves[segment][entry][leaf]:
                name = self._recipes[segment].entries[entry].name
                device = self._segments[segment].device.name
                raise DigestMismatch(
                    f"tensor {name!r}, leaf {leaf}: bytes changed between the host and {device}", tensor=name, leaf=leaf
                )

    def _hash_on_device(self, places: Sequence[tuple[int, int, int, int, int]]) -> None:
        """Hash whole leaves from (segment, entry, first leaf, offset, bytes)."""
        assert self._arrivals is not None
        ranges = [
            (segment, start, min(LEAF, offset + nbytes - start))
            for segment, _, _, offset, nbytes in places
            for start in range(offset, offset + nbytes, LEAF)
        ]
        found = iter(self._arrivals.leaves(ranges) if ranges else ())
        for segment, entry, first, _, nbytes in places:
            leaves = self.leaves[segment][entry]
            for leaf in range(first, first + leaf_count(nbytes)):
                leaves[leaf] = next(found)

    # ------------------------------------------------------------------ accounts

    def _count(self, extent: Extent, *, by_source: bool = True) -> dict[int, list[int]]:
        """The extent's bytes are there; returns the entries, by segment, of which that was the last."""
        complete: dict[int, list[int]] = {}
        with self._lock:
            self.bytes_read += extent.nbytes
            for piece in extent.pieces:
                pending = self._pending[piece.segment]
                pending[piece.entry] -= piece.nbytes
                if not pending[piece.entry]:
                    complete.setdefault(piece.segment, []).append(piece.entry)
        if self._bytes_counter is not None and by_source:
            self._bytes_counter.inc(extent.nbytes)
        return complete

    def _mark(self, extent: Extent, whole: Sequence[tuple[int, int]], how: int = 1) -> None:
        """All bytes of the extent are there, and hashed as far as they can be: with it all of the entries ``whole``."""
        self._landed[extent.index] = how
        for piece in extent.pieces:
            if piece.leaf >= 0:
                first = self._leaf_starts[piece.segment][piece.entry] + piece.leaf
                count = leaf_count(piece.nbytes)
                self.there[piece.segment][first : first + count] = b"\1" * count
        for segment, entry in whole:
            first, count = self._leaf_starts[segment][entry], len(self.leaves[segment][entry])
            self.there[segment][first : first + count] = b"\1" * count
        self.on_landed(extent)

    def missing(self) -> list[Extent]:
        """Extents that have not landed, taken from the queue: ``give`` puts them back."""
        found = list(self._queue)
        self._queue.clear()
        return found

    def has(self, extent: Extent) -> bool:
        """Whether it has landed."""
        return bool(self._landed[extent.index])

    @property
    def queued(self) -> int:
        """Extents that no reader has taken."""
        return len(self._queue)

    def give(self, extents: Iterable[Extent]) -> None:
        """Let the reader read these."""
        self._queue.extend(extents)

    def leaf_starts(self, segment: int) -> Sequence[int]:
        """Where each entry's leaves begin in ``there``, and where the last one's end."""
        return self._leaf_starts[segment]

    def begun(self, places: Iterable[tuple[int, int, int, int]]) -> None:
        """These are being read from the source: (segment, entry, first leaf, leaves)."""
        for segment, entry, leaf, count in places:
            first = self._leaf_starts[segment][entry] + leaf
            self.coming[segment][first : first + count] = b"\1" * count

    def forget(self, extents: Sequence[Extent]) -> bool:
        """What has landed of these is not to be believed: they are missing again. False where clients use it."""
        pieces = [piece for extent in extents for piece in extent.pieces]
        whole = {(p.segment, p.entry) for p in pieces if not self._pending[p.segment][p.entry]}
        if not self.take_back(whole):
            return False
        for extent in extents:
            self._landed[extent.index] = 0
        with self._lock:
            self.bytes_read -= sum(extent.nbytes for extent in extents)
            self.peer_bytes -= sum(extent.nbytes for extent in extents)
            for piece in pieces:
                self._pending[piece.segment][piece.entry] += piece.nbytes
        for piece in pieces:
            starts = self._leaf_starts[piece.segment]
            first, count = starts[piece.entry] + piece.leaf, leaf_count(piece.nbytes)
            if piece.leaf < 0:
                first, count = starts[piece.entry], starts[piece.entry + 1] - starts[piece.entry]
            self.there[piece.segment][first : first + count] = bytes(count)
        return True

    def from_peers(self, extents: Iterable[Extent]) -> list[Extent]:
        """Those of ``extents`` that came from peers."""
        return [extent for extent in extents if self._landed[extent.index] == _FROM_PEER]

    def expected_leaf(self, segment: int, entry: int, leaf: int) -> int | None:
        """The digest that a leaf of an entry has to have, where that is known."""
        known = self._expected.get(self._recipes[segment].entries[entry].name)
        return None if known is None else known[leaf]

    def leaf_at(self, segment: int, leaf: int) -> tuple[int, int]:
        """The entry that a leaf is of, and its number there, by its number over all entries of the segment."""
        entry = bisect.bisect_right(self._leaf_starts[segment], leaf) - 1
        return entry, leaf - self._leaf_starts[segment][entry]

    def send(self, views: Sequence[tuple[int, int, memoryview]], done: Callable[[], None]) -> None:
        """Copy what came by another way, each (segment, offset, bytes), to device memory; ``done`` once it is there."""
        assert self._arrivals is not None
        with self.phase("copying"):
            for segment, offset, view in views:
                self._arrivals.put(segment, Block(0, 0, offset, 0, len(view), 1), address_of(view))
            self._arrivals.add(None, self._arrivals.marks({segment for segment, _, _ in views}), done)

    def drain(self) -> None:
        """Wait until all that was sent to device memory is there, and counts."""
        if self._arrivals is not None:
            self._arrivals.finish()

    def arrived_on_device(self, extents: Sequence[Extent], digests: Iterable[tuple[int, int, int, int]]) -> None:
        """As ``arrived``, of what ``send`` has sent: it counts once what lies there was hashed, and is what came."""
        assert self._arrivals is not None
        self._sent.update(((segment, entry, leaf), digest) for segment, entry, leaf, digest in digests)
        self._by_peers.update(extent.index for extent in extents)
        for extent in extents:
            self._arrivals.add(extent)

    def arrived(self, extents: Sequence[Extent], digests: Iterable[tuple[int, int, int, int]]) -> None:
        """These extents came by another way: (segment, entry, leaf, digest) of all their leaves, or of whole entries.

        Raises DigestMismatch where others were expected.
        """
        self._save(extents)
        for segment, entry, leaf, digest in digests:
            self.leaves[segment][entry][leaf] = digest
            self._compare_entry(segment, entry, leaf, 1)
        complete: dict[int, list[int]] = {}
        for extent in extents:
            self._without_leaves(extent)
            for segment, entries in self._count(extent, by_source=False).items():
                complete.setdefault(segment, []).extend(entries)
        for extent in extents:
            self._mark(extent, self._deferred(extent, complete), _FROM_PEER)
        self._tell(complete)

    def _save(self, extents: Iterable[Extent]) -> None:
        """These were not read from the source."""
        nbytes = sum(extent.nbytes for extent in extents)
        self.peer_bytes += nbytes
        if self._saved_counter is not None:
            self._saved_counter.inc(nbytes)

    def _without_leaves(self, extent: Extent) -> None:
        """A checkpoint tensor is not hashed as such where a part of it came from a peer, laid out already."""
        if extent.tensor is not None:
            self.tensor_leaves.pop(extent.tensor[0], None)

    def _deferred(self, extent: Extent, complete: Mapping[int, Sequence[int]]) -> list[tuple[int, int]]:
        """(segment, entry) of those that could not be hashed before all of them was there."""
        late = {(piece.segment, piece.entry) for piece in extent.pieces if piece.leaf < 0}
        return [
            (segment, entry) for segment, entries in complete.items() for entry in entries if (segment, entry) in late
        ]

    def _tell(self, complete: Mapping[int, list[int]]) -> None:
        for segment, entries in complete.items():
            self._on_verified(segment, entries)

    def failed(self, extent: Extent, where: str, why: str) -> float:
        """A read failed. Returns the seconds to wait before the next try; raises SourceFailed past the deadline."""
        now = time.monotonic()
        extent.first_failure = extent.first_failure or now
        extent.attempts += 1
        self.retries += 1
        if self._retry_counter is not None:
            self._retry_counter.inc()
        spent = now - extent.first_failure
        if spent >= self._limits.retry_deadline:
            raise SourceFailed(
                f"{where}: bytes {extent.offset} to {extent.offset + extent.nbytes}: {why}; "
                f"given up after {extent.attempts} tries in {spent:.1f} s (WEIGHTD_RETRY_DEADLINE)",
                attempts=extent.attempts,
            )
        if extent.attempts == 1:
            log.warning("%s: bytes %d and up: %s; trying again", where, extent.offset, why)
        # Full jitter: readers that failed together do not come back together.
        return random.uniform(0.05, min(10.0, 0.1 * 2.0 ** min(extent.attempts, 10)))

    def check_stall(self, last_progress: float, where: Sequence[str]) -> None:
        """Raise SourceFailed where nothing has landed for the deadline; ``where`` names what is in flight."""
        spent = time.monotonic() - last_progress
        if spent > self._limits.retry_deadline:
            raise SourceFailed(
                f"{where[0]}: no byte of {len(where)} requests in flight has come for {spent:.1f} s "
                "(WEIGHTD_RETRY_DEADLINE)"
            )

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside towards a phase (one of PHASES), in thread-seconds."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            with self._lock:
                self.seconds[name] += spent
            if counter := self._phase_counters.get(name):
                counter.inc(spent)

    def digests(self, segment: int) -> list[str]:
        """Tensor digests of a segment's entries, in their order. Only when all have landed."""
        return [
            tensor_digest(entry.dtype, entry.shape, entry.nbytes, leaves)
            for entry, leaves in zip(self._recipes[segment].entries, self.leaves[segment], strict=True)
        ]

    def _hash(self, leaves: memoryview, first: int, view: memoryview, offset: int, nbytes: int) -> None:
        end = offset + nbytes
        for start in range(offset, end, LEAF):
            leaves[first] = leaf_digest(view[start : min(start + LEAF, end)])
            first += 1

    def _compare_entry(self, segment: int, index: int, first: int, count: int) -> None:
        # Where leaves are expected, whole tensors are read, and then only whole tensors carry leaves of their own.
        if self._expected:
            name = self._recipes[segment].entries[index].name
            self._compare(name, self.leaves[segment][index], first, count)

    def _compare(self, name: str, leaves: memoryview, first: int, count: int) -> None:
        expected = self._expected.get(name)
        if expected is None:
            return
        for leaf in range(first, first + count):
            if leaves[leaf] != expected[leaf]:
                raise DigestMismatch(
                    f"tensor {name!r}, leaf {leaf} (bytes {leaf * LEAF} and up of the tensor): digest is "
                    f"{leaves[leaf]:016x}, expected {expected[leaf]:016x}",
                    tensor=name,
                    leaf=leaf,
                )

    def _scatter(self, scatter: Scatter, landing: Landing) -> None:
        segment = self._segments[scatter.segment]
        block = scatter.block
        if block.rows == 1:
            segment.write(block.target, landing.views[0][block.source : block.source + block.run])
        else:
            copy_block(block, landing.views[0], segment.view)


def ledger_for(tensors: Sequence[TensorInfo], recipes: Sequence[Recipe], extents: Sequence[Extent]) -> Ledger:
    """An empty ledger for filling these."""
    leaves = sum(leaf_counts(recipes)) + sum(leaf_count(tensors[index].nbytes) for index in _hashed_tensors(extents))
    return Ledger.new(len(extents), leaves, fingerprint(recipes, extents))


def _hashed_tensors(extents: Sequence[Extent]) -> list[int]:
    """Checkpoint tensors that are hashed as such, by index."""
    return sorted({extent.tensor[0] for extent in extents if extent.tensor is not None})
