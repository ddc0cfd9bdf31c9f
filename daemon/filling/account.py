"""The account of one filling: what is there of a stage, where it came from, with what digests, and what is to come.

Marks and digests lie in a ledger, where they outlive the process. Methods may be called from any thread.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import Counter

from weightd.daemon.errors import DigestMismatch, SourceFailed
from weightd.daemon.filling.ledger import Ledger, fingerprint, leaf_counts
from weightd.daemon.layouts.digests import LEAF, leaf_count, tensor_digest
from weightd.daemon.layouts.extents import Extent, Piece
from weightd.daemon.layouts.recipe import Recipe, brought
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.tensors import TensorInfo

_FROM_ORIGIN, _FROM_PEER = 1, 2
"""What the ledger has for an extent that has landed."""


@dataclass
class PeerUse:
    """What one stage has had from one peer."""

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


class Account:
    """What is there of ``extents``. Counters are for watching: they only grow, but for ``forget``, and are read
    unlocked.

    ``ledger`` is as ``ledger_for`` makes it; what it says has landed already does not come again. Without one, marks
    and digests go with this object. ``expected_leaves`` maps a tensor's name to the leaf digests that are known of it.
    ``on_verified(segment, entries)`` is told of entries (their indices) all of whose leaves are hashed.
    """

    def __init__(
        self,
        tensors: Sequence[TensorInfo],
        recipes: Sequence[Recipe],
        extents: Sequence[Extent],
        *,
        ledger: Ledger | None,
        expected_leaves: Mapping[str, array[int]],
        on_verified: Callable[[int, list[int]], None],
    ) -> None:
        self.bytes_read = 0
        """Bytes that are there, from wherever."""
        self.peer_bytes = 0
        self.peers: dict[str, PeerUse] = {}
        """Peer → what came from it."""
        hashed = _hashed_tensors(extents)
        counts = leaf_counts(recipes) + [leaf_count(tensors[index].nbytes) for index in hashed]
        ledger = ledger or Ledger.private(len(extents), sum(counts))
        self._landed = ledger.landed
        found = iter(ledger.leaves(counts))
        self.leaves = [[next(found) for _ in recipe.entries] for recipe in recipes]
        """Leaf digests of each entry of each segment."""
        self.tensor_leaves = dict(zip(hashed, found, strict=True))
        """Those of checkpoint tensors (by index) that are hashed in a bounce buffer, whole, as the checkpoint has
        them."""
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
        self._expected = expected_leaves
        self._comparable = {
            (segment, copy.entry)
            for segment, recipe in enumerate(recipes if expected_leaves else ())
            for copy in recipe.copies
            if copy.source is None and copy.target is None
        }
        """Entries that are a tensor as it is: a slice has the tensor's name, but not its leaves."""
        self._on_verified = on_verified
        self._queue = deque(extent for extent, landed in zip(extents, self._landed, strict=True) if not landed)
        self._parts = [array("I", bytes(4 * of_segment[-1])) for of_segment in starts]
        """For each segment how many extents are still to bring a part of each leaf; 0 of those that come whole."""
        for extent in extents:
            self._expect_parts(extent)
        self._brought = [brought(recipe) for recipe in recipes]
        """Bytes that extents bring, of each entry of each segment."""
        self._pending = [list(of_segment) for of_segment in self._brought]
        """Bytes of those that are still to come."""
        self.unread = [
            [index for index, (entry, nbytes) in enumerate(zip(recipe.entries, pending, strict=True))
             if entry.nbytes and not nbytes]
            for recipe, pending in zip(recipes, self._pending, strict=True)
        ]  # fmt: skip
        """Of each segment the entries that are constants alone: no extent brings them."""
        self._lock = threading.Lock()
        self._telling = threading.Lock()
        """What is told to be verified is not forgotten at the same time."""
        self._bytes_counter: Counter | None = None
        self._saved_counter: Counter | None = None
        for index, extent in enumerate(extents):
            extent.index = index
            if self._landed[index]:
                self._take_over(extent)
        for segment, pending in enumerate(self._pending):
            unread = set(self.unread[segment])
            if there := [index for index, nbytes in enumerate(pending) if not nbytes and index not in unread]:
                on_verified(segment, there)

    def _take_over(self, extent: Extent) -> None:
        """It has landed before."""
        from_peer = self._landed[extent.index] == _FROM_PEER
        if from_peer:
            self._without_tensor(extent)
            self.peer_bytes += extent.nbytes
        self.bytes_read += extent.nbytes
        for piece in extent.pieces:
            self._pending[piece.segment][piece.entry] -= piece.nbytes
        self.mark(extent, self.completed(extent), from_peer=from_peer)

    def count_with(self, metrics: Metrics, source: str) -> None:
        """Add to a daemon's counters from now on, under the source's kind."""
        self._bytes_counter = metrics.source_bytes.labels(source)
        self._saved_counter = metrics.saved_bytes

    def close(self) -> None:
        """Let go of the ledger: of views, which would keep its memory and descriptor until the garbage collector comes
        by."""
        self.leaves, self.tensor_leaves, self._landed = [], {}, memoryview(b"")

    # ------------------------------------------------------------------ what is to come

    def next(self) -> Extent | None:
        """The next extent to read, in order; None when there is no more."""
        try:
            return self._queue.popleft()
        except IndexError:
            return None

    def drain(self) -> list[Extent]:
        """All extents that nobody has taken: ``requeue`` puts them back."""
        found = list(self._queue)
        self._queue.clear()
        return found

    def requeue(self, extents: Iterable[Extent]) -> None:
        """Let the source's reader read these."""
        self._queue.extend(extents)

    @property
    def queued(self) -> int:
        """Extents that no reader has taken."""
        return len(self._queue)

    def begun(self, places: Iterable[tuple[int, int, int, int]]) -> None:
        """These are being read from the source: (segment, entry, first leaf, leaves)."""
        for segment, entry, leaf, count in places:
            first = self._leaf_starts[segment][entry] + leaf
            self.coming[segment][first : first + count] = b"\1" * count

    # ------------------------------------------------------------------ what has come

    def count(self, extent: Extent, *, from_peer: bool = False) -> dict[int, list[int]]:
        """The extent's bytes are there; returns the entries, by segment, of which that was the last."""
        if from_peer:
            self._without_tensor(extent)
        complete: dict[int, list[int]] = {}
        with self._lock:
            self.bytes_read += extent.nbytes
            self.peer_bytes += extent.nbytes if from_peer else 0
            for piece in extent.pieces:
                pending = self._pending[piece.segment]
                pending[piece.entry] -= piece.nbytes
                if not pending[piece.entry]:
                    complete.setdefault(piece.segment, []).append(piece.entry)
        if counter := self._saved_counter if from_peer else self._bytes_counter:
            counter.inc(extent.nbytes)
        return complete

    def _expect_parts(self, extent: Extent) -> None:
        for piece in extent.pieces:
            if piece.shared:
                parts, first = self._parts[piece.segment], self._leaf_starts[piece.segment][piece.entry] + piece.leaf
                for leaf in range(first, first + piece.shared):
                    parts[leaf] += 1

    def completed(self, extent: Extent) -> list[Piece]:
        """The extent's bytes are there: the leaves, as pieces of whole ones, of which they were the last part.

        To be hashed before the extent is counted, which says that its entries are verified.
        """
        found: list[Piece] = []
        for piece in extent.pieces:
            if not piece.shared:
                continue
            entry, parts = self._recipes[piece.segment].entries[piece.entry], self._parts[piece.segment]
            start = self._leaf_starts[piece.segment][piece.entry]
            last = -2
            for leaf in range(piece.leaf, piece.leaf + piece.shared):
                with self._lock:
                    parts[start + leaf] -= 1
                    if parts[start + leaf]:
                        continue
                at = leaf * LEAF
                nbytes = min(LEAF, entry.nbytes - at)
                if last == leaf - 1:
                    found[-1] = found[-1]._replace(nbytes=found[-1].nbytes + nbytes)
                else:
                    found.append(Piece(piece.segment, piece.entry, entry.offset + at, nbytes, leaf))
                last = leaf
        return found

    def mark(self, extent: Extent, completed: Iterable[Piece], *, from_peer: bool = False) -> None:
        """All bytes of the extent are there, and hashed: with it the leaves that it has ``completed``."""
        self._landed[extent.index] = _FROM_PEER if from_peer else _FROM_ORIGIN
        for piece in itertools.chain(extent.pieces, completed):
            if not piece.shared:
                self._mark_leaves(piece.segment, piece.entry, piece.leaf, leaf_count(piece.nbytes))
        self.on_landed(extent)

    def _mark_leaves(self, segment: int, entry: int, first: int, count: int) -> None:
        start = self._leaf_starts[segment][entry] + first
        self.there[segment][start : start + count] = b"\1" * count

    def is_untouched(self, segment: int, entry: int) -> bool:
        """Whether nothing is there of an entry, a part of which is to come."""
        return 0 < self._pending[segment][entry] == self._brought[segment][entry]

    def mark_unread(self) -> None:
        """The entries that no extent brings are there, and hashed."""
        for segment, entries in enumerate(self.unread):
            for entry in entries:
                self._mark_leaves(segment, entry, 0, len(self.leaves[segment][entry]))
        self.announce(dict(enumerate(self.unread)))

    def announce(self, complete: Mapping[int, list[int]]) -> None:
        """These entries, by segment, are verified; but for what was forgotten since."""
        with self._telling:
            for segment, entries in complete.items():
                whole = [entry for entry in entries if not self._pending[segment][entry]]
                if whole:
                    self._on_verified(segment, whole)

    def arrived(self, extents: Sequence[Extent], digests: Iterable[tuple[int, int, int, int]]) -> None:
        """A peer has brought these extents: (segment, entry, leaf, digest) of all their leaves, or of whole entries.

        Raises DigestMismatch where others were expected.
        """
        for segment, entry, leaf, digest in digests:
            self.leaves[segment][entry][leaf] = digest
            self.compare_entry(segment, entry, leaf, 1)
        complete: dict[int, list[int]] = {}
        for extent in extents:
            completed = self.completed(extent)
            for segment, entries in self.count(extent, from_peer=True).items():
                complete.setdefault(segment, []).extend(entries)
            self.mark(extent, completed, from_peer=True)
        self.announce(complete)

    def _without_tensor(self, extent: Extent) -> None:
        """A checkpoint tensor is not hashed as such where a part of it came from a peer, laid out already."""
        if extent.tensor is not None:
            self.tensor_leaves.pop(extent.tensor[0], None)

    def has(self, extent: Extent) -> bool:
        """Whether it has landed."""
        return bool(self._landed[extent.index])

    def from_peers(self, extents: Iterable[Extent]) -> list[Extent]:
        """Those of ``extents`` that came from peers."""
        return [extent for extent in extents if self._landed[extent.index] == _FROM_PEER]

    def forget(self, extents: Sequence[Extent]) -> bool:
        """What has come of these is not to be believed: it is to come again. False where clients use it."""
        pieces = [piece for extent in extents for piece in extent.pieces]
        nbytes = sum(extent.nbytes for extent in extents)
        by_peers = sum(extent.nbytes for extent in self.from_peers(extents))
        for extent in extents:
            self._landed[extent.index] = 0
        with self._telling, self._lock:  # from now on nobody is told of their entries
            self.bytes_read -= nbytes
            self.peer_bytes -= by_peers
            for piece in pieces:
                self._pending[piece.segment][piece.entry] += piece.nbytes
            for extent in extents:
                self._expect_parts(extent)
        for piece in pieces:
            first = self._leaf_starts[piece.segment][piece.entry] + piece.leaf
            count = piece.shared or leaf_count(piece.nbytes)
            self.there[piece.segment][first : first + count] = bytes(count)
        return self.take_back({(piece.segment, piece.entry) for piece in pieces})

    def check_complete(self) -> None:
        """Raise where a reader has returned before every byte has landed: nothing may be sealed then."""
        if missing := sum(not landed for landed in self._landed):
            raise SourceFailed(f"{missing} of {len(self._landed)} extents have not come")
        for recipe, pending in zip(self._recipes, self._pending, strict=True):
            for entry, nbytes in zip(recipe.entries, pending, strict=True):
                if nbytes:
                    raise SourceFailed(f"tensor {entry.name!r}: {nbytes} of {entry.nbytes} bytes have not come")

    # ------------------------------------------------------------------ digests

    def leaf_starts(self, segment: int) -> Sequence[int]:
        """Where each entry's leaves begin in ``there``, and where the last one's end."""
        return self._leaf_starts[segment]

    def leaves_at(self, segment: int, first: int, count: int) -> array[int]:
        """Digests of leaves that follow one another, counted over all entries of a segment."""
        found = array("Q")
        while count > 0:
            entry, at = self.leaf_at(segment, first)
            part = self.leaves[segment][entry][at : at + count]
            if not part:
                raise IndexError("there are not so many leaves")
            found.frombytes(part.tobytes())
            first, count = first + len(part), count - len(part)
        return found

    def leaf_at(self, segment: int, leaf: int) -> tuple[int, int]:
        """The entry that a leaf is of, and its number there, by its number over all entries of the segment."""
        entry = bisect.bisect_right(self._leaf_starts[segment], leaf) - 1
        return entry, leaf - self._leaf_starts[segment][entry]

    def expected_leaf(self, segment: int, entry: int, leaf: int) -> int | None:
        """The digest that a leaf of an entry has to have, where that is known; -1 where there should be none."""
        known = self._expected.get(self._recipes[segment].entries[entry].name)
        if known is None:
            return None
        return known[leaf] if leaf < len(known) else -1

    def digests(self, segment: int) -> list[str]:
        """Tensor digests of a segment's entries, in their order. Only when all have landed."""
        return [
            tensor_digest(entry.dtype, entry.shape, entry.nbytes, leaves)
            for entry, leaves in zip(self._recipes[segment].entries, self.leaves[segment], strict=True)
        ]

    def compare_entry(self, segment: int, entry: int, first: int, count: int) -> None:
        """Raise DigestMismatch where these leaves of an entry are not the expected ones."""
        if (segment, entry) in self._comparable:
            self._compare(self._recipes[segment].entries[entry].name, self.leaves[segment][entry], first, count)

    def compare_tensor(self, tensor: int, leaves: memoryview, first: int, count: int) -> None:
        """The same of a checkpoint tensor, whose ``leaves`` these are."""
        self._compare(self._tensors[tensor].name, leaves, first, count)

    def _compare(self, name: str, leaves: memoryview, first: int, count: int) -> None:
        expected = self._expected.get(name)
        if expected is None:
            return
        if first + count > len(expected):
            raise DigestMismatch(
                f"tensor {name!r} has {len(leaves)} leaves, expected are {len(expected)}: it is longer than what was "
                "expected",
                tensor=name,
                leaf=len(expected),
            )
        for leaf in range(first, first + count):
            if leaves[leaf] != expected[leaf]:
                raise DigestMismatch(
                    f"tensor {name!r}, leaf {leaf} (bytes {leaf * LEAF} and up of the tensor): digest is "
                    f"{leaves[leaf]:016x}, expected {expected[leaf]:016x}",
                    tensor=name,
                    leaf=leaf,
                )


def ledger_for(tensors: Sequence[TensorInfo], recipes: Sequence[Recipe], extents: Sequence[Extent]) -> Ledger:
    """An empty ledger for filling these."""
    leaves = sum(leaf_counts(recipes)) + sum(leaf_count(tensors[index].nbytes) for index in _hashed_tensors(extents))
    return Ledger.new(len(extents), leaves, fingerprint(recipes, extents))


def _hashed_tensors(extents: Sequence[Extent]) -> list[int]:
    """Checkpoint tensors that are hashed as such, by index."""
    return sorted({extent.tensor[0] for extent in extents if extent.tensor is not None})
