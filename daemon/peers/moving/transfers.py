"""Parts on their way from peers: the process that reads them, where they land, and where peers put what is on GPUs."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from weightd.daemon.addresses import is_local, parse_address
from weightd.daemon.devices.base import Segment
from weightd.daemon.filling.fill import Fill
from weightd.daemon.layouts.digests import leaf_digest
from weightd.daemon.peers.finding.fleet import Fleet
from weightd.daemon.peers.finding.listening import Peer
from weightd.daemon.peers.moving.inlet import Inlet
from weightd.daemon.peers.moving.lane import Lane
from weightd.daemon.peers.moving.movers import Arrival, Mover, MoverFailed, Movers
from weightd.daemon.peers.moving.parts import Part, PartState, Span, leaf_ranges, packed
from weightd.daemon.peers.moving.paths import better_path

log = logging.getLogger(__name__)


class Put(NamedTuple):
    """A peer was asked to put a part where it can be read."""

    lane: Lane
    part: Part
    address: object
    """Where it says that it is; None where it has no room now."""
    error: str


class Settled(NamedTuple):
    """A part that has come lies where it belongs, and was hashed."""

    lane: Lane
    part: Part


class Transfers:
    """Reads parts of ``segments`` from peers, each by a lane of its own. Methods are for one thread.

    What comes of it goes to ``report``, from any thread.
    """

    def __init__(
        self,
        fleet: Fleet,
        movers: Movers,
        segments: Sequence[Segment],
        report: Callable[[Put | Arrival | Settled], object],
    ) -> None:
        """Raises OSError."""
        self._fleet = fleet
        self._movers = movers
        self._report = report
        self._mover: Mover | None = None
        self._lost = False
        """Whether one has ended by itself, and there is another."""
        self._lanes: dict[Peer, Lane] = {}
        self._inlet = Inlet(segments)
        self.on_device = self._inlet.on_device
        """Whether what comes is copied on to a GPU."""
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="window")
        """Ask peers to put what is on their GPUs where it can be read."""
        self._landing = ThreadPoolExecutor(min(8, max(2, os.cpu_count() or 1)), thread_name_prefix="landing")

    def lane(self, peer: Peer) -> Lane:
        """The one of a peer."""
        found = self._lanes.get(peer)
        if found is None:
            found = self._lanes[peer] = Lane(peer)
        return found

    def reading(self, ticket: int) -> tuple[Lane, Part] | None:
        """What is being read by a ticket; None where that was let go."""
        for lane in self._lanes.values():
            if (part := lane.reading(ticket)) is not None:
                return lane, part
        return None

    def connect(self, lane: Lane) -> int:
        """Connect to a peer as it has introduced itself; returns its number. Raises MoverFailed."""
        lane.number = number = self._connected().peer(*lane.peer.metadata)
        return number

    def find_place(self, part: Part) -> bool:
        """Whether there is a place for the part, which then has it."""
        return self._inlet.acquire(part)

    def free_place(self, part: Part) -> None:
        """The part's place is free: nothing is read from there, or to it. For any thread."""
        self._inlet.release(part)

    def ask(self, lane: Lane, part: Part) -> None:
        """Have a part, which has its place, from a peer. Raises MoverFailed."""
        self._number_of(lane)
        if lane.peer.reader is None:
            self.read(lane, part)
            return
        lane.move(part, PartState.AWAITED)
        self._threads.submit(self._have_put, lane, part, lane.take_read_out())

    def put_back(self, lane: Lane, part: Part) -> None:
        """The peer has no room for a part now: it is to be asked again."""
        lane.full = True
        self.free_place(part)
        lane.move(part, PartState.QUEUED)

    def read(self, lane: Lane, part: Part) -> None:
        """Read a part from where it lies in the peer's segments, or where the peer has put it. Raises MoverFailed."""
        number = self._number_of(lane)
        if part.at is None:
            addresses = [lane.peer.addresses[span.segment] + span.offset for span in part.spans]
        else:
            addresses = [part.at + start for start in packed([span.nbytes for span in part.spans])]
        places = self._inlet.places(part)
        pairs = [
            (offset, address, span.nbytes)
            for (_, offset), address, span in zip(places, addresses, part.spans, strict=True)
        ]
        assert self._mover is not None
        part.ticket = self._mover.read(number, places[0][0], pairs)
        lane.move(part, PartState.READING)

    def settle(self, lane: Lane, part: Part, fill: Fill) -> None:
        """Put a part that has come where it belongs, and hash it there, in a thread."""
        part.settling = self._landing.submit(self._settle, part, fill)
        part.settling.add_done_callback(lambda _: self._report(Settled(lane, part)))

    def views(self, part: Part) -> list[memoryview]:
        """The bytes of each span of a part that has settled."""
        return self._inlet.views(part)

    def give_back(self, lane: Lane) -> None:
        """Tell a peer that what it has put was read: others wait for its room."""
        self._threads.submit(self._say_read, lane.peer, lane.take_read_out())

    def came_by(self, peer: Peer, transport: str) -> None:
        """Note by what bytes came from a peer, and say so once where this machine has a better way."""
        if peer.use.transport == transport:
            return
        peer.use.transport = transport
        same_host = is_local(parse_address(peer.name)[0])
        if missed := better_path(transport, same_host=same_host):
            peer.use.slow_path = f"{missed.path}: {missed.reason}"
            log.warning("peer %s is read by %s, not by %s", peer.name, transport, peer.use.slow_path)
            self._fleet.count_slow(missed.path)

    @property
    def died(self) -> bool:
        """Whether a process that read has ended by itself, with what it was reading."""
        return self._lost or (self._mover is not None and not self._mover.alive)

    def kill(self) -> None:
        """End all reads: when this returns, nothing of them is being written any more."""
        if self._mover is not None:
            self._mover.kill()
            self._mover = None
        self._lost = False
        self._disconnected()

    def let_go(self, lane: Lane) -> set[int]:
        """Forget what a peer was to bring, of which nothing is being written any more: the groups that it is of."""
        lost = lane.let_go()
        for part in lost:
            self._inlet.release(part)
        return {part.group for part in lost}

    def forget(self, peer: Peer) -> None:
        """Nothing is asked of the peer any more. After ``let_go``."""
        self._lanes.pop(peer, None)

    def stop(self) -> None:
        """End everything that was started; afterwards no process but this one has the segments mapped."""
        self.kill()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._landing.shutdown(cancel_futures=True)
        with contextlib.suppress(MoverFailed):  # then the next stage starts its own
            self._movers.prepare()

    def close(self) -> None:
        """Let go of where parts land. After ``stop``."""
        self._inlet.close()

    def _connected(self) -> Mover:
        if self._mover is None or not self._mover.alive:
            self._lost = self._lost or self._mover is not None
            mover = self._movers.take()
            mover.on_arrival = self._ended
            try:
                self._inlet.connect(mover)
            except MoverFailed:
                mover.kill()
                raise
            self._mover = mover
            self._disconnected()
        return self._mover

    def _disconnected(self) -> None:
        """Numbers were those of a mover that is gone."""
        for lane in self._lanes.values():
            lane.number = None

    def _number_of(self, lane: Lane) -> int:
        self._connected()
        return self.connect(lane) if lane.number is None else lane.number

    # ------------------------------------------------------------------ in threads

    def _ended(self, arrival: Arrival | None) -> None:
        if arrival is not None:
            self._report(arrival)

    def _settle(self, part: Part, fill: Fill) -> list[tuple[Span, int, int]]:
        """(span, leaf, digest) of all leaves of a part."""
        with fill.phase("copying", "peer"):
            self._inlet.settle(part)
        with fill.phase("verifying", "peer"):  # what stays: a slot is open to whoever makes the mover write
            return [
                (span, leaf, leaf_digest(view[at - span.offset : at - span.offset + nbytes]))
                for span, view in zip(part.spans, self._inlet.views(part), strict=True)
                for leaf, at, nbytes in leaf_ranges(span)
            ]

    def _have_put(self, lane: Lane, part: Part, read_out: list[int]) -> None:
        """Ask a peer to put a part of what is on its GPU where it can be read."""
        try:
            pieces = [(span.segment, span.offset, span.nbytes) for span in part.spans]
            body = {"reader": lane.peer.reader, "given": read_out, "pieces": pieces}
            answer = lane.peer.client(self._fleet).post("/peer/v1/window", json=body)
            answer.raise_for_status()
            self._report(Put(lane, part, answer.json()["address"], ""))
        except Exception as error:  # whatever a stranger's answer can make of a parser
            self._report(Put(lane, part, None, f"{type(error).__name__}: {error}"[:500]))

    def _say_read(self, peer: Peer, read_out: list[int]) -> None:
        with contextlib.suppress(Exception):  # then it takes it back when nobody listens any more
            body = {"reader": peer.reader, "given": read_out, "pieces": []}
            peer.client(self._fleet).post("/peer/v1/window", json=body)
