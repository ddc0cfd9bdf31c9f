"""The fleet as one daemon sees it: who else there is, how to talk to them, and what went to and fro."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl

    import httpx

_REMEMBERED = 10_000
"""Peers whose traffic is remembered, and keys whose followers are."""


@dataclass
class Traffic:
    """What went to and from one peer, of all stages."""

    bytes_from: int = 0
    """Read from it, verified."""
    bytes_to: int = 0
    """That it says it has read."""
    bytes_per_second: float | None = None
    """Of the last stage that was read from it, while it was asked for any."""
    transport: str = ""
    """By what the last bytes came from it."""
    given_up: str = ""
    """Why it was given up last."""
    given_up_at: float | None = None
    """Seconds since the epoch."""


@dataclass
class Fleet:
    """Who else there is, and how to talk to them. Methods and callables are for any thread."""

    me: str
    """HOST:PORT where the others find this daemon; empty where it only reads."""
    members: Callable[[], Sequence[tuple[str, Mapping[str, float] | None]]]
    """Addresses, each with what the directory says that it has, if it knows."""
    token: str | None
    stall: float
    """Seconds without any arrival after which a peer is given up."""
    tls: ssl.SSLContext | None = None
    """Certificate and authorities by which daemons know each other; None: plain HTTP."""
    off: str = ""
    """Why nothing can be read from peers, nor they from this daemon; empty while it can."""
    count_arrived: Callable[[str, str, int], None] = lambda peer, transport, nbytes: None
    count_sent: Callable[[str, int], None] = lambda peer, nbytes: None
    count_slow: Callable[[str], None] = lambda better: None
    count_dropped: Callable[[str, str], None] = lambda peer, why: None
    gossip: Gossip = field(default_factory=lambda: Gossip())
    traffic: dict[str, Traffic] = field(default_factory=dict)
    """Peer → what went to and fro."""

    def client(self, address: str) -> httpx.Client:
        """A client of one peer's port."""
        import httpx  # 10 MB that a daemon without peers does without

        headers = {"Accept-Encoding": "identity"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        return httpx.Client(
            base_url=f"{'https' if self.tls else 'http'}://{address}",
            headers=headers,
            timeout=httpx.Timeout(5.0, read=10.0),
            verify=self.tls or False,  # authorities that no plain HTTP asks for would be read each time
            trust_env=False,  # proxies are for what is outside
        )

    def arrived(self, peer: str, transport: str, nbytes: int, rate: float) -> None:
        """Bytes have come from a peer, and were verified."""
        found = self._of(peer)
        found.bytes_from += nbytes
        found.transport = transport
        found.bytes_per_second = rate
        self.count_arrived(peer, transport, nbytes)

    def read_by(self, peer: str, nbytes: int) -> None:
        """A peer says that it has read so much from this daemon."""
        self._of(peer).bytes_to += nbytes
        self.count_sent(peer, nbytes)

    def dropped(self, peer: str, why: str, words: str) -> None:
        """A peer was given up; ``why`` is one of ``families.DROPPED``."""
        found = self._of(peer)
        found.given_up, found.given_up_at = words, time.time()
        self.count_dropped(peer, why)

    def _of(self, peer: str) -> Traffic:
        while len(self.traffic) >= _REMEMBERED and peer not in self.traffic:
            self.traffic.pop(next(iter(self.traffic)), None)
        return self.traffic.setdefault(peer, Traffic())


class Gossip:
    """What stages that load say to those who listen to them, and hear from them. Its methods are for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._followers: dict[str, dict[str, float]] = {}
        self._stamps: dict[str, dict[str, int]] = {}

    def followed(self, key: str, by: str) -> None:
        """A peer listens to a stage: it loads the same."""
        with self._lock:
            self._followers.setdefault(key, {})[by] = time.monotonic()
            if len(self._followers) > _REMEMBERED:  # of stages that nobody has asked for long
                del self._followers[next(iter(self._followers))]

    def followers(self, key: str) -> set[str]:
        """Peers that have come to listen within the last minute."""
        since = time.monotonic() - 60
        with self._lock:
            return {peer for peer, at in self._followers.get(key, {}).items() if at > since}

    def publish(self, key: str, stamps: Mapping[str, int]) -> None:
        """From now on this is what is said of a stage's readers; nothing: no longer."""
        with self._lock:
            self._stamps[key] = dict(stamps)
            if not stamps:
                del self._stamps[key]

    def published(self, key: str) -> dict[str, int]:
        """What is to be said of a stage's readers."""
        with self._lock:
            return dict(self._stamps.get(key, {}))
