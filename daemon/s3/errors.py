"""What the S3 endpoint answers where it cannot do what was asked: S3's own codes, with their statuses.

Codes and statuses: Amazon S3 API Reference, "Error responses", list of error codes.
"""

from __future__ import annotations

from collections.abc import Mapping

from weightd.daemon.errors import (
    CheckpointChanged,
    CheckpointNotFound,
    CredentialsRefused,
    DaemonError,
    InvalidRequest,
    NotAllowed,
    QueueFull,
    UnknownStage,
    UnreadableFile,
)
from weightd.daemon.redaction import redacted

STATUSES = {
    "AccessDenied": 403,
    "AuthorizationHeaderMalformed": 400,
    "ExpiredToken": 400,
    "InternalError": 500,
    "InvalidAccessKeyId": 403,
    "InvalidArgument": 400,
    "InvalidObjectState": 403,
    "InvalidRange": 416,
    "InvalidRequest": 400,
    "InvalidURI": 400,
    "KeyTooLongError": 400,
    "MethodNotAllowed": 405,
    "NoSuchBucket": 404,
    "NoSuchKey": 404,
    "NotImplemented": 501,
    "PreconditionFailed": 412,
    "RequestTimeTooSkewed": 403,
    "ServiceUnavailable": 503,
    "SignatureDoesNotMatch": 403,
    "SlowDown": 503,
}

_OF = {
    CheckpointNotFound: "NoSuchKey",
    UnknownStage: "NoSuchKey",
    NotAllowed: "AccessDenied",
    CredentialsRefused: "AccessDenied",
    UnreadableFile: "InvalidObjectState",
    CheckpointChanged: "PreconditionFailed",
    InvalidRequest: "InvalidArgument",
    QueueFull: "SlowDown",
}
"""Error of the daemon → S3's; all others pass, or may: 503 ServiceUnavailable, which clients try again."""


class S3Error(Exception):
    """An answer that is an error: its code, a message, and what else S3 says with it."""

    def __init__(self, code: str, message: str, details: Mapping[str, str] | None = None) -> None:
        super().__init__(redacted(message))
        self.code = code
        self.status = STATUSES[code]
        self.details = dict(details or {})


def as_s3(error: DaemonError, key: str = "") -> S3Error:
    """What a client of S3 is told for an error of the daemon."""
    code = next((code for kind, code in _OF.items() if isinstance(error, kind)), "ServiceUnavailable")
    return S3Error(code, str(error), {"Key": key} if key and code == "NoSuchKey" else {})
