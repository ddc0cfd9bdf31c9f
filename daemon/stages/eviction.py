"""What may go, and in which order, where room is needed: policy alone, without a hand on any memory."""

from __future__ import annotations

import time
from collections.abc import Iterable

from weightd.daemon.stages.stage import Stage


def awaited(stage: Stage, at: float) -> int:
    """Leases of before the daemon's restart whose holders may still come back, at a time in monotonic seconds."""
    return stage.awaited if at < stage.protected_until else 0


def evictable(stage: Stage, now: float) -> bool:
    """Whether it may go without anybody's leave: ready, not pinned, not leased, and nobody is waited for.

    ``now`` in monotonic seconds.
    """
    in_use = stage.pin or stage.leases or stage.moving or awaited(stage, now)
    return stage.state == "ready" and not in_use


def victims(stages: Iterable[Stage], missing: int, now: float, device: str) -> list[Stage] | None:
    """The stages to evict for ``missing`` bytes of a device; None where all that may go is not enough.

    Lowest priority first, then least recently leased; none that is not needed.
    """
    order = sorted(
        (stage for stage in stages if evictable(stage, now)), key=lambda stage: (stage.priority, stage.last_used)
    )
    chosen: list[Stage] = []
    freed = 0
    for stage in order:
        if freed >= missing:
            break
        chosen.append(stage)
        freed += stage.reserved[device]
    if freed < missing:
        return None
    for stage in list(chosen):  # what was chosen first may have become needless
        if freed - stage.reserved[device] >= missing:
            chosen.remove(stage)
            freed -= stage.reserved[device]
    return chosen


def expires_at(stage: Stage) -> float | None:
    """When its time to live without a lease is over, in monotonic seconds; None where it never is."""
    if stage.ttl_seconds is None or stage.state != "ready" or stage.pin or stage.leases or stage.moving:
        return None
    waits_until = stage.protected_until if stage.awaited else 0.0
    return max(max(stage.last_used, stage.asked_at) + stage.ttl_seconds, waits_until)


def now() -> float:
    """Seconds of the clock that residency goes by: it never jumps, and goes on across processes."""
    return time.monotonic()
