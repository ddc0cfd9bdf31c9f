"""The API for peers, on a port of its own: what this daemon has, and listening to it, which is a peer's lease."""

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Path, Query, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from weightd.api import problems
from weightd.api.gate import BodyLimit
from weightd.daemon.checkpoints.cache import Cache
from weightd.daemon.checkpoints.header import MAX_HEADER_BYTES
from weightd.daemon.errors import PeersOff, UnknownStage
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.peers.finding.fleet import Fleet
from weightd.daemon.peers.finding.listening import FORMAT
from weightd.daemon.peers.serving.server import Serving
from weightd.daemon.sources.uris import MAX_URI_BYTES

Size = Annotated[int, Field(ge=0, lt=1 << 53)]
StageKey = Annotated[
    str, Path(max_length=64, pattern="^[0-9a-f]+$", description="What the stage goes by in the fleet.")
]


class Wanted(BaseModel):
    """What a peer wants of a stage on a GPU, and what it needs no more of what it was given."""

    model_config = ConfigDict(extra="forbid")

    reader: str = Field(max_length=64, description="As it was told by the event stream.")
    given: list[int] = Field(max_length=1024, description="Addresses that it has read.")
    pieces: list[tuple[Size, Size, Size]] = Field(
        max_length=256, description="Segment, offset and bytes of each; put one after another, at multiples of 256."
    )


class HasRead(BaseModel):
    """What a peer has read of this daemon's memory since it said so last."""

    model_config = ConfigDict(extra="forbid")

    by: str = Field(max_length=300, description="HOST:PORT of its own port; empty where it has none.")
    nbytes: int = Field(ge=0, lt=1 << 53, description="Bytes.")


def create_peer_app(serving: Serving, cache: Cache, metrics: Metrics, fleet: Fleet) -> FastAPI:
    """The application."""
    members = fleet.members

    async def known(authorization: Annotated[str, Header()] = "") -> None:
        expected = f"Bearer {fleet.token}".encode()
        if fleet.token is not None and not hmac.compare_digest(authorization.encode(), expected):
            raise HTTPException(401, "the fleet's bearer token is needed here: WEIGHTD_PEER_TOKEN")

    app = FastAPI(title="weightd for peers", dependencies=[Depends(known)], docs_url=None, redoc_url=None)
    problems.install(app, metrics)
    app.add_middleware(BodyLimit, most=64 << 10)

    @app.get("/peer/v1/stages")
    async def stages() -> dict[str, Any]:
        """This node, and how much it has of what."""
        return {"node": fleet.me, "format": FORMAT, "stages": serving.stages()}

    async def lending(
        key: StageKey,
        speaks: Annotated[int, Query(alias="format", ge=0, lt=1 << 31, description="What the peer understands.")],
        by: Annotated[str, Query(max_length=300, description="HOST:PORT of the peer's own port.")] = "",
    ) -> AsyncIterator[dict[str, Any]]:
        if speaks != FORMAT:
            raise HTTPException(400, f"this daemon speaks format {FORMAT}, the peer {speaks}: upgrade the older one")
        if fleet.off:
            raise PeersOff(fleet.off)
        if key not in serving.stages():
            raise UnknownStage(f"no stage has the key {key!r}")
        # Whoever is in no directory is served, and neither counted nor followed.
        return serving.lend(key, by if any(by == name for name, _ in members()) else "")

    @app.get("/peer/v1/stages/{key}", response_class=EventSourceResponse)
    async def lend(
        events: Annotated[AsyncIterator[dict[str, Any]], Depends(lending)],
    ) -> AsyncIterator[ServerSentEvent]:
        """Where a stage's segments can be read, and which of their leaves are there, as they come."""
        async with contextlib.aclosing(events) as said:  # type: ignore[type-var]
            async for event in said:
                yield ServerSentEvent(event=event["type"], data=event)

    @app.post("/peer/v1/window")
    async def window(wanted: Wanted) -> dict[str, Any]:
        """Have parts of a stage that is on a GPU copied to where peers can read them."""
        return {"address": await serving.fetch(wanted.reader, wanted.given, wanted.pieces, fleet.stall / 4)}

    @app.get("/peer/v1/listing")
    async def listing(uri: Annotated[str, Query(max_length=MAX_URI_BYTES)]) -> dict[str, Any]:
        """The files of a checkpoint that a stage here is of: for peers without a way to its origin."""
        identity = serving.identity_of(uri)
        found = await asyncio.to_thread(cache.kept_listing, identity) if identity else None
        if found is None:
            raise UnknownStage(f"no stage here is of {uri[:200]!r}")
        return {**found, "identity": identity}

    @app.get("/peer/v1/file")
    async def file(
        identity: Annotated[str, Query(max_length=64, pattern="^[0-9a-f]+$")],
        name: Annotated[str, Query(max_length=4096)],
        offset: Annotated[int, Query(ge=0, lt=1 << 53)],
        length: Annotated[int, Query(ge=1, le=MAX_HEADER_BYTES)],
    ) -> Response:
        """Bytes of a file's header, or of a configuration file, never of weights."""
        found = await asyncio.to_thread(cache.kept_bytes, identity, name, offset, length)
        if found is None:
            raise UnknownStage("no such file is kept here")
        return Response(found, media_type="application/octet-stream")

    @app.post("/peer/v1/read", status_code=204)
    async def has_read(report: HasRead) -> None:
        """A peer says how much it has read, which nobody else can see. For figures only."""
        if any(report.by == name for name, _ in members()):
            fleet.read_by(report.by, report.nbytes)

    return app
