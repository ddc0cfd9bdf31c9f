"""Loading from peers: what they have comes from them, all else from the origin, each byte verified before it counts.

One thread decides, by ``Assignment``; one for each peer listens to what it has; the origin's own reader reads what
falls to this node. Bytes come through a mover process, and are put where they belong and hashed by threads.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from weightd.daemon.devices.base import Segment
from weightd.daemon.errors import DigestMismatch, SourceFailed
from weightd.daemon.filling.fill import Fill
from weightd.daemon.filling.sink import Sink
from weightd.daemon.layouts.extents import Extent
from weightd.daemon.layouts.recipe import Recipe
from weightd.daemon.peers.finding.fleet import Fleet
from weightd.daemon.peers.finding.following import Following
from weightd.daemon.peers.finding.listening import FORMAT, Absent, Answered, Gone, Peer, Said
from weightd.daemon.peers.moving.lane import Lane
from weightd.daemon.peers.moving.movers import Arrival, MoverFailed, Movers
from weightd.daemon.peers.moving.parts import PART, Part, PartState
from weightd.daemon.peers.moving.transfers import Put, Settled, Transfers
from weightd.daemon.peers.pulling.assignment import Assignment
from weightd.daemon.peers.pulling.groups import Group, Groups
from weightd.daemon.peers.pulling.origin import Origin
from weightd.daemon.peers.pulling.pace import Pace
from weightd.daemon.peers.pulling.truth import Truth
from weightd.daemon.sources.base import Reader


class Landed(NamedTuple):
    """An extent is there, from wherever."""

    extent: Extent


class PeerReader:
    """A reader for one ``fill`` that has what peers can bring from them; ``origin`` makes the reader of the stage's
    source; None where all has to come from peers.

    It decides, and keeps no state of what it decides about: who is listened to is ``Following``'s, how far parts are
    ``Transfers``' lanes', how far groups are the groups' own, whose turn they are ``Assignment``'s.
    """

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
        self._events: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._transfers = Transfers(fleet, movers, segments, self._events.put)
        self._pace = Pace(2.0, most=256)

    def run(self, sink: Sink) -> None:
        assert sink is self._fill
        fill, account = self._fill, self._account
        missing = account.drain()
        if not missing:
            return
        self._groups = Groups(missing, self._recipes, [account.leaf_starts(s) for s in range(len(self._recipes))])
        self._truth = Truth(account, self._groups, self._recipes)
        self._following = Following(self._fleet, self._key, account, self._events.put)
        stripes = [group.stripe for group in self._groups.all]
        self._assignment = Assignment(self._fleet.me, stripes, self._following.readers, self._fleet.stall)
        self._here = 0
        """Groups that have come."""
        self._origin.begin(fill)
        self._progress = time.monotonic()
        account.on_landed = lambda extent: self._events.put(Landed(extent))
        try:
            while not self._assignment.finished and not fill.stopped:
                now = time.monotonic()
                for peer in self._following.look(now, idle=lambda peer: self._transfers.lane(peer).empty):
                    self._transfers.forget(peer)
                    self._assignment.lost(peer.name)
                self._following.announce(now, reads=self._origin.works)
                with self._waiting():
                    happened = self._happened(0.02)
                for event in happened:
                    self._take(event)
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

    def _lanes(self) -> list[Lane]:
        """Those of the peers that are listened to."""
        return [self._transfers.lane(peer) for peer in self._following]

    def _waiting(self) -> AbstractContextManager[None]:
        """Waiting for peers; where only others are at work, the origin or threads that settle, they say what at."""
        lanes = self._lanes()
        others = self._origin.groups or any(lane.parts(PartState.SETTLING) for lane in lanes)
        alone = others and not any(lane.busy for lane in lanes)
        return nullcontext() if alone else self._fill.phase("source", "peer")

    def _happened(self, timeout: float) -> list[object]:
        """Events, at most ``timeout`` seconds after now; reads that have ended before all else."""
        found: list[object] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._events.get(timeout=timeout))
            while len(found) < 1000:
                found.append(self._events.get_nowait())
        return sorted(found, key=lambda event: not isinstance(event, Arrival))

    def _take(self, event: object) -> None:
        match event:
            case Landed(extent):
                self._landed(extent)
            case Put(lane, part, address, error):
                self._put(lane, part, address, error)
            case Arrival():
                self._arrived(event)
            case Settled(lane, part):
                self._settled(lane, part)
            case Absent(peer):
                self._following.absent(peer)
                self._transfers.forget(peer)
            case Answered(peer):
                peer.answered = True
            case Said(peer, said):
                self._heard(peer, said)
            case Gone(peer, why):
                if peer in self._following:
                    self._strike(peer, "gone", why)

    def _landed(self, extent: Extent) -> None:
        group = self._groups.of(extent)
        if group.landed():
            self._assignment.done(group.index)
            self._here += 1
            if self._origin.brought(group.index):
                self._compare_claims(group)
        self._progress = time.monotonic()

    def _feed_origin(self, now: float) -> None:
        """Keep the origin's reader busy with what falls to this node, as long as there is any."""
        if left := self._origin.left_over():
            self._fill.drain()  # what is on its way to a GPU is there before a peer may bring it again
            for group in left:
                if self._groups.all[group].extents_left:
                    self._assignment.failed(group)
        quiet = now - self._progress
        if not self._origin.exists and quiet > self._fleet.stall:
            self._origin.error = SourceFailed(f"no peer has brought anything for {self._fleet.stall:g} s")
        if self._origin.works:
            idle = 0.0 if self._origin.groups else quiet
            room = self._origin.room(alone=not self._following, here=self._here)
            groups = self._assignment.from_origin(room, at=now, idle=idle)
            chosen = [self._groups.all[group] for group in groups]
            self._fill.restore_constants(
                (span.segment, span.entry) for group in chosen if group.asked for span in group.spans
            )
            self._origin.read(chosen)
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
        if kind == "hello":
            if said["format"] != FORMAT:
                self._drop(peer, "version", f"it speaks format {str(said['format'])[:20]}, and this daemon {FORMAT}")
                return
            peer.greet(said)
        elif kind == "segments":
            peer.introduce(said, len(self._segments))
            peer.use.through_host = self._transfers.on_device or peer.reader is not None
            self._transfers.connect(self._transfers.lane(peer))
        elif kind == "readers":
            self._following.hear_readers(peer, said["stamps"])
        elif kind == "complete":
            peer.heard = True
        elif kind in ("leaves", "coming"):
            if said["epoch"] != peer.epoch:
                raise ValueError("leaves of another epoch than it said at first")
            if kind == "coming":
                count = int(said["count"])
                segment, first = peer.claims.at(said, count)
                self._assignment.coming(peer.name, [group.index for group in self._groups.at(segment, first, count)])
                return
            segment, first, count = peer.claims.add(said)
            if not self._contradicted(peer, segment, first, count):
                self._believe(peer, self._groups.at(segment, first, count))
        elif kind == "gone":
            self._strike(peer, "gone", "it gives nothing any more", counts=False)

    def _believe(self, peer: Peer, groups: Sequence[Group]) -> None:
        """Of these groups it may bring those of which it claims to have all."""
        whole = [group.index for group in groups if peer.claims.has_all(self._groups.leaves(group))]
        self._assignment.has(peer.name, whole)

    def _compare_claims(self, group: Group) -> None:
        """What has come from the origin tells whether peers claim the truth."""
        for peer in self._following:
            for segment, first, count in self._groups.leaves(group):
                if peer.claims.has_any(segment, first, count) and self._contradicted(peer, segment, first, count):
                    break

    def _contradicted(self, peer: Peer, segment: int, first: int, count: int) -> bool:
        """Whether this node has one of these leaves from the origin with another digest: then the peer is given up."""
        wrong = self._truth.wrong_claim(peer.claims, segment, first, count)
        if wrong:
            self._liar(peer, wrong)
        return bool(wrong)

    # ------------------------------------------------------------------ what peers bring

    def _ask_peers(self, now: float) -> None:
        """Ask for as much as comes in a second or so, of those first who bring it soonest."""
        lanes = self._lanes()
        asked = sum(lane.busy for lane in lanes)
        willing = [lane for lane in lanes if lane.peer.metadata and lane.has_room]
        fastest = max((lane.rate for lane in willing), default=0.0)
        while willing and asked < self._pace.at_once:
            lane = min(willing, key=lambda lane: (lane.busy + 1) / (lane.rate or fastest or 1.0))
            if lane.next is None and (group := self._assignment.from_peer(lane.peer.name)) is not None:
                lane.queue(self._groups.all[group].begin_parts())
            part = lane.next
            if part is None or not self._transfers.find_place(part) or not self._ask(lane, part, now):
                willing.remove(lane)
                continue
            asked += 1
            if not lane.has_room:
                willing.remove(lane)
        for lane in self._lanes():
            if lane.read_out and not lane.busy:
                self._transfers.give_back(lane)

    def _ask(self, lane: Lane, part: Part, now: float) -> bool:
        """Ask a peer for a part, which has its place; whether that could be done."""
        lane.begin(now)
        try:
            self._transfers.ask(lane, part)
        except MoverFailed as error:
            self._unreachable(lane.peer, error)
            return False
        return True

    def _put(self, lane: Lane, part: Part, address: object, error: str) -> None:
        """A peer says where a part can be read; None: it has no room now."""
        if part.state is not PartState.AWAITED:
            if isinstance(address, int):  # nobody waits for it any more
                lane.read_out.append(address)
            return
        if error or not (address is None or (isinstance(address, int) and 0 <= address < 1 << 62)):
            self._strike(lane.peer, "failed", error or "it says of no address where it has put what was asked for")
            return
        if address is None:
            self._transfers.put_back(lane, part)
            return
        part.at = address
        try:
            self._transfers.read(lane, part)
        except MoverFailed as failure:
            self._unreachable(lane.peer, failure)

    def _unreachable(self, peer: Peer, error: MoverFailed) -> None:
        self._strike(peer, "unreachable", f"it cannot be read: {error}")

    def _arrived(self, arrival: Arrival) -> None:
        """A read has ended."""
        found = self._transfers.reading(arrival.ticket)
        if found is None:
            return
        lane, part = found
        if arrival.error is not None:
            self._strike(lane.peer, "failed", arrival.error)  # parts may still land: with the ticket, the mover goes
            return
        self._progress = now = time.monotonic()
        lane.came(part, now)
        self._transfers.came_by(lane.peer, arrival.transport)
        self._transfers.settle(lane, part, self._fill)

    def _settled(self, lane: Lane, part: Part) -> None:
        """A part that has come lies where it belongs, and was hashed."""
        if part.state is not PartState.SETTLING:  # the peer was given up meanwhile
            return
        assert part.settling is not None
        peer, found = lane.peer, part.settling.result()
        if wrong := self._truth.wrong_bytes(peer.claims, found):
            self._liar(peer, wrong)
            return
        lane.move(part, PartState.SETTLED)
        peer.use.nbytes += part.nbytes
        self._fleet.arrived(peer.name, peer.use.transport, part.nbytes, lane.rate)
        self._pace.came()
        if self._transfers.on_device:
            views = zip(part.spans, self._transfers.views(part), strict=True)
            whole = [(span.segment, span.offset, view) for span, view in views]
            self._fill.send(whole, lambda: self._transfers.free_place(part))
        group = self._groups.all[part.group]
        if group.part_came(peer.name, found):
            self._has_come(group)

    def _has_come(self, group: Group) -> None:
        """All parts of a group have come from a peer, verified."""
        extents = [extent for extent in group.extents if not self._account.has(extent)]
        digests = group.take_digests()
        if self._transfers.on_device:
            self._fill.arrived_on_device(extents, digests)
        else:
            self._account.arrived(extents, digests)

    # ------------------------------------------------------------------ peers that fail

    def _drop_dead(self, now: float) -> None:
        if self._transfers.died:
            for peer in [lane.peer for lane in self._lanes() if lane.parts(PartState.READING)]:
                self._strike(peer, "failed", "the process that read from it died")
        for lane in self._lanes():
            # A read says nothing before it ends, and how long it takes is known only once some have.
            patience = self._fleet.stall + (2 * lane.busy * PART / lane.rate if lane.rate else 0.0)
            if lane.busy and now - lane.arrived > patience:
                self._drop(lane.peer, "stalled", f"nothing came for {patience:.1f} s")
            # What it claims is left to it, and is asked of it only once it has said where that lies.
            elif not lane.peer.metadata and now - lane.peer.since > self._fleet.stall and lane.peer.claims.any:
                self._drop(lane.peer, "stalled", f"for {self._fleet.stall:g} s it did not say where its segments are")

    def _strike(self, peer: Peer, why: str, words: str, *, counts: bool = True) -> None:
        """Give a peer up for now; after some times for good."""
        self._drop(peer, why, words, for_good=self._following.strike(peer, counts=counts))

    def _liar(self, peer: Peer, words: str) -> None:
        """Give a peer up that serves what is wrong, and all that it has brought."""
        self._drop(peer, "wrong_bytes", words)
        brought = [group for group in self._groups.all if group.brought_by == peer.name]
        again = self._account.from_peers(extent for group in brought for extent in group.extents)
        if not self._account.forget(again):
            raise DigestMismatch(f"peer {peer.name} serves wrong bytes, and clients use what it has brought: {words}")
        for extent in again:
            self._groups.of(extent).extents_left += 1
        for group in brought:
            group.brought_by = None
        self._assignment.again([group.index for group in brought])
        for other in self._following:
            self._believe(other, brought)

    def _drop(self, peer: Peer, why: str, words: str, *, for_good: bool = True) -> None:
        """Have nothing more of a peer. What it was to bring is free again, once nothing can write there any more."""
        self._following.give_up(peer, why, words, for_good=for_good)
        lane = self._transfers.lane(peer)
        if lane.parts(PartState.READING):
            # A transfer cannot be called back. The process that makes it can be ended, and with it all others' are.
            self._transfers.kill()
            for other in self._lanes():
                self._let_go(other)
        self._fill.drain()  # nor is anything on its way to a GPU when others bring it
        self._let_go(lane)
        self._transfers.forget(peer)
        self._assignment.lost(peer.name)

    def _let_go(self, lane: Lane) -> None:
        for number in self._transfers.let_go(lane):
            self._groups.all[number].let_go()
            self._assignment.failed(number)
