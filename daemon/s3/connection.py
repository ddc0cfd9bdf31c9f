"""One connection to the S3 endpoint: HTTP requests one after another, each answered before the next is read."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import time
from collections.abc import Mapping
from http import HTTPStatus

import h11

from weightd.daemon.errors import DaemonError
from weightd.daemon.lending.entrance import Visit
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.s3 import answers, asked
from weightd.daemon.s3.answering import Answer, Answering
from weightd.daemon.s3.asked import Access, Asked
from weightd.daemon.s3.bodies import Body
from weightd.daemon.s3.delivery import Delivery, Passing
from weightd.daemon.s3.errors import S3Error, as_s3
from weightd.daemon.s3.lanes import Home
from weightd.daemon.s3.sending import Gone, Outlet, Patience

_MAX_HEAD = 64 << 10
_PATIENCE = Patience(60.0, 1 << 20)
"""Less than 17 KB/s are taken by nobody who needs them, and a lease goes with them."""
_LINGER = 2.0
"""Seconds that a client is listened to that was told off while it was sending."""


class Connection:
    """Serves one client, in a thread of its own or of others like it."""

    def __init__(
        self, connection: socket.socket, visit: Visit, access: Access, answering: Answering, passing: Passing,
        home: Home, metrics: Metrics,
    ) -> None:  # fmt: skip
        self._connection = connection
        self._visit = visit
        self._access = access
        self._answering = answering
        self._home = home
        self._metrics = metrics
        self._outlet = Outlet(connection, _PATIENCE)
        self._delivery = Delivery(connection, self._outlet, answering.bodies, passing, home, metrics)
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD)
        host, port = connection.getpeername()[:2]
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._request_id = ""

    async def serve(self) -> None:
        """Until the client has gone. Raises OSError, Stalled."""
        while True:
            self._request_id = secrets.token_hex(8).upper()
            try:
                request = await self._next_request()
                if request is None:
                    return
                await self._serve(request)
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

    async def _serve(self, sent: h11.Request) -> None:
        method, target = sent.method.decode(), sent.target.decode("latin-1")
        operation, body = "other", Body()
        try:
            try:
                request = asked.read(method, target, list(sent.headers), self._access)
                operation = request.operation
                answer = await self._delivery.unless_gone(self._home.ask(self._found(request, body)))
            except (S3Error, DaemonError) as error:
                refusal = error if isinstance(error, S3Error) else as_s3(error)
                text = answers.error_xml(refusal, asked.path_of(target), self._request_id)
                headers = {"content-type": "application/xml", "content-length": str(len(text))}
                answer = Answer(refusal.status, headers, text, len(text))
            await self._send(operation, answer, body, bodiless=method == "HEAD")
        finally:
            self._home.tell(lambda: self._ended(body))

    async def _found(self, request: Asked, body: Body) -> Answer:
        """On the daemon's own loop."""
        self._visit.works()
        return await self._answering.answer(request, body, self._address)

    def _ended(self, body: Body) -> None:
        """On the daemon's own loop."""
        self._answering.bodies.end(body)
        self._visit.works()  # that it waits is said anew
        self._visit.waits()

    # ------------------------------------------------------------------ answering

    async def _send(self, operation: str, answer: Answer, body: Body, *, bodiless: bool) -> None:
        nbytes = 0 if bodiless else answer.nbytes
        head = self._head(operation, answer.status, answer.headers)
        if nbytes and answer.text:
            await self._outlet.send(head + answer.text)
        else:
            await self._outlet.send(head, more=bool(nbytes))
            await self._delivery.send(body)
        if nbytes:  # they went past h11
            self._http.send_with_data_passthrough(h11.Data(data=_Sent(nbytes)))  # type: ignore[arg-type]
        self._http.send(h11.EndOfMessage())
        if self._http.their_state is h11.SEND_BODY:
            with contextlib.suppress(h11.RemoteProtocolError):
                self._http.next_event()  # that there is no body

    def _head(self, operation: str, status: int, headers: Mapping[str, str]) -> bytes:
        self._count(operation, status)
        own = {"x-amz-request-id": self._request_id, "server": "weightd", "date": answers.http_date(time.time())}
        response = h11.Response(
            status_code=status, reason=HTTPStatus(status).phrase.encode(), headers=list({**own, **headers}.items())
        )
        return self._http.send(response) or b""

    async def _refuse(self, error: S3Error) -> None:
        text = answers.error_xml(error, "", self._request_id)
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-length: {len(text)}\r\nconnection: close\r\n\r\n"
        await self._outlet.send(head.encode() + text)
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
        self._metrics.s3_requests.labels(operation, str(status)).inc()


class _Sent:
    """Stands for so many bytes of a body, of which h11 wants to know only that."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count
