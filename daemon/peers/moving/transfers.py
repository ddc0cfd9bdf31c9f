"""Parts on their way from peers: the process that reads them, where they land, and where peers put what is on GPUs."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from weightd.daemon.addresses import is_local, parse_address
from weightd.daemon.devices.base import Segment
from weightd.daemon.filling.fill import Fill
from weightd.daemon.layouts.digests import leaf_digest
from weightd.daemon.peers.finding.fleet import Fleet
from weightd.daemon.peers.finding.following import Peer
from weightd.daemon.peers.moving.inlet import Inlet
from weightd.daemon.peers.moving.movers import Arrival, Mover, MoverFailed, Movers
from weightd.daemon.peers.moving.parts import Part, Span, leaf_ranges, packed
from weightd.daemon.peers.moving.paths import better_path

log = logging.getLogger(__name__)


class Transfers:
    """Reads parts of ``segments`` from peers. Methods are for one thread.

    Puts ``("put", (peer, part, address, error))`` among ``events`` when a peer has put what it was asked to, and says
    of reads that have ended ``("arrived", arrival)``.
    """

    def __init__(
        self, fleet: Fleet, movers: Movers, segments: Sequence[Segment], events: queue.SimpleQueue[tuple[str, Any]]
    ) -> None:
        """Raises OSError."""
        self._fleet = fleet
        self._movers = movers
        self._events = events
        self._mover: Mover | None = None
        self._lost = False
        """Whether one has ended by itself, and there is another."""
        self._numbers: dict[Peer, int] = {}
        """Peer → its number with the mover, once connected."""
        self._inlet = Inlet(segments)
        self.on_device = self._inlet.on_device
        """Whether what comes is copied on to a GPU."""
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="window")
        """Ask peers to put what is on their GPUs where it can be read."""
        self._landing = ThreadPoolExecutor(min(8, max(2, os.cpu_count() or 1)), thread_name_prefix="landing")

    def happened(self, timeout: float) -> list[tuple[str, Any]]:
        """Events, at most ``timeout`` seconds after now; reads that have ended before all else."""
        found: list[tuple[str, Any]] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._events.get(timeout=timeout))
            while len(found) < 1000:
                found.append(self._events.get_nowait())
        return sorted(found, key=lambda event: event[0] != "arrived")

    def connect(self, peer: Peer) -> None:
        """Connect to a peer as it has introduced itself. Raises MoverFailed."""
        self._numbers[peer] = self._connected().peer(*peer.metadata)

    def find_place(self, part: Part) -> bool:
        """Whether there is a place for the part, which then has it."""
        return self._inlet.take(part)

    def free_place(self, part: Part) -> None:
        """The part's place is free: nothing is read from there, or to it. For any thread."""
        self._inlet.give(part)

    def settle(self, peer: Peer, part: Part, fill: Fill) -> None:
        """Put a part that has come where it belongs, and hash it there, in a thread: ``("settled", (peer, part))`` says
        that ``peer.settling[part]`` has the digests."""
        peer.settling[part] = settling = self._landing.submit(self._settle, part, fill)
        settling.add_done_callback(lambda _: self._events.put(("settled", (peer, part))))

    def views(self, part: Part) -> list[memoryview]:
        """The bytes of each span of a part that has settled."""
        return self._inlet.views(part)

    def ask(self, peer: Peer, part: Part) -> None:
        """Have a part, which has its place, from a peer. Raises MoverFailed."""
        self._number_of(peer)
        if peer.reader is None:
            self.read(peer, part)
            return
        peer.awaited.add(part)
        given, peer.given = peer.given, []
        self._threads.submit(self._have_put, peer, part, given)

    def read(self, peer: Peer, part: Part) -> None:
        """Read a part from where it lies in the peer's segments, or where the peer has put it. Raises MoverFailed."""
        number = self._number_of(peer)
        if part.at is None:
            addresses = [peer.addresses[span.segment] + span.offset for span in part.spans]
        else:
            addresses = [part.at + start for start in packed([span.nbytes for span in part.spans])]
        places = self._inlet.places(part)
        pairs = [
            (offset, address, span.nbytes)
            for (_, offset), address, span in zip(places, addresses, part.spans, strict=True)
        ]
        assert self._mover is not None
        peer.in_flight[self._mover.read(number, places[0][0], pairs)] = part

    def give_back(self, peer: Peer) -> None:
        """Tell a peer that what it has put was read: others wait for its room."""
        given, peer.given = peer.given, []
        self._threads.submit(self._say_given, peer, given)

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
        self._numbers.clear()

    def let_go(self, peer: Peer) -> set[int]:
        """Forget what a peer was to bring, of which nothing is being written any more: the groups that it is of."""
        wait(peer.settling.values())
        parts = [*peer.in_flight.values(), *peer.settling, *peer.awaited, *peer.parts]
        for part in parts:
            self._inlet.give(part)
            if part.at is not None:
                peer.given.append(part.at)
        groups = {part.group for part in parts}
        for group in groups:
            peer.digests.pop(group, None)
        peer.in_flight.clear()
        peer.settling.clear()
        peer.awaited.clear()
        peer.parts.clear()
        self._numbers.pop(peer, None)
        return groups

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
            mover.tell = self._tell
            try:
                self._inlet.connect(mover)
            except MoverFailed:
                mover.kill()
                raise
            self._mover = mover
            self._numbers.clear()
        return self._mover

    def _number_of(self, peer: Peer) -> int:
        self._connected()
        if peer not in self._numbers:
            self.connect(peer)
        return self._numbers[peer]

    # ------------------------------------------------------------------ in threads

    def _tell(self, arrival: Arrival | None) -> None:
        if arrival is not None:
            self._events.put(("arrived", arrival))

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

    def _have_put(self, peer: Peer, part: Part, given: list[int]) -> None:
        """Ask a peer to put a part of what is on its GPU where it can be read."""
        try:
            pieces = [(span.segment, span.offset, span.nbytes) for span in part.spans]
            body = {"reader": peer.reader, "given": given, "pieces": pieces}
            answer = peer.client(self._fleet).post("/peer/v1/window", json=body)
            answer.raise_for_status()
            self._events.put(("put", (peer, part, answer.json()["address"], "")))
        except Exception as error:  # whatever a stranger's answer can make of a parser
            self._events.put(("put", (peer, part, None, f"{type(error).__name__}: {error}"[:500])))

    def _say_given(self, peer: Peer, given: list[int]) -> None:
        with contextlib.suppress(Exception):  # then it takes it back when nobody listens any more
            body = {"reader": peer.reader, "given": given, "pieces": []}
            peer.client(self._fleet).post("/peer/v1/window", json=body)
