"""Secrets do not go into logs, records, answers and metrics."""

from __future__ import annotations

import os
import re
from functools import cache

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
