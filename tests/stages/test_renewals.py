"""Who comes back after a restart: each protects itself, and nobody else's protection ends by it."""

from __future__ import annotations

from weightd.daemon.stages import eviction
from weightd.daemon.stages.leases import Leases
from weightd.daemon.stages.request import StageRequest
from weightd.daemon.stages.stage import Stage


def test_an_engine_that_renews_twice_ends_nobody_elses_protection() -> None:
    stage = Stage("file:///x", ["cpu"], StageRequest(model="/x"), None)
    stage.enter("ready")
    stage.awaited, stage.protected_until = 2, eviction.now() + 3600
    leases = Leases({stage.id: stage}, grace=30, most_per_user=9, changed=lambda: None)

    def renew(lease: str) -> None:
        leases.end(leases.begin(stage, 0, uid=1, gid=1, pid=1, renews=lease))

    began_here = leases.begin(stage, 0, uid=1, gid=1, pid=1)
    leases.end(began_here)
    renew(began_here.id)  # its connection was lost, not its daemon
    assert stage.awaited == 2
    for _ in range(3):
        renew("le-000000000001")
        assert stage.awaited == 1
        assert leases.in_use(stage)
    renew("le-000000000002")
    assert stage.awaited == 0
    assert not leases.in_use(stage)
