"""The S3 endpoint: connections in threads of their own, so that sending keeps nobody waiting who asks for less.

Each thread has an event loop with the connections that it was given; what they ask for is found on the daemon's own
loop, and bytes go from segments to sockets by sendfile(2).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import re
import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote

import h11

from weightd.daemon.errors import DaemonError, UnknownStage
from weightd.daemon.lending.credentials import Peer
from weightd.daemon.lending.entrance import Entrance, Rules, Visit
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.s3 import answers
from weightd.daemon.s3.errors import S3Error, as_s3
from weightd.daemon.s3.file_map import Held, Lacking
from weightd.daemon.s3.listing import MAX_KEYS, Query, after_of, page
from weightd.daemon.s3.objects import Body, Objects
from weightd.daemon.s3.opened import Opened
from weightd.daemon.s3.sending import Gone, Stalled, hung_up, send, send_file
from weightd.daemon.s3.signatures import Keys, Request

log = logging.getLogger(__name__)

T = TypeVar("T")

_CONNECTIONS = 1024
"""At once."""
_MAX_HEAD = 64 << 10
_CHUNK = 8 << 20
"""Bytes that are read at once of what is passed on, where few ask for it."""
_PIECE = 1 << 20
"""Bytes that are copied at once from a GPU: they wait in memory for who takes them slowly."""
_PASSING = 128 << 20
"""Bytes that all answers together that are passed on may have in memory, but for the least that each needs."""
_LEAST = 256 << 10
_ABSOLUTE = re.compile("https?://[^/]*", re.IGNORECASE)
_PATIENCE = 60.0
"""Seconds that a client may take nothing of what it asked for."""
_LINGER = 2.0
"""Seconds that a client is listened to that was told off while it was sending."""
_READ = {"list-type", "prefix", "delimiter", "marker", "max-keys", "encoding-type", "continuation-token", "start-after",
         "fetch-owner", "x-id"}  # fmt: skip
"""Parameters of lists; others name something of a bucket that is not here."""
_OF_OBJECTS = {"partNumber", "versionId", "x-id"} | answers.OVERRIDES.keys()


@dataclass(frozen=True)
class Access:
    """Who may ask. ``keys``: None takes any signature. ``hosts``: names of this endpoint, below which a
    bucket's name may stand (``models.localhost``)."""

    keys: Keys | None
    hosts: tuple[str, ...]


