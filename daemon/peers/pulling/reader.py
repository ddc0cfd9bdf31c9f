"""Loading from peers: what they have comes from them, all else from the origin, each byte verified before it counts.

One thread decides, by ``Assignment``; one for each peer listens to what it has; the origin's own reader reads what
falls to this node. Bytes come through a mover process, and are put where they belong and hashed by threads.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from weightd.daemon.devices.base import Segment
from weightd.daemon.errors import DigestMismatch, SourceFailed
from weightd.daemon.filling.fill import Fill
from weightd.daemon.filling.sink import Sink
from weightd.daemon.layouts.extents import Extent
from weightd.daemon.layouts.recipe import Recipe
from weightd.daemon.peers.finding.fleet import Fleet
from weightd.daemon.peers.finding.following import FORMAT, Following, Peer
from weightd.daemon.peers.moving.movers import Arrival, MoverFailed, Movers
from weightd.daemon.peers.moving.parts import PART, Part, Span
from weightd.daemon.peers.moving.transfers import Transfers
from weightd.daemon.peers.pulling.assignment import Assignment
from weightd.daemon.peers.pulling.groups import Group, Groups, begin_parts_anew, parts_of
from weightd.daemon.peers.pulling.origin import Origin
from weightd.daemon.peers.pulling.pace import Pace
from weightd.daemon.sources.base import Reader


class Pulling:
    """The fleet, as stages load from it."""

    def __init__(self, fleet: Fleet, movers: Movers) -> None:
        self._fleet = fleet
        self._movers = movers

    @property
    def off(self) -> str:
        return self._fleet.off

    def reader(
        self,
        key: str,
        recipes: Sequence[Recipe],
        segments: Sequence[Segment],
        extents: Sequence[Extent],
        fill: Fill,
        origin: Callable[[], Reader] | None,
    ) -> Reader:
        begin_parts_anew(extents, recipes, fill.account)
        return PeerReader(key, self._fleet, self._movers, recipes, segments, fill, origin)


class PeerReader:
    """A reader for one ``fill`` that has what peers can bring from them; ``origin`` makes the reader of the stage's
    source; None where all has to come from peers."""

    def __init__(
        self,
        key: str,
        fleet: Fleet,
        movers: Movers,
        recipes: Sequence[Recipe],
        segments: Sequence[Segment],
        fill: Fill,
        origin: Callable[[], Reader] | None,
    ) -> None:
        self._fill, self._account = fill, fill.account
        self._key = key
        self._fleet = fleet
        self._recipes = recipes
        self._segments = segments
        self._origin = Origin(origin)
        self._events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._transfers = Transfers(fleet, movers, segments, self._events)
        self._pace = Pace(2.0, most=256)
        self._parts_left: dict[int, int] = {}
        """Group → parts that are still to come of it, while a peer brings it."""
        self._from: dict[int, str] = {}
        """Group → the peer that brought it."""

    def run(self, sink: Sink) -> None:
        assert sink is self._fill
        fill, account = self._fill, self._account
        missing = account.take_all()
        if not missing:
            return
        self._groups = Groups(missing, self._recipes, [account.leaf_starts(s) for s in range(len(self._recipes))])
        self._left = {group.index: len(group.extents) for group in self._groups.all}
        """Group → ``landed`` events that are to come: what is forgotten before its event was taken has two."""
        self._following = Following(self._fleet, self._key, account, self._events)
        stripes = [group.stripe for group in self._groups.all]
        self._assignment = Assignment(self._fleet.me, stripes, self._following.readers, self._fleet.stall)
        self._here = 0
        """Groups that have come."""
        self._origin.begin(fill)
        self._progress = time.monotonic()
        account.on_landed = lambda extent: self._events.put(("landed", extent))
        try:
            while not self._assignment.finished and not fill.stopped:
                now = time.monotonic()
                for name in self._following.look(now):
                    self._assignment.lost(name)
                self._following.tell(now, reads=self._origin.works)
                with self._waiting():
                    happened = self._transfers.happened(0.02)
                for kind, what in happened:
                    self._take(kind, what)
                now = time.monotonic()
                self._drop_dead(now)
                self._ask_peers(now)
                if not self._following.may_say_more(now):
                    self._feed_origin(now)
        finally:
            account.on_landed = lambda extent: None
            self._following.close()
            self._transfers.stop()
            self._origin.stop()

    def close(self) -> None:
        self._origin.close()
        self._transfers.close()

    def _waiting(self) -> AbstractContextManager[None]:
        """Waiting for peers; where only others are at work, the origin or threads that settle, they say what at."""
        others = self._origin.groups or any(peer.settling for peer in self._following)
        alone = others and not any(peer.busy for peer in self._following)
        return nullcontext() if alone else self._fill.phase("source", "peer")

    def _take(self, kind: str, what: Any) -> None:
        """Something has happened: events of ``listen``, of ``Transfers``, and ``landed``, with the extent."""
        if kind == "landed":
            self._landed(what)
        elif kind == "put":
            self._put(*what)
        elif kind == "arrived":
            self._arrived(what)
        elif kind == "settled":
            self._settled(*what)
        elif kind == "absent":
            self._following.absent(what)
        elif kind == "said":
            self._heard(*what)
        else:
            peer, why = what
            if peer in self._following:
                self._strike(peer, "gone", str(why))

    def _landed(self, extent: Extent) -> None:
        group = self._groups.of(extent).index
        self._left[group] -= 1
        if not self._left[group]:
            self._assignment.done(group)
            self._here += 1
            if self._origin.brought(group):
                self._compare_claims(group)
        self._progress = time.monotonic()

    def _feed_origin(self, now: float) -> None:
        """Keep the origin's reader busy with what falls to this node, as long as there is any."""
        if left := self._origin.left_over():
            self._fill.drain()  # what is on its way to a GPU is there before a peer may bring it again
            for group in left:
                if self._left[group]:
                    self._assignment.failed(group)
        quiet = now - self._progress
        if not self._origin.exists and quiet > self._fleet.stall:
            self._origin.error = SourceFailed(f"no peer has brought anything for {self._fleet.stall:g} s")
        if self._origin.works:
            idle = 0.0 if self._origin.groups else quiet
            room = self._origin.room(alone=not self._following, here=self._here)
            groups = self._assignment.from_origin(room, at=now, idle=idle)
            self._origin.read([self._groups.all[group] for group in groups])
        elif self._origin.error is not None and not self._may_come(quiet):
            raise self._origin.error

    def _may_come(self, quiet: float) -> bool:
        """Whether peers may still bring what is missing: not where they wait as this node does, nobody with an
        origin."""
        return quiet < 3 * self._fleet.stall and any(peer.metadata for peer in self._following)

    # ------------------------------------------------------------------ what peers say

    def _heard(self, peer: Peer, said: Any) -> None:
        peer.unheard.release()
        if peer not in self._following:
            return
        try:
            self._understand(peer, said)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            self._drop(peer, "nonsense", f"it says what makes no sense: {error!r}"[:500])
        except MoverFailed as error:
            self._strike(peer, "unreachable", f"it cannot be read: {error}"[:500])

    def _understand(self, peer: Peer, said: Mapping[str, Any]) -> None:
        kind = said["type"]
        if kind == "answered":
            peer.answered = True
        elif kind == "hello":
            if said["format"] != FORMAT:
                self._drop(peer, "version", f"it speaks format {str(said['format'])[:20]}, and this daemon {FORMAT}")
                return
            peer.greet(said)
        elif kind == "segments":
            peer.introduce(said, len(self._segments))
            peer.use.through_host = self._transfers.on_device or peer.reader is not None
            self._transfers.connect(peer)
        elif kind == "readers":
            self._following.told_of_readers(peer, said["stamps"])
        elif kind == "complete":
            peer.heard = True
        elif kind in ("leaves", "coming"):
            if said["epoch"] != peer.epoch:
                raise ValueError("leaves of another epoch than it said at first")
            if kind == "coming":
                count = int(said["count"])
                segment, first = peer.claims.at(said, count)
                self._assignment.coming(peer.name, self._groups.at(segment, first, count))
                return
            segment, first, count = peer.claims.take(said)
            if not self._contradicted(peer, segment, first, count):
                self._believe(peer, self._groups.at(segment, first, count))
        elif kind == "gone":
            self._strike(peer, "gone", "it gives nothing any more", counts=False)

    def _believe(self, peer: Peer, groups: Sequence[int]) -> None:
        """Of these groups it may bring those of which it claims to have all."""
        whole = [group for group in groups if peer.claims.has_all(self._groups.leaves(group))]
        self._assignment.has(peer.name, whole)

    def _compare_claims(self, group: int) -> None:
        """What has come from the origin tells whether peers claim the truth."""
        for peer in self._following:
            for segment, first, count in self._groups.leaves(group):
                if peer.claims.has_any(segment, first, count) and self._contradicted(peer, segment, first, count):
                    break

    def _contradicted(self, peer: Peer, segment: int, first: int, count: int) -> bool:
        """Whether this node has one of these leaves from the origin with another digest: then the peer is given up."""
        there, claims = self._account.there[segment], peer.claims
        if not there.count(1, first, first + count):
            return False
        for leaf in range(first, first + count):
            group = self._groups.of_leaf(segment, leaf)
            if there[leaf] and claims.there[segment][leaf] and group is not None and group not in self._from:
                entry, at = self._account.leaf_at(segment, leaf)
                if self._account.leaves[segment][entry][at] != claims.digests[segment][leaf]:
                    name = self._recipes[segment].entries[entry].name
                    self._liar(peer, f"tensor {name!r}, leaf {at}: not the digest that the origin's bytes have")
                    return True
        return False

    # ------------------------------------------------------------------ what peers bring

    def _ask_peers(self, now: float) -> None:
        """Ask for as much as comes in a second or so, of those first who bring it soonest."""
        asked = sum(peer.busy for peer in self._following)
        willing = [peer for peer in self._following if peer.metadata and peer.has_room]
        fastest = max((peer.rate for peer in willing), default=0.0)
        while willing and asked < self._pace.at_once:
            peer = min(willing, key=lambda peer: (peer.busy + 1) / (peer.rate or fastest or 1.0))
            if not peer.parts and (group := self._assignment.from_peer(peer.name)) is not None:
                peer.parts.extend(parts_of(self._groups.all[group]))
                self._parts_left[group] = len(peer.parts)
            if not peer.parts or not self._transfers.find_place(peer.parts[0]):
                willing.remove(peer)
                continue
            if not self._ask(peer, peer.parts.popleft(), now):
                willing.remove(peer)
                continue
            asked += 1
            if not peer.has_room:
                willing.remove(peer)
        for peer in self._following:
            if peer.given and not peer.busy:
                self._transfers.give_back(peer)

    def _ask(self, peer: Peer, part: Part, now: float) -> bool:
        """Ask a peer for a part, which has its place; whether that could be done."""
        if not peer.busy and not peer.full:
            peer.arrived = now
        try:
            self._transfers.ask(peer, part)
        except MoverFailed as error:
            self._unreachable(peer, part, error)
            return False
        return True

    def _put(self, peer: Peer, part: Part, address: object, error: str) -> None:
        """A peer says where a part can be read; None: it has no room now."""
        if peer not in self._following or part not in peer.awaited:
            if isinstance(address, int):  # nobody waits for it any more
                peer.given.append(address)
            return
        if error or not (address is None or (isinstance(address, int) and 0 <= address < 1 << 62)):
            self._strike(peer, "failed", error or "it says of no address where it has put what was asked for")
            return
        peer.awaited.discard(part)
        if address is None:
            peer.full = True
            self._transfers.free_place(part)
            peer.parts.appendleft(part)
            return
        part.at = address
        try:
            self._transfers.read(peer, part)
        except MoverFailed as failure:
            self._unreachable(peer, part, failure)

    def _unreachable(self, peer: Peer, part: Part, error: MoverFailed) -> None:
        peer.awaited.add(part)  # so that it is given up with the peer
        self._strike(peer, "unreachable", f"it cannot be read: {error}")

    def _arrived(self, arrival: Arrival) -> None:
        """A read has ended."""
        peer = next((peer for peer in self._following if arrival.ticket in peer.in_flight), None)
        if peer is None:
            return
        if arrival.error is not None:
            self._strike(peer, "failed", arrival.error)  # parts of it may still land: with the ticket, the mover goes
            return
        part = peer.in_flight.pop(arrival.ticket)
        if part.at is not None:
            peer.given.append(part.at)
        self._progress = now = time.monotonic()
        peer.use.seconds += now - peer.arrived
        peer.arrived, peer.full = now, False
        self._transfers.came_by(peer, arrival.transport)
        self._transfers.settle(peer, part, self._fill)

    def _settled(self, peer: Peer, part: Part) -> None:
        """A part that has come lies where it belongs, and was hashed."""
        settling = peer.settling.pop(part, None)
        if settling is None:  # the peer was given up meanwhile
            return
        found = settling.result()
        if wrong := self._wrong_in(peer, found):
            peer.awaited.add(part)  # so that it is given up with the peer
            self._liar(peer, wrong)
            return
        peer.digests.setdefault(part.group, []).extend(
            (span.segment, span.entry, leaf, digest) for span, leaf, digest in found
        )
        peer.use.nbytes += part.nbytes
        self._fleet.arrived(peer.name, peer.use.transport, part.nbytes, peer.rate)
        self._pace.came()
        if self._transfers.on_device:
            views = zip(part.spans, self._transfers.views(part), strict=True)
            whole = [(span.segment, span.offset, view) for span, view in views]
            self._fill.send(whole, lambda: self._transfers.free_place(part))
        self._parts_left[part.group] -= 1
        if not self._parts_left[part.group]:
            self._has_come(peer, self._groups.all[part.group])

    def _wrong_in(self, peer: Peer, found: Sequence[tuple[Span, int, int]]) -> str:
        """What is wrong with digests of what a peer has brought; empty where nothing is."""
        for span, leaf, digest in found:
            first = self._account.leaf_starts(span.segment)[span.entry]
            claimed = peer.claims.digests[span.segment][first + leaf] == digest
            if not claimed or self._account.expected_leaf(span.segment, span.entry, leaf) not in (None, digest):
                name = self._recipes[span.segment].entries[span.entry].name
                what = "not the expected bytes" if claimed else "not the bytes that it claims"
                return f"tensor {name!r}, leaf {leaf}: {what}"
        return ""

    def _has_come(self, peer: Peer, group: Group) -> None:
        """All parts of a group have come from a peer, verified."""
        self._from[group.index] = peer.name
        extents = [extent for extent in group.extents if not self._account.has(extent)]
        digests = peer.digests.pop(group.index)
        if self._transfers.on_device:
            self._fill.arrived_on_device(extents, digests)
        else:
            self._account.arrived(extents, digests)

    # ------------------------------------------------------------------ peers that fail

    def _drop_dead(self, now: float) -> None:
        if self._transfers.died:
            for peer in [peer for peer in self._following if peer.in_flight]:
                self._strike(peer, "failed", "the process that read from it died")
        for peer in self._following:
            # A read says nothing before it ends, and how long it takes is known only once some have.
            patience = self._fleet.stall + (2 * peer.busy * PART / peer.rate if peer.rate else 0.0)
            if peer.busy and now - peer.arrived > patience:
                self._drop(peer, "stalled", f"nothing came for {patience:.1f} s")

    def _strike(self, peer: Peer, why: str, words: str, *, counts: bool = True) -> None:
        """Give a peer up for now; after some times for good."""
        self._drop(peer, why, words, for_good=self._following.strike(peer, counts=counts))

    def _liar(self, peer: Peer, words: str) -> None:
        """Give a peer up that serves what is wrong, and all that it has brought."""
        self._drop(peer, "wrong_bytes", words)
        brought = [group for group, name in self._from.items() if name == peer.name]
        again = self._account.from_peers(extent for group in brought for extent in self._groups.all[group].extents)
        if not self._account.forget(again):
            raise DigestMismatch(f"peer {peer.name} serves wrong bytes, and clients use what it has brought: {words}")
        for extent in again:
            self._left[self._groups.of(extent).index] += 1
        for group in brought:
            del self._from[group]
        self._assignment.again(brought)
        for other in self._following:
            self._believe(other, brought)

    def _drop(self, peer: Peer, why: str, words: str, *, for_good: bool = True) -> None:
        """Have nothing more of a peer. What it was to bring is free again, once nothing can write there any more."""
        self._following.give_up(peer, why, words, for_good=for_good)
        if peer.in_flight:
            # A transfer cannot be called back. The process that makes it can be ended, and with it all others' are.
            self._transfers.kill()
            for other in self._following:
                self._let_go(other)
        self._fill.drain()  # nor is anything on its way to a GPU when others bring it
        self._let_go(peer)
        self._assignment.lost(peer.name)

    def _let_go(self, peer: Peer) -> None:
        for group in self._transfers.let_go(peer):
            self._assignment.failed(group)
