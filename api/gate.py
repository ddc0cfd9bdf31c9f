"""Who may do what: peers of the Unix socket by their credentials, TCP clients by token and by the host they name."""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyio import BrokenResourceError
from starlette.exceptions import HTTPException

from weightd.api.problems import STATUS, problem
from weightd.daemon.addresses import is_loopback
from weightd.daemon.errors import DaemonError, ReadOnly
from weightd.daemon.lending.credentials import AllowedPeers, Peer
from weightd.daemon.lending.entrance import Rules
from weightd.daemon.observing.logs import request_id
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.observing.refusals import Refusals
from weightd.ipc.runtime_dir import API_SOCKET, TOKEN_FILE

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
MAX_BODY_BYTES = 16 << 20
"""Longest request body."""

_OPEN = frozenset({"/livez", "/readyz", "/healthz"})
_PAGE = "/"
"""Served to whoever asks, as a page that asks for the token: what it shows goes only to who is ``authorized``."""
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""What the Host header calls hosts that only this machine reaches."""
_STAGE = "/v1/stage"
"""Where somebody without a token may post to as well: a guest, for whom nothing of others' goes."""


def rules(
    metrics: Metrics,
    most: int,
    *,
    admitted: AllowedPeers | None = None,
    refusals: Refusals | None = None,
    secured: bool = False,
) -> Rules:
    """Of a socket that speaks HTTP: so many connections, and a problem document for those who may not stay.

    ``secured``: by TLS, which has to be agreed on before anything can be said.
    """
    return Rules(most, partial(_turned_away, metrics, refusals, secured), admitted)


def _turned_away(metrics: Metrics, refusals: Refusals | None, secured: bool, error: DaemonError) -> bytes | None:
    """An answer to whatever is being asked, as it goes over the wire; None where it could not be read."""
    metrics.errors.labels(error.code).inc()
    if refusals is not None:
        refusals.note(error)
    if secured:
        return None
    status = STATUS[error.code]
    answer = problem(status, error.code, str(error), {"Connection": "close", "Retry-After": "1"})
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode()
    lines = [head, *(name + b": " + value for name, value in answer.raw_headers), b"", b""]
    return b"\r\n".join(lines) + bytes(answer.body)


class BodyLimit:
    """ASGI middleware: refuses requests with longer bodies than ``most`` bytes, while they come."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = self._most

        async def bounded() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"a request's body may have {self._most} bytes")
            return message

        await self._app(scope, bounded, send)


class Gate:
    """ASGI middleware: refuses who may not come in, measures those who may, and gives every request an id."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        peers: AllowedPeers,
        token: str | None,
        own_token: str | None,
        folder: Path | None,
        listen_host: str,
        metrics: Metrics,
    ) -> None:
        self._app = app
        self._peers = peers
        self._token = f"Bearer {token}".encode() if token else None
        self._own_token = f"Bearer {own_token}".encode() if own_token else None
        self._how = _how_to_change(folder, own_token is not None)
        # A page in a browser can reach loopback under a name of its own (DNS rebinding); the Host header tells.
        own_name = f"[{listen_host}]" if ":" in listen_host else listen_host
        self._hosts = frozenset({*_LOCAL_HOSTS, own_name}) if is_loopback(listen_host) else None
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        own = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        request_id.set(own)

        async def measured(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", own.encode())]
                route = getattr(scope.get("route"), "path", None)
                spent = time.perf_counter() - started
                self._metrics.answered(scope["method"], route, message["status"], spent)
                fields = {"event": "request", "status": message["status"], "seconds": round(spent, 6)}
                told = (scope["method"], route or "unmatched", message["status"])
                log.debug("%s %s: %d", *told, extra={"fields": fields})
            await send(message)

        refusal = self._refusal(scope)
        try:
            await (refusal or self._app)(scope, receive, measured)
        except* BrokenResourceError:
            pass  # of FastAPI's event streams, whose client has hung up while it was being told something

    def _refusal(self, scope: Scope) -> Callable[..., Any] | None:
        headers = dict(scope["headers"])
        state = scope.setdefault("state", {})
        peer: Peer | None = state.get("peer")
        if peer is not None:
            state["authorized"] = self._peers.admits(peer)
            return None if state["authorized"] else problem(403, "peer_not_allowed", self._peers.refusal(peer))
        host = headers.get(b"host", b"").decode("latin-1")
        name = host if host.endswith("]") else host.rpartition(":")[0] if ":" in host else host
        if self._hosts is not None and name not in self._hosts:
            return problem(403, "host_not_allowed", f"Host is {host[:100]!r}: this API is for the local machine")
        if _from_another_site(scope["method"], headers):
            return problem(403, "cross_site", "pages of other sites may not call this API")
        given = headers.get(b"authorization", b"")
        state["authorized"] = self._token is None or hmac.compare_digest(given, self._token)
        method, path = scope["method"], scope["path"]
        if self._token is None and (self._own_token is None or not hmac.compare_digest(given, self._own_token)):
            state["guest"] = True
            if method not in ("GET", "HEAD") and (method, path) != ("POST", _STAGE):
                self._metrics.errors.labels(ReadOnly.code).inc()
                return problem(403, ReadOnly.code, f"{method} {path[:200]} changes something: {self._how}")
        if not state["authorized"] and scope["path"] not in _OPEN and scope["path"] != _PAGE:
            return problem(
                401,
                "unauthorized",
                "a bearer token is needed here: the setting WEIGHTD_TOKEN has it",
                {"WWW-Authenticate": "Bearer"},
            )
        return None


def _how_to_change(folder: Path | None, has_token: bool) -> str:
    place = folder or Path("$WEIGHTD_RUNTIME_DIR")
    words = (
        "whoever shows no token may read here, and stage what fits beside what there is. As a user whom "
        f"WEIGHTD_PEER_UIDS admits, ask over the Unix socket: curl --unix-socket {place / API_SOCKET}, or the command "
        "weightd"
    )
    if has_token:
        words += f'; or show the token here: -H "Authorization: Bearer $(cat {place / TOKEN_FILE})"'
    return words


def _from_another_site(method: str, headers: dict[bytes, bytes]) -> bool:
    """Whether a page of another origin, in somebody's browser, sends this. All that it may is to be a link to here.

    It could not read the answer, but what it asks for would be done. Browsers say so by Sec-Fetch-Site, and where that
    is missing (it is to plain HTTP beyond loopback) by Origin.
    """
    site = headers.get(b"sec-fetch-site")
    if site is not None:
        opens = (headers.get(b"sec-fetch-mode"), headers.get(b"sec-fetch-dest")) == (b"navigate", b"document")
        return site not in (b"none", b"same-origin") and not (opens and method in ("GET", "HEAD"))
    origin = headers.get(b"origin")
    return origin is not None and origin.partition(b"://")[2] != headers.get(b"host", b"")
