"""A stage: the act and the record of bringing one (checkpoint, layout, device) into its segments."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from weightd.daemon.checkpoints.listing import Listing
from weightd.daemon.checkpoints.selection import LeftOut
from weightd.daemon.devices.base import Segment
from weightd.daemon.errors import DaemonError
from weightd.daemon.filling.account import PeerUse
from weightd.daemon.filling.fill import Fill
from weightd.daemon.filling.ledger import Ledger
from weightd.daemon.observing.clock import Clock
from weightd.daemon.observing.logs import request_id
from weightd.daemon.sources.base import are_still
from weightd.daemon.stages.manifests import SealedManifest
from weightd.daemon.stages.planning import Plan, SegmentInfo
from weightd.daemon.stages.request import StageRequest

log = logging.getLogger(__name__)

TERMINAL = frozenset({"ready", "failed", "cancelled", "evicted"})


@dataclass(frozen=True)
class Lease:
    """One process's use of one segment. It is an open connection: it ends when the connection does."""

    id: str
    stage: str
    rank: int
    uid: int | None
    """None where it is held over TCP, which does not say who is there."""
    gid: int | None
    pid: int | None
    since: float
    """Seconds since the epoch."""
    client: str = ""
    """HOST:PORT of who reads it over S3, or the id of the stage that is filled from it: neither has a handle; empty
    where it is held for one."""


@dataclass(frozen=True, eq=False)
class PeerLease:
    """One peer's reading of a stage. It is an open connection as well, but an eviction waits for it only so long."""

    stage: Stage
    by: str
    """HOST:PORT of its own port for peers; empty where it has none."""


