"""Loading from peers: what they have comes from them, all else from the origin, each byte verified before it counts.

One thread decides, by ``Assignment``; one for each peer listens to what it has; the origin's own reader reads what
falls to this node. Bytes come through a mover process, straight to their final address.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from weightd.daemon.devices import Segment
from weightd.daemon.digests import leaf_digest
from weightd.daemon.errors import DigestMismatch, SourceFailed
from weightd.daemon.extents import Extent
from weightd.daemon.fill import Fill
from weightd.daemon.peers.assignment import Assignment
from weightd.daemon.peers.fleet import Fleet, PeerUse
from weightd.daemon.peers.following import FORMAT, Claims, Peer, listen
from weightd.daemon.peers.groups import Group, Part, Span, leaf_ranges, parts_of, plan_groups
from weightd.daemon.peers.membership import READERS, Readers, degree, neighbours
from weightd.daemon.peers.mover import Mover, MoverFailed
from weightd.daemon.peers.paths import better_path, is_local
from weightd.daemon.peers.window import Inlet, packed
from weightd.daemon.recipe import Recipe
from weightd.daemon.sources import Reader

log = logging.getLogger(__name__)

_STRIKES = 3
"""Times that a peer may fail without having said anything untrue, before it is given up for good."""
_AT_ONCE = 4
"""Groups that are asked of one peer at the same time, at most."""
_FIRST_WORD = 2.0
"""Seconds that peers may take to say what they have, before the origin is read."""
_AGAIN = 1.0
"""Seconds between looks at who has come."""
_WHOLE = 4
"""Peers with all of a stage that its readers listen to beside their neighbours, where the directory knows of any."""


class PeerReader:
    """A reader for stages whose segments are in host memory; ``origin`` makes the reader of their source; None where
    all has to come from peers."""

    def __init__(
        self,
        key: str,
        fleet: Fleet,
        recipes: Sequence[Recipe],
        segments: Sequence[Segment],
        origin: Callable[[], Reader] | None,
    ) -> None:
        self._key = key
        self._fleet = fleet
        self._recipes = recipes
        self._segments = segments
        self._make_origin = origin
        self._origin: Reader | None = None
        self._origin_thread: threading.Thread | None = None
        self._origin_error: BaseException | None = None
        self._origin_window = _Window(least=4, most=64)
        self._with_origin: set[int] = set()
        """Groups that the origin's reader was given, and that are not here yet."""
        self._events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._peers: dict[str, Peer] = {}
        self._lost: set[str] = set()
        """Peers that were given up for good."""
        self._strikes: dict[str, int] = {}
        self._peer_window = _Window(least=4, most=256)
        self._readers = Readers(fleet.me, key, fleet.stall)
        self._mover: Mover | None = None
        self._inlet = Inlet(segments)
        self._on_device = self._inlet.window is not None
        """Whether what comes is copied on to a GPU."""
        self._windows = ThreadPoolExecutor(8, thread_name_prefix="window")
        """Ask peers to put what is on their GPUs where it can be read."""
        self._parts_left: dict[int, int] = {}
        """Group → parts that are still to come of it, while a peer brings it."""
        self._asked: dict[str, int] = {}
        self._not_before: dict[str, float] = {}
        """When a peer may be asked again, in monotonic seconds."""
        self._groups: list[Group] = []
        self._group_of: dict[int, Group] = {}
        self._from: dict[int, str] = {}
        """Group → the peer that brought it."""
        self._by_leaf: list[dict[int, int]] = []
        """For each segment: leaf, counted over all its entries → group."""

    def run(self, fill: Fill) -> None:
        self._fill, self._account = fill, fill.account
        self._share = _Share(fill)
        missing = self._account.take_all()
        if not missing:
            return
        self._groups = plan_groups(missing, self._recipes)
        self._group_of = {extent.index: group for group in self._groups for extent in group.extents}
        self._starts = [self._account.leaf_starts(segment) for segment in range(len(self._recipes))]
        self._by_leaf = [{} for _ in self._recipes]
        for group in self._groups:
            for segment, first, count in self._leaves(group):
                self._by_leaf[segment].update(dict.fromkeys(range(first, first + count), group.index))
        self._left = {group.index: len(group.extents) for group in self._groups}
        self._assignment = Assignment(
            self._fleet.me, [group.stripe for group in self._groups], self._readers, self._fleet.stall
        )
        self._account.on_landed = lambda extent: self._events.put(("landed", extent))
        self._started = self._progress = time.monotonic()
        looked = told = 0.0
        seen: set[str] = set()
        try:
            while not self._assignment.finished and not fill.stopped:
                now = time.monotonic()
                followers = self._fleet.gossip.followers(self._key)
                if now - looked > _AGAIN or followers - seen:
                    looked, seen = now, followers
                    self._look(now)
                if now - told > _AGAIN:
                    told = now
                    self._tell(now)
                with fill.phase("source"):
                    happened = self._next_events(0.02)
                for kind, what in happened:
                    self._take(kind, what)
                now = time.monotonic()
                self._drop_dead(now)
                self._ask_peers(now)
                if not any(self._awaited(peer, now) for peer in self._peers.values()):
                    self._feed_origin(now)
        finally:
            self._account.on_landed = lambda extent: None
            self._stop()

    def _take(self, kind: str, what: Any) -> None:
        if kind == "landed":
            self._landed(self._group_of[what.index])
        elif kind == "put":
            self._put(*what)
        elif kind == "arrived":
            self._arrived(what.ticket, what.error, what.transport)
        elif kind == "absent":
            absent: Peer = what
            if self._peers.get(absent.name) is absent:
                del self._peers[absent.name]  # to be asked again: it may come to have it
                self._account.peers.pop(absent.name, None)
        else:
            peer: Peer = what[0]
            said = what[1]
            if kind == "said":
                peer.unheard.release()
            if self._peers.get(peer.name) is not peer:
                return
            if kind == "gone":
                self._strike(peer, "gone", str(said))
            else:
                self._heard(peer, said)

    def _landed(self, group: Group) -> None:
        self._left[group.index] -= 1
        if not self._left[group.index]:
            self._assignment.done(group.index)
            if group.index in self._with_origin:
                self._with_origin.discard(group.index)
                self._origin_window.came()
                self._compare_claims(group)
        self._progress = time.monotonic()

    def _compare_claims(self, group: Group) -> None:
        """What has come from the origin tells whether peers claim the truth."""
        for peer in list(self._peers.values()):
            for segment, first, count in self._leaves(group):
                if peer.claims.there[segment].count(1, first, first + count) and self._contradicted(
                    peer, segment, first, count
                ):
                    break

    # ------------------------------------------------------------------ listening

    def _look(self, now: float) -> None:
        """Listen to those that are new: to neighbours, to those who listen to this one, and some that have it all."""
        members = {name: stages for name, stages in self._fleet.members() if name != self._fleet.me}
        having = [name for name, stages in members.items() if stages is None or self._key in stages]
        wanted = neighbours(self._fleet.me, self._key, [name for name in having if name not in self._lost])
        if self._fleet.me in self._readers.now(now):
            whole = [name for name in having if (members[name] or {}).get(self._key) == 1.0]
            wanted += neighbours(self._fleet.me, self._key, whole)[:_WHOLE]
        back = [name for name in self._fleet.gossip.followers(self._key) if name in members]
        for name in [*wanted, *back]:
            if name in self._peers or name in self._lost or len(self._peers) >= 2 * degree(len(members)):
                continue
            if now >= self._not_before.get(name, 0.0) or name in back:
                self._follow(name, now)

    def _follow(self, name: str, now: float) -> None:
        self._asked[name] = self._asked.get(name, 0) + 1
        self._not_before[name] = now + min(30.0, _AGAIN * 1.5 ** self._asked[name])
        use = self._account.peers.setdefault(name, PeerUse())
        use.given_up = ""
        peer = self._peers[name] = Peer(name, Claims(self._starts), use)
        arguments = (self._fleet, self._key, peer, self._events)
        threading.Thread(target=listen, args=arguments, name="peer", daemon=True).start()

    def _tell(self, now: float) -> None:
        """Say to those who listen who reads the origin: this node, as long as that works for it."""
        reads = self._fleet.me and self._make_origin is not None and self._origin_error is None
        own = time.time_ns() // 1_000_000 if reads else None
        self._fleet.gossip.tell(self._key, self._readers.stamps(own, now))

    def _awaited(self, peer: Peer, now: float) -> bool:
        """Whether it may be about to say that it has what the origin would be read for."""
        if peer.heard:
            return False
        return now - peer.told < self._fleet.stall if peer.answered else now - self._started < _FIRST_WORD

    def _next_events(self, timeout: float) -> list[tuple[str, Any]]:
        """What has happened, at most ``timeout`` seconds after now."""
        found: list[tuple[str, Any]] = []
        if self._mover is not None:
            with contextlib.suppress(MoverFailed):
                arrival = self._mover.arrived(0.001 if not self._events.empty() else timeout)
                while arrival is not None:
                    found.append(("arrived", arrival))
                    arrival = self._mover.arrived(0)
        with contextlib.suppress(queue.Empty):
            if self._mover is None:
                found.append(self._events.get(timeout=timeout))
            while len(found) < 1000:
                found.append(self._events.get_nowait())
        return found

    def _heard(self, peer: Peer, said: Any) -> None:
        try:
            self._understand(peer, said)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            self._drop(peer, "nonsense", f"it says what makes no sense: {error!r}"[:500])
        except MoverFailed as error:
            self._strike(peer, "unreachable", f"it cannot be read: {error}"[:500])

    def _understand(self, peer: Peer, said: Mapping[str, Any]) -> None:
        kind = said["type"]
        if kind == "answered":
            peer.answered, peer.told = True, time.monotonic()
        elif kind == "segments":
            if said["format"] != FORMAT:
                self._drop(peer, "version", f"it speaks format {str(said['format'])[:20]}, and this daemon {FORMAT}")
                return
            segments = said["segments"]
            expected = len(self._segments) if said["reader"] is None else 1
            if len(segments) != expected:
                raise ValueError(f"{len(segments)} segments, expected {expected}")
            peer.reader = None if said["reader"] is None else str(said["reader"])
            peer.use.through_host = self._on_device or peer.reader is not None
            peer.epoch = said["epoch"]
            peer.addresses = [int(segment["address"]) for segment in segments]
            peer.metadata = [base64.b64decode(segment["metadata"], validate=True) for segment in segments]
            peer.number = self._connected().peer(*peer.metadata)
            peer.ready = said["ready"] is True
            peer.heard = not peer.ready
        elif kind == "readers":
            members = {name for name, _ in self._fleet.members()}
            stamps = {name: int(stamp) for name, stamp in list(said["stamps"].items())[:READERS]}
            members.add(peer.name)
            self._readers.heard({name: stamp for name, stamp in stamps.items() if name in members}, time.monotonic())
        elif kind == "complete":
            peer.heard = True
        elif kind in ("leaves", "coming"):
            if not peer.metadata or said["epoch"] != peer.epoch:
                raise ValueError("leaves of another epoch than its segments")
            peer.told = time.monotonic()
            if kind == "coming":
                count = int(said["count"])
                segment, first = peer.claims.at(said, count)
                self._assignment.coming(peer.name, self._groups_at(segment, first, count))
                return
            segment, first, count = peer.claims.take(said)
            if self._contradicted(peer, segment, first, count):
                return
            touched = self._groups_at(segment, first, count)
            self._assignment.has(peer.name, [group for group in touched if self._has_all(peer, group)])
        elif kind == "gone":
            self._strike(peer, "gone", "it gives nothing any more", counts=False)

    def _leaves(self, group: Group) -> Iterable[tuple[int, int, int]]:
        """(segment, first leaf counted over all its entries, leaves) of what a group brings."""
        for span in group.spans:
            yield span.segment, self._starts[span.segment][span.entry] + span.leaf, len(leaf_ranges(span))

    def _groups_at(self, segment: int, first: int, count: int) -> list[int]:
        by_leaf = self._by_leaf[segment]
        return list(dict.fromkeys(by_leaf[leaf] for leaf in range(first, first + count) if leaf in by_leaf))

    def _has_all(self, peer: Peer, group: int) -> bool:
        return all(
            peer.claims.there[segment].count(1, first, first + count) == count
            for segment, first, count in self._leaves(self._groups[group])
        )

    def _contradicted(self, peer: Peer, segment: int, first: int, count: int) -> bool:
        """Whether this node has one of these leaves from the origin with another digest: then the peer is given up."""
        there, by_leaf, claims = self._account.there[segment], self._by_leaf[segment], peer.claims
        if not there.count(1, first, first + count):
            return False
        for leaf in range(first, first + count):
            group = by_leaf.get(leaf)
            if there[leaf] and claims.there[segment][leaf] and group is not None and group not in self._from:
                entry, at = self._account.leaf_at(segment, leaf)
                if self._account.leaves[segment][entry][at] != claims.digests[segment][leaf]:
                    name = self._recipes[segment].entries[entry].name
                    self._liar(peer, f"tensor {name!r}, leaf {at}: not the digest that the origin's bytes have")
                    return True
        return False

    # ------------------------------------------------------------------ reading from peers

    def _connected(self) -> Mover:
        if self._mover is None or not self._mover.alive:
            mover = Mover()
            try:
                self._inlet.connect(mover)
            except MoverFailed:
                mover.kill()
                raise
            self._mover = mover
            for peer in self._peers.values():
                peer.number = None
        return self._mover

    def _ask_peers(self, now: float) -> None:
        """Ask for as much as comes in a second or so, of those first who bring it soonest."""
        asked = sum(peer.busy for peer in self._peers.values())
        willing = [peer for peer in self._peers.values() if peer.metadata and peer.busy < _AT_ONCE]
        fastest = max((peer.rate for peer in willing), default=0.0)
        while willing and asked < self._peer_window.size:
            peer = min(willing, key=lambda peer: (peer.busy + 1) / (peer.rate or fastest or 1.0))
            if not peer.parts and (index := self._assignment.from_peer(peer.name)) is not None:
                peer.parts.extend(parts_of(self._groups[index]))
                self._parts_left[index] = len(peer.parts)
            if not peer.parts or not self._inlet.take(peer.parts[0]):
                willing.remove(peer)
                continue
            if not self._ask(peer, peer.parts.popleft(), now):
                willing.remove(peer)
                continue
            asked += 1
            if peer.busy >= _AT_ONCE:
                willing.remove(peer)
        for peer in self._peers.values():
            if peer.given and not peer.busy:  # others wait for its room
                given, peer.given = peer.given, []
                self._windows.submit(self._give_back, peer, given)

    def _ask(self, peer: Peer, part: Part, now: float) -> bool:
        """Ask a peer for a part, which has its place; whether that could be done."""
        if not peer.busy:
            peer.arrived = now
        try:
            mover = self._connected()
            if peer.number is None:
                peer.number = mover.peer(*peer.metadata)
            if peer.reader is None:
                self._read(peer, part, [peer.addresses[span.segment] + span.offset for span in part.spans])
            else:
                peer.awaited.add(part)
                pieces = [(span.segment, span.offset, span.nbytes) for span in part.spans]
                given, peer.given = peer.given, []
                self._windows.submit(self._have_put, peer, part, peer.reader, given, pieces)
        except MoverFailed as error:
            peer.awaited.add(part)  # so that it is given up with the peer
            self._strike(peer, "unreachable", f"it cannot be read: {error}")
            return False
        return True

    def _read(self, peer: Peer, part: Part, addresses: Sequence[int]) -> None:
        assert self._mover is not None
        assert peer.number is not None
        places = self._inlet.places(part)
        pairs = [
            (offset, address, span.nbytes)
            for (_, offset), address, span in zip(places, addresses, part.spans, strict=True)
        ]
        peer.in_flight[self._mover.read(peer.number, places[0][0], pairs)] = part

    def _have_put(self, peer: Peer, part: Part, reader: str, given: list[int], pieces: list[Any]) -> None:
        """In a thread: ask a peer to put a part of what is on its GPU where it can be read."""
        try:
            body = {"reader": reader, "given": given, "pieces": pieces}
            answer = peer.client(self._fleet).post("/peer/v1/window", json=body)
            answer.raise_for_status()
            self._events.put(("put", (peer, part, answer.json()["address"], "")))
        except Exception as error:  # whatever a stranger's answer can make of a parser
            self._events.put(("put", (peer, part, None, f"{type(error).__name__}: {error}"[:500])))

    def _give_back(self, peer: Peer, given: list[int]) -> None:
        """In a thread: tell a peer that what it has put was read."""
        with contextlib.suppress(Exception):  # then it takes it back when nobody listens any more
            body = {"reader": peer.reader, "given": given, "pieces": []}
            peer.client(self._fleet).post("/peer/v1/window", json=body)

    def _put(self, peer: Peer, part: Part, address: object, error: str) -> None:
        """A peer says where a part can be read."""
        if self._peers.get(peer.name) is not peer or part not in peer.awaited:
            if isinstance(address, int):  # nobody waits for it any more
                peer.given.append(address)
            return
        peer.awaited.discard(part)
        if error or not (address is None or (isinstance(address, int) and 0 <= address < 1 << 62)):
            peer.awaited.add(part)
            self._strike(peer, "failed", error or "it says of no address where it has put what was asked for")
            return
        if address is None:  # it has no room now
            self._inlet.give(part)
            peer.parts.appendleft(part)
            return
        part.at = address
        starts = packed([span.nbytes for span in part.spans])
        try:
            self._connected()
            if peer.number is None:
                peer.number = self._connected().peer(*peer.metadata)
            self._read(peer, part, [address + start for start in starts])
        except MoverFailed as failure:
            peer.awaited.add(part)
            self._strike(peer, "unreachable", f"it cannot be read: {failure}")

    def _arrived(self, ticket: int, error: str | None, transport: str) -> None:
        """A read has ended."""
        peer = next((peer for peer in self._peers.values() if ticket in peer.in_flight), None)
        if peer is None:
            return
        if error is not None:
            self._strike(peer, "failed", error)  # parts of it may still land: with the ticket, the mover goes
            return
        part = peer.in_flight.pop(ticket)
        if part.at is not None:
            peer.given.append(part.at)
        self._progress = now = time.monotonic()
        peer.use.seconds += now - peer.arrived
        peer.arrived = now
        views = self._inlet.views(part)
        found: list[tuple[Span, int, int]] = []
        with self._fill.phase("verifying"):
            for span, view in zip(part.spans, views, strict=True):
                for leaf, at, nbytes in leaf_ranges(span):
                    start = at - span.offset
                    found.append((span, leaf, leaf_digest(view[start : start + nbytes])))
        for span, leaf, digest in found:
            claim = peer.claims.digests[span.segment][self._starts[span.segment][span.entry] + leaf]
            expected = self._account.expected_leaf(span.segment, span.entry, leaf)
            if digest != claim or expected not in (None, digest):
                name = self._recipes[span.segment].entries[span.entry].name
                what = "not the bytes that it claims" if digest != claim else "not the expected bytes"
                peer.awaited.add(part)
                self._liar(peer, f"tensor {name!r}, leaf {leaf}: {what}")
                return
        peer.digests.setdefault(part.group, []).extend(
            (span.segment, span.entry, leaf, digest) for span, leaf, digest in found
        )
        peer.use.nbytes += part.nbytes
        if peer.use.transport != transport:
            peer.use.transport = transport
            self._look_for_better(peer)
        self._fleet.arrived(peer.name, transport, part.nbytes, peer.rate)
        self._peer_window.came()
        if self._on_device:
            whole = [(span.segment, span.offset, view) for span, view in zip(part.spans, views, strict=True)]
            self._fill.send(whole, lambda: self._inlet.give(part))
        self._parts_left[part.group] -= 1
        if not self._parts_left[part.group]:
            self._has_come(peer, self._groups[part.group])

    def _has_come(self, peer: Peer, group: Group) -> None:
        """All parts of a group have come from a peer, verified."""
        self._from[group.index] = peer.name
        extents = [extent for extent in group.extents if not self._account.has(extent)]
        digests = peer.digests.pop(group.index)
        if self._on_device:
            self._fill.arrived_on_device(extents, digests)
        else:
            self._account.arrived(extents, digests)

    def _look_for_better(self, peer: Peer) -> None:
        """Say once where a peer is read by TCP although this machine has a better way."""
        same_host = is_local(peer.name.rpartition(":")[0].strip("[]"))
        if missed := better_path(peer.use.transport, same_host=same_host):
            peer.use.slow_path = f"{missed.path}: {missed.reason}"
            log.warning("peer %s is read by %s, not by %s", peer.name, peer.use.transport, peer.use.slow_path)
            self._fleet.count_slow(missed.path)

    def _drop_dead(self, now: float) -> None:
        if self._mover is not None and not self._mover.alive:
            for peer in [peer for peer in self._peers.values() if peer.in_flight]:
                self._strike(peer, "failed", "the process that read from it died")
        for peer in list(self._peers.values()):
            if peer.busy and now - peer.arrived > self._fleet.stall:
                self._drop(peer, "stalled", f"nothing came for {self._fleet.stall:g} s")

    def _strike(self, peer: Peer, why: str, words: str, *, counts: bool = True) -> None:
        """Give a peer up for now; after some times for good."""
        self._strikes[peer.name] = self._strikes.get(peer.name, 0) + counts
        self._drop(peer, why, words, for_good=self._strikes[peer.name] >= _STRIKES)

    def _liar(self, peer: Peer, words: str) -> None:
        """Give a peer up that serves what is wrong, and all that it has brought."""
        self._drop(peer, "wrong_bytes", words)
        if self._on_device:
            self._fill.drain()
        brought = [group for group, name in self._from.items() if name == peer.name]
        again = self._account.from_peers(extent for group in brought for extent in self._groups[group].extents)
        if not self._account.forget(again):
            raise DigestMismatch(f"peer {peer.name} serves wrong bytes, and clients use what it has brought: {words}")
        for extent in again:
            self._left[self._group_of[extent.index].index] += 1
        for index in brought:
            del self._from[index]
        self._assignment.again(brought)
        for other in self._peers.values():
            self._assignment.has(other.name, [group for group in brought if self._has_all(other, group)])

    def _drop(self, peer: Peer, why: str, words: str, *, for_good: bool = True) -> None:
        """Have nothing more of a peer. What it was to bring is free again, once nothing can write there any more."""
        log.warning("peer %s is given up: %s", peer.name, words)
        self._fleet.dropped(peer.name, why, words)
        peer.use.given_up = words
        self._peers.pop(peer.name, None)
        peer.close()
        if for_good:
            self._lost.add(peer.name)
        self._readers.lost(peer.name, time.monotonic())
        if peer.in_flight:
            # A transfer cannot be called back. The process that makes it can be ended, and with it all others' are.
            if self._mover is not None:
                self._mover.kill()
                self._mover = None
            for other in (peer, *self._peers.values()):
                other.number = None
                self._let_go(other)
        self._let_go(peer)
        self._assignment.lost(peer.name)

    def _let_go(self, peer: Peer) -> None:
        """Whatever a peer was to bring is free again; nothing of it is being written any more."""
        pending = [*peer.in_flight.values(), *peer.awaited, *peer.parts]
        for part in pending:
            self._inlet.give(part)
            if part.at is not None:
                peer.given.append(part.at)
        for group in {part.group for part in pending}:
            self._assignment.failed(group)
            peer.digests.pop(group, None)
        peer.in_flight.clear()
        peer.awaited.clear()
        peer.parts.clear()

    # ------------------------------------------------------------------ the origin

    def _feed_origin(self, now: float) -> None:
        """Keep the origin's reader busy with what falls to this node, as long as there is any."""
        if self._origin_thread is not None and not self._origin_thread.is_alive():
            self._origin_thread.join()
            self._origin_thread = None
            self._origin_ended()
        if self._make_origin is None and now - self._progress > self._fleet.stall:
            self._origin_error = SourceFailed(f"no peer has brought anything for {self._fleet.stall:g} s")
        if self._make_origin is None or self._origin_error is not None:
            if self._origin_error is not None and not any(peer.metadata for peer in self._peers.values()):
                raise self._origin_error
            return
        idle = 0.0 if self._with_origin else now - self._progress
        room = self._origin_window.size - len(self._with_origin)
        if groups := self._assignment.from_origin(room, at=now, idle=idle):
            self._with_origin.update(groups)
            self._account.begun(
                (span.segment, span.entry, span.leaf, len(leaf_ranges(span)))
                for group in groups
                for span in self._groups[group].spans
            )
            self._account.give(extent for group in groups for extent in self._groups[group].extents)
        if self._account.queued and self._origin_thread is None:
            self._origin_thread = threading.Thread(target=self._run_origin, name="origin", daemon=True)
            self._origin_thread.start()

    def _run_origin(self) -> None:
        try:
            if self._origin is None:
                assert self._make_origin is not None
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

    def _origin_ended(self) -> None:
        """Its reader has done what it had, or failed: then what it has not brought is to come from peers."""
        error = self._origin_error
        if error is None:
            return
        if not isinstance(error, SourceFailed):
            raise error
        log.warning("the origin fails, what is missing is to come from peers: %s", error)
        self._account.take_all()
        for group in self._with_origin:
            if self._left[group]:
                self._assignment.failed(group)
        self._with_origin.clear()

    def _stop(self) -> None:
        """End everything that was started; afterwards no process but this one has the segments mapped."""
        self._fleet.gossip.tell(self._key, {})
        for peer in self._peers.values():
            peer.close()
        if self._mover is not None:
            self._mover.kill()
            self._mover = None
        self._windows.shutdown(wait=False, cancel_futures=True)
        if self._origin_thread is not None:
            self._share.stop()
            self._origin_thread.join()

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()
        if self._origin is not None:
            self._origin.close()
        self._inlet.close()


class _Window:
    """How many groups to have asked for at once: as many as come in two seconds, ``least`` until that is known."""

    def __init__(self, *, least: int, most: int) -> None:
        self._least = least
        self._most = most
        self._came: deque[float] = deque(maxlen=most)

    def came(self) -> None:
        """One has come."""
        self._came.append(time.monotonic())

    @property
    def size(self) -> int:
        if len(self._came) < 2:
            return self._least
        rate = (len(self._came) - 1) / max(self._came[-1] - self._came[0], 1e-3)
        return max(2, min(self._most, round(2 * rate)))


class _Share:
    """The part of a fill that the origin brings: its reader stops when its own part is over, not all of the fill."""

    def __init__(self, fill: Fill) -> None:
        self._fill, self._account = fill, fill.account
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
