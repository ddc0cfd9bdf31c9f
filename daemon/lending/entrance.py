"""The one way in: connections to all of the daemon's listening sockets are accepted here, and bounded together.

Whoever connects and says nothing costs others nothing. A connection is *idle* until it has said all of what it wants,
and again once that is answered. One that stays idle for too long is hung up on. Where there is no place for a newcomer
the oldest idle one makes room: first of the same user, who has a share that is smaller than the whole. What is busy, a
lease or a long answer, say, goes for nobody; then the newcomer is turned away. Who may not come in takes no place.

Connections stop short of the last descriptors, which stay for files, segments and what lends them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
import time
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from weightd.daemon.addresses import is_loopback
from weightd.daemon.errors import DaemonError, PeerNotAllowed, TooManyConnections
from weightd.daemon.lasting import lasting
from weightd.daemon.lending.credentials import AllowedPeers, Peer, peer_of
from weightd.daemon.observing.families import REFUSED
from weightd.daemon.observing.metrics import Metrics

log = logging.getLogger(__name__)

HEAD_SECONDS = 10.0
"""For which a connection may be idle before it has begun to say what it wants: a request's head, a message's length."""
REST_SECONDS = 30.0
"""For the rest of it, 16 MiB at most."""
KEPT = 8
"""Places that each socket has however few descriptors are left: somebody who looks after the daemon gets in."""
_LEAVING = 8
"""Connections at most that are told why they may not stay, and listened to until they have hung up."""
_LEAVING_SECONDS = 2.0
_PAUSE = 0.1
"""Seconds until the next try where no descriptor is left for a connection, and none can be made free."""
_COUNT_EVERY = 0.5
"""Seconds at least between two looks at how many descriptors there are."""
_TOLD_EVERY = 60.0
"""Seconds between two lines of the log about the same."""

_NO_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
# accept(2): errors of the new connection's own, which Linux passes on.
_GONE = frozenset(
    {
        errno.ECONNABORTED, errno.EPERM, errno.EPROTO, errno.ENOPROTOOPT, errno.ENETDOWN, errno.ENETUNREACH,
        errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENONET, errno.EOPNOTSUPP, errno.ETIMEDOUT,
    }
)  # fmt: skip


def reserve(limit: int) -> int:
    """Of so many descriptors, how many connections leave to others."""
    return min(limit // 4, 1024)


def share(most: int) -> int:
    """Of so many places, how many one user may have: an eighth is others', where there are enough to part."""
    return most - max(most // 8, 1) if most >= 4 else most


@dataclass(frozen=True)
class Rules:
    """Who may come in at one socket, how many at once, and what the others are told."""

    most: int
    """Places."""
    refusal: Callable[[DaemonError], bytes | None]
    """Notes that somebody is turned away for this; returns the words to say, None where there are none."""
    admitted: AllowedPeers | None = None
    """Of a Unix socket; None: everybody whom its file lets in."""
    full: type[DaemonError] = TooManyConnections
    """What a newcomer is told that there is no place for."""
    setting: str = ""
    """What says how many places there are, where that is a setting."""


class Visit:
    """One connection that was let in. Whoever serves it says how far it is, and ``end`` once it is closed.

    ``hang_up`` is called, once at most, where it has to go; ``unsent`` says how many bytes of an answer still wait to
    be taken. Its server sets both.
    """

    def __init__(self, door: Door, user: Hashable) -> None:
        self._door = door
        self.user = user
        self.hang_up: Callable[[], object] = lambda: None
        self.unsent: Callable[[], int] = lambda: 0
        self.state = ""
        self._timer: asyncio.TimerHandle | None = None
        self._unsent = 0

    def waits(self) -> None:
        """It is idle from now on; nothing new where it was already."""
        if self.state != "waits":
            self._enter("waits", self._door.head_seconds)

    def sends(self) -> None:
        """It has begun to say what it wants."""
        if self.state != "sends":
            self._enter("sends", self._door.rest_seconds)

    def works(self) -> None:
        """It has said what it wants, and that is being done."""
        if self.state != "works":
            self._enter("works", None)

    def end(self) -> None:
        """It is closed."""
        if self.state != "gone":
            self._enter("gone", None)
            self._door.left(self)

    def drop(self, reason: str) -> None:
        """Hang up; its place is free at once."""
        hang_up = self.hang_up
        self.end()
        self._door.note(reason)
        hang_up()

    def _enter(self, state: str, seconds: float | None) -> None:
        if self.state == "gone":
            return
        self.state = state
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._door.idle.pop(self, None)
        if seconds is not None:
            self._door.idle[self] = None
            self._unsent = self.unsent()
            self._timer = asyncio.get_running_loop().call_later(seconds, self._late, seconds)

    def _late(self, seconds: float) -> None:
        before, self._unsent = self._unsent, self.unsent()
        if self._unsent < before:  # it takes what it was answered, slowly
            self._timer = asyncio.get_running_loop().call_later(seconds, self._late, seconds)
        else:
            self.drop("silent")


class Door:
    """One listening socket, and who came in by it."""

    def __init__(
        self,
        entrance: Entrance,
        name: str,
        listener: socket.socket,
        rules: Rules,
        take: Callable[[socket.socket, Visit, Peer | None], None],
    ) -> None:
        self.name = name
        self.listener = listener
        self.rules = rules
        self.take = take
        self.head_seconds = entrance.head_seconds
        self.rest_seconds = entrance.rest_seconds
        self.visits: set[Visit] = set()
        self.users: Counter[Hashable] = Counter()
        """User → places that they have: of a Unix socket by number, of TCP by address."""
        self.idle: dict[Visit, None] = {}
        """Those that are idle, for longest first."""
        self._entrance = entrance
        self._metrics = entrance.metrics
        self._told: dict[str, tuple[float, int]] = {}
        for reason in REFUSED:  # a counter's first step shows only where there was a 0 before
            self._metrics.connections_dropped.labels(name, reason)
        listener.setblocking(False)
        self._acceptor = lasting(entrance.accept(self), f"accepting connections to {name}")

    def oldest(self, user: Hashable | None = None) -> Visit | None:
        """The visit that has been idle for longest, of a user or of all; None where none is."""
        return next((visit for visit in self.idle if user is None or visit.user == user), None)

    def entered(self, visit: Visit) -> None:
        self.visits.add(visit)
        self.users[visit.user] += 1
        self._metrics.connections.labels(self.name).set(len(self.visits))

    def left(self, visit: Visit) -> None:
        self.visits.discard(visit)
        self.users[visit.user] -= 1
        if not self.users[visit.user]:
            del self.users[visit.user]
        self._metrics.connections.labels(self.name).set(len(self.visits))

    def note(self, reason: str) -> None:
        """A connection was dropped or turned away: counted, and now and then in the log."""
        self._metrics.connections_dropped.labels(self.name, reason).inc()
        at, count = self._told.get(reason, (0.0, 0))
        if time.monotonic() - at < _TOLD_EVERY and at:
            self._told[reason] = at, count + 1
            return
        self._told[reason] = time.monotonic(), 0
        more = f", and {count} more since the last line" if count else ""
        # Browsers and port checks connect and say nothing; nobody has to be troubled by that.
        level = logging.INFO if reason == "silent" else logging.WARNING
        log.log(level, "%s: a connection was dropped: %s%s", self.name, REFUSED[reason], more)

    def close(self) -> None:
        """Let nobody in any more; who is in may stay."""
        self._acceptor.cancel()

    async def wait_closed(self) -> None:
        """Return once nobody is let in any more."""
        await asyncio.gather(self._acceptor, return_exceptions=True)


class Entrance:
    """Accepts connections on all doors of a daemon. On the event loop only."""

    def __init__(
        self, metrics: Metrics, *, head_seconds: float = HEAD_SECONDS, rest_seconds: float = REST_SECONDS
    ) -> None:
        self.metrics = metrics
        self.head_seconds = head_seconds
        self.rest_seconds = rest_seconds
        self._doors: list[Door] = []
        self._leaving: dict[asyncio.Task[None], None] = {}
        self._others = 0
        """Descriptors that are no connections, when they were counted last."""
        self._count_at = 0.0
        """When to count them again, in monotonic seconds."""

    def open(
        self,
        name: str,
        listener: socket.socket,
        rules: Rules,
        take: Callable[[socket.socket, Visit, Peer | None], None],
    ) -> Door:
        """Let people in at a listening socket. ``take`` begins to serve a connection, which it owns: not blocking."""
        door = Door(self, name, listener, rules, take)
        self._doors.append(door)
        return door

    async def accept(self, door: Door) -> None:
        """Until cancelled. Raises OSError where the socket is none any more."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(door.listener)
            except OSError as error:
                if error.errno in _NO_DESCRIPTORS:
                    log.warning("%s: cannot accept: %s", door.name, error)
                    pause = 0.0 if self._make_room() else _PAUSE
                    await asyncio.sleep(pause)
                elif error.errno not in _GONE:
                    raise
                continue
            try:
                self._let_in(door, connection, address)
            except OSError:
                connection.close()  # it is gone already
            await asyncio.sleep(0)  # there may be a thousand, and others have something to do

    def _let_in(self, door: Door, connection: socket.socket, address: object) -> None:
        peer = peer_of(connection) if connection.family == socket.AF_UNIX else None
        user: Hashable = peer.uid if peer is not None else _user_at(address)
        rules = door.rules
        if peer is not None and rules.admitted is not None and not rules.admitted.admits(peer):
            self._turn_away(door, connection, "not_admitted", PeerNotAllowed(rules.admitted.refusal(peer)))
            return
        most, own = rules.most, share(rules.most)
        allowed = f", which is all that {rules.setting} allows" if rules.setting else ", which is all that may be"
        words = ""
        if door.users[user] >= own and not self._drop(door.oldest(user)):
            words = f"{_who(user)} has {own} of the {most} connections to {door.name}{allowed}: others have the rest"
            if own == most:
                words = f"{most} connections to {door.name} are open{allowed}"
        elif len(door.visits) >= most and not self._drop(door.oldest()):
            words = f"{most} connections to {door.name} are open{allowed}"
        elif self._scarce() and len(door.visits) >= KEPT and not self._make_room():
            words = "too many open files: the descriptors that are left are not for connections (ulimit -n)"
        if words:
            self._turn_away(door, connection, "full", rules.full(words))
            return
        visit = Visit(door, user)
        door.entered(visit)
        visit.waits()
        door.take(connection, visit, peer)

    def _scarce(self) -> bool:
        """Whether one more connection would take of the descriptors that are others'."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit == resource.RLIM_INFINITY:
            return False
        connections = sum(len(door.visits) for door in self._doors)
        started = time.monotonic()
        if started >= self._count_at:
            self._others = len(os.listdir("/proc/self/fd")) - connections
            ended = time.monotonic()
            self._count_at = ended + max(_COUNT_EVERY, 50 * (ended - started))
        return self._others + connections >= limit - reserve(limit)

    def _drop(self, visit: Visit | None) -> bool:
        if visit is not None:
            visit.drop("room")
        return visit is not None

    def _make_room(self) -> bool:
        """Drop the oldest idle connection where most are idle; whether there was one."""
        doors = [door for door in self._doors if door.idle]
        return self._drop(max(doors, key=lambda door: len(door.idle)).oldest()) if doors else False

    def _turn_away(self, door: Door, connection: socket.socket, reason: str, error: DaemonError) -> None:
        door.note(reason)
        words = door.rules.refusal(error)
        if words is None:
            connection.close()
            return
        if len(self._leaving) >= _LEAVING:
            oldest = next(iter(self._leaving))
            del self._leaving[oldest]
            oldest.cancel()
        task = asyncio.create_task(_see_off(connection, words))
        self._leaving[task] = None

        def gone(task: asyncio.Task[None]) -> None:
            self._leaving.pop(task, None)
            connection.close()  # here, as a task that is cancelled before it begins does nothing at all

        task.add_done_callback(gone)


async def _see_off(connection: socket.socket, words: bytes) -> None:
    """Say why, and hear out what is being said: closing over unread words would take ours away with them."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(_LEAVING_SECONDS):
            await loop.sock_sendall(connection, words)
            connection.shutdown(socket.SHUT_WR)
            while await loop.sock_recv(connection, 1 << 16):
                pass


def _user_at(address: object) -> str:
    """Who is at a TCP address: all that is on this machine is one user."""
    host = str(address[0]) if isinstance(address, tuple) else ""
    return "this machine" if is_loopback(host) else host


def _who(user: Hashable) -> str:
    return f"uid {user}" if isinstance(user, int) else f"{user}"
