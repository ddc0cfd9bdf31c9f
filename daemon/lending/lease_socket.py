"""The lease socket: segments lent over connections, each of which is the lease."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

from weightd.daemon.devices.cuda import IpcSegment
from weightd.daemon.errors import DaemonError, DigestMismatch, InvalidRequest, LeaseLimit
from weightd.daemon.lending.credentials import AllowedPeers, Peer
from weightd.daemon.lending.entrance import Entrance, Rules, Visit
from weightd.daemon.node.service import Node
from weightd.daemon.stages.eviction import now
from weightd.daemon.stages.manifests import SealedManifest
from weightd.daemon.stages.request import parse_request
from weightd.daemon.stages.segments import segment_manifest
from weightd.daemon.stages.stage import Stage
from weightd.ipc import wire
from weightd.ipc.runtime_dir import LEASE_SOCKET

log = logging.getLogger(__name__)

_REFUSAL_TIMEOUT = 30.0
"""Seconds that a connection may take to be told why not."""
_PROGRESS_INTERVAL = 1.0
_LEASE_ID = re.compile(r"le-[0-9a-f]{12}")


async def resolve(node: Node, message: dict[str, Any]) -> tuple[Stage, int]:
    """The stage and the rank whose segment a client means. Raises what ``Node.stage`` raises, and InvalidRequest."""
    rank = message.get("tp_rank")
    if message.get("op") != "lease" or not (rank is None or type(rank) is int):
        raise InvalidRequest("expected op 'lease', and tp_rank to be a whole number or null")
    request = message.get("request")
    if isinstance(message.get("stage"), str):
        stage = node.get(message["stage"])
    elif rank is not None and isinstance(request, dict) and not (request.get("parallel") or request.get("layout")):
        stage = node.find_rank(parse_request({**request, "parallel": None}), rank)
    else:
        stage, _ = await node.stage(parse_request(request))
    ranks = stage.request.ranks
    if rank is None:
        if len(ranks) > 1:
            raise InvalidRequest(f"stage {stage.id} has a segment for each tp_rank of {list(ranks)}: say which")
        rank = ranks[0]
    if rank not in ranks:
        raise InvalidRequest(f"stage {stage.id} has no tp_rank {rank}, it has {list(ranks)}")
    return stage, rank


async def lend_by_handle(node: Node, stage: Stage, rank: int, peer: Peer | None) -> AsyncIterator[dict[str, Any]]:
    """Lend a ``cuda_ipc`` segment as long as this is being read: ``progress`` while it loads, ``lease``, ``revoked``.

    What it cannot be lent for comes as an ``error``, the last event.
    """
    started, was_ready = time.perf_counter(), stage.state == "ready"
    try:
        while stage.state != "ready":
            if stage.finished:
                raise stage.error or InvalidRequest(f"stage {stage.id} is {stage.state}")
            yield _progress(stage)
            await stage.changed(_PROGRESS_INTERVAL)
        uid, gid, pid = (peer.uid, peer.gid, peer.pid) if peer else (None, None, None)
        lease = node.residency.leases.begin(stage, rank, uid=uid, gid=gid, pid=pid)
    except DaemonError as error:
        yield _error(error)
        return
    index = stage.request.ranks.index(rank)
    segment = stage.segments[index]
    assert isinstance(segment, IpcSegment)
    if was_ready:
        node.metrics.attach_seconds.observe(time.perf_counter() - started)
    try:
        yield {
            "type": "lease",
            "lease": lease.id,
            "stage": stage.id,
            "gpu": segment.device.uuid,
            "handle": base64.b64encode(segment.ipc_handle).decode(),
            "offset": segment.ipc_offset,
            "nbytes": segment.nbytes,
            "digest": stage.segment_digests[index],
            "manifest": f"/v1/stage/{stage.id}/manifest?tp_rank={rank}",
        }
        told: float | None = None
        while stage.state == "ready":
            if stage.revoked_until is not None and told != stage.revoke_deadline:
                told = stage.revoke_deadline
                yield {"type": "revoked", "seconds": max(0.0, told - now())}
            else:  # what has changed while that was being told, nobody says again
                await stage.changed(None)
    finally:
        node.residency.leases.end(lease)


class LeaseServer:
    """Serves the lease connections that come in at a listening Unix socket: a task each, none waits for another."""

    def __init__(
        self, node: Node, listener: socket.socket, peers: AllowedPeers, max_connections: int, entrance: Entrance
    ) -> None:
        self._node = node
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._connections: set[asyncio.Task[None]] = set()
        rules = Rules(max_connections, self._turned_away, peers, LeaseLimit, "WEIGHTD_MAX_LEASES")
        self._door = entrance.open(LEASE_SOCKET, listener, rules, self._take)

    def _take(self, connection: socket.socket, visit: Visit, peer: Peer | None) -> None:
        assert peer is not None  # it is a Unix socket
        task = asyncio.create_task(self._serve(connection, visit, peer))
        visit.hang_up = task.cancel
        self._connections.add(task)

        def gone(task: asyncio.Task[None]) -> None:
            self._connections.discard(task)
            connection.close()  # here, as a task that is cancelled before it begins does nothing at all
            visit.end()

        task.add_done_callback(gone)

    async def _serve(self, connection: socket.socket, visit: Visit, peer: Peer) -> None:
        try:
            await self._conversation(connection, visit, peer)
        except (OSError, wire.Closed):
            pass  # the client is gone; its lease went with it
        except DaemonError as error:
            await self._refuse(connection, error)
        except Exception as error:
            log.exception("lease connection")
            await self._refuse(connection, DaemonError(f"{type(error).__name__}: see the daemon's log"))

    def _turned_away(self, error: DaemonError) -> bytes:
        """What somebody is told who is not let in for this."""
        self._node.metrics.errors.labels(error.code).inc()
        self._node.refusals.note(error)
        return wire.encode(_error(error))

    async def _refuse(self, connection: socket.socket, error: DaemonError) -> None:
        self._node.metrics.errors.labels(error.code).inc()
        self._node.refusals.note(error)
        with contextlib.suppress(OSError, TimeoutError):
            await asyncio.wait_for(self._send(connection, _error(error)), _REFUSAL_TIMEOUT)

    async def _conversation(self, connection: socket.socket, visit: Visit, peer: Peer) -> None:
        message = await self._receive(connection, visit)
        visit.works()
        started = time.perf_counter()
        # From here on the client has nothing to say: whatever comes in is the end of the connection.
        lending = asyncio.ensure_future(self._lend(connection, peer, message, started))
        hangup = asyncio.ensure_future(self._loop.sock_recv(connection, 1))
        try:
            await asyncio.wait({lending, hangup}, return_when=asyncio.FIRST_COMPLETED)
            if lending.done():
                lending.result()
        finally:
            for task in (lending, hangup):
                task.cancel()
            await asyncio.gather(lending, hangup, return_exceptions=True)

    async def _lend(self, connection: socket.socket, peer: Peer, message: dict[str, Any], started: float) -> None:
        stage, rank = await resolve(self._node, message)
        if stage.request.handle != "fd":
            raise InvalidRequest(
                f"stage {stage.id} has a {stage.request.handle} handle, which POST /v1/leases lends: stage it with "
                'handle "fd" to attach to it here'
            )
        streaming = bool(message.get("stream"))
        was_ready = stage.state == "ready"
        last = 0.0
        while stage.state != "ready" and not (streaming and stage.fill is not None):
            if stage.error is not None:
                raise stage.error
            if stage.finished:
                raise InvalidRequest(f"stage {stage.id} is {stage.state}")
            if time.monotonic() - last >= _PROGRESS_INTERVAL:
                last = time.monotonic()
                await self._send(connection, _progress(stage))
            await stage.changed(_PROGRESS_INTERVAL)
        index = stage.request.ranks.index(rank)
        renews = _renewed(message, stage, index)
        lease = self._node.residency.leases.begin(stage, rank, uid=peer.uid, gid=peer.gid, pid=peer.pid, renews=renews)
        try:
            if was_ready:
                self._node.metrics.attach_seconds.observe(time.perf_counter() - started)
            ready = await self._hand_over(connection, stage, index, lease.id)
            sent = 0
            while stage.state != "ready":
                if stage.finished:
                    raise stage.error or InvalidRequest(f"stage {stage.id} is {stage.state}")
                verified = stage.verified[index]
                if sent < len(verified):
                    news, sent = verified[sent:], len(verified)
                    await self._send(connection, {"type": "verified", "entries": _ranges(news)})
                else:
                    await stage.changed(None)
            if not ready:
                await self._send(
                    connection,
                    {
                        "type": "ready",
                        "digest": stage.segment_digests[index],
                        "checkpoint_digest": stage.checkpoint_digest,
                    },
                )
            # Until the client hangs up, which cancels this, or has to let go.
            while stage.revoked_until is None:
                await stage.changed(None)
            told: float | None = None
            while stage.state == "ready":
                if told != stage.revoke_deadline:
                    told = stage.revoke_deadline
                    await self._send(connection, {"type": "revoked", "seconds": max(0.0, told - now())})
                else:  # what has changed while that was being sent, nobody says again
                    await stage.changed(None)
        finally:
            self._node.residency.leases.end(lease)

    async def _hand_over(self, connection: socket.socket, stage: Stage, index: int, lease: str) -> bool:
        """Send the descriptors; whether the stage was ready when it did."""
        segment = stage.segments[index]
        ready = stage.state == "ready"
        if ready:
            manifest = stage.manifests[index].again()  # sending may wait, and the stage go meanwhile
        else:
            plan = stage.plan
            assert plan is not None  # what loads has been planned
            manifest = await self._loop.run_in_executor(
                None, lambda: SealedManifest.seal(segment_manifest(stage, plan, index))
            )
        lent = -1
        try:
            if stage.finished and stage.state != "ready":
                raise stage.error or InvalidRequest(f"stage {stage.id} is {stage.state}")
            try:
                lent = segment.lend()
            except OSError as error:
                raise LeaseLimit(f"no descriptor is left to lend: {error.strerror} (ulimit -n of the daemon)") from None
            reply = {
                "type": "lease",
                "lease": lease,
                "stage": stage.id,
                "nbytes": segment.nbytes,
                "manifest_nbytes": manifest.nbytes,
                "ready": ready,
                "gpu": segment.device.uuid,
                "footprint": segment.footprint,
            }
            await self._send(connection, reply, [lent, manifest.fd])
            return ready
        finally:
            if lent >= 0:
                os.close(lent)
            manifest.close()

    async def _receive(self, connection: socket.socket, visit: Visit) -> dict[str, Any]:
        (length,) = wire.LENGTH.unpack(await self._receive_exactly(connection, wire.LENGTH.size))
        visit.sends()
        if length > wire.MAX_REQUEST_BYTES:
            raise InvalidRequest(f"a message of {length} bytes, allowed are {wire.MAX_REQUEST_BYTES}")
        try:
            return wire.decode(await self._receive_exactly(connection, length))
        except ValueError as error:
            raise InvalidRequest(f"the message is no JSON object: {error}") from None

    async def _receive_exactly(self, connection: socket.socket, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = await self._loop.sock_recv(connection, min(count - len(data), 1 << 16))
            if not part:
                raise wire.Closed("the client hung up")
            data += part
        return bytes(data)

    async def _send(self, connection: socket.socket, message: dict[str, Any], fds: list[int] | None = None) -> None:
        data = wire.encode(message)
        sent = 0
        while fds:
            try:
                sent, fds = socket.send_fds(connection, [data], fds), None
            except BlockingIOError:
                await self._writable(connection)
        await self._loop.sock_sendall(connection, data[sent:])

    async def _writable(self, connection: socket.socket) -> None:
        future: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_writer(connection, _resolve_future, future)
        try:
            await future
        finally:
            self._loop.remove_writer(connection)

    async def close(self) -> None:
        """Stop accepting and end all leases."""
        self._door.close()
        await self._door.wait_closed()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self._listener.close()


def _renewed(message: dict[str, Any], stage: Stage, index: int) -> str | None:
    """The lease that a client had before the daemon was restarted. Raises DigestMismatch, InvalidRequest."""
    renews = message.get("renews")
    if renews is None:
        return None
    if not isinstance(renews, dict) or not _LEASE_ID.fullmatch(str(renews.get("lease"))):
        raise InvalidRequest("renews must be an object with the lease's id and the segment's digest")
    found = stage.segment_digests[index] if stage.segment_digests else None
    if renews.get("digest") != found:
        raise DigestMismatch(
            f"stage {stage.id}: the segment's digest is {found}, the lease was on {str(renews.get('digest'))[:50]}"
        )
    return str(renews["lease"])


def _error(error: DaemonError) -> dict[str, Any]:
    return {"type": "error", "code": error.code, "message": str(error), "details": error.details}


def _progress(stage: Stage) -> dict[str, Any]:
    return {
        "type": "progress",
        "stage": stage.id,
        "state": stage.state,
        "bytes_done": stage.bytes_done,
        "bytes_total": stage.bytes_total,
    }


def _ranges(indices: list[int]) -> list[list[int]]:
    """Sorted indices as inclusive ranges."""
    ranges: list[list[int]] = []
    for index in sorted(indices):
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return ranges


def _resolve_future(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
