"""Memory of stages that move or go: what is let go of, what is remembered of it, what is said where there is none."""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from tests.stages.test_moves import House, restored
from tests.stages.test_policy import made
from weightd.daemon.devices.cpu import CpuDevice
from weightd.daemon.errors import (
    DigestMismatch,
    InsufficientCapacity,
    InvalidRequest,
    NotMovable,
    StageLeased,
    UnknownStage,
)
from weightd.daemon.filling.ledger import Ledger
from weightd.daemon.keeper.deposits import Deposits
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.stages import left_behind, residency
from weightd.daemon.stages.left_behind import LeftBehind, mapping_processes
from weightd.daemon.stages.manifests import SealedManifest
from weightd.daemon.stages.moves import move_segments
from weightd.daemon.stages.request import parse_request
from weightd.daemon.stages.residency import Residency
from weightd.daemon.stages.stage import Stage
from weightd.ipc.manifest import Manifest

PAGE = mmap.PAGESIZE


def sealed() -> SealedManifest:
    return SealedManifest.seal(
        Manifest("st-1", "file:///x", "cpu", 0, 1, 5, None, None, None, ["a"], ["U8"], [[5]], [0], None), [3]
    )


def test_a_manifest_cannot_be_changed_by_who_gets_it_and_says_more_to_its_own_daemon() -> None:
    manifest = sealed()
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    assert fcntl.fcntl(manifest.fd, fcntl.F_GET_SEALS) == seals
    text = os.pread(manifest.fd, 1 << 16, 0)
    assert Manifest.decode(text[: manifest.nbytes]).names == ["a"]
    assert text[manifest.nbytes :] == b"[3]"
    assert manifest.read()[1] == [3]
    again = manifest.again()
    manifest.close()
    assert (manifest.fd, again.read()[0].names, again.nbytes) == (-1, ["a"], manifest.nbytes)
    again.close()
    assert SealedManifest.seal(Manifest.decode(text[: manifest.nbytes])).read()[1] == []


# ---------------------------------------------------------------------------- what others still map


def test_memory_that_was_lent_is_counted_as_long_as_anybody_maps_it() -> None:
    device, left = CpuDevice("cpu", 1 << 30), LeftBehind()
    mapped, unmapped = device.allocate(2 * PAGE, "st-1/0"), device.allocate(PAGE, "st-2/0")
    fd = mapped.lend()
    left.note(mapped)
    left.note(unmapped)
    inodes = [os.fstat(segment.fd).st_ino for segment in (mapped, unmapped)]
    ours = mmap.mmap(fd, 2 * PAGE, mmap.MAP_SHARED, mmap.PROT_READ)
    mapped.close()
    unmapped.close()
    os.close(fd)
    assert mapping_processes(inodes) == {inodes[0]: {os.getpid()}}
    assert mapping_processes([]) == {}
    assert asyncio.run(left.mapped_bytes()) == 2 * PAGE
    ours.close()
    assert asyncio.run(left.mapped_bytes()) == 0
    assert left._footprints == {}


def test_who_cannot_be_looked_into_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = ["self", "1", "999999999", str(os.getpid())]
    monkeypatch.setattr(left_behind.os, "listdir", lambda path: listed)
    segment = CpuDevice("cpu", 1 << 30).allocate(PAGE, "st-1/0")
    inode = os.fstat(segment.fd).st_ino
    assert mapping_processes([inode, 5]) == {inode: {os.getpid()}}
    segment.close()


# ---------------------------------------------------------------------------- residency


def house(capacity: int = 10 * PAGE, **options: Any) -> Residency:
    return Residency(
        {"cpu": CpuDevice("cpu", capacity)}, Deposits(), Metrics(), lease_grace=1.0, max_leases_per_user=9, **options
    )


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(cast(Any, test()))


def test_all_of_a_stage_is_closed_when_it_goes_and_who_waits_is_told() -> None:
    async def test() -> None:
        here = house()
        stage = made(PAGE)
        here.keep(stage)
        segment, manifest, ledger = here.devices["cpu"].allocate(PAGE, "x"), sealed(), Ledger.new(0, 0, bytes(16))
        stage.segments, stage.manifests, stage.ledger = [segment], [manifest], ledger
        stage.plan = cast(Any, object())
        change = asyncio.create_task(stage.changed(30))
        await asyncio.sleep(0)
        here.evict(stage, "capacity")
        assert [part.fd for part in (segment, manifest, ledger)] == [-1, -1, -1]
        assert (stage.segments, stage.manifests, stage.ledger, stage.plan, stage.reserved) == ([], [], None, None, {})
        assert await change
        assert here._metrics.registry.get_sample_value("weightd_evictions_total", {"reason": "capacity"}) == 1
        assert await here.mapped_elsewhere() == 0

    run(test)


