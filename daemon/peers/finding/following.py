"""To which peers a stage listens: those that are near, and who of them was given up."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from weightd.daemon.filling.account import Account, PeerUse
from weightd.daemon.peers.finding.claims import Claims
from weightd.daemon.peers.finding.fleet import Fleet
from weightd.daemon.peers.finding.listening import Heard, Peer, listen
from weightd.daemon.peers.finding.membership import READERS, Readers, degree, first_readers, neighbours

log = logging.getLogger(__name__)

_AGAIN = 1.0
"""Seconds between looks at who has come."""
_FIRST_WORD = 2.0
"""Seconds that peers may take to say what they have, before the origin is read."""
_STRIKES = 3
"""Times that a peer may fail without having said anything untrue, before it is given up for good."""
_WHOLE = 4
"""Peers with all of a stage that its readers listen to beside their neighbours, where the directory knows of any."""


class Following:
    """The peers that a stage, by its ``key``, listens to: who they are, and who was given up. For one thread.

    What they say goes to ``report``, from threads.
    """

    def __init__(self, fleet: Fleet, key: str, account: Account, report: Callable[[Heard], object]) -> None:
        self._peers: dict[str, Peer] = {}
        self.readers = Readers(fleet.me, key, fleet.stall)
        """Who reads the origin, as far as peers have said."""
        self._fleet = fleet
        self._key = key
        self._uses = account.peers
        self._starts = [account.leaf_starts(segment) for segment in range(len(account.there))]
        self._report = report
        self._lost: set[str] = set()
        """Peers that were given up for good."""
        self._strikes: dict[str, int] = {}
        self._asked: dict[str, int] = {}
        self._not_before: dict[str, float] = {}
        """When a peer may be asked again, in monotonic seconds."""
        self._started = time.monotonic()
        self._looked = self._announced = 0.0
        self._seen: set[str] = set()

    def __contains__(self, peer: Peer) -> bool:
        """Whether it is still listened to."""
        return self._peers.get(peer.name) is peer

    def __bool__(self) -> bool:
        """Whether anybody is."""
        return bool(self._peers)

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._peers.values()))

    def look(self, now: float, idle: Callable[[Peer], bool]) -> list[Peer]:
        """Listen to those that are new, now and then, and as soon as somebody has come to listen to this one.

        Returns those who are listened to no more, because others are nearer now that more members are known. Who is not
        ``idle`` stays.
        """
        back = self._fleet.gossip.followers(self._key)
        if now - self._looked <= _AGAIN and not back - self._seen:
            return []
        self._looked, self._seen = now, back
        members = {name: stages for name, stages in self._fleet.members() if name != self._fleet.me}
        wanted = [*self._wanted(members, now), *(name for name in back if name in members)]
        far = [peer for peer in self if peer.name not in wanted and peer.answered and idle(peer)]
        for peer in far:
            peer.close()
            del self._peers[peer.name]
        for name in wanted:
            if name in self._peers or name in self._lost or len(self._peers) >= 2 * degree(len(members)):
                continue
            if now >= self._not_before.get(name, 0.0) or name in back:
                self._follow(name, now)
        return far

    def _wanted(self, members: Mapping[str, Mapping[str, float] | None], now: float) -> list[str]:
        """Neighbours and, where this node reads the origin, some that have it all."""
        having = [name for name, stages in members.items() if stages is None or self._key in stages]
        wanted = neighbours(self._fleet.me, self._key, [name for name in having if name not in self._lost])
        if self._fleet.me in self.readers.now(now):
            whole = [name for name in having if (members[name] or {}).get(self._key) == 1.0]
            wanted += neighbours(self._fleet.me, self._key, whole)[:_WHOLE]
        # Before they have said that they read: nodes that begin together are not to take each other for absent.
        loading = [name for name in having if (members[name] or {}).get(self._key, 1.0) < 1.0]
        self.readers.heard(first_readers(self._key, loading), now)
        return wanted

    def _follow(self, name: str, now: float) -> None:
        self._asked[name] = self._asked.get(name, 0) + 1
        self._not_before[name] = now + min(30.0, _AGAIN * 1.5 ** self._asked[name])
        use = self._uses.setdefault(name, PeerUse())
        use.given_up = ""
        peer = self._peers[name] = Peer(name, Claims(self._starts), use)
        arguments = (self._fleet, self._key, peer, self._report)
        threading.Thread(target=listen, args=arguments, name="peer", daemon=True).start()

    def announce(self, now: float, *, reads: bool) -> None:
        """Say to those who listen, now and then, who reads the origin: this node among them if it ``reads``."""
        if now - self._announced <= _AGAIN:
            return
        self._announced = now
        own = time.time_ns() // 1_000_000 if reads and self._fleet.me else None
        self._fleet.gossip.publish(self._key, self.readers.stamps(own, now))

    def hear_readers(self, peer: Peer, stamps: Mapping[str, Any]) -> None:
        """A peer says who reads the origin: taken from it of members only, and of so many."""
        known = {name for name, _ in self._fleet.members()} | {peer.name}
        found = {name: int(stamp) for name, stamp in list(stamps.items())[:READERS]}
        self.readers.heard({name: stamp for name, stamp in found.items() if name in known}, time.monotonic())

    def may_say_more(self, now: float) -> bool:
        """Whether any may be about to say that it has what the origin would be read for."""
        return any(
            now - peer.since < self._fleet.stall if peer.answered else now - self._started < _FIRST_WORD
            for peer in self
            if not peer.heard
        )

    def absent(self, peer: Peer) -> None:
        """A peer has nothing of the stage. It is asked again: it may come to have it."""
        if peer in self:
            del self._peers[peer.name]
            if not peer.use.nbytes:
                self._uses.pop(peer.name, None)

    def strike(self, peer: Peer, *, counts: bool) -> bool:
        """A peer has failed; whether that was once too often."""
        self._strikes[peer.name] = self._strikes.get(peer.name, 0) + counts
        return self._strikes[peer.name] >= _STRIKES

    def give_up(self, peer: Peer, why: str, words: str, *, for_good: bool) -> None:
        """Listen to it no more; ``why`` is one of ``families.DROPPED``."""
        log.warning("peer %s is given up: %s", peer.name, words)
        self._fleet.dropped(peer.name, why, words)
        peer.use.given_up = words
        self._peers.pop(peer.name, None)
        peer.close()
        if for_good:
            self._lost.add(peer.name)
        self.readers.lost(peer.name, time.monotonic())

    def close(self) -> None:
        """Listen to nobody, and tell nobody anything."""
        self._fleet.gossip.publish(self._key, {})
        for peer in self:
            peer.close()
