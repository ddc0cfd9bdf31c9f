"""Errors as RFC 9457 problem documents."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from weightd.api.models import Problem
from weightd.daemon.errors import DaemonError
from weightd.daemon.observing.logs import request_id
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.observing.refusals import Refusals
from weightd.daemon.stages.request import describe_errors

STATUS = {
    "invalid_request": 422,
    "unknown_layout": 404,
    "layout_differs": 409,
    "layout_in_use": 409,
    "cache_failed": 507,
    "not_allowed": 403,
    "credentials_refused": 403,
    "peer_not_allowed": 403,
    "insufficient_capacity": 507,
    "unknown_stage": 404,
    "checkpoint_not_found": 404,
    "checkpoint_changed": 409,
    "invalid_checkpoint": 422,
    "ambiguous_checkpoint": 422,
    "unreadable_file": 422,
    "source_failed": 502,
    "stage_leased": 409,
    "not_planned": 409,
    "not_movable": 409,
    "stage_revoked": 409,
    "needs_socket": 409,
    "lost": 409,
    "interrupted": 409,
    "device_failed": 500,
    "lease_limit": 429,
    "queue_full": 429,
    "too_many_watchers": 429,
    "read_only": 403,
    "too_many_connections": 503,
    "peers_off": 503,
    "not_ready": 503,
}
"""HTTP status of each error code that a request can be refused with; all others are 500."""

_CODES = {400: "malformed", 401: "unauthorized", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


class NotPlanned(DaemonError):
    """The stage has no manifest (yet): its checkpoint has not been read, or could not be."""

    code = "not_planned"
    remedy = "wait until it is planned; where it has failed, stage it again"


class NeedsSocket(DaemonError):
    """The segment is lent by descriptor, over lease.sock."""

    code = "needs_socket"
    remedy = "attach by weightd.ipc, or stage it with handle cuda_ipc"


def problem(status: int, code: str, detail: str, headers: dict[str, str] | None = None, **members: Any) -> JSONResponse:
    """One problem document."""
    document = {
        **members,
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": code,
    }
    if told := request_id.get():
        document["request_id"] = told
    return JSONResponse(document, status, headers, media_type="application/problem+json")


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's ``responses`` of a route that can answer with these problems."""
    schema = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        status: {"model": Problem, "description": HTTPStatus(status).phrase, "content": schema} for status in statuses
    }


def install(app: FastAPI, metrics: Metrics, refusals: Refusals | None = None) -> None:
    """Make every error of the application a problem document, and note what is refused."""

    @app.exception_handler(DaemonError)
    async def _daemon(request: Request, error: DaemonError) -> JSONResponse:
        metrics.errors.labels(error.code).inc()
        if refusals is not None:
            refusals.note(error)
        wait = error.details.get("retry_after_seconds")
        headers = {"Retry-After": str(wait)} if wait else None
        return problem(STATUS.get(error.code, 500), error.code, str(error), headers, **error.details)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return problem(422, "invalid_request", "; ".join(describe_errors(list(error.errors()))))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        code = _CODES.get(error.status_code, "http_error")
        return problem(error.status_code, code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        return problem(500, "internal_error", f"{type(error).__name__}: see the daemon's log")