def test_what_was_lent_is_remembered_and_what_was_not_is_not() -> None:
    async def test() -> None:
        here = house()
        for lent in (False, True):
            stage = made(PAGE, lent=lent)
            stage.segments = [here.devices["cpu"].allocate(PAGE, "x")]
            inode = os.fstat(stage.segments[0].fd).st_ino
            here.release(stage)
            assert (inode in here._left_behind._footprints) is lent

    run(test)


def test_what_is_freed_is_there_for_others_once_nothing_of_this_daemon_maps_it() -> None:
    async def test() -> None:
        here, let_go = house(), asyncio.Event()
        here.on_release = lambda stage: cast(Any, let_go.wait())
        here.release(made(PAGE))
        waiting = asyncio.create_task(here.unmapped())
        await asyncio.sleep(0)
        assert not waiting.done()
        let_go.set()
        await asyncio.wait_for(waiting, 30)
        await asyncio.sleep(0)
        assert here._unmapping == set()
        await here.unmapped()

    run(test)


def test_what_went_to_make_room_is_known_for_an_hour_and_of_so_many_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        here, clock = house(), [1000.0]
        monkeypatch.setattr(residency.eviction, "now", lambda: clock[0])
        monkeypatch.setattr(residency, "_REMEMBERED", 2)

        def stage(name: str) -> Stage:
            found = Stage(f"file:///{name}", ["cpu"], parse_request({"model": "/m"}), None)
            found.enter("ready")
            return found

        for name in ("a", "b", "c"):
            here.evict(stage(name), "capacity")
        here.evict(stage("d"), "ttl")
        assert [here.made_room(stage(name)) for name in "abcd"] == [False, True, True, False]
        assert not here.made_room(stage("b")), "it is told once"
        here.evict(stage("a"), "capacity")
        clock[0] += 3599.0
        here.evict(stage("b"), "capacity")
        assert here.made_room(stage("a"))
        clock[0] += 3600.0
        assert not here.made_room(stage("b"))

    run(test)


def test_of_stages_that_have_ended_the_latest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        here = house()
        assert residency.MAX_ENDED == 200
        monkeypatch.setattr(residency, "MAX_ENDED", 2)
        ready, dying = made(PAGE), made(PAGE)
        dying.enter("evicted")
        ended = [made() for _ in range(4)]
        for age, stage in enumerate(ended):
            stage.reserved = {}
            stage.enter("evicted")
            stage.entered = 100.0 - age
        for stage in (ready, dying, *ended):
            here.keep(stage)
        assert list(here.stages.values()) == [ready, dying, *ended[:2]], "what still has memory is none that has ended"
        assert here.get(ready.id) is ready
        with pytest.raises(UnknownStage, match="no stage has the id 'st-x"):
            here.get("st-x" * 100)

    run(test)


def test_what_is_not_adopted_takes_room_until_it_is_dropped() -> None:
    async def test() -> None:
        here = house()
        here.unadopted = [
            {"name": "st-1", "nbytes": PAGE, "reason": "?"},
            {"name": "st-2", "nbytes": PAGE, "reason": "?"},
        ]
        assert (here.used("cpu"), here.room("cpu")) == (2 * PAGE, 8 * PAGE)
        assert [left["name"] for left in here.drop_unadopted()] == ["st-1", "st-2"]
        assert (here.used("cpu"), here.unadopted) == (0, [])

    run(test)


def test_what_does_not_fit_is_told_all_that_is_in_the_way() -> None:
    async def test() -> None:
        here = house()
        leased, pinned, idle = made(4 * PAGE), made(PAGE, pin=True), made(3 * PAGE)
        for stage in (leased, pinned, idle):
            here.keep(stage)
        here.leases.begin(leased, 0, uid=1, gid=1, pid=1)
        assert here.victims({"cpu": 2 * PAGE}) == []
        assert here.victims({"cpu": 3 * PAGE}) == [idle]
        assert here.victims({"cpu": 6 * PAGE}) is None
        with pytest.raises(InsufficientCapacity) as error:
            here.make_room("file:///new", {"cpu": 6 * PAGE})
        assert str(error.value) == (
            f"file:///new needs {6 * PAGE} bytes on cpu; {8 * PAGE} of {10 * PAGE} are taken, of which {3 * PAGE} "
            f"could be evicted: {PAGE} are missing: end leases, drop or unpin a stage, or raise WEIGHTD_CAPACITY"
        )
        resident = error.value.details.pop("resident")
        assert error.value.details == {
            "device": "cpu", "needed_bytes": 6 * PAGE, "used_bytes": 8 * PAGE, "evictable_bytes": 3 * PAGE,
            "leased_bytes": 4 * PAGE, "capacity_bytes": 10 * PAGE, "available_bytes": None, "missing_bytes": PAGE,
        }  # fmt: skip
        assert resident[0] == {
            "id": leased.id, "model": "file:///x", "state": "ready", "bytes": 4 * PAGE, "leases": 1, "pin": False,
            "priority": 0,
        }  # fmt: skip
        assert [found["id"] for found in resident] == [leased.id, pinned.id, idle.id]
        assert idle.state == "ready"

    run(test)


