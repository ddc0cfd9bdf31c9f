"""Loading from peers: what they have comes from them, all else from the origin, each byte verified before it counts.

One thread decides, by ``Assignment``; one for each peer listens to what it has; the origin's own reader reads what
falls to this node. Bytes come through a mover process, straight to their final address.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from weightd.daemon.devices import Segment
from weightd.daemon.errors import SourceFailed
from weightd.daemon.extents import Extent
from weightd.daemon.fill import Fill
from weightd.daemon.peers.assignment import Assignment
from weightd.daemon.peers.groups import Group, leaf_ranges, plan_groups
from weightd.daemon.peers.mover import Mover, MoverFailed
from weightd.daemon.recipe import Recipe
from weightd.daemon.sources import Reader

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

_AHEAD = 64
"""Extents that the origin's reader has before it, at most: what it has not begun yet can still come from a peer."""
_STRIKES = 3
"""Times that a mover process may die while it reads from a peer, before that one is given up for good."""
_FOLLOWED = 64
"""Peers that are listened to at the same time."""
_AT_ONCE = 4
"""Groups that are asked of one peer at the same time."""
_FIRST_WORD = 2.0
"""Seconds that peers may take to say what they have, before the origin is read."""
_AGAIN = 1.0
"""Seconds between looks at who has come."""
_MAX_LINE = 1 << 20


@dataclass(frozen=True)
class Fleet:
    """Who else there is, and how to talk to them. ``members()`` gives addresses; callable from any thread."""

    me: str
    members: Callable[[], Sequence[str]]
    token: str | None
    stall: float
    """Seconds without any arrival after which a peer is given up."""
    count_bytes: Callable[[int], None] = lambda nbytes: None
    count_dropped: Callable[[str, str], None] = lambda peer, reason: None

    def client(self, address: str) -> httpx.Client:
        """A client of one peer's port."""
        import httpx  # 10 MB that a daemon without peers does without

        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return httpx.Client(base_url=f"http://{address}", headers=headers, timeout=httpx.Timeout(5.0, read=10.0))


