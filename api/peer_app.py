"""The API for peers, on a port of its own: what this daemon has, and listening to it, which is a peer's lease."""

import contextlib
import hmac
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Path
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.exceptions import HTTPException

from weightd.api import problems
from weightd.daemon.errors import UnknownStage
from weightd.daemon.metrics import Metrics
from weightd.daemon.peers.serving import Serving

StageKey = Annotated[
    str, Path(max_length=64, pattern="^[0-9a-f]+$", description="What the stage goes by in the fleet.")
]


def create_peer_app(serving: Serving, metrics: Metrics, *, node: str, token: str | None) -> FastAPI:
    """The application; ``token`` is the fleet's, None where none is needed."""

    async def known(authorization: Annotated[str, Header()] = "") -> None:
        if token is not None and not hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "the fleet's bearer token is needed here: WEIGHTD_PEER_TOKEN")

    app = FastAPI(title="weightd for peers", dependencies=[Depends(known)], docs_url=None, redoc_url=None)
    problems.install(app, metrics)

    @app.get("/peer/v1/stages")
    async def stages() -> dict[str, Any]:
        """This node, and how much it has of what."""
        return {"node": node, "stages": serving.stages()}

    async def lending(key: StageKey) -> AsyncIterator[dict[str, Any]]:
        if key not in serving.stages():
            raise UnknownStage(f"no stage has the key {key!r}")
        return serving.lend(key)

    @app.get("/peer/v1/stages/{key}", response_class=EventSourceResponse)
    async def lend(
        events: Annotated[AsyncIterator[dict[str, Any]], Depends(lending)],
    ) -> AsyncIterator[ServerSentEvent]:
        """Where a stage's segments can be read, and which of their leaves are there, as they come."""
        async with contextlib.aclosing(events) as said:  # type: ignore[type-var]
            async for event in said:
                yield ServerSentEvent(event=event["type"], data=event)

    return app
