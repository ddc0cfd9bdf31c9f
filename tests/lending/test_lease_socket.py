"""What is said over a lease connection, message by message: progress, descriptors, what is verified, and why not."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.lending.rooms import noticed
from tests.lending.served import Served, within
from weightd.daemon.devices.cuda import CudaDevice, IpcSegment
from weightd.daemon.errors import DaemonError, DigestMismatch, InvalidRequest, SourceFailed, UnknownStage
from weightd.daemon.lending import lease_socket as module
from weightd.daemon.lending.credentials import Peer
from weightd.daemon.lending.lease_socket import _ranges, _renewed, lend_by_handle, resolve
from weightd.daemon.stages.stage import Stage
from weightd.ipc import wire


class Time:
    """In place of ``time``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now


def asked(stage: Stage, **more: Any) -> dict[str, Any]:
    return {"op": "lease", "stage": stage.id, "tp_rank": None, **more}


def attached(served: Served) -> float:
    return served.metrics.registry.get_sample_value("weightd_attach_duration_seconds_count") or 0.0


# ---------------------------------------------------------------------------- what is lent


@pytest.mark.parametrize("rank", [0, 1])
def test_of_a_ready_stage_the_descriptors_of_the_rank_are_lent_until_its_lessee_hangs_up(
    tmp_path: Path, rank: int
) -> None:
    async def body(served: Served) -> None:
        stage = served.made(0, 1)
        descriptors = len(os.listdir("/proc/self/fd"))
        asking = served.asks(asked(stage, tp_rank=rank))
        reply = await asking.hears()
        ((lease, found),) = stage.leases.items()
        assert (found.rank, found.uid, found.gid, found.pid) == (rank, os.getuid(), os.getgid(), os.getpid())
        segment = stage.segments[rank]
        inode, _ = reply.pop("inodes")
        nbytes, _ = reply.pop("sizes")
        assert (inode, nbytes) == (os.fstat(segment.fd).st_ino, segment.footprint)
        assert reply == {
            "type": "lease", "lease": lease, "stage": stage.id, "nbytes": segment.nbytes, "ready": True, "gpu": None,
            "manifest_nbytes": stage.manifests[rank].nbytes, "footprint": segment.footprint,
        }  # fmt: skip
        assert attached(served) == 1
        asking.client.close()
        await noticed(lambda: not stage.leases)
        await noticed(lambda: len(os.listdir("/proc/self/fd")) == descriptors)

    within(tmp_path, body)


def test_who_waits_is_told_how_far_it_is_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Time()
    monkeypatch.setattr(module, "time", clock)

    async def body(served: Served) -> None:
        stage = served.stage()
        asking = served.asks(asked(stage))
        progress = {"type": "progress", "stage": stage.id, "state": "queued", "bytes_done": 0, "bytes_total": 0}
        assert await asking.hears() == progress
        served.load(stage)
        clock.now += 0.875
        for _ in range(20):
            stage.notify()
            await asyncio.sleep(0)
        assert not asking.heard
        clock.now += 0.125
        stage.notify()
        assert await asking.hears() == {**progress, "state": "loading", "bytes_done": 7, "bytes_total": 100}
        served.ready(stage)
        assert (await asking.hears())["ready"] is True
        assert attached(served) == 0, "it was not ready when it was asked for"

    within(tmp_path, body)


@pytest.mark.parametrize("how", ["failed", "cancelled"])
@pytest.mark.parametrize("stream", [False, True])
def test_who_waits_for_what_never_comes_is_told_why(tmp_path: Path, how: str, stream: bool) -> None:
    async def body(served: Served) -> None:
        stage = served.stage()
        if stream:
            served.load(stage)
        asking = served.asks(asked(stage, stream=stream))
        await asking.hears()
        stage.enter(how, SourceFailed("503") if how == "failed" else None)
        told = await asking.hears()
        assert (told["type"], told["details"]) == ("error", {})
        if how == "failed":
            assert (told["code"], told["message"]) == ("source_failed", "503")
        else:
            assert (told["code"], told["message"]) == ("invalid_request", f"stage {stage.id} is cancelled")
        with pytest.raises(wire.Closed):
            await asking.hears()
        assert stage.leases == {}
        labels = {"code": told["code"]}
        assert served.metrics.registry.get_sample_value("weightd_errors_total", labels) == 1.0

    within(tmp_path, body)


def test_who_streams_is_told_of_what_is_verified_as_it_comes_and_of_the_digests_at_the_end(tmp_path: Path) -> None:
    async def body(served: Served) -> None:
        stage = served.stage(1)
        served.load(stage)
        stage.verified[0] += [2, 0, 1]
        asking = served.asks(asked(stage, stream=True))
        lease = await asking.hears()
        assert (lease["type"], lease["ready"], len(lease["inodes"])) == ("lease", False, 2)
        assert await asking.hears() == {"type": "verified", "entries": [[0, 2]]}
        stage.notify()
        stage.verified[0].append(3)
        stage.notify()
        assert await asking.hears() == {"type": "verified", "entries": [[3, 3]]}
        served.ready(stage)
        assert await asking.hears() == {
            "type": "ready", "digest": stage.segment_digests[0], "checkpoint_digest": stage.checkpoint_digest,
        }  # fmt: skip

    within(tmp_path, body)


