"""Residency against a model of itself: what stays, what goes, and in which order."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from weightd.daemon.checkpoints.cache import Cache
from weightd.daemon.devices.cpu import CpuDevice
from weightd.daemon.errors import InsufficientCapacity, LeaseLimit, NotMovable, StageLeased, StageRevoked
from weightd.daemon.filling.ledger import Ledger
from weightd.daemon.keeper.deposits import Deposits
from weightd.daemon.layouts.digests import leaf_digest
from weightd.daemon.limits import FillLimits, NodeLimits
from weightd.daemon.node.service import Node
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.sources.uris import Allow
from weightd.daemon.stages import eviction
from weightd.daemon.stages.manifests import SealedManifest
from weightd.daemon.stages.moves import move_segments
from weightd.daemon.stages.planning import SegmentInfo
from weightd.daemon.stages.request import StageRequest
from weightd.daemon.stages.residency import Residency
from weightd.daemon.stages.stage import Lease, Stage
from weightd.ipc.manifest import Manifest

PAGE = mmap.PAGESIZE
CAPACITY = 8 * PAGE
LEASES_PER_USER = 3
DEVICES = ("cpu:0", "cpu:1")
LIMITS = FillLimits(threads=1, in_flight_bytes=1 << 20, extent_bytes=1 << 20, bounce_buffers=2, retry_deadline=1.0)


@dataclass
class Seen:
    """What the model knows of a stage that lives."""

    stage: Stage
    device: str
    nbytes: int
    priority: int
    pin: bool
    ttl: float | None
    mark: int
    used_at: float
    leases: list[Lease] = field(default_factory=list)

    @property
    def may_go(self) -> bool:
        return not self.pin and not self.leases


class ResidencyMachine(RuleBasedStateMachine):
    """Real segments, a clock that only the rules move, and every effect predicted from the words of the design."""

    def __init__(self) -> None:
        super().__init__()
        self.fds = open_fds()
        self.clock = 1000.0
        self.patch = mock.patch.object(eviction, "now", self.now)
        self.patch.start()
        self.loop = asyncio.new_event_loop()
        self.deposits = Deposits()
        devices = {name: CpuDevice(name, CAPACITY) for name in DEVICES}
        self.residency = Residency(
            devices, self.deposits, Metrics(), lease_grace=30, max_leases_per_user=LEASES_PER_USER
        )
        self.alive: list[Seen] = []
        self.node = self.loop.run_until_complete(self.made())

    async def made(self) -> Node:
        """What clients' changes come by: with no place for files, and no peers."""
        return Node(
            dict(self.residency.devices),
            residency=self.residency,
            deposits=self.deposits,
            allow=Allow(),
            cache=Cache(Path("/dev/null/none")),
            fill_limits=LIMITS,
            limits=NodeLimits(concurrent_loads=1, max_queued=1, revoke_grace=1.0, trust_peers=False),
            metrics=Metrics(),
        )

    def now(self) -> float:
        return self.clock

    def teardown(self) -> None:
        for seen in self.alive:
            self.residency.release(seen.stage)
        self.loop.close()
        self.patch.stop()
        assert open_fds() <= self.fds, "a descriptor is left over"

    def pick(self, which: int) -> Seen:
        return self.alive[which % len(self.alive)]

    def on(self, device: str) -> list[Seen]:
        return [seen for seen in self.alive if seen.device == device]

    def make_room(self, device: str, needed: int, make: Callable[[], object] | None = None) -> bool:
        """What ``make``, or make_room, may and must do, said without saying how; whether there is room now."""
        held = self.on(device)
        missing = sum(seen.nbytes for seen in held) + needed - CAPACITY
        candidates = [seen for seen in held if seen.may_go]
        evictable = sum(seen.nbytes for seen in candidates)
        make = make or (lambda: self.residency.make_room("/new", {device: needed}))
        if evictable < missing:
            with pytest.raises(InsufficientCapacity) as refused:
                make()
            details = refused.value.details
            assert details["missing_bytes"] == missing - evictable
            assert details["leased_bytes"] == sum(seen.nbytes for seen in held if seen.leases)
            assert {found["id"] for found in details["resident"]} == {seen.stage.id for seen in held}
            assert all(seen.stage.state == "ready" for seen in held)
            return False
        make()
        gone = [seen for seen in held if seen.stage.state == "evicted"]
        freed = sum(seen.nbytes for seen in gone)
        assert freed >= missing
        assert all(seen.may_go for seen in gone)
        assert all(freed - seen.nbytes < missing for seen in gone), "one of them went without need"
        if gone:
            # Everything that goes earlier than the last one to go would not have been enough by itself.
            last = max((seen.priority, seen.used_at) for seen in gone)
            before = sum(seen.nbytes for seen in candidates if (seen.priority, seen.used_at) < last)
            assert before < missing, "something went out of turn"
        self.forget(gone)
        return True

    def forget(self, gone: list[Seen]) -> None:
        for seen in gone:
            assert (seen.stage.segments, seen.stage.manifests, seen.stage.footprint) == ([], [], 0)
            assert not seen.stage.segments
            self.alive.remove(seen)

    def step(self, rounds: int = 5) -> None:
        """Let tasks on the loop run as far as they get."""

        async def rest() -> None:
            for _ in range(rounds):
                await asyncio.sleep(0)

        self.loop.run_until_complete(rest())

    @rule(
        device=st.sampled_from(DEVICES),
        pages=st.integers(1, 3),
        priority=st.sampled_from([0, 0, 1]),
        pin=st.sampled_from([False, False, True]),
        ttl=st.sampled_from([None, 10.0]),
    )
    def stage(self, device: str, pages: int, priority: int, pin: bool, ttl: float | None) -> None:
        self.clock += 0.001  # no two are used at the same moment
        if not self.make_room(device, pages * PAGE):
            return
        nbytes = pages * PAGE
        request = StageRequest(model="/x", priority=priority, pin=pin, ttl_seconds=ttl)
        stage = Stage("file:///x", [device], request, None)
        self.residency.keep(stage)
        stage.reserved = {device: nbytes}
        segment = self.residency.devices[device].allocate(nbytes, stage.id)
        mark = len(self.residency.stages) % 251
        segment.view[:] = bytes([mark]) * nbytes
        stage.ledger = Ledger.new(0, 1, bytes(16))
        stage.ledger.leaves([1])[0][0] = leaf_digest(segment.view)
        segment.seal()
        manifest = Manifest(
            stage.id, stage.uri, device, 0, 1, nbytes, None, None, None, ["w"], ["U8"], [[nbytes]], [0], None
        )
        stage.segments, stage.manifests = [segment], [SealedManifest.seal(manifest, [0])]
        stage.infos = (SegmentInfo(0, nbytes, 1),)
        stage.enter("ready")
        self.residency.leases.note(stage)
        self.alive.append(Seen(stage, device, nbytes, priority, pin, ttl, mark, self.clock))

    @rule(device=st.sampled_from(DEVICES), missing=st.sampled_from([0, 1, 1, 2, 5]))
    def only_make_room(self, device: str, missing: int) -> None:
        free = CAPACITY - sum(seen.nbytes for seen in self.on(device))
        self.make_room(device, free + missing * PAGE)

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 20), uid=st.integers(0, 1))
    def lease(self, which: int, uid: int) -> None:
        seen = self.pick(which)
        self.clock += 0.001
        held = sum(lease.uid == uid for other in self.alive for lease in other.leases)
        if held >= LEASES_PER_USER:
            with pytest.raises(LeaseLimit, match="WEIGHTD_MAX_LEASES_PER_USER"):
                self.residency.leases.begin(seen.stage, 0, uid=uid, gid=0, pid=1)
            return
        seen.leases.append(self.residency.leases.begin(seen.stage, 0, uid=uid, gid=0, pid=1))
        seen.used_at = self.clock

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 20))
    def touch(self, which: int) -> None:
        seen = self.pick(which)
        lease = self.residency.leases.begin(seen.stage, 0, uid=8, gid=0, pid=1)
        self.clock += 0.001
        self.residency.leases.end(lease)
        seen.used_at = self.clock

    @precondition(lambda self: any(seen.leases for seen in self.alive))
    @rule(which=st.integers(0, 20))
    def end_lease(self, which: int) -> None:
        leased = [seen for seen in self.alive if seen.leases]
        seen = leased[which % len(leased)]
        self.clock += 0.001
        self.residency.leases.end(seen.leases.pop())
        seen.used_at = self.clock

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 20), pin=st.booleans(), priority=st.integers(0, 2))
    def change(self, which: int, pin: bool, priority: int) -> None:
        seen = self.pick(which)
        self.node.change(seen.stage, pin=pin)
        assert seen.stage.priority == seen.priority, "what is not said stays"
        seen.pin = pin
        self.node.change(seen.stage, priority=priority)
        assert seen.stage.pin == pin, "what is not said stays"
        seen.priority = priority

    @rule(seconds=st.sampled_from([0.5, 3.0, 20.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock += seconds
        idle = [seen for seen in self.alive if seen.ttl is not None and seen.may_go]
        due = [seen for seen in idle if seen.used_at + (seen.ttl or 0) <= self.clock]
        task = self.loop.create_task(self.residency.expire())
        self.step()
        assert not task.done()
        task.cancel()
        self.step()
        assert [seen for seen in self.alive if seen.stage.state == "evicted"] == due
        self.forget(due)

    @precondition(lambda self: any(seen.leases for seen in self.alive))
    @rule(which=st.integers(0, 20), let_go=st.booleans())
    def revoke(self, which: int, let_go: bool) -> None:
        leased = [seen for seen in self.alive if seen.leases]
        seen = leased[which % len(leased)]
        self.residency.revoke(seen.stage, 3600 if let_go else 0)
        with pytest.raises(StageRevoked):
            self.residency.leases.begin(seen.stage, 0, uid=9, gid=0, pid=1)
        task = self.loop.create_task(self.residency.revoked(seen.stage))
        if let_go:
            self.step()
            while seen.leases:
                assert seen.stage.state == "ready"
                self.residency.leases.end(seen.leases.pop())
                self.step()
        self.loop.run_until_complete(task)
        assert seen.stage.state == "evicted"
        self.forget([seen])
        for lease in seen.leases:
            self.residency.leases.end(lease)

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 20))
    def drop(self, which: int) -> None:
        seen = self.pick(which)
        if seen.leases:
            with pytest.raises(StageLeased) as error:
                self.node.drop(seen.stage.id)
            assert len(error.value.details["leases"]) == len(seen.leases)
            return
        self.node.drop(seen.stage.id)
        assert seen.stage.state == "evicted"
        self.forget([seen])

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 20), lease_meanwhile=st.booleans())
    def move(self, which: int, lease_meanwhile: bool) -> None:
        seen = self.pick(which)
        target = DEVICES[1 - DEVICES.index(seen.device)]
        lent: list[Lease] = []

        async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
            if not arguments:
                return function()  # opening the device
            others = [other.nbytes for other in self.on(target) if other.stage.state == "ready"]
            assert self.residency.used(target) == sum(others) + seen.nbytes
            assert not eviction.evictable(seen.stage, self.clock)
            for force in (False, True):
                with pytest.raises(NotMovable, match=f"being moved to {target}"):
                    self.node.drop(seen.stage.id, force=force)
            if lease_meanwhile:
                lent.append(self.residency.leases.begin(seen.stage, 0, uid=9, gid=0, pid=1))
            return function(*arguments)

        def move() -> None:
            coroutine = move_segments(
                self.residency, self.deposits, seen.stage, self.residency.devices[target], LIMITS, in_thread
            )
            try:
                self.loop.run_until_complete(coroutine)
            except StageLeased:
                if not lent:
                    raise

        if seen.leases:
            with pytest.raises(StageLeased):
                move()
            assert seen.stage.device != target
        elif self.make_room(target, seen.nbytes, move) and not lent:
            seen.device = target
        for lease in lent:
            self.residency.leases.end(lease)
            seen.used_at = self.clock
        assert seen.stage.moving is None

    @invariant()
    def what_lives_is_what_is_counted(self) -> None:
        for device in DEVICES:
            assert self.residency.used(device) == sum(seen.nbytes for seen in self.on(device)) <= CAPACITY
        for seen in self.alive:
            assert (seen.stage.state, seen.stage.device) == ("ready", seen.device)
            assert os.pread(seen.stage.segments[0].fd, 1, seen.nbytes - 1) == bytes([seen.mark])
            assert seen.stage.ledger is not None
            assert seen.stage.ledger.leases == len(seen.leases)
        assert len(list(self.residency.leases)) == sum(len(seen.leases) for seen in self.alive)


ResidencyMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
TestResidencyAgainstItsModel = ResidencyMachine.TestCase


def open_fds() -> set[tuple[str, str]]:
    """Descriptors of this process, and what they are of."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
    return found