def test_peers_that_read_are_waited_for_until_they_stop_or_their_time_is_over() -> None:
    async def test() -> None:
        for grace, stops in ((3600.0, True), (0.0, False)):
            here, stage = house(peer_grace=grace), made(PAGE)
            here.keep(stage)
            lease = here.leases.begin_for_peer(stage, "peer:1")
            waiting = asyncio.create_task(here.dismiss_victims({"cpu": 10 * PAGE}))
            await asyncio.sleep(0)
            if stops:
                assert (stage.dismissed, waiting.done()) == (True, False)
                here.leases.end_for_peer(lease)
            await asyncio.wait_for(waiting, 30)
            assert not stage.dismissed
        await here.dismiss_victims({"cpu": 9 * PAGE})

    run(test)


def test_a_revocation_may_become_shorter_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        here, stage, clock = house(), made(PAGE), [1000.0]
        monkeypatch.setattr(residency.eviction, "now", lambda: clock[0])
        deadlines = []
        for grace in (100.0, 200.0, 100.0, 50.0):
            here.revoke(stage, grace)
            deadlines.append(stage.revoke_deadline)
        assert deadlines == [1100.0, 1100.0, 1100.0, 1050.0]
        assert stage.revoked_until is not None

    run(test)


# ---------------------------------------------------------------------------- moves


@pytest.fixture
def two() -> Any:
    house = House()
    yield house
    house.close()


def test_what_has_moved_is_there_verified_sealed_and_lent_to_nobody(two: House) -> None:
    two.stage.lent = True
    before = [*two.stage.segments, *two.stage.manifests]
    asyncio.run(two.move())
    stage = two.stage
    assert (stage.devices, stage.device, stage.reserved, stage.lent) == (
        ("cpu:1",) * 2,
        "cpu:1",
        {"cpu:1": 2 * PAGE},
        False,
    )
    assert [part.fd for part in before] == [-1] * 4
    assert [os.pread(segment.fd, 1, PAGE - 1) for segment in stage.segments] == [b"\1", b"\2"]
    assert not any(segment.writable for segment in stage.segments)
    assert [manifest.read()[0].device for manifest in stage.manifests] == ["cpu:1"] * 2
    assert [manifest.read()[1] for manifest in stage.manifests] == [[0], [0]]
    assert len(two.residency._left_behind._footprints) == 2
    again, _ = restored(two)
    assert again.devices == ("cpu:1", "cpu:1")
    for part in (*again.segments, *again.manifests, cast(Any, again.ledger)):
        part.close()
    segments = list(stage.segments)
    asyncio.run(two.move())
    assert stage.segments == segments, "it is there already"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"state": "loading"}, "is loading: only a ready stage"),
        ({"moving": "cpu:7"}, "is being moved to cpu:7"),
        ({"revoked_until": 5.0}, "is being revoked"),
    ],
)
def test_only_what_is_ready_and_stays_can_be_moved(what: dict[str, Any], message: str, two: House) -> None:
    for name, value in what.items():
        setattr(two.stage, name, value)
    with pytest.raises(NotMovable, match=message):
        asyncio.run(two.move())
    assert two.stage.device == "cpu:0"
    for name in what:
        setattr(two.stage, name, {"state": "ready"}.get(name))


def test_a_device_without_such_handles_is_refused(two: House) -> None:
    two.stage.request = two.stage.request.model_copy(update={"handle": "cuda_ipc"})
    with pytest.raises(InvalidRequest, match="cpu:1 has no segments with handle 'cuda_ipc'"):
        asyncio.run(two.move())


def test_a_copy_that_is_not_the_same_is_given_up_and_the_stage_stays_as_it_was(two: House) -> None:
    assert two.stage.ledger is not None
    two.stage.ledger.leaves([2])[0][1] ^= 1
    before = list(two.stage.segments)
    with pytest.raises(DigestMismatch, match="tensor 'w', leaf 0: changed while it was moved"):
        asyncio.run(two.move())
    assert (two.stage.segments, two.stage.reserved, two.stage.moving) == (before, {"cpu:0": 2 * PAGE}, None)
    assert two.residency.used("cpu:1") == 0


def test_what_is_leased_is_not_moved_nor_what_there_is_no_room_for(two: House) -> None:
    lease = two.residency.leases.begin(two.stage, 0, uid=1, gid=1, pid=1)
    with pytest.raises(StageLeased):
        asyncio.run(two.move())
    two.residency.leases.end(lease)
    full = CpuDevice("cpu:1", PAGE)
    two.residency.devices = {**two.residency.devices, "cpu:1": full}
    with pytest.raises(InsufficientCapacity):
        asyncio.run(move_segments(two.residency, two.deposits, two.stage, full, cast(Any, None), asyncio.to_thread))
    assert two.stage.reserved == {"cpu:0": 2 * PAGE}