def test_every_deadline_by_which_to_let_go_is_told_once_and_the_end_is_the_end(tmp_path: Path) -> None:
    async def body(served: Served) -> None:
        stage = served.made()
        asking = served.asks(asked(stage))
        await asking.hears()
        for grace in (500.0, 50.0):
            served.residency.revoke(stage, grace)
            told = await asking.hears()
            assert told["type"] == "revoked"
            assert grace - 40 < told["seconds"] <= grace
            stage.notify()
        served.residency.revoke(stage, -5.0)
        assert await asking.hears() == {"type": "revoked", "seconds": 0.0}
        stage.enter("evicted")
        with pytest.raises(wire.Closed):
            await asking.hears()
        assert stage.leases == {}

    within(tmp_path, body)


def test_what_changes_while_a_deadline_is_being_told_is_told_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(served: Served) -> None:
        stage = served.made()
        send, changes = (
            served.server._send,
            [lambda: served.residency.revoke(stage, 50), lambda: stage.enter("evicted")],
        )

        async def slow(connection: socket.socket, message: dict[str, Any], fds: list[int] | None = None) -> None:
            await send(connection, message, fds)
            if message["type"] == "revoked":
                changes.pop(0)()

        monkeypatch.setattr(served.server, "_send", slow)
        asking = served.asks(asked(stage))
        await asking.hears()
        served.residency.revoke(stage, 500)
        assert [(await asking.hears())["seconds"] > 50 for _ in range(2)] == [True, False]
        with pytest.raises(wire.Closed):
            await asking.hears()

    within(tmp_path, body)


def test_whoever_says_more_than_what_it_wants_has_hung_up(tmp_path: Path) -> None:
    async def body(served: Served) -> None:
        stage = served.made()
        asking = served.asks(asked(stage))
        await asking.hears()
        asking.client.sendall(b"x")
        with pytest.raises(ConnectionError):
            await asking.hears()
        await noticed(lambda: not stage.leases)

    within(tmp_path, body)


def test_a_server_that_closes_ends_all_leases_and_lets_nobody_in(tmp_path: Path) -> None:
    async def body(served: Served) -> None:
        stage = served.made()
        asking = served.asks(asked(stage))
        await asking.hears()
        await served.server.close()
        assert stage.leases == {}
        with pytest.raises(wire.Closed):
            await asking.hears()
        with pytest.raises(ConnectionRefusedError):
            served.asks(asked(stage))

    within(tmp_path, body)


# ---------------------------------------------------------------------------- what is meant, and what is refused


def test_a_rank_may_be_left_out_where_there_is_one_and_must_be_one_that_there_is(tmp_path: Path) -> None:
    async def body(served: Served) -> None:
        one, both = served.made(1), served.made(0, 1)
        assert await resolve(served.node, asked(one)) == (one, 1)
        assert await resolve(served.node, asked(both, tp_rank=1)) == (both, 1)
        for message, words in (
            (asked(both), r"has a segment for each tp_rank of \[0, 1\]: say which"),
            (asked(one, tp_rank=0), r"has no tp_rank 0, it has \[1\]"),
            (asked(one, tp_rank=True), "tp_rank to be a whole number or null"),
            (asked(one, tp_rank="1"), "tp_rank to be a whole number or null"),
            (asked(one, op="rob"), "expected op 'lease'"),
            ({"op": "lease", "request": {"model": 5}}, "model"),
        ):
            with pytest.raises(InvalidRequest, match=words):
                await resolve(served.node, message)
        with pytest.raises(UnknownStage, match="st-none"):
            await resolve(served.node, {"op": "lease", "stage": "st-none"})

    within(tmp_path, body)


@pytest.mark.parametrize(("nbytes", "code"), [(wire.MAX_REQUEST_BYTES + 1, "invalid_request"), (2, "invalid_request")])
def test_what_is_no_request_is_refused_with_why(tmp_path: Path, nbytes: int, code: str) -> None:
    async def body(served: Served) -> None:
        stage = served.made()
        asking = served.asks(asked(stage))
        await asking.hears()
        asking.client.close()
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            client.connect(served.path)
            client.sendall(wire.LENGTH.pack(nbytes) + b"[]")
            told, _ = await asyncio.to_thread(wire.receive, client)
        assert told["code"] == code
        assert ("allowed are 16777216" if nbytes > 2 else "the message is no JSON object: expected") in told["message"]

    within(tmp_path, body)


def test_a_request_may_come_in_pieces(tmp_path: Path) -> None:
    async def body(served: Served) -> None:
        stage = served.made()
        message = wire.encode(asked(stage))
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            client.connect(served.path)
            for piece in (message[:1], message[1:7], message[7:]):
                client.sendall(piece)
                for _ in range(20):
                    await asyncio.sleep(0)
            told, fds = await asyncio.to_thread(wire.receive, client)
            wire.close_all(fds)
        assert (told["type"], told["stage"]) == ("lease", stage.id)

    within(tmp_path, body)


