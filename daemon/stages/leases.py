"""Leases: who uses which stage, and who may come back to one after a restart of the daemon."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Iterator, Mapping

from weightd.daemon.errors import InvalidRequest, LeaseLimit, StageLeased, StageRevoked
from weightd.daemon.stages import eviction
from weightd.daemon.stages.stage import Lease, PeerLease, Stage


class Leases:
    """All leases on ``stages``. On the event loop only.

    ``grace`` is how long holders of before a restart are waited for, in seconds; ``changed`` is called when what may be
    evicted has changed.
    """

    def __init__(
        self, stages: Mapping[str, Stage], *, grace: float, most_per_user: int, changed: Callable[[], None]
    ) -> None:
        self._stages = stages
        self._grace = grace
        self._most_per_user = most_per_user
        self._changed = changed

    def begin(
        self, stage: Stage, rank: int, *, uid: int | None, gid: int | None, pid: int | None, renews: str | None = None
    ) -> Lease:
        """Record a lease on one rank's segment; ``renews`` is the id that it had with the daemon before this one.

        Raises InvalidRequest where the stage has no such rank, StageRevoked, LeaseLimit.
        """
        if rank not in stage.request.ranks:
            raise InvalidRequest(f"stage {stage.id} has no tp_rank {rank}, it has {list(stage.request.ranks)}")
        self.check_lendable(stage, uid)
        lease_id = renews if renews and renews not in stage.leases else "le-" + secrets.token_hex(6)
        if stage.awaited:
            # Each of those who are waited for comes back once: who comes again, or began here, is none of the others.
            if renews and renews not in stage.known:
                stage.awaited -= 1
            stage.known |= {lease_id, renews or lease_id}
        lease = Lease(lease_id, stage.id, rank, uid, gid, pid, time.time())
        stage.leases[lease.id] = lease
        stage.lent = True
        self.note(stage)
        return lease

    def check_lendable(self, stage: Stage, uid: int | None) -> None:
        """Raises StageRevoked, LeaseLimit."""
        if stage.revoked_until is not None:
            raise StageRevoked(f"stage {stage.id} is being taken away: stage {stage.uri} again once it has gone")
        if sum(lease.uid == uid and not lease.client for lease in self) >= self._most_per_user:
            who = "TCP clients hold" if uid is None else f"uid {uid} holds"
            raise LeaseLimit(
                f"{who} {self._most_per_user} leases, which is all that WEIGHTD_MAX_LEASES_PER_USER allows"
            )

    def end(self, lease: Lease) -> None:
        """Its connection is closed."""
        if stage := self._stages.get(lease.stage):
            stage.leases.pop(lease.id, None)
            self.note(stage)
            stage.notify()

    def begin_reading(self, stage: Stage, client: str) -> Lease:
        """Record that somebody reads a stage, over S3 or to fill another: nobody maps it, and nobody comes back to it
        after a restart."""
        rank = stage.request.ranks[0]
        lease = Lease("le-" + secrets.token_hex(6), stage.id, rank, None, None, None, time.time(), client)
        stage.leases[lease.id] = lease
        self.note(stage)
        return lease

    def begin_for_peer(self, stage: Stage, by: str) -> PeerLease:
        """Record that a peer reads a stage; it takes nothing of the leases that users may have."""
        lease = PeerLease(stage, by)
        stage.peer_leases.add(lease)
        stage.lent = True
        return lease

    def end_for_peer(self, lease: PeerLease) -> None:
        """It has hung up."""
        lease.stage.peer_leases.discard(lease)
        lease.stage.notify()

    def note(self, stage: Stage) -> None:
        """A lease began or ended, or it became ready: note it where the next daemon finds it."""
        stage.last_used = eviction.now()
        if stage.ledger is not None:
            leases = sum(not lease.client for lease in stage.leases.values()) + eviction.awaited(stage, stage.last_used)
            stage.ledger.note(leases, stage.last_used, lent=stage.lent)
        self._changed()

    def await_holders(self, stage: Stage) -> None:
        """After a restart: give those who leased it until then time to come back."""
        assert stage.ledger is not None
        stage.lent, stage.awaited = stage.ledger.lent, stage.ledger.leases
        stage.last_used = stage.ledger.last_used or eviction.now()
        if stage.awaited:
            stage.protected_until = eviction.now() + self._grace

    def holders(self) -> list[str]:
        """Who leases anything, or may come back to what it leased before a restart of the daemon, in words."""
        found = sorted({_holder(lease) for lease in self})
        missing = sum(eviction.awaited(stage, eviction.now()) for stage in self._stages.values())
        return found + ([f"{missing} that have not come back yet"] if missing else [])

    def __iter__(self) -> Iterator[Lease]:
        """All leases there are."""
        return itertools.chain.from_iterable(stage.leases.values() for stage in self._stages.values())

    def in_use(self, stage: Stage) -> bool:
        """Whether processes use it, or may come back to it after a restart of the daemon."""
        return bool(stage.leases or eviction.awaited(stage, eviction.now()))

    def check_none(self, stage: Stage) -> None:
        """Raises StageLeased where processes use it, or may come back to it after a restart of the daemon."""
        if not self.in_use(stage):
            return
        waited_for = eviction.awaited(stage, eviction.now())
        holders = ", ".join(_holder(lease) for lease in list(stage.leases.values())[:10])
        if not holders:
            left = stage.protected_until - eviction.now()
            holders = f"processes that have {left:.0f} s left to come back after the daemon's restart"
        raise StageLeased(
            f"stage {stage.id} has {len(stage.leases) + waited_for} leases, held by {holders}: force=true takes it",
            leases=[lease.__dict__ for lease in stage.leases.values()],
        )


def _holder(lease: Lease) -> str:
    if lease.client:
        return f"a client over S3 at {lease.client}"
    return "a client over TCP" if lease.pid is None else f"pid {lease.pid} (uid {lease.uid})"
