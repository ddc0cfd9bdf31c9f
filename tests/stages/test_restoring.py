"""A stage as the next daemon finds it: deposited by one, restored by another from descriptors alone."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.filling.fills import store, tensor
from weightd.daemon.checkpoints.cache import Cache
from weightd.daemon.checkpoints.selection import LeftOut
from weightd.daemon.devices.cpu import CpuDevice
from weightd.daemon.devices.quarantine import Quarantine
from weightd.daemon.errors import Lost
from weightd.daemon.filling.ledger import Ledger
from weightd.daemon.keeper.deposits import Deposits
from weightd.daemon.stages import record
from weightd.daemon.stages.manifests import SealedManifest
from weightd.daemon.stages.planning import SegmentInfo, make_plan
from weightd.daemon.stages.record import UnknownRecord
from weightd.daemon.stages.request import parse_request
from weightd.daemon.stages.segments import segment_manifest
from weightd.daemon.stages.stage import Stage


class Held:
    """Deposits whose keeper is this test: what is held, by name."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._ours = ours
        self.deposits = Deposits(theirs)
        self.said: list[str] = []
        self._fds: dict[str, int] = {}
        self._theirs = theirs

    def now(self) -> dict[str, int]:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._ours, 4096, 4)
            except BlockingIOError:
                return self._fds
            self.said.append(data.decode())
            verb, _, name = data.decode().partition(" ")
            if verb == "put":
                if name in self._fds:
                    os.close(self._fds[name])
                (self._fds[name],) = fds
            else:
                for gone in [held for held in self._fds if held == name or held.startswith(f"{name}/")]:
                    os.close(self._fds.pop(gone))

    def parts(self, stage: Stage) -> dict[str, int]:
        """Of a stage, as an adopting daemon has them."""
        return {name.removeprefix(f"{stage.id}/"): fd for name, fd in self.now().items() if name.startswith(stage.id)}

    def close(self) -> None:
        for fd in self.now().values():
            os.close(fd)
        self._ours.close()
        self._theirs.close()


@pytest.fixture
def held() -> Iterator[Held]:
    held = Held()
    yield held
    held.close()


def devices() -> dict[str, CpuDevice]:
    return {name: CpuDevice(name, 1 << 30) for name in ("cpu", "cpu:1")}


def quarantine() -> Quarantine:
    return Quarantine(Deposits(), {})


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Stage]]:
    stored = store(tmp_path, {"a": tensor("U8", (8, 1000))})
    made: list[Stage] = []

    def make(state: str = "ready", **request: Any) -> Stage:
        parallel = {"tp_size": 2, "tp_rank": "all", "map": {"*": 0}}
        listing = replace(stored.checkpoint.listing, rule="by the rule", left_out=(LeftOut("x", "why"),))
        stage = Stage(
            listing.uri, ["cpu", "cpu:1"], parse_request({"model": "/m", "parallel": parallel, **request}), listing
        )
        plan = make_plan(stored.source, listing, stage.request, Cache(Path("/dev/null/none")))
        stage.infos = plan.infos
        stage.segments = [devices()[name].allocate(4000, stage.id) for name in stage.devices]
        for index, segment in enumerate(stage.segments):
            segment.view[:4000] = bytes([index + 1]) * 4000
            if state == "ready":
                segment.seal()
            stage.reserved[stage.devices[index]] = segment.footprint
        stage.ledger = Ledger.new(3, 5, bytes(range(16)))
        stage.ledger.note(2, 77.0, lent=True)
        if state == "ready":
            stage.manifests = [SealedManifest.seal(segment_manifest(stage, plan, i), [0]) for i in range(2)]
        stage.enter(state)
        made.append(stage)
        return stage

    yield make
    for stage in made:
        close(stage)


def close(stage: Stage) -> None:
    for part in (*stage.segments, *stage.manifests):
        part.close()
    if stage.ledger is not None:
        stage.ledger.close()


SAID: dict[str, Any] = {
    "source_kind": "file", "priority": 5, "pin": True, "ttl_seconds": 9.0, "created_at": 1e9, "ready_at": 1e9 + 1,
    "revoked_until": 2e9, "revoke_deadline": 5.0, "bytes_total": 8000, "bytes_read": 7000, "peer_bytes": 10,
    "metadata": "/cache", "segment_digests": ["1", "2"], "checkpoint_digest": "xxh3:1",
    "phase_seconds": {"source": 1.0}, "seconds": {"queued": 1.0}, "satisfied": {"xxh3:1", "a=sha256:2"},
    "request_id": "r-1", "deaths": 2,
    "left_out": (LeftOut("y", "because"),),
}  # fmt: skip