class Endpoint:
    """Serves connections that were accepted elsewhere. Made on the daemon's own loop."""

    def __init__(self, objects: Objects, access: Access, metrics: Metrics, *, threads: int) -> None:
        self.objects = objects
        self.access = access
        self.metrics = metrics
        self.started_at = time.time()
        self._loop = asyncio.get_running_loop()
        self._lanes = [_Lane(f"s3-{number}") for number in range(threads)]
        self._next = 0
        self._passing: set[int] = set()
        """Connections (their Python ids) to which something is passed on."""

    @contextlib.contextmanager
    def passing(self, who: object) -> Iterator[Callable[[], int]]:
        """While something is passed on to ``who``: says how many bytes to read of it at once. From any thread."""
        self._passing.add(id(who))
        try:
            yield lambda: max(_LEAST, min(_CHUNK, _PASSING // 2 // max(1, len(self._passing))))
        finally:
            self._passing.discard(id(who))

    def open(self, entrance: Entrance, listener: socket.socket) -> None:
        """Serve whoever comes in at a listening socket."""
        entrance.open("s3", listener, Rules(_CONNECTIONS, _turned_away), self._take)

    def _take(self, connection: socket.socket, visit: Visit, _: Peer | None) -> None:
        connection.setblocking(False)
        visit.hang_up = lambda: _shut_down(connection)
        lane = self._lanes[self._next % len(self._lanes)]
        self._next += 1
        lane.begin(self._serve(connection, visit))

    def close(self) -> None:
        """Cut all connections."""
        for lane in self._lanes:
            lane.close()
        self.objects.close()

    async def _serve(self, connection: socket.socket, visit: Visit) -> None:
        try:
            with connection:
                await _Client(self, connection, visit).serve()
        except (OSError, Stalled):
            pass
        except Exception:
            log.exception("S3: a connection has failed")
        finally:
            self.tell(visit.end)

    def tell(self, what: Any) -> None:
        """Have something done on the daemon's own loop."""
        with contextlib.suppress(RuntimeError):  # it is over
            self._loop.call_soon_threadsafe(what)

    async def ask(self, what: Coroutine[Any, Any, T]) -> T:
        """Have something found on the daemon's own loop."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(what, self._loop))


class _Lane:
    """A thread with an event loop, and what runs there."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def begin(self, what: Coroutine[Any, Any, None]) -> None:
        def begin() -> None:
            task = self._loop.create_task(what)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self._loop.call_soon_threadsafe(begin)

    def close(self) -> None:
        def end() -> None:
            for task in self._tasks:
                task.cancel()
            self._loop.call_later(0.1, self._loop.stop)

        self._loop.call_soon_threadsafe(end)


class _Client:
    """One connection: requests one after another, each answered before the next is read."""

    def __init__(self, endpoint: Endpoint, connection: socket.socket, visit: Visit) -> None:
        self._endpoint = endpoint
        self._connection = connection
        self._visit = visit
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD)
        host, port = connection.getpeername()[:2]
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def serve(self) -> None:
        while True:
            self._endpoint.tell(self._visit.waits)
            self._request_id = secrets.token_hex(8).upper()
            self._resource = ""
            self._is_head = False
            try:
                request = await self._next_request()
                if request is None:
                    return
                self._endpoint.tell(self._visit.works)
                await self._answer(request)
            except h11.RemoteProtocolError as error:
                self._count("invalid", 400)
                await self._refuse(S3Error("InvalidRequest", f"this is no HTTP request: {error}"))
                return
            except Gone:
                return  # short of what was promised, which no client takes for the whole
            if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                await self._see_off()
                return
            self._http.start_next_cycle()

    async def _next_request(self) -> h11.Request | None:
        loop = asyncio.get_running_loop()
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(await loop.sock_recv(self._connection, 1 << 16))
            elif isinstance(event, h11.Request):
                return event
            else:
                return None

    # ------------------------------------------------------------------ what is asked for

    async def _answer(self, sent: h11.Request) -> None:
        method, target = sent.method.decode(), sent.target.decode("latin-1")
        self._is_head = method == "HEAD"
        headers: dict[str, str] = {}
        for name, value in sent.headers:
            text = value.decode("utf-8", "surrogateescape")
            headers[name.decode()] = f"{headers[name.decode()]},{text}" if name.decode() in headers else text
        path, _, question = target.partition("?")
        if (absolute := _ABSOLUTE.match(path)) is not None:  # as to a proxy: the AWS SDK for C++ does so
            path = path[absolute.end() :] or "/"
        self._resource = path
        operation = "other"
        try:
            # What follows a '#' no client means to send as it is, and no signature is of it.
            if not path.startswith("/") or "#" in path:
                raise S3Error("InvalidURI", "Couldn't parse the specified URI.")
            query = parse_qsl(question, keep_blank_values=True, max_num_fields=100)
            if self._endpoint.access.keys is not None:
                self._endpoint.access.keys.check(Request(method, path, query, headers))
            bucket, key = self._place(headers.get("host", ""), unquote(path, errors="surrogateescape"))
            asked = {name: value for name, value in query if not name.lower().startswith("x-amz-")}
            operation = _operation(method, bucket, key, asked)
            if operation in ("GetObject", "HeadObject"):
                await self._object(operation, bucket, key, headers, asked)
                return
            answer = await self._endpoint.ask(self._text(operation, bucket, asked))
            await self._send_text(operation, 200, answer)
        except S3Error as error:
            await self._send_error(operation, error)
        except DaemonError as error:
            await self._send_error(operation, as_s3(error))
        except ValueError:
            await self._send_error(operation, S3Error("InvalidURI", "Couldn't parse the specified URI."))

    def _place(self, host: str, path: str) -> tuple[str, str]:
        """Bucket and key: by path, or where the host's name says the bucket."""
        access = self._endpoint.access
        name = (host if host.endswith("]") else host.rpartition(":")[0] if ":" in host else host).lower()
        for base in access.hosts:
            if name.endswith(f".{base}"):
                return name[: -len(base) - 1], path[1:]
        # A page in a browser can reach loopback under a name of its own (DNS rebinding): the host tells.
        if access.keys is None and name not in access.hosts:
            raise S3Error(
                "AccessDenied", f"Host is {host[:100]!r}: without keys this endpoint is for the local machine"
            )
        bucket, _, key = path[1:].partition("/")
        return bucket, key

    async def _text(self, operation: str, bucket: str, asked: Mapping[str, str]) -> bytes:
        """On the daemon's own loop."""
        objects = self._endpoint.objects
        if operation == "ListBuckets":
            return answers.buckets_xml(objects.buckets(), self._endpoint.started_at)
        if operation in ("HeadBucket", "GetBucketLocation"):
            await objects.check_bucket(bucket)
            return b"" if operation == "HeadBucket" else answers.location_xml()
        query = _query(asked)
        found = page([], query) if query.most == 0 else await objects.list_page(bucket, query)
        return await asyncio.to_thread(answers.list_xml, bucket, asked, query, found)

    # ------------------------------------------------------------------ objects

    async def _object(
        self, operation: str, bucket: str, key: str, headers: Mapping[str, str], asked: Mapping[str, str]
    ) -> None:
        endpoint = self._endpoint
        found = await self._unless_gone(endpoint.ask(endpoint.objects.find(bucket, key)))
        stored = found.object
        if not answers.check_conditions(stored, headers):
            tags = {"etag": answers.etag(stored), "last-modified": answers.http_date(stored.modified)}
            await self._head(operation, 304, tags)
            self._finish(0)
            return
        part = answers.range_of(headers.get("range", ""), stored.size)
        wanted = part.nbytes if operation == "GetObject" else 0
        body = Body(found.uri, [], part.first, wanted)
        try:
            if wanted:
                await self._unless_gone(endpoint.ask(endpoint.objects.open(found, body, self._address)))
            status = 206 if part.partial else 200
            await self._head(operation, status, answers.object_headers(stored, part, asked), more=bool(wanted))
            for piece in body.parts:
                await self._send_part(body, piece)
            self._finish(wanted)
        finally:
            endpoint.tell(lambda: endpoint.objects.end(body))

    async def _send_part(self, body: Body, part: bytes | Held | Lacking | Path) -> None:
        if isinstance(part, bytes):
            await send(self._connection, part, patience=_PATIENCE, more=True)
            self._sent("resident", len(part))
        elif isinstance(part, Held):
            await self._send_held(body, part)
        elif isinstance(part, Lacking):
            await self._pass_on(body, part)
        else:
            with part.open("rb") as file:
                await self._send_file(body, file.fileno(), body.first, body.nbytes)
            self._sent("resident", body.nbytes)

    async def _send_held(self, body: Body, held: Held) -> None:
        """From a segment, as its bytes are verified."""
        endpoint = self._endpoint
        while held.nbytes:
            count, waited = held.nbytes, False
            if body.stage is not None and body.stage.state != "ready":
                try:
                    count = await self._unless_gone(endpoint.ask(endpoint.objects.available(body, held)))
                except UnknownStage:
                    raise Gone from None
                waited = True
            opened = body.opened
            assert opened is not None
            if opened.is_on_gpu(held.segment):
                count = min(count, _PIECE)
                data = await asyncio.to_thread(_copied, opened, held, count)
                await send(self._connection, data, patience=_PATIENCE)
            else:
                await self._send_file(body, opened.fd(held.segment), held.offset, count)
            self._sent("waited" if waited else "resident", count)
            held = held._replace(at=held.at + count, offset=held.offset + count, nbytes=held.nbytes - count)

    async def _send_file(self, body: Body, fd: int, offset: int, count: int) -> None:
        await send_file(self._connection, fd, offset, count, patience=_PATIENCE, gone=lambda: body.gone)

    async def _pass_on(self, body: Body, part: Lacking) -> None:
        """From the origin, a piece ahead of what is being sent."""
        endpoint = self._endpoint
        start, end = part.start, part.start + part.nbytes

        def read(start: int, count: int) -> asyncio.Future[bytes]:
            return asyncio.ensure_future(endpoint.ask(endpoint.objects.read(body, start, count)))

        with endpoint.passing(self) as most:
            coming = read(start, min(most(), end - start))
            try:
                while start < end:
                    try:
                        data = await self._unless_gone(coming)
                    except DaemonError as error:
                        log.warning(
                            "S3: %s ends short, it is passed on and its origin does not answer: %s", body.uri, error
                        )
                        raise Gone from None
                    start += len(data)
                    if start < end:
                        coming = read(start, min(most(), end - start))
                    await send(self._connection, data, patience=_PATIENCE)
                    self._sent("passed", len(data))
            finally:
                if not coming.cancel() and not coming.cancelled():
                    coming.exception()  # heard, where the client has gone before it came

    async def _unless_gone(self, what: Awaitable[T]) -> T:
        """What is waited for, unless the client hangs up meanwhile: then OSError."""
        task = asyncio.ensure_future(what)
        closed = asyncio.ensure_future(hung_up(self._connection))
        try:
            await asyncio.wait({task, closed}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise OSError(errno.ECONNRESET, "the client has hung up")
            return task.result()
        finally:
            for one in (task, closed):
                one.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await closed

    # ------------------------------------------------------------------ answering

    async def _head(self, operation: str, status: int, headers: Mapping[str, str], *, more: bool = False) -> None:
        self._count(operation, status)
        own = {"x-amz-request-id": self._request_id, "server": "weightd", "date": answers.http_date(time.time())}
        response = h11.Response(
            status_code=status, reason=HTTPStatus(status).phrase.encode(), headers=list({**own, **headers}.items())
        )
        await send(self._connection, self._http.send(response) or b"", patience=_PATIENCE, more=more)

    def _finish(self, count: int) -> None:
        """``count`` bytes of a body were sent past h11."""
        if count:
            self._http.send_with_data_passthrough(h11.Data(data=_Sent(count)))  # type: ignore[arg-type]
        self._http.send(h11.EndOfMessage())
        if self._http.their_state is h11.SEND_BODY:
            with contextlib.suppress(h11.RemoteProtocolError):
                self._http.next_event()  # that there is no body

    async def _send_text(self, operation: str, status: int, text: bytes) -> None:
        headers = {"content-type": "application/xml", "content-length": str(len(text))}
        await self._head(operation, status, headers, more=bool(text))
        if text and not self._is_head:
            await send(self._connection, text, patience=_PATIENCE)
        self._finish(0 if self._is_head else len(text))

    async def _send_error(self, operation: str, error: S3Error) -> None:
        await self._send_text(operation, error.status, answers.error_xml(error, self._resource, self._request_id))

    async def _refuse(self, error: S3Error) -> None:
        text = answers.error_xml(error, self._resource, self._request_id)
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-length: {len(text)}\r\nconnection: close\r\n\r\n"
        await send(self._connection, head.encode() + text, patience=_LINGER)
        await self._see_off()

    async def _see_off(self) -> None:
        """Hear out what is being said: closing over unread words would take our answer away with them."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError, TimeoutError):
            self._connection.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(_LINGER):
                while await loop.sock_recv(self._connection, 1 << 16):
                    pass

    def _count(self, operation: str, status: int) -> None:
        self._endpoint.metrics.s3_requests.labels(operation, str(status)).inc()

    def _sent(self, outcome: str, nbytes: int) -> None:
        self._endpoint.metrics.s3_bytes.labels(outcome).inc(nbytes)


class _Sent:
    """Stands for so many bytes of a body, of which h11 wants to know only that."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count


def _turned_away(error: DaemonError) -> bytes:
    """What is said to who may not stay."""
    text = answers.error_xml(S3Error("SlowDown", str(error)), "/", "")
    head = f"HTTP/1.1 503 Slow Down\r\ncontent-length: {len(text)}\r\nretry-after: 1\r\nconnection: close\r\n\r\n"
    return head.encode() + text


def _copied(opened: Opened, held: Held, count: int) -> bytes:
    """Bytes of a GPU's segment: pinned memory is for copying, and nobody's to hold who takes them slowly. Blocks."""
    with opened.copied(held.segment, held.offset, count, _CHUNK) as view:
        return bytes(view)


def _shut_down(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        connection.shutdown(socket.SHUT_RDWR)


def _operation(method: str, bucket: str, key: str, asked: Mapping[str, str]) -> str:
    """What a request is called. Raises S3Error where that is nothing that is done here."""
    if method in ("PUT", "POST", "DELETE"):
        raise S3Error("AccessDenied", "this endpoint only reads: write to the origin")
    if method not in ("GET", "HEAD"):
        raise S3Error("MethodNotAllowed", "The specified method is not allowed against this resource.")
    if not bucket:
        return "ListBuckets"
    if not key:
        if method == "HEAD":
            return "HeadBucket"
        if "location" in asked:
            return "GetBucketLocation"
        if others := sorted(asked.keys() - _READ):
            raise S3Error("NotImplemented", f"{others[0]!r} of a bucket is not implemented here")
        return "ListObjects"
    if others := sorted(asked.keys() - _OF_OBJECTS):
        raise S3Error("NotImplemented", f"{others[0]!r} of an object is not implemented here")
    if asked.get("versionId", "null") != "null" or asked.get("partNumber", "1") != "1":
        raise S3Error("NotImplemented", "versions and parts of objects are not implemented here")
    return "HeadObject" if method == "HEAD" else "GetObject"


def _query(asked: Mapping[str, str]) -> Query:
    """Which part of a list is asked for. Raises S3Error."""
    most = asked.get("max-keys", str(MAX_KEYS))
    if not (most.isascii() and most.isdecimal()) or len(most) > 10:
        raise S3Error("InvalidArgument", "Provided max-keys not an integer or within integer range")
    if asked.get("encoding-type", "url") != "url":
        raise S3Error("InvalidArgument", "Invalid Encoding Method specified in Request")
    if asked.get("list-type", "2") != "2":
        raise S3Error("InvalidArgument", "list-type is 2, or left out")
    if asked.get("list-type") == "2":
        after = asked.get("start-after", "")
        if token := asked.get("continuation-token"):
            after = after_of(token)
        elif "continuation-token" in asked:
            raise S3Error("InvalidArgument", "The continuation token provided is incorrect")
    else:
        after = asked.get("marker", "")
    return Query(asked.get("prefix", ""), asked.get("delimiter", ""), after, min(int(most), MAX_KEYS))
