"""Listening to peers: what each says that it has of a stage, bounded whatever it sends."""

from __future__ import annotations

import contextlib
import json
import queue
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightd.daemon.peers.fleet import Fleet, PeerUse
from weightd.daemon.peers.groups import Part

if TYPE_CHECKING:
    import httpx

FORMAT = 1
"""Of what peers tell each other. Another one is another version's: its peer is left alone."""
_MAX_LINE = 1 << 20
_UNHEARD = 32
"""Events of one peer that may wait to be understood; what comes then waits in the socket."""
_REPORT = 2.0
"""Seconds between telling a peer how much was read from it."""


class Claims:
    """The digests that a peer claims for the leaves it has, by segment; ``starts[s][e]`` is where an entry's begin."""

    def __init__(self, starts: Sequence[Sequence[int]]) -> None:
        self._starts = starts
        self.digests = [array("Q", bytes(8 * of_segment[-1])) for of_segment in starts]
        self.there = [bytearray(of_segment[-1]) for of_segment in starts]

    def at(self, said: Mapping[str, Any], count: int) -> tuple[int, int]:
        """The segment and the first leaf in it that an event is about. Raises ValueError."""
        segment, entry, first = (_number(said[name]) for name in ("segment", "entry", "first"))
        if segment >= len(self._starts) or entry >= len(self._starts[segment]) - 1:
            raise ValueError("leaves of an entry that there is not")
        start, end = self._starts[segment][entry : entry + 2]
        if start + first + count > end:
            raise ValueError("more leaves than the entry has")
        return segment, start + first

    def take(self, said: Mapping[str, Any]) -> tuple[int, int, int]:
        """Take in a ``leaves`` event: the segment, and the first and the number of its leaves. Raises ValueError."""
        digests = array("Q", bytes.fromhex(said["digests"]))
        if sys.byteorder == "little":
            digests.byteswap()
        segment, first = self.at(said, len(digests))
        self.digests[segment][first : first + len(digests)] = digests
        self.there[segment][first : first + len(digests)] = b"\1" * len(digests)
        return segment, first, len(digests)


@dataclass(eq=False)
class Peer:
    """One peer, as far as it is known."""

    name: str
    claims: Claims
    use: PeerUse
    answered: bool = False
    """Whether it has the stage."""
    ready: bool = False
    """Whether it has all of it."""
    heard: bool = False
    """Whether it has said what it has of it, as far as it can."""
    epoch: str = ""
    """Of its segments: what is said under another is not about them."""
    number: int | None = None
    """Its number with the mover, once connected."""
    metadata: list[bytes] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)
    reader: str | None = None
    """By what it knows who asks it to put what is on its GPU where it can be read; None: it can be read where it is."""
    parts: deque[Part] = field(default_factory=deque)
    """To be asked of it."""
    awaited: set[Part] = field(default_factory=set)
    """That it is to put where they can be read."""
    in_flight: dict[int, Part] = field(default_factory=dict)
    """Ticket → what is being read."""
    given: list[int] = field(default_factory=list)
    """Where it has put what was read since."""
    digests: dict[int, list[tuple[int, int, int, int]]] = field(default_factory=dict)
    """Group → (segment, entry, leaf, digest) of those of its parts that have come."""
    arrived: float = 0.0
    """When bytes came from it last, or were asked of it while none were, in monotonic seconds."""
    told: float = 0.0
    """When it said something new last."""
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when nobody listens to it any more."""
    unheard: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(_UNHEARD))

    _client: httpx.Client | None = None

    @property
    def busy(self) -> int:
        """Parts that were asked of it, and have not come."""
        return len(self.in_flight) + len(self.awaited)

    def client(self, fleet: Fleet) -> httpx.Client:
        """To ask it by, from any thread."""
        if self._client is None:
            self._client = fleet.client(self.name)
        return self._client

    def close(self) -> None:
        """Listen no more, and ask nothing more."""
        self.gone.set()
        if self._client is not None:
            self._client.close()

    @property
    def rate(self) -> float:
        """Bytes in a second while any were asked of it; 0 where nothing has come yet."""
        return self.use.nbytes / self.use.seconds if self.use.seconds > 0 else 0.0


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


def _number(found: object) -> int:
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < 1 << 62:
        raise ValueError(f"expected a number, found {str(found)[:100]!r}")
    return found
