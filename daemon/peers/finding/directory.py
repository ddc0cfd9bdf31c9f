"""How daemons find each other: one small protocol, and a directory of each kind behind it.

A directory says which peers there are and, where it knows, what they have; whether that is true, the peer itself is
asked. Nothing here ever fails a stage: where a directory is away, the last known members stay for ``KEEP`` seconds, are
dropped then, and come back with it; ``status()`` says what is wrong.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from weightd.daemon.addresses import is_address, is_local, is_loopback

DIRECTORIES = {
    "none": "weightd.daemon.peers.finding.static",
    "static": "weightd.daemon.peers.finding.static",
    "dns": "weightd.daemon.peers.finding.dns",
    "etcd": "weightd.daemon.peers.finding.etcd",
}
"""Kind → module with ``parse(kind, place) -> Opener``, imported when first asked for."""

KEEP = 60.0
"""Seconds that the last known members stay where their directory is away: longer than one restarts, and no longer than
trying dead addresses is cheap."""

MAX_MEMBERS = 10_000
MAX_STAGES = 256
MAX_STAGE_KEY = 128
MAX_TEXT = 160_000  # bytes of an entry: as many stages with keys as long as they may be, in any script
_MAX_SKIPPED = 100  # log lines over a directory's life

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Member:
    """A peer, as its directory knows it."""

    node: str
    """Its name; its address where the directory knows none."""
    address: str
    """HOST:PORT of its peers' port, an IPv6 address in brackets."""
    stages: Mapping[str, float] | None
    """What it has: stage key → completeness, 0 to 1. None: the directory does not know, it has to be asked."""


class Directory(Protocol):
    """Where daemons find each other. All methods are for one event loop; none raises because a directory is away."""

    async def start(self) -> None:
        """Begin to look, and to publish. Does not wait for the directory."""

    def members(self) -> Sequence[Member]:
        """The peers that are known now, without ourselves: checked, bounded, ordered by address. Costs nothing.

        Callable from any thread.
        """

    async def changed(self, timeout: float) -> bool:
        """Wait until the members have changed since this last returned True, or False after ``timeout`` seconds.

        For one caller: a change is told once.
        """

    async def publish(self, stages: Mapping[str, float]) -> None:
        """From now on this is what we have. Returns at once; written in the background, about once a second at most."""

    def status(self) -> str:
        """``ok``, or what is wrong."""

    async def close(self) -> None:
        """Withdraw what was published, as far as that takes two seconds, and stop. Safe to call twice."""


class Opener(Protocol):
    """What is left of a setting after it was found to be right."""

    def __call__(self, *, node: str, address: str) -> Directory: ...


def parse(text: str) -> Opener:
    """Read WEIGHTD_PEERS, without starting anything. ValueError says what was found and what is allowed."""
    kind, _, place = text.strip().partition(":")
    kind = kind.strip().lower() or "none"
    if kind not in DIRECTORIES:
        raise ValueError(
            f"expected none, static:HOST:PORT,..., dns:NAME:PORT or etcd:http://HOST:2379, found {kind[:100]!r}"
        )
    opener: Opener = import_module(DIRECTORIES[kind]).parse(kind, place.strip())
    return opener


def open_directory(text: str, *, node: str, address: str) -> Directory:
    """The directory that WEIGHTD_PEERS names, not started yet.

    ``node`` is this daemon's name and ``address`` the HOST:PORT where peers reach it; ``none`` looks at neither.
    Raises ValueError where one of the three is not what it should be.
    """
    return parse(text)(node=node, address=address)


def checked_node(node: object) -> str:
    """A node's name: 1 to 253 printable characters without a slash. ValueError otherwise."""
    if not isinstance(node, str) or not 1 <= len(node) <= 253 or not node.isprintable() or "/" in node:
        raise ValueError(f"a node's name has 1 to 253 printable characters and no slash, found {str(node)[:300]!r}")
    return node


def is_stage_key(key: object) -> bool:
    """Whether this may stand for a stage: 1 to 128 printable characters."""
    return isinstance(key, str) and 1 <= len(key) <= MAX_STAGE_KEY and key.isprintable()