@dataclass(eq=False)
class _Peer:
    """One peer, as far as it is known."""

    name: str
    answered: bool = False
    """Whether it has the stage."""
    ready: bool = False
    """Whether it has all of it."""
    heard: bool = False
    """Whether it has said what it has of it, as far as it can."""
    number: int | None = None
    """Its number with the mover, once connected."""
    metadata: list[bytes] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)
    claims: dict[tuple[int, int, int], int] = field(default_factory=dict)
    """(segment, entry, leaf) → the digest that it claims."""
    in_flight: dict[int, int] = field(default_factory=dict)
    """Ticket → group."""
    arrived: float = 0.0
    """When bytes came from it last, or were asked of it while none were, in monotonic seconds."""
    told: float = 0.0
    """When it said something new last."""
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when nobody listens to it any more."""


class PeerReader:
    """A reader for stages whose segments are in host memory; ``origin`` makes the reader of their source."""

    def __init__(
        self,
        key: str,
        fleet: Fleet,
        recipes: Sequence[Recipe],
        segments: Sequence[Segment],
        origin: Callable[[], Reader],
    ) -> None:
        self._key = key
        self._fleet = fleet
        self._recipes = recipes
        self._segments = segments
        self._make_origin = origin
        self._origin: Reader | None = None
        self._origin_thread: threading.Thread | None = None
        self._origin_error: BaseException | None = None
        self._with_origin: set[int] = set()
        """Groups that were given to the origin's reader."""
        self._events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._peers: dict[str, _Peer] = {}
        self._lost: set[str] = set()
        self._strikes: dict[str, int] = {}
        self._mover: Mover | None = None
        self._regions: list[int] = []
        self._closing = threading.Event()
        self._asked: dict[str, int] = {}
        self._not_before: dict[str, float] = {}
        """When a peer may be asked again, in monotonic seconds."""
        self._groups: list[Group] = []
        self._group_of: dict[int, Group] = {}
        self._at_leaf: dict[tuple[int, int, int], Group] = {}

    def run(self, fill: Fill) -> None:
        self._share = _Share(fill)
        missing = fill.missing()
        if not missing:
            return
        self._groups = plan_groups(missing, self._recipes)
        self._group_of = {extent.index: group for group in self._groups for extent in group.extents}
        for group in self._groups:
            for span in group.spans:
                for leaf, _, _ in leaf_ranges(span):
                    self._at_leaf[span.segment, span.entry, leaf] = group
        assignment = Assignment(self._fleet.me, [group.stripe for group in self._groups])
        left = {group.index: len(group.extents) for group in self._groups}
        fill.on_landed = lambda extent: self._events.put(("landed", extent))
        started = progress = looked = time.monotonic()
        self._look()
        try:
            while not assignment.finished and not fill.stopped:
                now = time.monotonic()
                if now - looked > _AGAIN:
                    looked = now
                    self._look()
                with fill.phase("source"):
                    happened = self._next_event(0.02)
                for kind, what in happened:
                    if kind == "landed":
                        group = self._group_of[what.index]
                        left[group.index] -= 1
                        if not left[group.index]:
                            assignment.done(group.index)
                        progress = now
                    elif kind == "arrived":
                        if self._arrived(fill, assignment, *what):
                            progress = now
                    else:
                        self._heard(assignment, kind, what)
                self._drop_dead(assignment, now)
                self._ask_peers(assignment)
                if not any(self._awaited(peer, now, started) for peer in self._peers.values()):
                    self._feed_origin(fill, assignment, left, impatient=now - progress > self._fleet.stall)
        finally:
            fill.on_landed = lambda extent: None
            self._stop()

    # ------------------------------------------------------------------ listening

    def _look(self) -> None:
        """Listen to members that are new."""
        now = time.monotonic()
        for address in self._fleet.members():
            known = address in self._peers or address in self._lost or len(self._peers) >= _FOLLOWED
            if known or now < self._not_before.get(address, 0.0):
                continue
            self._asked[address] = self._asked.get(address, 0) + 1
            self._not_before[address] = now + min(60.0, _AGAIN * 2.0 ** self._asked[address])
            peer = self._peers[address] = _Peer(address)
            threading.Thread(target=self._follow, args=(address, peer.gone), name="peer", daemon=True).start()

    def _awaited(self, peer: _Peer, now: float, started: float) -> bool:
        """Whether it may be about to say that it has what the origin would be read for."""
        if peer.heard:
            return False
        return now - peer.told < self._fleet.stall if peer.answered else now - started < _FIRST_WORD

    def _follow(self, address: str, gone: threading.Event) -> None:
        """In a thread: pass on what a peer says, until it stops."""
        why = "it hung up"
        try:
            with self._fleet.client(address) as client, client.stream("GET", f"/peer/v1/stages/{self._key}") as answer:
                if answer.status_code == 404:
                    self._events.put(("absent", address))
                    return
                answer.raise_for_status()
                self._events.put(("said", (address, {"type": "answered"})))
                for line in answer.iter_lines():
                    if self._closing.is_set() or gone.is_set():
                        return
                    if len(line) > _MAX_LINE:
                        raise ValueError(f"a line of {len(line)} bytes")
                    if line.startswith("data:"):
                        self._events.put(("said", (address, json.loads(line[5:]))))
        except Exception as error:  # whatever a stranger's answer can make of a parser
            why = f"{type(error).__name__}: {error}"
        if not gone.is_set():
            self._events.put(("gone", (address, why)))

    def _next_event(self, timeout: float) -> list[tuple[str, Any]]:
        """What has happened, at most ``timeout`` seconds after now."""
        found: list[tuple[str, Any]] = []
        if self._mover is not None:
            with contextlib.suppress(MoverFailed):
                arrival = self._mover.arrived(0.001 if not self._events.empty() else timeout)
                while arrival is not None:
                    found.append(("arrived", arrival))
                    arrival = self._mover.arrived(0)
        with contextlib.suppress(queue.Empty):
            if self._mover is None and not found:
                found.append(self._events.get(timeout=timeout))
            while True:
                found.append(self._events.get_nowait())
        return found

    def _heard(self, assignment: Assignment, kind: str, what: Any) -> None:
        if kind == "absent":
            self._peers.pop(what, None)  # to be asked again: it may come to have it
            return
        address, said = what
        peer = self._peers.get(address)
        if peer is None:
            return
        if kind == "gone":
            self._strike(assignment, peer, str(said))
            return
        try:
            self._understand(assignment, peer, said)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            self._drop(assignment, peer, f"it says what makes no sense: {error!r}")
        except MoverFailed as error:
            self._drop(assignment, peer, f"it cannot be read: {error}")

    def _understand(self, assignment: Assignment, peer: _Peer, said: Mapping[str, Any]) -> None:
        if said["type"] == "answered":
            peer.answered, peer.told = True, time.monotonic()
        elif said["type"] == "segments":
            segments = said["segments"]
            if len(segments) != len(self._segments):
                raise ValueError(f"{len(segments)} segments, expected {len(self._segments)}")
            peer.addresses = [int(segment["address"]) for segment in segments]
            peer.metadata = [base64.b64decode(segment["metadata"], validate=True) for segment in segments]
            peer.number = self._connected().peer(*peer.metadata)
            peer.ready = said["ready"] is True
            peer.heard = not peer.ready
            if not peer.ready:
                assignment.wants(peer.name)
        elif said["type"] == "complete":
            peer.heard = True
        elif said["type"] == "leaves":
            segment, entry, first, digests = said["segment"], said["entry"], said["first"], said["digests"]
            if not isinstance(digests, str) or len(digests) % 16:
                raise ValueError("digests of no length that digests have")
            touched = set()
            for i in range(len(digests) // 16):
                place = (segment, entry, first + i)
                group = self._at_leaf.get(place)
                if group is not None:
                    peer.claims[place] = int(digests[16 * i : 16 * i + 16], 16)
                    touched.add(group.index)
            if touched:
                peer.told = time.monotonic()
            whole = [index for index in touched if self._claims(peer, self._groups[index]) is not None]
            assignment.has(peer.name, whole)
        elif said["type"] == "gone":
            self._drop(assignment, peer, "it gives nothing any more", for_good=False)

    def _claims(self, peer: _Peer, group: Group) -> list[int] | None:
        """The digests that a peer claims for a group's leaves; None where it has not all of them."""
        found = []
        for span in group.spans:
            for leaf, _, _ in leaf_ranges(span):
                digest = peer.claims.get((span.segment, span.entry, leaf))
                if digest is None:
                    return None
                found.append(digest)
        return found

    # ------------------------------------------------------------------ reading from peers

    def _connected(self) -> Mover:
        if self._mover is None or not self._mover.alive:
            mover = Mover()
            try:
                self._regions = [mover.into(segment.fd, segment.footprint) for segment in self._segments]
            except MoverFailed:
                mover.kill()
                raise
            self._mover = mover
            for peer in self._peers.values():
                peer.number = None
        return self._mover

    def _ask_peers(self, assignment: Assignment) -> None:
        for peer in list(self._peers.values()):
            while peer.metadata and len(peer.in_flight) < _AT_ONCE:
                index = assignment.from_peer(peer.name)
                if index is None:
                    break
                try:
                    mover = self._connected()
                    if peer.number is None:
                        peer.number = mover.peer(*peer.metadata)
                    if not peer.in_flight:
                        peer.arrived = time.monotonic()
                    self._read(mover, peer, self._groups[index])
                except MoverFailed as error:
                    assignment.failed(index)
                    self._drop(assignment, peer, f"it cannot be read: {error}")
                    break

    def _read(self, mover: Mover, peer: _Peer, group: Group) -> None:
        """A transfer for each segment that the group is of."""
        assert peer.number is not None
        for segment in sorted({span.segment for span in group.spans}):
            pairs = [
                (span.offset, peer.addresses[segment] + span.offset, span.nbytes)
                for span in group.spans
                if span.segment == segment
            ]
            peer.in_flight[mover.read(peer.number, self._regions[segment], pairs)] = group.index

    def _arrived(self, fill: Fill, assignment: Assignment, ticket: int, error: str | None) -> bool:
        """A read has ended; whether it has brought something."""
        peer = next((peer for peer in self._peers.values() if ticket in peer.in_flight), None)
        if peer is None:
            return False
        group = self._groups[peer.in_flight[ticket]]
        if error is not None:
            self._strike(assignment, peer, error)  # parts of it may still land: with the ticket, the mover goes
            return False
        del peer.in_flight[ticket]
        peer.arrived = time.monotonic()
        if group.index in peer.in_flight.values():
            return True  # there is more of it to come
        claims = self._claims(peer, group)
        places = [(span, leaf, at, nbytes) for span in group.spans for leaf, at, nbytes in leaf_ranges(span)]
        with fill.phase("verifying"):
            found = fill.hash_places([(span.segment, at, nbytes) for span, _, at, nbytes in places])
            wrong = next((i for i, digest in enumerate(found) if claims is None or digest != claims[i]), None)
            if wrong is not None:
                name = self._recipes[places[wrong][0].segment].entries[places[wrong][0].entry].name
                assignment.failed(group.index)
                self._drop(assignment, peer, f"tensor {name!r}, leaf {places[wrong][1]}: not the bytes that it claims")
                return False
            digests = [
                (span.segment, span.entry, leaf, digest)
                for (span, leaf, _, _), digest in zip(places, found, strict=True)
            ]
            fill.arrived([extent for extent in group.extents if not fill.has(extent)], digests)
        self._fleet.count_bytes(group.nbytes)
        return True

    def _drop_dead(self, assignment: Assignment, now: float) -> None:
        if self._mover is not None and not self._mover.alive:
            for peer in [peer for peer in self._peers.values() if peer.in_flight]:
                self._strike(assignment, peer, "the process that read from it died")
        for peer in list(self._peers.values()):
            if peer.in_flight and now - peer.arrived > self._fleet.stall:
                self._drop(assignment, peer, f"nothing came for {self._fleet.stall:g} s")

    def _strike(self, assignment: Assignment, peer: _Peer, reason: str) -> None:
        """Give a peer up for now; after some times for good."""
        self._strikes[peer.name] = self._strikes.get(peer.name, 0) + 1
        self._drop(assignment, peer, reason, for_good=self._strikes[peer.name] >= _STRIKES)

    def _drop(self, assignment: Assignment, peer: _Peer, reason: str, *, for_good: bool = True) -> None:
        """Have nothing more of a peer. What it was to bring is free again, once nothing can write there any more."""
        log.warning("peer %s is given up: %s", peer.name, reason)
        self._fleet.count_dropped(peer.name, reason)
        self._peers.pop(peer.name, None)
        peer.gone.set()
        if for_good:
            self._lost.add(peer.name)
        if peer.in_flight:
            # A transfer cannot be called back. The process that makes it can be ended, and with it all others' are.
            if self._mover is not None:
                self._mover.kill()
                self._mover = None
            for other in (peer, *self._peers.values()):
                other.number = None
                for index in other.in_flight.values():
                    assignment.failed(index)
                other.in_flight.clear()
        assignment.lost(peer.name)
        if not for_good:
            assignment.back(peer.name)

    # ------------------------------------------------------------------ the origin

    def _feed_origin(self, fill: Fill, assignment: Assignment, left: Mapping[int, int], *, impatient: bool) -> None:
        """Keep the origin's reader busy with what falls to this node, as long as there is any."""
        if self._origin_thread is not None and not self._origin_thread.is_alive():
            self._origin_thread.join()
            self._origin_thread = None
            self._origin_ended(fill, assignment, left)
        if self._origin_error is not None:
            if not any(peer.metadata for peer in self._peers.values()):
                raise self._origin_error
            return
        if fill.queued < _AHEAD:
            groups = assignment.from_origin(most=_AHEAD - fill.queued, impatient=impatient)
            self._with_origin.update(groups)
            fill.give(extent for group in groups for extent in self._groups[group].extents)
        if fill.queued and self._origin_thread is None:
            self._origin_thread = threading.Thread(target=self._run_origin, name="origin", daemon=True)
            self._origin_thread.start()

    def _run_origin(self) -> None:
        try:
            if self._origin is None:
                self._origin = self._make_origin()
            self._origin.run(cast(Fill, self._share))
        except BaseException as error:
            # What it has asked for may still be written, and only its end says that nothing is. Nor may what it has
            # failed of keep views of segments.
            if self._origin is not None:
                self._origin.close()
                self._origin = None
            self._origin_error = error.with_traceback(None)
            self._origin_error.__context__ = self._origin_error.__cause__ = None

    def _origin_ended(self, fill: Fill, assignment: Assignment, left: Mapping[int, int]) -> None:
        """Its reader has done what it had, or failed: then what it has not brought is to come from peers."""
        error = self._origin_error
        if error is None:
            return
        if not isinstance(error, SourceFailed):
            raise error
        log.warning("the origin fails, what is missing is to come from peers: %s", error)
        fill.missing()
        for group in self._with_origin:
            if left[group]:
                assignment.failed(group)

    def _stop(self) -> None:
        """End everything that was started; afterwards no process but this one has the segments mapped."""
        self._closing.set()
        if self._mover is not None:
            self._mover.kill()
            self._mover = None
        if self._origin_thread is not None:
            self._share.stop()
            self._origin_thread.join()

    def close(self) -> None:
        self._closing.set()
        if self._origin is not None:
            self._origin.close()


class _Share:
    """The part of a fill that the origin brings: its reader stops when its own part is over, not all of the fill."""

    def __init__(self, fill: Fill) -> None:
        self._fill = fill
        self._stop = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fill, name)

    @property
    def stopped(self) -> bool:
        return self._stop.is_set() or self._fill.stopped

    def stop(self) -> None:
        self._stop.set()

    def next(self) -> Extent | None:
        return None if self.stopped else self._fill.next()
