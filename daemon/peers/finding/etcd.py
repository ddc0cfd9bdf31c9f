"""``etcd:http://HOST:2379[,http://...][/PREFIX]``: entries in etcd v3 that live as long as their daemons.

Each daemon keeps one small entry, ``PREFIX/peers/NODE/ADDRESS`` (the default prefix is ``/weightd``), under a lease: a
daemon that dies is gone after ``TTL`` seconds. It lists all the others and watches them from that revision on. Over the
gateway for HTTP and JSON that every etcd from 3.4 on has on its client port, so nothing but httpx is needed.

The connection is one session: a list, then a watch and a lease that is kept alive, beside each other. Whatever goes
wrong in it (etcd restarts, has lost its quorum, has compacted what was to be watched) ends it, and the next one begins
with the next endpoint and a new list; the lease goes on from one session to the next, and is granted anew where it has
ended.

Credentials are etcdctl's: ETCDCTL_USER (``name:password``, with the right to read and write what is under the prefix),
ETCDCTL_CACERT, ETCDCTL_CERT, ETCDCTL_KEY. Where etcd has users, its gateway refuses client certificates with a common
name.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import socket
import ssl
from base64 import b64decode, b64encode
from collections.abc import AsyncGenerator, Mapping
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import httpx

from weightd.daemon.addresses import join_address, parse_address
from weightd.daemon.lasting import lasting
from weightd.daemon.peers.finding.directory import (
    MAX_MEMBERS,
    MAX_STAGES,
    MAX_TEXT,
    Backoff,
    BaseDirectory,
    Member,
    Opener,
    checked_node,
    checked_stages,
    is_stage_key,
)

log = logging.getLogger(__name__)

TTL = 10  # seconds that an entry outlives its daemon
KEEPALIVE = 3.0  # seconds between renewals, so that two may be lost
BETWEEN_WRITES = 1.0
NOT_FOUND = 5  # gRPC's code
ANSWER_TIMEOUT = 5.0
PAGE = 200  # entries of one listing request
MAX_ANSWER = 64 << 20  # more than a page of entries of ours
_DEAD_CONNECTION = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]


class EtcdError(Exception):
    """What etcd answered, or what its answer lacks."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code  # gRPC's


def parse(kind: str, place: str) -> Opener:
    """One or several endpoints of one cluster, and a prefix."""
    found = [_endpoint(part.strip()) for part in place.split(",") if part.strip()]
    endpoints = list(dict.fromkeys(endpoint for endpoint, _ in found))
    prefixes = {prefix for _, prefix in found if prefix}
    if not 1 <= len(endpoints) <= 64 or len(prefixes) > 1:
        raise ValueError(f"etcd takes 1 to 64 endpoints and one prefix, found {len(endpoints)} and {sorted(prefixes)}")
    return partial(EtcdDirectory, endpoints, prefixes.pop() if prefixes else "/weightd")


def _endpoint(text: str) -> tuple[str, str]:
    """An URL's endpoint and prefix, which is empty where it has none."""
    try:
        url = urlsplit(text)
        host, port = parse_address(join_address(url.hostname or "", url.port or 2379))
    except ValueError:
        url = urlsplit("")
    if url.scheme not in ("http", "https") or "@" in url.netloc or url.query or url.fragment or not text.isprintable():
        raise ValueError(
            "etcd takes http://HOST:2379 or https://HOST:2379, several with commas between them, and a prefix behind "
            "the last one, as in http://HOST:2379/cluster-a; the user comes from ETCDCTL_USER. "
            f"Found {text.rpartition('@')[2][:300]!r}"  # what is before it may be a password
        )
    prefix = url.path.strip("/")
    return f"{url.scheme}://{join_address(host, port)}", prefix and f"/{prefix}"