def checked_stages(stages: object) -> dict[str, float]:
    """Stage key → completeness, as found outside. ValueError where it is anything else."""
    if not isinstance(stages, dict) or len(stages) > MAX_STAGES:
        raise ValueError(f"stages are a map with {MAX_STAGES} entries at most")
    for key, share in stages.items():
        if not is_stage_key(key):
            raise ValueError(f"a stage's key has 1 to {MAX_STAGE_KEY} printable characters")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError("a stage's completeness is a number from 0 to 1")
    return {key: float(share) for key, share in stages.items()}


class Backoff:
    """Seconds until the next try: doubled by each failure, up to a limit, and never two daemons at the same moment."""

    def __init__(self, first: float = 0.25, limit: float = 5.0) -> None:
        self._first = first
        self._limit = limit
        self._next = first

    def reset(self) -> None:
        """It worked."""
        self._next = self._first

    def failed(self) -> float:
        """It failed: how long to wait now."""
        delay, self._next = self._next, min(self._limit, 2 * self._next)
        return delay * random.uniform(0.5, 1)


class BaseDirectory:
    """What all directories share: the members, who is told of them, and which of them are ourselves."""

    name = "none"
    """For messages."""

    def __init__(self) -> None:
        self.own_host, self.own_port = "", 0
        self._members: dict[str, Member] = {}
        self._sorted: tuple[Member, ...] | None = ()
        self._changed = asyncio.Event()
        self._skipped: set[str] = set()
        self._wrong = ""
        self._heard_at = time.monotonic()
        self._away_since: float | None = None

    async def start(self) -> None:
        pass

    def members(self) -> Sequence[Member]:
        found = self._sorted  # other threads ask as well, and what they find must not be None by then
        if found is None:
            found = tuple(sorted(self._members.values(), key=lambda member: (member.address, member.node)))
            self._sorted = found
        return found

    async def changed(self, timeout: float) -> bool:
        try:
            async with asyncio.timeout(timeout):
                await self._changed.wait()
        except TimeoutError:
            return False
        self._changed.clear()
        return True

    async def publish(self, stages: Mapping[str, float]) -> None:
        pass

    def status(self) -> str:
        return self._wrong or "ok"

    async def close(self) -> None:
        pass

    # For the directories themselves

    def is_own(self, host: str, port: int) -> bool:
        """Whether a peer there would be ourselves: the same address, or any other one of this machine at our port.

        Loopback addresses are compared as they are: whoever lists several of them means several daemons.
        """
        if port != self.own_port:
            return False
        if host == self.own_host:
            return True
        return is_address(host) and not is_loopback(host) and is_local(host)

    def put(self, key: str, member: Member | None) -> None:
        """What is known under a key is this now, or nothing."""
        if member is None:
            known = self._members.pop(key, None) is not None
        elif key not in self._members and len(self._members) >= MAX_MEMBERS:
            self.skip("members", f"there are more than {MAX_MEMBERS}: not all are known here")
            return
        else:
            known = self._members.get(key) != member
            self._members[key] = member
        if known:
            self._sorted = None
            self._changed.set()

    def put_all(self, members: Iterable[tuple[str, Member]]) -> None:
        """These are all the members there are."""
        found = dict(members)
        for key in [key for key in self._members if key not in found]:
            self.put(key, None)
        for key, member in found.items():
            self.put(key, member)

    def skip(self, what: str, why: object) -> None:
        """Say, once for each, that something found outside is left out."""
        what = what[:300]
        if what not in self._skipped and len(self._skipped) < _MAX_SKIPPED:
            self._skipped.add(what)
            log.warning("%s: left out %r: %s", self.name, what, why)

    def heard(self) -> None:
        """The directory has just said who is there."""
        self._heard_at = time.monotonic()

    def well(self, but: str = "") -> None:
        """All is as it should be, except perhaps for what no retry mends."""
        if self._away_since is not None:
            log.info("%s: is back", self.name)
        self._away_since = None
        self._wrong = but and f"{self.name}: {but}"
        self.heard()

    def lost(self, why: str) -> None:
        """The directory is away; what it said last is dropped when that was long ago."""
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
            log.warning("%s: %s; going on without it, and trying again", self.name, why)
        if now - self._heard_at > KEEP:
            self.put_all(())
        kept = f"{len(self._members)} members are known" if self._members else "no members are known"
        self._wrong = f"{self.name}: {why} (for {now - self._away_since:.0f} s; {kept})"
