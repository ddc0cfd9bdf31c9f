"""Filling segments: where a stage's bytes land, are scattered, copied on and hashed.

A source's reader takes extents from a Fill, writes their bytes to their landing, and says so; everything that is the
same for all sources happens here, and what has come of it is in the fill's account. Methods may be called from any
thread.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import random
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

from prometheus_client import Counter

from weightd.daemon.devices.base import Segment
from weightd.daemon.devices.cpu import HostBuffers
from weightd.daemon.devices.host_memory import address_of
from weightd.daemon.errors import DigestMismatch, SourceFailed
from weightd.daemon.filling.account import Account
from weightd.daemon.filling.arrivals import Arrivals
from weightd.daemon.filling.ledger import Ledger
from weightd.daemon.filling.ordered_hash import OrderedHash
from weightd.daemon.filling.phases import Phases
from weightd.daemon.filling.sink import Landing, Sink
from weightd.daemon.filling.slots import Slots
from weightd.daemon.layouts.digests import LEAF, leaf_count, leaf_digest
from weightd.daemon.layouts.extents import Extent, Piece, Scatter
from weightd.daemon.layouts.recipe import (
    Block,
    Copy,
    Recipe,
    blocks,
    contiguous,
    convert_block,
    copy_block,
    gather_block,
)
from weightd.daemon.limits import FillLimits
from weightd.daemon.observing.clock import Clock
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.tensors import TensorInfo
from weightd.ipc.recipe import Box, Constant

log = logging.getLogger(__name__)


def retry_pause(attempts: int) -> float:
    """Seconds to wait before the next try, after so many."""
    # Full jitter: readers that failed together do not come back together.
    return random.uniform(0.05, min(10.0, 0.1 * 2.0 ** min(attempts, 10)))


class Fill(Sink):
    """One filling of segments by ``extents``. Counters are for watching: they only grow, and are read unlocked.

    ``segments`` and ``recipes`` are parallel. ``ledger`` is where marks and digests go, as ``ledger_for`` makes it;
    what it says has landed already is not read again. Without one, they go with this object. ``buffered`` says that the
    source would as well read into buffers, ``native`` that its reader can write to device memory. ``expected_leaves``
    maps a tensor's name to the leaf digests that are known of it: a leaf that differs fails the fill at once.
    ``sha256_prefixes`` maps a file's index to the bytes in front of its tensors, for files whose SHA-256 is wanted.
    ``on_verified(segment, entries)`` is told of entries (their indices) all of whose leaves are hashed. ``clock`` is
    told what threads are at.
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
        clock: Clock | None = None,
    ) -> None:
        self.threads = limits.threads
        self.in_flight_bytes = limits.in_flight_bytes
        self.extent_bytes = limits.extent_bytes
        self.retries = 0
        self._phases = Phases(clock or Clock())
        self.account = Account(
            tensors,
            recipes,
            extents,
            ledger=ledger,
            expected_leaves=expected_leaves or {},
            on_verified=on_verified,
        )
        self._constants: dict[tuple[int, int], list[Constant]] = {}
        """Those of each (segment, entry) that has any."""
        for segment, recipe in enumerate(recipes):
            for constant in recipe.constants:
                self._constants.setdefault((segment, constant.entry), []).append(constant)
        self.sha256 = {file: OrderedHash(prefix) for file, prefix in (sha256_prefixes or {}).items()}
        self._recipes = recipes
        self._segments = segments
        self._limits = limits
        self._lock = threading.Lock()
        self._own = threading.local()
        self._stop = threading.Event()
        self._sent: dict[tuple[int, int, int], int] = {}
        """(segment, entry, leaf) → its digest, of what is on its way from a peer to a device."""
        self._by_peers: set[int] = set()
        """Extents on that way."""
        self._retry_counter: Counter | None = None
        self._mismatch_counter: Counter | None = None
        self._failure: BaseException | None = None
        on_device = bool(segments) and segments[0].device.uuid is not None
        self._arrivals = Arrivals(segments, self._digest, self._fail, self.phase) if on_device else None
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

    def count_with(self, metrics: Metrics, source: str) -> None:
        """Add to a daemon's counters from now on, under the source's kind."""
        self.account.count_with(metrics, source)
        self._retry_counter = metrics.source_retries.labels(source)
        self._phases.count_with(metrics, source)
        self._mismatch_counter = metrics.mismatches

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
        self.account.close()

    def wait(self, seconds: float, phase: str = "source") -> None:
        """Sleep, but no longer than until the fill is stopped; what is waited for is a phase."""
        with self.phase(phase):
            self._stop.wait(seconds)

    def next(self) -> Extent | None:
        """The next extent to read, in order; None when there is no more, or the fill is stopped."""
        return None if self.stopped else self.account.next()

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
            slot = self._slots.acquire(wait, self._stop, lambda: ordered is None or ordered.position == extent.offset)
        if slot is None:
            return None
        return Landing([memoryview(slot)[: extent.nbytes]], address_of(slot), slot)

    def abandon(self, landing: Landing) -> None:
        """Give a landing back that nothing writes to any more."""
        landing.views.clear()
        if landing.slot is not None:
            self._slots.release(landing.slot)

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
                leaves = self.account.tensor_leaves.get(tensor)
                if leaves is not None:
                    self._hash(leaves, leaf, landing.views[0], 0, extent.nbytes)
                    self.account.compare_tensor(tensor, leaves, leaf, leaf_count(extent.nbytes))
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

    # ------------------------------------------------------------------ constants

    def write_constants(self) -> None:
        """Put constants where no source brings anything. Before any reader runs."""
        unread = [(segment, index) for segment, entries in enumerate(self.account.unread) for index in entries]
        begun = bool(self.account.bytes_read)  # a process before this one has written and hashed those of ``unread``
        self.restore_constants(self._constants)
        if not begun:
            self._write_constants(unread)
            if self.stopped:
                return  # nor are they all written
            pieces = []
            for segment, index in unread:
                entry = self._recipes[segment].entries[index]
                pieces.append(Piece(segment, index, entry.offset, entry.nbytes, 0))
            with self.phase("verifying"):
                if self._arrivals is not None:
                    self._hash_on_device(pieces)
                else:
                    for piece in pieces:
                        self._hash_piece(piece)
        self.account.mark_unread()

    def restore_constants(self, entries: Iterable[tuple[int, int]]) -> None:
        """Put constants into those of these entries (segment, entry) that nothing that counts has come of.

        What a peer brings is all of an entry: where that was wrong, so are its constants, which no origin brings.
        """
        self._write_constants([place for place in entries if self.account.is_untouched(*place)])

    def _write_constants(self, entries: Iterable[tuple[int, int]]) -> None:
        """All of these entries' (segment, entry), in the recipe's order: the last one stands."""
        written = False
        with self.phase("copying"):
            for segment, entry in entries:
                for constant in self._constants.get((segment, entry), ()):
                    self._write_constant(segment, self._recipes[segment], constant)
                    written = True
            if written and self._arrivals is not None:
                self._arrivals.finish()
        if self._failure is not None:
            raise self._failure

    def _write_constant(self, segment: int, recipe: Recipe, constant: Constant) -> None:
        entry = recipe.entries[constant.entry]
        whole = Box(0, constant.target.shape, contiguous(constant.target.shape).strides)
        like = TensorInfo(entry.name, entry.dtype, constant.target.shape, 0, 0, 0)
        for block in blocks(Copy(0, constant.entry, whole, constant.target), like, entry):
            if self._stop.is_set():
                return
            if self._arrivals is None and block.rows > 1 and block.run <= LEAF:
                data = memoryview(constant.value * (block.run // len(constant.value)))
                anew = block._replace(source=0, source_stride=0, target=entry.offset + block.target)
                copy_block(anew, data, self._segments[segment].view)
                continue
            for row in range(block.rows):
                target = entry.offset + block.target + row * block.target_stride
                for done in range(0, block.run, LEAF):
                    nbytes = min(LEAF, block.run - done)
                    data = memoryview(bytearray(constant.value * (nbytes // len(constant.value))))
                    if self._arrivals is None:
                        self._segments[segment].write(target + done, data)
                    else:
                        self._put(segment, Block(0, 0, target + done, 0, nbytes, 1), data)

    def _put(self, segment: int, block: Block, data: memoryview) -> None:
        """Copy from memory of its own to a device, and keep that until it is there."""
        assert self._arrivals is not None
        self._arrivals.put(segment, block, address_of(data))
        self._arrivals.add(None, self._arrivals.marks({segment}), data.release)

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
                if not piece.shared:
                    self._hash_piece(piece, landing.views[0][position:] if through else None)
                position += piece.nbytes
        if through:
            with self.phase("copying"):
                position = 0
                for run in extent.runs:
                    self._segments[run.segment].write(run.offset, landing.views[0][position : position + run.nbytes])
                    position += run.nbytes
        with self.phase("verifying"):
            completed = self.account.completed(extent)
            for piece in completed:
                self._hash_piece(piece)
        complete = self.account.count(extent)
        self.account.mark(extent, completed)
        self._let_go(landing)
        self.account.announce(complete)

    def _hash_piece(self, piece: Piece, data: memoryview | None = None) -> None:
        """Hash whole leaves, where they lie or of ``data`` that they are to become. Raises DigestMismatch."""
        view, offset = self._segments[piece.segment].view, piece.offset
        if data is not None:
            view, offset = data, 0
        self._hash(self.account.leaves[piece.segment][piece.entry], piece.leaf, view, offset, piece.nbytes)
        self.account.compare_entry(piece.segment, piece.entry, piece.leaf, leaf_count(piece.nbytes))

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
            puts: list[tuple[int, Block, int]] = []
            converted: list[memoryview] = []
            for segment, block, cast in scatters:
                source = landing.address
                if cast is not None:
                    block, data = convert_block(block, cast, landing.views[0])
                    converted.append(data)
                    source = address_of(data)
                elif block.rows > 1 and block.source_stride < block.run:  # rows that overlap no device copies
                    block, data = gather_block(block, landing.views[0])
                    converted.append(data)
                    source = address_of(data)
                arrivals.put(segment, block, source)
                puts.append((segment, block, source))
            marks = arrivals.marks({segment for segment, _, _ in puts})

        def copied() -> None:
            if read_back:
                for put in puts:
                    if not arrivals.check(*put):
                        self._changed_on_the_way(extent)
            converted.clear()
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
            whole = [piece for extent in extents for piece in extent.pieces if not piece.shared]
            self._hash_on_device(whole)
            for piece in whole:
                self.account.compare_entry(piece.segment, piece.entry, piece.leaf, leaf_count(piece.nbytes))
            completed = [self.account.completed(extent) for extent in extents]
            late = list(itertools.chain.from_iterable(completed))
            self._hash_on_device(late)
            for piece in (*whole, *late):
                self._compare_sent(piece.segment, piece.entry, piece.leaf, leaf_count(piece.nbytes))
            for extent in extents:
                done = self.account.count(extent, from_peer=extent.index in self._by_peers)
                for segment, entries in done.items():
                    complete.setdefault(segment, []).extend(entries)
        for extent, leaves in zip(extents, completed, strict=True):
            self.account.mark(extent, leaves, from_peer=extent.index in self._by_peers)
        self._by_peers.difference_update(extent.index for extent in extents)
        self.account.announce(complete)

    def _compare_sent(self, segment: int, entry: int, first: int, count: int) -> None:
        """What a peer has brought was verified on the host: what lies on the device has to be the same."""
        for leaf in range(first, first + count):
            came = self._sent.pop((segment, entry, leaf), None)
            if came is not None and came != self.account.leaves[segment][entry][leaf]:
                name = self._recipes[segment].entries[entry].name
                device = self._segments[segment].device.name
                raise DigestMismatch(
                    f"tensor {name!r}, leaf {leaf}: bytes changed between the host and {device}", tensor=name, leaf=leaf
                )

    def _hash_on_device(self, pieces: Sequence[Piece]) -> None:
        """Hash whole leaves."""
        assert self._arrivals is not None
        ranges = [
            (piece.segment, start, min(LEAF, piece.offset + piece.nbytes - start))
            for piece in pieces
            for start in range(piece.offset, piece.offset + piece.nbytes, LEAF)
        ]
        found = iter(self._arrivals.leaves(ranges) if ranges else ())
        for piece in pieces:
            leaves = self.account.leaves[piece.segment][piece.entry]
            for leaf in range(piece.leaf, piece.leaf + leaf_count(piece.nbytes)):
                leaves[leaf] = next(found)

    # ------------------------------------------------------------------ what peers bring to devices

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
        """As ``Account.arrived``, of what ``send`` has sent: it counts once what lies there was hashed and compared."""
        assert self._arrivals is not None
        self._sent.update(((segment, entry, leaf), digest) for segment, entry, leaf, digest in digests)
        self._by_peers.update(extent.index for extent in extents)
        for extent in extents:
            self._arrivals.add(extent)

    # ------------------------------------------------------------------ retries and figures

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
                f"{where}: bytes {extent.offset} to {extent.end}: {why}; "
                f"given up after {extent.attempts} tries in {spent:.1f} s (WEIGHTD_RETRY_DEADLINE)",
                attempts=extent.attempts,
            )
        if extent.attempts == 1:
            log.warning("%s: bytes %d and up: %s; trying again", where, extent.offset, why)
        return retry_pause(extent.attempts)

    def check_stall(self, last_progress: float, where: Sequence[str]) -> None:
        """Raise SourceFailed where nothing has landed for the deadline; ``where`` names what is in flight."""
        spent = time.monotonic() - last_progress
        if spent > self._limits.retry_deadline:
            raise SourceFailed(
                f"{where[0]}: no byte of {len(where)} requests in flight has come for {spent:.1f} s "
                "(WEIGHTD_RETRY_DEADLINE)"
            )

    def mismatched(self, source: str) -> None:
        """What came from a source is not what was expected, and is not of the stage any more."""
        if self._mismatch_counter is not None:
            self._mismatch_counter.labels(source).inc()

    @property
    def seconds(self) -> dict[str, float]:
        """Thread-seconds so far, by phase."""
        return self._phases.seconds

    def phase(self, name: str, source: str = "") -> AbstractContextManager[None]:
        """Count the time inside towards a phase (one of PHASES), in thread-seconds; ``source``: where it is not the
        stage's own."""
        return self._phases.phase(name, source)

    def _hash(self, leaves: memoryview, first: int, view: memoryview, offset: int, nbytes: int) -> None:
        end = offset + nbytes
        for start in range(offset, end, LEAF):
            leaves[first] = leaf_digest(view[start : min(start + LEAF, end)])
            first += 1

    def _scatter(self, scatter: Scatter, landing: Landing) -> None:
        segment = self._segments[scatter.segment]
        block, data = scatter.block, landing.views[0]
        if scatter.cast is not None:
            block, data = convert_block(block, scatter.cast, data)
        if block.rows == 1 or block.source_stride == block.target_stride == block.run:
            segment.write(block.target, data[block.source : block.source + block.rows * block.run])
        elif segment.buffered and block.target_stride == block.run:
            self._write_gathered(segment, block, data)
        else:
            copy_block(block, data, segment.view)

    def _write_gathered(self, segment: Segment, block: Block, data: memoryview) -> None:
        """Rows that become neighbours, by way of memory that stays in the processor's cache, and is there already."""
        if not hasattr(self._own, "gathered"):
            self._own.gathered = memoryview(mmap.mmap(-1, LEAF, mmap.MAP_PRIVATE))
        step = max(1, LEAF // block.run)
        for row in range(0, block.rows, step):
            part = block._replace(
                source=block.source + row * block.source_stride,
                target=block.target + row * block.run,
                rows=min(step, block.rows - row),
            )
            gathered = data
            if part.rows > 1:
                part, gathered = gather_block(part, data, self._own.gathered)
            segment.write(part.target, gathered[part.source : part.source + part.rows * part.run])