class EtcdDirectory(BaseDirectory):
    """Publishes under a lease, lists and watches."""

    def __init__(self, endpoints: list[str], prefix: str, *, node: str, address: str) -> None:
        super().__init__()
        self.name = "etcd"
        self.own_host, self.own_port = parse_address(address)
        self._prefix = f"{prefix}/peers/"
        self._node = checked_node(node)
        self._address = join_address(self.own_host, self.own_port)
        self._endpoints = endpoints
        self._value = _entry(self._node, self._address, {})
        self._unpublished = asyncio.Event()
        self._lease = "0"
        self._client: httpx.AsyncClient | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._backoff = Backoff()
        self._wrong = f"{self.name}: not connected yet"

    async def start(self) -> None:
        self._task = lasting(self._keep_connected(), f"asking {self.name} for peers")

    async def publish(self, stages: Mapping[str, float]) -> None:
        # In hundredths, rounded down: what changes by less is not worth a write, and 1 is complete.
        shares = {key: math.floor(min(max(share, 0), 1) * 100) / 100 for key, share in stages.items()}
        value = _entry(self._node, self._address, shares)
        if value != self._value:
            self._value = value
            self._unpublished.set()

    async def close(self) -> None:
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._client is not None:
            if self._lease != "0":
                with contextlib.suppress(EtcdError, httpx.HTTPError, TimeoutError):
                    async with asyncio.timeout(2):
                        await self._call("lease/revoke", {"ID": self._lease})
            self._lease = "0"
            await self._client.aclose()
            self._client = None

    async def _keep_connected(self) -> None:
        while not self._closed:  # a task group that fails while it is cancelled forgets that it was
            try:
                if self._client is None:
                    self._client = _client()
                await self._session(self._client)
            except* Exception as group:  # whatever comes from outside: this goes on
                error: BaseException = group
                while isinstance(error, BaseExceptionGroup):
                    error = error.exceptions[0]
                log.debug("%s", self.name, exc_info=error)
                self.lost(f"{self._endpoints[0]}: {str(error)[:500] or type(error).__name__}")
            if not self._closed:
                self._endpoints.append(self._endpoints.pop(0))
                await asyncio.sleep(self._backoff.failed())

    async def _session(self, client: httpx.AsyncClient) -> None:
        client.headers.pop("Authorization", None)
        user, separator, password = os.environ.get("ETCDCTL_USER", "").partition(":")
        if separator:
            answer = await self._call("auth/authenticate", {"name": user, "password": password})
            client.headers["Authorization"] = answer["token"]
        revision = await self._list()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch(revision + 1))
            tasks.create_task(self._announce())

    async def _list(self) -> int:
        """Learn all entries; returns their revision."""
        found: dict[str, Member] = {}
        begin, end = self._prefix.encode(), _end(self._prefix.encode())
        seen, revision, more = 0, 0, True
        while more:
            answer = await self._call(
                "kv/range", {"key": _b64(begin), "range_end": _b64(end), "limit": PAGE, "revision": revision}
            )
            revision = revision or int(answer["header"]["revision"])
            entries = answer.get("kvs", [])
            for entry in entries:
                key = b64decode(entry["key"])
                begin = key + b"\0"
                if member := self._member(key, b64decode(entry.get("value", ""))):
                    found[key.decode()] = member
            seen += len(entries)
            more = bool(answer.get("more")) and bool(entries)
            if more and seen >= MAX_MEMBERS:
                self.skip(self._prefix, f"it has more than {MAX_MEMBERS} entries: not all are known here")
                break
        self.put_all(found.items())
        self.heard()
        return revision

    async def _watch(self, revision: int) -> None:
        begin = self._prefix.encode()
        request = {"key": _b64(begin), "range_end": _b64(_end(begin)), "start_revision": revision, "fragment": True}
        async with contextlib.aclosing(self._stream("watch", {"create_request": request})) as answers:
            async for answer in answers:
                if answer.get("canceled"):
                    compacted = answer.get("compact_revision")
                    reason = f"revision {revision} is compacted up to {compacted}" if compacted else "without a reason"
                    raise EtcdError(f"the watch was cancelled: {answer.get('cancel_reason') or reason}")
                for event in answer.get("events", []):
                    key = b64decode(event["kv"]["key"])
                    deleted = event.get("type") == "DELETE"
                    member = None if deleted else self._member(key, b64decode(event["kv"].get("value", "")))
                    self.put(key.decode(errors="replace"), member)
        raise EtcdError("the watch has ended")

    async def _announce(self) -> None:
        self._unpublished.set()
        while True:
            answer = await self._call("lease/keepalive", {"ID": self._lease}) if self._lease != "0" else {}
            if int(answer.get("result", {}).get("TTL", 0)) <= 0:
                self._lease = (await self._call("lease/grant", {"TTL": TTL}))["ID"]
                self._unpublished.set()
            if self._unpublished.is_set():
                self._unpublished.clear()
                key = f"{self._prefix}{self._node}/{self._address}".encode()
                put = {"key": _b64(key), "value": _b64(self._value), "lease": self._lease}
                try:
                    await self._call("kv/put", put)
                except EtcdError as error:
                    if error.code == NOT_FOUND:
                        self._lease = "0"
                    raise
            self._backoff.reset()
            self.well()
            await asyncio.sleep(BETWEEN_WRITES)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KEEPALIVE - BETWEEN_WRITES):
                    await self._unpublished.wait()

    def _member(self, key: bytes, value: bytes) -> Member | None:
        """What an entry says, if it is one of ours, and not our own."""
        try:
            if len(value) > MAX_TEXT:
                raise ValueError(f"it has {len(value)} bytes, and {MAX_TEXT} are allowed")
            found = json.loads(value)
            if not isinstance(found, dict) or not isinstance(found.get("address"), str):
                raise ValueError("it is no map with node, address and stages")
            node, (host, port) = checked_node(found.get("node")), parse_address(found["address"])
            if key.decode() != f"{self._prefix}{node}/{join_address(host, port)}":
                raise ValueError("its key is not its node and address")
            if (host, port) == (self.own_host, self.own_port):
                return None
            return Member(node, join_address(host, port), checked_stages(found.get("stages")))
        except (ValueError, RecursionError) as error:
            self.skip(key[:1000].decode(errors="replace"), str(error)[:300])
            return None

    async def _call(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        async with asyncio.timeout(ANSWER_TIMEOUT), contextlib.aclosing(self._answers(path, body)) as answers:
            found = None
            async for answer in answers:
                if found is not None:
                    raise EtcdError(f"{path}: more than one answer")
                found = answer
        if found is None:
            raise EtcdError(f"{path}: an empty answer")
        return found

    async def _stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The results as they come; the first one says that the stream is there, and has to come in time."""
        async with contextlib.aclosing(self._answers(path, body)) as answers:
            limit: float | None = ANSWER_TIMEOUT
            while True:
                async with asyncio.timeout(limit):
                    answer = await anext(answers, None)
                if answer is None:
                    return
                limit = None
                yield answer["result"]

    async def _answers(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The JSON documents of an answer, one a line."""
        assert self._client is not None
        async with self._client.stream("POST", f"{self._endpoints[0]}/v3/{path}", json=body) as response:
            line: list[bytes] = []
            size = 0
            async for chunk in response.aiter_raw():
                *ends, rest = chunk.split(b"\n")
                for end in ends:
                    if text := b"".join([*line, end]).strip():
                        yield _checked(path, response.status_code, text)
                    line, size = [], 0
                line.append(rest)
                size += len(rest)
                if size > MAX_ANSWER:
                    raise EtcdError(f"{path}: an answer of more than {MAX_ANSWER} bytes")
            if text := b"".join(line).strip():
                yield _checked(path, response.status_code, text)


def _checked(path: str, status: int, text: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise EtcdError(f"{path}: HTTP {status} with {text[:100]!r}: nothing that etcd says") from None
    if status != 200 or "error" in answer:
        error = answer.get("error", answer)  # of a stream it is a map
        message = error.get("message", error) if isinstance(error, dict) else error
        code = answer.get("code", 0)
        raise EtcdError(f"{path}: {str(message)[:300]}", code if isinstance(code, int) else 0)
    return answer


def _client() -> httpx.AsyncClient:
    """For etcd inside the cluster: no proxies, and connections that notice when the other end is gone."""
    context = ssl.create_default_context(cafile=os.environ.get("ETCDCTL_CACERT") or None)
    if certificate := os.environ.get("ETCDCTL_CERT"):
        context.load_cert_chain(certificate, os.environ.get("ETCDCTL_KEY") or None)
    return httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(verify=context, trust_env=False, socket_options=_DEAD_CONNECTION),
        headers={
            "Accept-Encoding": "identity",
            "Grpc-Metadata-hasleader": "true",  # a member without a quorum says so, instead of watching in silence
        },
        timeout=httpx.Timeout(ANSWER_TIMEOUT, read=None),
        trust_env=False,
    )


def _entry(node: str, address: str, stages: Mapping[str, float]) -> bytes:
    """What is published: never more than others would take."""
    kept = dict([(key, share) for key, share in stages.items() if is_stage_key(key)][:MAX_STAGES])
    if len(kept) < len(stages):
        log.debug("etcd: %d of %d stages are not published", len(stages) - len(kept), len(stages))
    text = json.dumps({"node": node, "address": address, "stages": kept}, ensure_ascii=False, separators=(",", ":"))
    return text.encode()


def _b64(data: bytes) -> str:
    return b64encode(data).decode()


def _end(prefix: bytes) -> bytes:
    """The first key behind all that begin with a prefix."""
    return prefix[:-1] + bytes([prefix[-1] + 1])