@pytest.mark.parametrize("state", ["ready", "loading"])
def test_all_that_is_to_be_known_of_a_stage_comes_back(state: str, held: Held, make: Callable[..., Stage]) -> None:
    stage = make(state)
    for name, value in SAID.items():
        setattr(stage, name, value)
    record.deposit(held.deposits, stage)
    again = record.restore(held.parts(stage), devices(), quarantine())
    found = {name: getattr(again, name) for name in SAID}
    assert found == {**SAID, "deaths": 2 if state == "ready" else 3}, (
        "a daemon that is gone, and did not say so, has died"
    )
    assert (again.id, again.uri, again.devices, again.request) == (stage.id, stage.uri, stage.devices, stage.request)
    assert again.state == ("ready" if state == "ready" else "queued")
    assert (again.announced, again.planned.is_set()) == (True, state == "ready")
    assert again.listing is not None
    assert stage.listing is not None
    assert (again.listing.identity, again.listing.weights) == (stage.listing.identity, stage.listing.weights)
    assert (again.listing.rule, again.listed_at) == ("by the rule", 1e9)
    assert again.infos == (SegmentInfo(0, 4000, 1), SegmentInfo(1, 4000, 1))
    assert again.reserved == {"cpu": 4096, "cpu:1": 4096}
    assert again.ledger is not None
    assert (again.ledger.leases, again.ledger.last_used, again.ledger.extents) == (2, 77.0, 3)
    assert [os.pread(segment.fd, 1, 3999) for segment in again.segments] == [b"\1", b"\2"]
    assert [segment.writable for segment in again.segments] == [state != "ready"] * 2
    assert [manifest.read()[1] for manifest in again.manifests] == ([[0], [0]] if state == "ready" else [])
    assert again.clock.began == stage.clock.began
    assert again.clock.origin == "file"
    close(again)


def test_where_no_keeper_is_and_where_there_is_no_memory_nothing_is_deposited(
    held: Held, make: Callable[..., Stage]
) -> None:
    record.deposit(Deposits(), make())
    stage = make()
    segments, stage.segments = stage.segments, []
    record.update(held.deposits, stage)
    assert held.now() == {}
    stage.segments = segments


def test_a_daemon_that_makes_room_is_not_counted_as_dead(held: Held, make: Callable[..., Stage]) -> None:
    stage = make("loading")
    stage.handed_over = True
    record.deposit(held.deposits, stage)
    again = record.restore(held.parts(stage), devices(), quarantine())
    assert again.deaths == 0
    close(again)


def test_a_stage_that_moved_is_what_its_record_says_and_what_it_was_is_dropped(
    held: Held, make: Callable[..., Stage]
) -> None:
    stage = make()
    record.deposit(held.deposits, stage)
    names = ["ledger", "manifest/0", "manifest/1", "record", "segment/0", "segment/1"]
    assert sorted(held.parts(stage)) == names
    for number in (1, 2):
        record.redeposit(held.deposits, stage)
        assert stage.deposited_as == f".{number}"
        of = f".{number}/"
        assert sorted(held.parts(stage)) == sorted(name.replace("/", of) for name in names)
    order = [said.partition("/")[2] for said in held.said if said.startswith("put")][-6:]
    assert order[-1] == "record", "it is replaced after all that it speaks of is there"
    again = record.restore(held.parts(stage), devices(), quarantine())
    assert (again.deposited_as, len(again.segments), len(again.manifests)) == (".2", 2, 2)
    close(again)
    parts = [*held.parts(stage), "segment/0", "segment.1/0", "manifest.3/1", "other/0"]
    assert record.leftovers(stage, parts) == {f"{stage.id}/{kind}" for kind in ("segment", "segment.1", "manifest.3")}
    record.withdraw(held.deposits, stage)
    assert held.parts(stage) == {}


def test_legacy_handles_are_lost_with_the_daemon(held: Held, make: Callable[..., Stage]) -> None:
    stage = make(handle="cuda_ipc")
    record.deposit(held.deposits, stage)
    again = record.restore(held.parts(stage), devices(), quarantine())
    assert (again.state, again.segments, type(again.error)) == ("failed", [], Lost)


