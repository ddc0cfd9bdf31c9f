"""Listening to one peer: what it says of itself and of a stage, bounded whatever it sends."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from weightd.daemon.filling.account import PeerUse
from weightd.daemon.peers.finding.claims import Claims
from weightd.daemon.peers.finding.fleet import Fleet

if TYPE_CHECKING:
    import httpx

FORMAT = 1
"""Of what peers tell each other. Another one is another version's: its peer is left alone."""
_MAX_LINE = 1 << 20
_UNHEARD = 32
"""Events of one peer that may wait to be understood; what comes then waits in the socket."""
_REPORT = 2.0
"""Seconds between telling a peer how much was read from it."""


@dataclass(eq=False)
class Peer:
    """One peer, as far as it has said who it is and what it has."""

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


class Answered(NamedTuple):
    """A peer has the stage, and is about to say what of it."""

    peer: Peer


class Absent(NamedTuple):
    """A peer has nothing of the stage."""

    peer: Peer


class Said(NamedTuple):
    """An event of its stream. Whoever takes it in releases ``peer.unheard``."""

    peer: Peer
    event: Any


class Gone(NamedTuple):
    """It says nothing any more."""

    peer: Peer
    why: str


Heard = Answered | Absent | Said | Gone


def listen(fleet: Fleet, key: str, peer: Peer, report: Callable[[Heard], object]) -> None:
    """Report what a peer says of a stage, until it stops, or ``peer.gone`` is set. For a thread of its own."""
    why = "it hung up"
    try:
        with fleet.client(peer.name) as client, contextlib.ExitStack() as stack:
            receipts = _Receipts(client, fleet.me, peer.use)
            params = {"format": str(FORMAT), "by": fleet.me}
            answer = stack.enter_context(client.stream("GET", f"/peer/v1/stages/{key}", params=params))
            if answer.status_code == 404:
                report(Absent(peer))
                return
            answer.raise_for_status()
            if "content-encoding" in answer.headers:
                raise ValueError("it compresses what was asked for as it is")
            report(Answered(peer))
            stack.callback(receipts.send)
            for line in lines(answer.iter_raw()):
                receipts.send_now_and_then()
                if not line.startswith(b"data:"):
                    continue
                said = json.loads(line[5:])
                while not peer.unheard.acquire(timeout=0.5) and not peer.gone.is_set():
                    pass
                if peer.gone.is_set():
                    return
                report(Said(peer, said))
    except Exception as error:  # whatever a stranger's answer can make of a parser
        why = f"{type(error).__name__}: {error}"
    if not peer.gone.is_set():
        report(Gone(peer, why))


class _Receipts:
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
