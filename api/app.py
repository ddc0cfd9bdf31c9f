"""The HTTP API over the node. No logic lives here: each route asks the node and shows what it says."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import Body, Depends, FastAPI, Path, Query, Request, Response
from fastapi.responses import HTMLResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from weightd.api import problems
from weightd.api.gate import MAX_BODY_BYTES, BodyLimit, Gate
from weightd.api.layout_models import CheckpointRecord, LayoutList, LayoutRecord, checkpoint_json, layout_record
from weightd.api.models import (
    Change,
    FitRecord,
    LeaseEvent,
    LeaseList,
    LeaseRecord,
    LeaseRequest,
    Move,
    SegmentManifest,
    StageList,
    StageRecord,
    fit_record,
    manifest_json,
    stage_record,
)
from weightd.api.node_models import NodeRecord, Unadopted, UnadoptedList
from weightd.api.overview import NodeEvent, node_record, rows, version
from weightd.api.peer_models import PeerList, peer_list
from weightd.api.probes import health_routes, metrics_routes
from weightd.api.problems import NeedsSocket, NotPlanned, responses
from weightd.api.status import page
from weightd.daemon.errors import InvalidRequest
from weightd.daemon.lending.credentials import AllowedPeers
from weightd.daemon.lending.lease_socket import lend_by_handle, resolve
from weightd.daemon.node.feed import Feed, Watcher
from weightd.daemon.node.service import Node
from weightd.daemon.stages.request import StageRequest, parse_request
from weightd.daemon.stages.stage import Stage
from weightd.ipc.runtime_dir import LEASE_SOCKET

MAX_WAIT_SECONDS = 86400.0

MAX_LAYOUTS = 100
"""Layouts that are listed."""

Key = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$", description="The layout's key.")]
StageId = Annotated[str, Path(max_length=64, description="The stage's id.")]


def create_app(
    node: Node,
    *,
    peers: AllowedPeers,
    token: str | None = None,
    own_token: str | None = None,
    folder: FilePath | None = None,
    listen_host: str = "127.0.0.1",
) -> FastAPI:
    """The application. ``listen_host`` is where it is served by TCP, beside the Unix socket; empty: nowhere.

    ``token`` is demanded there for whatever is asked, ``own_token``, which lies in ``folder``, for changes alone.
    """
    app = FastAPI(
        title="weightd",
        version=version("weightd") or "0",
        summary="Stages model weights into memory that engines map.",
        responses=responses(400, 401, 403, 422),
    )
    app.state.feed = feed = Feed(partial(rows, node))
    problems.install(app, node.metrics, node.refusals)
    app.add_middleware(BodyLimit, most=MAX_BODY_BYTES)
    app.add_middleware(
        Gate,
        peers=peers,
        token=token,
        own_token=own_token,
        folder=folder,
        listen_host=listen_host,
        metrics=node.metrics,
    )

    async def known_stage(stage_id: StageId) -> Stage:
        # A dependency, because an event stream has answered 200 by the time that its own code runs.
        return node.get(stage_id)

    @app.post(
        "/v1/stage",
        status_code=202,
        response_model=StageRecord | FitRecord,
        responses={
            200: {"model": StageRecord | FitRecord, "description": "It is there already; or what a dry run found."},
            202: {"model": StageRecord, "description": "It is on its way, or it failed on the way: see its state."},
            **responses(404, 409, 413, 429, 502, 507),
        },
    )
    async def stage(
        request: StageRequest,
        response: Response,
        http: Request,
        wait: Annotated[float, Query(ge=0, le=MAX_WAIT_SECONDS, description="Seconds to wait for its end.")] = 0,
        dry_run: Annotated[bool, Query(description="Only say whether it would fit, and what would go for it.")] = False,
    ) -> StageRecord | FitRecord:
        """Stage a checkpoint, or join a stage of the same that is there or on its way. Answers once it is planned.

        Over TCP without a token it takes what room there is, evicts nothing, and changes no stage that is there."""
        if dry_run:
            response.status_code = 200
            return fit_record(await node.would_fit(request))
        found, existed = await node.stage(request, guest=http.scope.get("state", {}).get("guest", False))
        if wait:
            await found.wait(wait)
        if existed and found.state == "ready":
            response.status_code = 200
        response.headers["Location"] = f"/v1/stage/{found.id}"
        return stage_record(found)

    @app.get("/v1/stage")
    async def stages() -> StageList:
        """All stages, oldest first, with those that ended lately."""
        return StageList(stages=[stage_record(found) for found in node.stages()])

    @app.get("/v1/stage/{stage_id}", responses=responses(404))
    async def show(stage_id: StageId) -> StageRecord:
        """One stage."""
        return stage_record(node.get(stage_id))

    @app.get("/v1/stage/{stage_id}/manifest", response_model=SegmentManifest, responses=responses(404, 409))
    async def manifest(
        stage_id: StageId,
        tp_rank: Annotated[
            int | None, Query(ge=0, description="Which segment; needed where there are several.")
        ] = None,
        leaves: Annotated[bool, Query(description="Also the leaf digests.")] = False,
    ) -> Response:
        """What one of its segments holds."""
        found = node.get(stage_id)
        if found.plan is None and not found.manifests:
            raise NotPlanned(f"stage {found.id} is {found.state}: it has no manifest")
        ranks = found.request.ranks
        if tp_rank is None and len(ranks) > 1:
            raise InvalidRequest(f"tp_rank: stage {found.id} has a segment for each of {list(ranks)}: say which")
        if tp_rank is not None and tp_rank not in ranks:
            raise InvalidRequest(f"tp_rank: stage {found.id} has no rank {tp_rank}, it has {list(ranks)}")
        index = 0 if tp_rank is None else ranks.index(tp_rank)
        text = await asyncio.to_thread(manifest_json, found, index, leaves)
        return Response(text, media_type="application/json")

    @app.get("/v1/stage/{stage_id}/events", response_class=EventSourceResponse, responses=responses(404))
    async def events(found: Annotated[Stage, Depends(known_stage)]) -> AsyncIterator[ServerSentEvent]:
        """Its record as server-sent events: ``state`` at every change, ``progress`` while it loads; ends as it does."""
        last, number = "", 0
        async for _ in found.watch():
            record = stage_record(found)
            number += 1
            yield ServerSentEvent(
                event="progress" if record.state == last else "state", id=str(number), data=record, retry=1000
            )
            last = record.state

    @app.delete("/v1/stage/{stage_id}", responses=responses(404, 409))
    async def remove(
        stage_id: StageId,
        force: Annotated[bool, Query(description="Take it away from those who lease it.")] = False,
        grace: Annotated[
            float | None,
            Query(ge=0, le=86400, description="Seconds that they have to let go; null: the setting revoke_grace."),
        ] = None,
    ) -> StageRecord:
        """Cancel it while it is on its way; drop it once it has ended. Refused while anybody leases it, unless forced:
        lessees are told then, and the memory is freed once they have let go, or their time is over."""
        await node.residency.notice_hangups()
        return stage_record(node.drop(stage_id, force=force, grace=grace))

    @app.patch("/v1/stage/{stage_id}", responses=responses(404))
    async def change(stage_id: StageId, to: Change) -> StageRecord:
        """Change what decides whether it stays: its pin, its priority."""
        found = node.get(stage_id)
        node.change(found, priority=to.priority, pin=to.pin)
        return stage_record(found)

    @app.post("/v1/stage/{stage_id}/move", responses=responses(404, 409, 507))
    async def move(stage_id: StageId, where: Move) -> StageRecord:
        """Move it to another device without its source. Answers once it is there."""
        return stage_record(await node.move(stage_id, where.device))

    async def by_handle(wanted: LeaseRequest, http: Request) -> AsyncIterator[dict[str, Any]]:
        message: dict[str, Any] = {"op": "lease", "stage": wanted.stage, "tp_rank": wanted.tp_rank}
        if wanted.request is not None:
            message["request"] = wanted.request.model_dump(mode="json")
        found, rank = await resolve(node, message)
        if found.request.handle == "fd":
            raise NeedsSocket(
                f"stage {found.id} is lent by descriptor, which HTTP cannot carry: weightd.ipc.attach() takes it from "
                f'lease.sock in the runtime directory; a stage with handle "cuda_ipc" can be lent here',
                socket=LEASE_SOCKET,
            )
        if found.finished and found.state != "ready":
            raise found.error or NotPlanned(f"stage {found.id} is {found.state}")
        node.residency.leases.check_lendable(found, None)
        return lend_by_handle(node, found, rank, http.scope.get("state", {}).get("peer"))

    @app.post("/v1/leases", response_class=EventSourceResponse, responses=responses(404, 409, 429, 507))
    async def lend(
        lending: Annotated[AsyncIterator[dict[str, Any]], Depends(by_handle)],
    ) -> AsyncIterator[ServerSentEvent]:
        """Lend a segment with a legacy handle, staging it first where nobody has, as server-sent events.

        The lease is the connection: it lasts as long as the answer is being read, and ends when it is closed.
        """
        async with contextlib.aclosing(lending) as events:  # type: ignore[type-var]
            async for event in events:
                yield ServerSentEvent(event=event["type"], data=LeaseEvent.model_validate(event), retry=1000)

    @app.get("/v1/leases")
    async def leases() -> LeaseList:
        """All leases."""
        return LeaseList(
            leases=[
                LeaseRecord(
                    id=lease.id,
                    stage=lease.stage,
                    model=node.get(lease.stage).uri,
                    tp_rank=lease.rank,
                    uid=lease.uid,
                    gid=lease.gid,
                    pid=lease.pid,
                    since=lease.since,
                    client=lease.client or None,
                )
                for lease in node.residency.leases
            ]
        )

    @app.get("/v1/checkpoint", response_model=CheckpointRecord, responses=responses(404, 429, 502))
    async def checkpoint(
        model: Annotated[str, Query(min_length=1, max_length=4096, description="Its URI, as in POST /v1/stage.")],
        weights: Annotated[
            list[Annotated[str, Query(max_length=1024)]] | None,
            Query(max_length=16, description="As in POST /v1/stage, as many as a URL holds."),
        ] = None,
    ) -> Response:
        """What the headers of a checkpoint say. No weights are read, and nothing is staged."""
        found, metadata = await node.checkpoint(parse_request({"model": model, "weights": weights or None}))
        text = await asyncio.to_thread(checkpoint_json, found, metadata)
        return Response(text, media_type="application/json")

    @app.get("/v1/layouts")
    async def layouts() -> LayoutList:
        """The layouts that engines have uploaded, of which those used longest ago go where the cache has no room."""
        return LayoutList(layouts=[layout_record(layout) for layout in await node.layouts.all(MAX_LAYOUTS)])

    @app.get("/v1/layouts/{key}", responses=responses(404))
    async def layout(
        key: Key,
        wait: Annotated[float, Query(ge=0, le=MAX_WAIT_SECONDS, description="Seconds to wait for it to come.")] = 0,
    ) -> LayoutRecord:
        """One layout."""
        return layout_record(await node.layouts.get(key, wait))

    @app.put("/v1/layouts/{key}", responses=responses(409, 413, 507))
    async def put_layout(
        key: Key,
        document: Annotated[dict[str, Any], Body(description="As weightd.ipc.recipe writes it.")],
    ) -> LayoutRecord:
        """Upload an engine's own layout of a checkpoint, to be named by stage requests. It is checked as a whole; a
        second time it changes nothing, and another one by the same key is refused."""
        return layout_record(await node.layouts.put(key, document))

    @app.delete("/v1/layouts/{key}", status_code=204, responses=responses(404, 409))
    async def remove_layout(key: Key) -> None:
        """Forget a layout that no stage is in."""
        await node.layouts.remove(key)

    @app.get("/v1/peers")
    async def list_peers() -> PeerList:
        """The other daemons of the fleet, as far as the directory knows them."""
        return peer_list(node)

    @app.get("/v1/node")
    async def describe() -> NodeRecord:
        """The daemon and its devices."""
        return node_record(node, await node.residency.mapped_elsewhere())

    @app.delete("/v1/unadopted")
    async def remove_unadopted() -> UnadoptedList:
        """Drop what the keeper holds and this daemon could not adopt: ``unadopted`` of ``/v1/node``."""
        return UnadoptedList(unadopted=[Unadopted(**left) for left in node.residency.drop_unadopted()])

    async def watching(http: Request) -> AsyncIterator[Watcher]:
        with feed.watcher(http.scope.get("state", {}).get("hang_up", lambda: None)) as watcher:
            yield watcher

    @app.get("/v1/events", response_class=EventSourceResponse, responses=responses(429))
    async def node_events(
        watcher: Annotated[Watcher, Depends(watching)],
        follow: Annotated[bool, Query(description="Go on after the snapshot, with what changes.")] = True,
    ) -> AsyncIterator[NodeEvent]:
        """The whole node as server-sent events: ``snapshot``, in as many events as it takes, then ``changes``, four
        times a second at most. Records replace those of the same kind and key. Whoever reads slowly gets fewer, later
        ones. Every connection begins with a snapshot, whatever ``Last-Event-ID`` says; reconnect where it ends."""
        async for event in watcher.events():
            yield ServerSentEvent(event=event.name, id=str(event.id), raw_data=event.text, retry=1000)  # type: ignore[misc]
            if not (follow or event.more):
                return

    @app.get(
        "/",
        response_class=HTMLResponse,
        responses={
            401: {
                "description": "The page without what it shows: it asks for the token.",
                "content": {"text/html": {"schema": {"type": "string"}}},
            }
        },
    )
    async def status(http: Request) -> Response:
        """The status page, for a browser."""
        known = http.scope.get("state", {}).get("authorized", False)
        return HTMLResponse(page.render(node if known else None), 200 if known else 401, page.headers())

    app.include_router(health_routes(node, named=True))
    app.include_router(metrics_routes(node))
    return app