class Stage:
    """One stage. Its state changes on the event loop only; the loading thread fills what ``Filled`` holds.

    States: ``queued → planning → loading → verifying → ready``, or ``failed``, ``cancelled``, ``evicted``. A planned
    stage that has to wait for others goes back to ``queued``.

    ``asked`` is when it was asked for, in monotonic seconds, where its URI has been listed since.
    """

    def __init__(
        self,
        uri: str,
        devices: Sequence[str],
        request: StageRequest,
        listing: Listing | None,
        asked: float | None = None,
    ) -> None:
        self.id = "st-" + secrets.token_hex(6)
        self.uri = uri
        self.devices = tuple(devices)
        """Name of each segment's device."""
        self.request = request
        self.listing = listing
        self.request_id = request_id.get()
        """Of the HTTP request that it was made for; empty where it was for none."""
        self.state = "queued"
        self.error: DaemonError | None = None
        self.clock = Clock(asked, "listing")
        """Where its time goes, until it is ready or has ended otherwise."""
        self.clock.enter("queued")
        self.created_at = time.time() - (time.monotonic() - self.clock.began)
        self.ready_at: float | None = None
        self.seconds: dict[str, float] = {}
        """Seconds spent in each state so far, the current one excluded."""
        self.source_kind = ""
        self.priority = request.priority
        self.pin = request.pin
        self.ttl_seconds = request.ttl_seconds
        """The longest that anybody asked for; None where somebody asked for none."""
        self.asked_at = 0.0
        """When it was asked for last while it was there already, in monotonic seconds."""
        self.listed_at = self.created_at
        """When its source was last seen to hold what it is of, in seconds since the epoch."""
        self.guest = False
        """Whether it was asked for by somebody for whom nothing may go."""
        self.plan: Plan | None = None
        """From planning until it is ready; manifests take its place then."""
        self.infos: tuple[SegmentInfo, ...] = ()
        """Its segments, once planned."""
        self.metadata: str | None = None
        """Folder with the checkpoint's configuration files, once planned."""
        self.left_out: tuple[LeftOut, ...] = listing.left_out if listing else ()
        """Files at its URI that were not taken, as far as is known."""
        self.fill: Fill | None = None
        """Only while loading."""
        self.deaths = 0
        """Daemons that died, rather than made room, while it was on its way."""
        self.handed_over = False
        """Whether this daemon makes room for the next one, and the stage is not to blame."""
        self.bytes_read = 0
        self.peer_bytes = 0
        self.peers: dict[str, PeerUse] = {}
        """Peer → what came from it."""
        self.phase_seconds: dict[str, float] = {}
        """Thread-seconds of loading by phase (``fill.PHASES``)."""
        self.segments: list[Segment] = []
        self.ledger: Ledger | None = None
        """Once loading has begun."""
        self.reserved: dict[str, int] = {}
        """Bytes of each device's capacity that are reserved for it."""
        self.bytes_total = 0
        self.segment_digests: list[str] = []
        """Digest of each segment, once ready."""
        self.checkpoint_digest: str | None = None
        self.key = ""
        """What peers know it by, once planned: equal where the bytes are, and where they lie."""
        self.manifests: list[SealedManifest] = []
        """Manifest of each segment, once ready."""
        self.leaf_counts: dict[int, Sequence[int]] = {}
        """Segment → leaves of each of its tensors, once anybody has asked."""
        self.deposited_as = ""
        """What the names of its segments' deposits end with: another each time that it moves."""
        self.verified: list[list[int]] = []
        """For each segment the entries that streaming clients may use already, in order, while loading."""
        self.satisfied: set[str] = set()
        """Expectations that were checked and met: digests, and ``file=sha256:...`` pairs."""
        self.leases: dict[str, Lease] = {}
        self.peer_leases: set[PeerLease] = set()
        self.dismissals = 0
        """How many wait for peers to stop reading it, because it is about to go."""
        self.last_used = time.monotonic()
        """When a lease began or ended last, or it became ready: monotonic seconds, which outlive a process."""
        self.protected_until = 0.0
        """Until when lessees of the daemon before this one are waited for (monotonic seconds)."""
        self.revoked_until: float | None = None
        """By when its lessees have to let go, once they were told to (seconds since the epoch)."""
        self.revoke_deadline = 0.0
        """The same in monotonic seconds."""
        self.awaited = 0
        """Leases that the daemon before this one had, until ``protected_until``."""
        self.known: set[str] = set()
        """Leases that this daemon has seen while others were awaited."""
        self.moving: str | None = None
        """Where to it is being moved."""
        self.lent = False
        """Whether anybody was ever given a descriptor of its memory."""
        self.announced = False
        """Whether a client has been given its id."""
        self.cancelled = threading.Event()
        self.entered = time.monotonic()
        """When it came into its state, in monotonic seconds."""
        self._changed = asyncio.Event()
        self.planned = asyncio.Event()
        """Set once planning has ended, well or not."""

    @property
    def device(self) -> str:
        """The device of its segments, or devices with commas between."""
        return named(self.devices)

    @property
    def footprint(self) -> int:
        """Bytes of capacity that are reserved for it, of all devices together."""
        return sum(self.reserved.values())

    @property
    def dismissed(self) -> bool:
        """Whether peers that read it are to stop."""
        return self.dismissals > 0

    @property
    def finished(self) -> bool:
        """Whether the state will not change by itself any more."""
        return self.state in TERMINAL

    @property
    def bytes_done(self) -> int:
        """Bytes that have landed and were hashed."""
        return self.fill.account.bytes_read if self.fill else self.bytes_read

    def bytes_by_source(self) -> dict[str, int]:
        """Bytes done by where they came from: its own source, and peers."""
        from_peers = self.fill.account.peer_bytes if self.fill else self.peer_bytes
        return {self.source_kind: self.bytes_done - from_peers, "peer": from_peers}

    def cached_as(self) -> set[str]:
        """The names by which the cache keeps what is of it: its identity, and digests."""
        expected = self.request.expect_digest or ()
        names = set(expected.values()) if isinstance(expected, dict) else {expected} if expected else set()
        names |= {digest.rpartition("=")[2] for digest in self.satisfied}
        if self.listing is not None:
            names.add(self.listing.identity)
        return names.union(self.request.layouts)

    def settle(self) -> None:
        """Loading is over: keep its figures, let its buffers go."""
        if self.fill is not None:
            account, self.phase_seconds = self.fill.account, dict(self.fill.seconds)
            self.bytes_read, self.peer_bytes, self.peers = account.bytes_read, account.peer_bytes, dict(account.peers)
            self.fill = None

    def enter(self, state: str, error: DaemonError | None = None) -> None:
        """Change the state and tell everybody who watches. A terminal state is left only by a ready stage."""
        if self.finished and self.state != "ready":
            return
        now = time.monotonic()
        self.seconds[self.state] = self.seconds.get(self.state, 0.0) + now - self.entered
        self.entered = now
        self.state = state
        self.error = error
        if state == "ready":
            self.ready_at = time.time()
        if self.finished:
            self.clock.stop()
            self.planned.set()
        self.log_state()
        self.notify()

    def log_state(self) -> None:
        """Log the state that it has come into."""
        fields: dict[str, Any] = {"event": "stage", "stage": self.id, "state": self.state, "model": self.uri}
        told = f"{self.state} {self.uri}"
        if self.state == "queued":
            fields["device"] = self.device
        if self.state == "ready":
            spent = round(sum(self.clock.spent().values()), 3)
            fields |= {"bytes": self.bytes_total, "seconds": spent, "digest": self.checkpoint_digest}
            told += f": {self.bytes_total} bytes in {spent:.2f} s"
        if self.error is not None:
            fields["code"] = self.error.code
            told += f": {self.error}"
        log.log(logging.WARNING if self.state == "failed" else logging.INFO, "%s", told, extra={"fields": fields})

    def state_seconds(self) -> dict[str, float]:
        """Seconds spent in each state, the current one included unless it is terminal."""
        seconds = dict(self.seconds)
        if not self.finished:
            seconds[self.state] = seconds.get(self.state, 0.0) + time.monotonic() - self.entered
        return seconds

    def notify(self) -> None:
        """Wake everybody in ``changed``. On the event loop only."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self, timeout: float | None = None) -> bool:
        """Wait for the next change of state or of verified tensors; False where none came in ``timeout`` seconds."""
        try:
            await asyncio.wait_for(self._changed.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def wait(self, timeout: float | None) -> bool:
        """Wait until the stage has finished, at most ``timeout`` seconds; whether it has."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.finished:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            await self.changed(left)
        return True

    async def watch(self, interval: float = 0.25, heartbeat: float = 10.0) -> AsyncIterator[bool]:
        """Yield True at every change of state and, while bytes move, every ``interval`` seconds; ends when finished.

        Yields False where nothing has changed for ``heartbeat`` seconds.
        """
        last: tuple[Any, ...] | None = None
        quiet = time.monotonic()
        while True:
            now = (self.state, self.bytes_done)
            if now != last or time.monotonic() - quiet >= heartbeat:
                yield now != last
                last, quiet = now, time.monotonic()
            if now[0] in TERMINAL:  # what was yielded last, not what it has become meanwhile
                return
            await self.changed(interval)


def is_still(stage: Stage, listing: Listing) -> bool:
    """Whether a stage is of what was listed at its URI."""
    assert stage.listing is not None
    if stage.listing.identity == listing.identity:
        return True
    # Until ctime was in them, versions of local files were others. Of such a record the weights tell.
    return stage.uri.startswith(("file:", "hf:")) and are_still(stage.listing.weights, listing.weights)


def named(devices: Sequence[str]) -> str:
    """Segments' devices as one name: once where all are the same."""
    return ",".join(devices if len(set(devices)) > 1 else devices[:1])
