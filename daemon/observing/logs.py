"""The daemon's log: one event a line on stderr, as JSON or for people, of what it is about, and without secrets.

Who logs says what has happened; of which stage, and on whose request, is known from where it happens.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TextIO

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the HTTP request that all this is done for; empty where it is for none."""
stage_id: ContextVar[str] = ContextVar("stage_id", default="")
"""Of the stage that is being worked on."""

_HIDDEN = "***"
_SECRET_VARIABLES = re.compile(r"SECRET|TOKEN|PASSWORD|_KEY$|SAS|CREDENTIAL")
_NO_SECRETS = re.compile(r"_(FILE|PATH|URI|URL|ENDPOINT|DIR|DISABLED|CREDENTIALS|TLS_KEY)$")
_SHORTEST_SECRET = 6
"""Characters: what is shorter would be found in half of all words."""

_IN_TEXT = [
    # Signed URLs of S3, GCS, Azure and the hub, and whatever else is named so in a query or a dump of settings.
    re.compile(
        r"(?i)\b((?:x-(?:amz|goog)-(?:signature|credential|security-token)|sig|signature|token|access_?token|api_?key"
        r"|awsaccesskeyid|googleaccessid|password|secret|secret_?access_?key|session_?token|account_?key)"
        r"\s*=\s*)[^\s&\"'<>]+"
    ),
    re.compile(r"(?i)\b((?:bearer|basic)\s+)[A-Za-z0-9+/=._~-]{6,}"),
    re.compile(r"(?i)(\"?(?:authorization|x-amz-security-token|cookie)\"?\s*[:=]\s*\"?)(?!bearer |basic )[^\s\"',]+"),
    re.compile(r"(://[^/\s:@]*:)[^/\s@]+(?=@)"),
    re.compile(r"()\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    re.compile(r"()\bhf_[A-Za-z0-9]{20,}\b"),
]


def redacted(text: str) -> str:
    """The text without what is, or looks like, a secret: values of the environment's variables for secrets, signatures
    and tokens in URLs, credentials in headers."""
    for secret in _secrets():
        text = text.replace(secret, _HIDDEN)
    for pattern in _IN_TEXT:
        text = pattern.sub(rf"\1{_HIDDEN}", text)
    return text


def holds_secret(text: str) -> bool:
    """Whether something in it looks like a secret, whatever the environment has."""
    return any(pattern.search(text) for pattern in _IN_TEXT)


def cleaned(value: object) -> object:
    """A value of a JSON document with all its strings redacted."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {name: cleaned(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(item) for item in value]
    return value


@cache
def _secrets() -> tuple[str, ...]:
    found = {
        value
        for name, value in os.environ.items()
        if _SECRET_VARIABLES.search(name) and not _NO_SECRETS.search(name) and len(value) >= _SHORTEST_SECRET
    }
    return tuple(sorted(found, key=len, reverse=True))


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
