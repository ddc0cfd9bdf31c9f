"""Listening to peers: to whom, and what each says that it has of a stage, bounded whatever it sends."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightd.daemon.filling.account import Account, PeerUse
from weightd.daemon.peers.finding.claims import Claims
from weightd.daemon.peers.finding.fleet import Fleet
from weightd.daemon.peers.finding.membership import READERS, Readers, degree, first_readers, neighbours
from weightd.daemon.peers.moving.parts import Part, Span

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

FORMAT = 1
"""Of what peers tell each other. Another one is another version's: its peer is left alone."""
_AT_ONCE = 4
"""Parts that are asked of one peer at the same time, at most."""
_AHEAD = 0.25
"""Seconds that what was asked of a peer may take to come where more is to be asked of it: while parts wait for one that
is asked by all, others come to have them."""
_MAX_LINE = 1 << 20
_UNHEARD = 32
"""Events of one peer that may wait to be understood; what comes then waits in the socket."""
_REPORT = 2.0
"""Seconds between telling a peer how much was read from it."""
_AGAIN = 1.0
"""Seconds between looks at who has come."""
_FIRST_WORD = 2.0
"""Seconds that peers may take to say what they have, before the origin is read."""
_STRIKES = 3
"""Times that a peer may fail without having said anything untrue, before it is given up for good."""
_WHOLE = 4
"""Peers with all of a stage that its readers listen to beside their neighbours, where the directory knows of any."""