def test_a_fault_of_the_daemons_is_told_without_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(served: Served) -> None:
        def fail(stage: str) -> Stage:
            raise ZeroDivisionError("secret")

        monkeypatch.setattr(served.node, "get", fail)
        told = await served.asks({"op": "lease", "stage": "x"}).hears()
        assert (told["code"], told["message"]) == (DaemonError.code, "ZeroDivisionError: see the daemon's log")

    within(tmp_path, body)


@pytest.mark.parametrize(
    ("indices", "ranges"),
    [([], []), ([0], [[0, 0]]), ([0, 2], [[0, 0], [2, 2]]), ([3, 1, 2, 7, 8], [[1, 3], [7, 8]])],
)
def test_entries_are_told_as_ranges(indices: list[int], ranges: list[list[int]]) -> None:
    assert _ranges(indices) == ranges


def test_a_lease_is_renewed_for_who_says_its_digest(tmp_path: Path) -> None:
    async def body(served: Served) -> None:
        stage, lease = served.made(0, 1), "le-0123456789ab"
        digest = stage.segment_digests[1]
        assert _renewed({}, stage, 1) is None
        assert _renewed({"renews": {"lease": lease, "digest": digest}}, stage, 1) == lease
        long = "x" * 99
        with pytest.raises(DigestMismatch, match=f"digest is {digest}, the lease was on {'x' * 50}$"):
            _renewed({"renews": {"lease": lease, "digest": long}}, stage, 1)
        with pytest.raises(DigestMismatch):
            _renewed({"renews": {"lease": lease, "digest": digest}}, stage, 0)
        for renews in (1, {"lease": "le-1", "digest": digest}, {"digest": digest}):
            with pytest.raises(InvalidRequest):
                _renewed({"renews": renews}, stage, 1)
        waits = served.stage()
        assert _renewed({"renews": {"lease": lease, "digest": None}}, waits, 0) == lease

    within(tmp_path, body)


def test_by_handle_progress_is_told_until_it_ends_and_an_error_is_the_last_word(tmp_path: Path) -> None:
    async def body(served: Served) -> None:
        for stage, error, words in (
            (served.stage(), SourceFailed("503"), "503"),
            (served.stage(), None, "is cancelled"),
            (served.stage(), None, "is being taken away"),
        ):
            lent = lend_by_handle(served.node, stage, 0, Peer(1, 2, 3, ()))
            assert (await anext(lent))["type"] == "progress"
            if words == "is being taken away":
                served.load(stage)
                served.ready(stage)
                served.residency.revoke(stage, 50.0)
            else:
                stage.enter("failed" if error else "cancelled", error)
            told = await anext(lent)
            assert told["type"] == "error"
            assert words in told["message"]
            with pytest.raises(StopAsyncIteration):
                await anext(lent)

    within(tmp_path, body)


def handled(served: Served, stage: Stage) -> None:
    """Its segment is one with a legacy handle, which this machine need not be able to make."""
    segment = object.__new__(IpcSegment)
    segment.device = cast(CudaDevice, SimpleNamespace(uuid="GPU-1"))
    segment.nbytes, segment.ipc_handle, segment.ipc_offset = 800, b"handle", 512
    stage.segments = [segment]


def test_by_handle_a_ready_stage_is_lent_until_it_goes_and_every_deadline_told_once(tmp_path: Path) -> None:
    async def body(served: Served) -> None:
        stage = served.made()
        handled(served, stage)
        lent = lend_by_handle(served.node, stage, 0, Peer(1, 2, 3, ()))
        told = await anext(lent)
        ((lease, found),) = stage.leases.items()
        assert (found.pid, found.uid, found.gid) == (1, 2, 3)
        assert told == {
            "type": "lease", "lease": lease, "stage": stage.id, "gpu": "GPU-1", "offset": 512, "nbytes": 800,
            "handle": "aGFuZGxl", "digest": stage.segment_digests[0],
            "manifest": f"/v1/stage/{stage.id}/manifest?tp_rank=0",
        }  # fmt: skip
        assert attached(served) == 1
        for grace in (500.0, 50.0, -5.0):
            served.residency.revoke(stage, grace)
            told = await anext(lent)
            assert told["type"] == "revoked"
            assert max(0.0, grace - 40) <= told["seconds"] <= max(0.0, grace)

        async def rest() -> list[dict[str, Any]]:
            return [event async for event in lent]

        end = asyncio.ensure_future(rest())
        stage.notify()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not end.done(), "nothing is new"
        stage.enter("evicted")
        assert await end == []
        assert stage.leases == {}
        unknown = served.made()
        handled(served, unknown)
        by_tcp = lend_by_handle(served.node, unknown, 0, None)
        await anext(by_tcp)
        assert [lease.pid for lease in unknown.leases.values()] == [None]
        await cast(Any, by_tcp).aclose()
        assert unknown.leases == {}

    within(tmp_path, body)