def rewritten(parts: dict[str, int], **changes: Any) -> dict[str, int]:
    """The parts with another record."""
    table = json.loads(os.pread(parts["record"], 1 << 20, 0))
    for name, value in changes.items():
        table[name] = value
        if value is None:
            del table[name]
    fd = os.memfd_create("record")
    os.write(fd, json.dumps(table).encode())
    return {**parts, "record": fd}


@pytest.mark.parametrize("lacks", ["ledger", "segment/0", "segment/1", "manifest/1"])
def test_what_lacks_a_part_is_left_alone_with_nothing_kept_open(
    lacks: str, held: Held, make: Callable[..., Stage]
) -> None:
    stage = make()
    record.deposit(held.deposits, stage)
    parts = held.parts(stage)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UnknownRecord, match="its parts are not what its record says: KeyError"):
        record.restore({name: fd for name, fd in parts.items() if name != lacks}, devices(), quarantine())
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "a record of format 2, this version of weightd knows 1"),
        ({"format": None}, "no record of a stage: KeyError"),
        ({"devices": ["cpu", "cpu:2"]}, "its device 'cpu:2' is not on this node"),
        ({"uuids": ["GPU-1", None]}, r"its device 'cpu' \(GPU-1\) is not on this node"),
        ({"uuids": [None]}, "its parts are not what its record says"),
        ({"footprints": [4096]}, "its parts are not what its record says"),
        ({"infos": [{"rank": 0, "nbytes": 4097, "tensors": 1}] * 2}, "a segment of 4096 bytes, expected are 8192"),
        ({"infos": [{"rank": 0}]}, "a record of format 1 that cannot be read: TypeError"),
        ({"identity": None}, "a record of format 1 that cannot be read: KeyError"),
        ({"request": {"model": ""}}, "cannot be read"),
        ({"deaths": "x"}, "cannot be read: ValueError"),
    ],
)
def test_what_is_not_as_it_should_be_is_left_alone(
    changes: dict[str, Any], message: str, held: Held, make: Callable[..., Stage]
) -> None:
    stage = make()
    record.deposit(held.deposits, stage)
    with pytest.raises(UnknownRecord, match=message):
        record.restore(rewritten(held.parts(stage), **changes), devices(), quarantine())


def test_a_device_in_quarantine_is_not_touched(held: Held, make: Callable[..., Stage]) -> None:
    stage = make()
    record.deposit(held.deposits, stage)
    here = devices()
    here["cpu:1"].quarantined = "it failed"
    with pytest.raises(UnknownRecord, match=r"its device cpu:1 \(None\) is in quarantine: it failed: 'weightd reload'"):
        record.restore(held.parts(stage), here, quarantine())


def test_what_versions_before_did_not_say_is_taken_as_it_was_then(held: Held, make: Callable[..., Stage]) -> None:
    stage = make()
    stage.created_at -= 100.0
    record.deposit(held.deposits, stage)
    older = dict.fromkeys(
        ("uuids", "rule", "left_out", "deposited_as", "request_id", "deaths", "handed_over", "ttl_seconds", "began",
         "spent", "peer_bytes", "devices", "footprints")
    )  # fmt: skip
    again = record.restore(rewritten(held.parts(stage), **older, device="cpu", footprint=8192), devices(), quarantine())
    assert (again.devices, again.reserved) == (("cpu", "cpu"), {"cpu": 8192})
    assert (again.peer_bytes, again.request_id, again.deposited_as, again.deaths) == (0, "", "", 0)
    assert (again.ttl_seconds, again.left_out) == (None, ())
    assert abs((stage.clock.began - 100.0) - again.clock.began) < 5
    close(again)


def test_so_many_files_that_were_not_taken_are_told_of(
    held: Held, make: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert record.MAX_LEFT_OUT == 1000
    monkeypatch.setattr(record, "MAX_LEFT_OUT", 2)
    stage = make()
    stage.left_out = tuple(LeftOut(str(i), "why") for i in range(5))
    record.deposit(held.deposits, stage)
    again = record.restore(held.parts(stage), devices(), quarantine())
    assert [file.name for file in again.left_out] == ["0", "1"]
    close(again)
