"""The daemon's log: one event a line on stderr, as JSON or for people, of what it is about, and without secrets.

Who logs says what has happened; of which stage, and on whose request, is known from where it happens.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

from weightd.daemon.redaction import cleaned, redacted

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the HTTP request that all this is done for; empty where it is for none."""
stage_id: ContextVar[str] = ContextVar("stage_id", default="")
"""Of the stage that is being worked on."""


@contextmanager
def about(stage: str) -> Iterator[None]:
    """Within the block, what this task logs is about a stage."""
    token = stage_id.set(stage)
    try:
        yield
    finally:
        stage_id.reset(token)


class _AsJson(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        event = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps({name: cleaned(value) for name, value in event.items()}, default=str)


class _ForPeople(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = _fields(record)
        stage = fields.pop("stage", "")
        fields.pop("event", None)
        message = record.getMessage()
        line = f"{at}.{int(record.msecs):03} {record.levelname:<7} {f'{stage} ' if stage else ''}{message}"
        line += "".join(f" {name}={value}" for name, value in fields.items() if str(value) not in message)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        # One event, one line: nobody who names a model writes lines of the log.
        return redacted(line if record.exc_info else re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", "?", line))


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields = {"stage": stage_id.get(), "request_id": request_id.get(), **getattr(record, "fields", {})}
    return {name: value for name, value in fields.items() if value not in ("", None)}


def configure(level: str, form: str, stream: TextIO = sys.stderr) -> None:
    """Send everything to ``stream``; ``form`` is auto, json or text: auto is text on a terminal, and JSON elsewhere."""
    if form == "auto":
        form = "text" if stream.isatty() else "json"
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_AsJson() if form == "json" else _ForPeople())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    for name in ("uvicorn", "httpx", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