@dataclass(eq=False)
class Peer:
    """One peer, as far as it is known."""

    name: str
    claims: Claims
    use: PeerUse
    answered: bool = False
    """Whether it has the stage."""
    heard: bool = False
    """Whether it has said what it has of it, as far as it can."""
    epoch: str = ""
    """Of its segments: what is said under another is not about them."""
    metadata: list[bytes] = field(default_factory=list)
    """What a mover needs to read its segments; nothing before it has introduced itself."""
    addresses: list[int] = field(default_factory=list)
    reader: str | None = None
    """By what it knows who asks it to put what is on its GPU where it can be read; None: it can be read where it is."""
    parts: deque[Part] = field(default_factory=deque)
    """To be asked of it."""
    awaited: set[Part] = field(default_factory=set)
    """That it is to put where they can be read."""
    in_flight: dict[int, Part] = field(default_factory=dict)
    """Ticket → what is being read."""
    settling: dict[Part, Future[list[tuple[Span, int, int]]]] = field(default_factory=dict)
    """That have come, and are being put where they belong: (span, leaf, digest) of what they hold."""
    given: list[int] = field(default_factory=list)
    """Where it has put what was read since."""
    digests: dict[int, list[tuple[int, int, int, int]]] = field(default_factory=dict)
    """Group → (segment, entry, leaf, digest) of those of its parts that have come."""
    arrived: float = 0.0
    """When bytes came from it last, or were asked of it while none were, in monotonic seconds."""
    full: bool = False
    """Whether it had no room for what it was asked for last."""
    since: float = field(default_factory=time.monotonic)
    """Since when it is listened to, in monotonic seconds."""
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when nobody listens to it any more."""
    unheard: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(_UNHEARD))

    _client: httpx.Client | None = None
    _opening: threading.Lock = field(default_factory=threading.Lock)

    def greet(self, said: Mapping[str, Any]) -> None:
        """It says under what epoch it speaks, and whether it has all. Raises KeyError and the like."""
        if self.epoch:
            raise ValueError("it has said so before")
        self.epoch = str(said["epoch"])
        self.heard = said["ready"] is not True  # one that loads says what it has as it comes

    def introduce(self, said: Mapping[str, Any], segments: int) -> None:
        """It says where its segments are, of which a stage has so many. Raises ValueError, KeyError and the like."""
        if said["epoch"] != self.epoch:
            raise ValueError("segments of another epoch than it said at first")
        if self.metadata:
            raise ValueError("it has said before where its segments are")
        self.reader = None if said["reader"] is None else str(said["reader"])
        found = said["segments"]
        expected = segments if self.reader is None else 1
        if len(found) != expected:
            raise ValueError(f"{len(found)} segments, expected {expected}")
        self.addresses = [int(segment["address"]) for segment in found]
        self.metadata = [base64.b64decode(segment["metadata"], validate=True) for segment in found]

    @property
    def has_room(self) -> bool:
        """Whether to ask more of it now: one part at a time until it is known how fast they come."""
        asked = sum(part.nbytes for part in (*self.in_flight.values(), *self.awaited))
        return not asked or (self.busy < _AT_ONCE and asked <= _AHEAD * self.rate)

    @property
    def busy(self) -> int:
        """Parts that were asked of it, and have not come."""
        return len(self.in_flight) + len(self.awaited)

    def client(self, fleet: Fleet) -> httpx.Client:
        """To ask it by, from any thread."""
        with self._opening:
            if self.gone.is_set():
                raise RuntimeError("nothing is asked of it any more")
            if self._client is None:
                self._client = fleet.client(self.name)
            return self._client

    def close(self) -> None:
        """Listen no more, and ask nothing more."""
        with self._opening:
            self.gone.set()
            if self._client is not None:
                self._client.close()

    @property
    def rate(self) -> float:
        """Bytes in a second while any were asked of it; 0 where nothing has come yet."""
        return self.use.nbytes / self.use.seconds if self.use.seconds > 0 else 0.0


class Following:
    """The peers that a stage, by its ``key``, listens to: who they are, and who was given up. For one thread.

    What they say goes to ``events``, as ``listen`` has it.
    """

    def __init__(self, fleet: Fleet, key: str, account: Account, events: queue.SimpleQueue[tuple[str, Any]]) -> None:
        self._peers: dict[str, Peer] = {}
        self.readers = Readers(fleet.me, key, fleet.stall)
        """Who reads the origin, as far as peers have said."""
        self._fleet = fleet
        self._key = key
        self._uses = account.peers
        self._starts = [account.leaf_starts(segment) for segment in range(len(account.there))]
        self._events = events
        self._lost: set[str] = set()
        """Peers that were given up for good."""
        self._strikes: dict[str, int] = {}
        self._asked: dict[str, int] = {}
        self._not_before: dict[str, float] = {}
        """When a peer may be asked again, in monotonic seconds."""
        self._started = time.monotonic()
        self._looked = self._told = 0.0
        self._seen: set[str] = set()

    def __contains__(self, peer: Peer) -> bool:
        """Whether it is still listened to."""
        return self._peers.get(peer.name) is peer

    def __bool__(self) -> bool:
        """Whether anybody is."""
        return bool(self._peers)

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._peers.values()))

    def look(self, now: float) -> list[str]:
        """Listen to those that are new, now and then, and as soon as somebody has come to listen to this one.

        Returns those who are listened to no more, because others are nearer now that more members are known.
        """
        back = self._fleet.gossip.followers(self._key)
        if now - self._looked <= _AGAIN and not back - self._seen:
            return []
        self._looked, self._seen = now, back
        members = {name: stages for name, stages in self._fleet.members() if name != self._fleet.me}
        wanted = [*self._wanted(members, now), *(name for name in back if name in members)]
        far = [peer for peer in self if peer.name not in wanted and peer.answered and not peer.busy and not peer.parts]
        for peer in far:
            peer.close()
            del self._peers[peer.name]
        for name in wanted:
            if name in self._peers or name in self._lost or len(self._peers) >= 2 * degree(len(members)):
                continue
            if now >= self._not_before.get(name, 0.0) or name in back:
                self._follow(name, now)
        return [peer.name for peer in far]

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
        arguments = (self._fleet, self._key, peer, self._events)
        threading.Thread(target=listen, args=arguments, name="peer", daemon=True).start()

    def tell(self, now: float, *, reads: bool) -> None:
        """Say to those who listen, now and then, who reads the origin: this node among them if it ``reads``."""
        if now - self._told <= _AGAIN:
            return
        self._told = now
        own = time.time_ns() // 1_000_000 if reads and self._fleet.me else None
        self._fleet.gossip.tell(self._key, self.readers.stamps(own, now))

    def told_of_readers(self, peer: Peer, stamps: Mapping[str, Any]) -> None:
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
        self._fleet.gossip.tell(self._key, {})
        for peer in self:
            peer.close()


def listen(fleet: Fleet, key: str, peer: Peer, events: queue.SimpleQueue[tuple[str, Any]]) -> None:
    """Pass on what a peer says of a stage, until it stops, or ``peer.gone`` is set. For a thread of its own.

    Puts ``("absent", peer)``, ``("said", (peer, event))`` and, last, ``("gone", (peer, why))``.
    """
    why = "it hung up"
    try:
        with fleet.client(peer.name) as client, contextlib.ExitStack() as stack:
            report = _Report(client, fleet.me, peer.use)
            params = {"format": str(FORMAT), "by": fleet.me}
            answer = stack.enter_context(client.stream("GET", f"/peer/v1/stages/{key}", params=params))
            if answer.status_code == 404:
                events.put(("absent", peer))
                return
            answer.raise_for_status()
            if "content-encoding" in answer.headers:
                raise ValueError("it compresses what was asked for as it is")
            events.put(("said", (peer, {"type": "answered"})))
            stack.callback(report.send)
            for line in lines(answer.iter_raw()):
                report.send_now_and_then()
                if not line.startswith(b"data:"):
                    continue
                said = json.loads(line[5:])
                while not peer.unheard.acquire(timeout=0.5) and not peer.gone.is_set():
                    pass
                if peer.gone.is_set():
                    return
                events.put(("said", (peer, said)))
    except Exception as error:  # whatever a stranger's answer can make of a parser
        why = f"{type(error).__name__}: {error}"
    if not peer.gone.is_set():
        events.put(("gone", (peer, why)))


class _Report:
    """Tells a peer how much was read from it, which it cannot see by itself. For its figures only."""

    def __init__(self, client: httpx.Client, me: str, use: PeerUse) -> None:
        self._client = client
        self._me = me
        self._use = use
        self._told = 0
        self._when = time.monotonic()

    def send_now_and_then(self) -> None:
        if time.monotonic() - self._when > _REPORT:
            self.send()

    def send(self) -> None:
        nbytes = self._use.nbytes - self._told
        self._when = time.monotonic()
        if nbytes:
            with contextlib.suppress(Exception):  # then it does not know
                self._client.post("/peer/v1/read", json={"by": self._me, "nbytes": nbytes})
                self._told += nbytes


def lines(parts: Iterator[bytes]) -> Iterator[bytes]:
    """The lines of a stream, each bounded while it comes. Raises ValueError."""
    rest = b""
    for part in parts:
        *whole, rest = (rest + part).split(b"\n")
        yield from whole
        if len(rest) > _MAX_LINE:
            raise ValueError(f"a line of more than {_MAX_LINE} bytes")
