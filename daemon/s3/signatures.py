"""Who a request comes from: AWS Signature Version 4, in the Authorization header or in the URL.

What a request should have been signed with is computed by botocore, as a client does it, and compared. Formats: Amazon
S3 API Reference, "Authenticating Requests (AWS Signature Version 4)".
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from weightd.daemon.s3.errors import S3Error

_ALGORITHM = "AWS4-HMAC-SHA256"
_HEADER = re.compile(
    rf"{_ALGORITHM}\s+Credential=(?P<credential>[^,\s]+)\s*,\s*SignedHeaders=(?P<signed>[^,\s]+)\s*,\s*"
    r"Signature=(?P<signature>[0-9a-f]{64})"
)
_CREDENTIAL = re.compile(r"(?P<key>[^/]+)/(?P<date>\d{8})/(?P<region>[^/]+)/s3/aws4_request")
_SKEW = 15 * 60
"""Seconds that a client's clock may be off: S3's own limit."""
_MAX_EXPIRES = 7 * 24 * 3600


@dataclass(frozen=True)
class Request:
    """What is signed of a request: header names in lower case; the path as sent; the query decoded, in order."""

    method: str
    path: str
    query: list[tuple[str, str]]
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Keys:
    """The one pair of keys that is let in."""

    access: str
    secret: str

    def check(self, request: Request) -> None:
        """Raises S3Error where the request is not signed by these, or its time is over."""
        query = dict(request.query)
        if "X-Amz-Signature" in query:
            self._check_url(request, query)
        elif "authorization" in request.headers:
            self._check_header(request, request.headers["authorization"])
        else:
            raise S3Error("AccessDenied", "a signature is needed here: WEIGHTD_S3_ACCESS_KEY has the key for it")

    def _check_header(self, request: Request, header: str) -> None:
        found = _HEADER.fullmatch(header.strip())
        if found is None:
            raise S3Error("AuthorizationHeaderMalformed", f"the Authorization header is not of {_ALGORITHM}")
        at = _time(request.headers.get("x-amz-date", ""))
        if abs((datetime.now(UTC) - at).total_seconds()) > _SKEW:
            raise S3Error(
                "RequestTimeTooSkewed", "The difference between the request time and the current time is too large."
            )
        if "x-amz-content-sha256" not in request.headers:
            raise S3Error("InvalidRequest", "Missing required header for this request: x-amz-content-sha256")
        self._compare(request, found["credential"], found["signed"], found["signature"], at, None)

    def _check_url(self, request: Request, query: Mapping[str, str]) -> None:
        if query.get("X-Amz-Algorithm") != _ALGORITHM:
            raise S3Error("InvalidRequest", f"X-Amz-Algorithm only supports {_ALGORITHM}")
        at, expires = _time(query.get("X-Amz-Date", "")), query.get("X-Amz-Expires", "")
        if not expires.isdecimal() or not 0 < int(expires) <= _MAX_EXPIRES:
            raise S3Error("InvalidArgument", f"X-Amz-Expires must be 1 to {_MAX_EXPIRES} seconds")
        age = (datetime.now(UTC) - at).total_seconds()
        if age < -_SKEW or age > int(expires):
            raise S3Error("AccessDenied", "Request has expired")
        signed = [(name, value) for name, value in request.query if name != "X-Amz-Signature"]
        self._compare(
            request, query.get("X-Amz-Credential", ""), query.get("X-Amz-SignedHeaders", ""),
            query["X-Amz-Signature"], at, signed,
        )  # fmt: skip

    def _compare(
        self,
        request: Request,
        credential: str,
        signed_headers: str,
        signature: str,
        at: datetime,
        query: list[tuple[str, str]] | None,
    ) -> None:
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.compat import HTTPHeaders
        from botocore.credentials import Credentials

        scope = _CREDENTIAL.fullmatch(credential)
        if scope is None or scope["date"] != f"{at:%Y%m%d}":
            raise S3Error("AuthorizationHeaderMalformed", "the credential is not KEY/DATE/REGION/s3/aws4_request")
        names = signed_headers.split(";")
        if "host" not in names:
            raise S3Error("AccessDenied", "the header host is not signed")
        signed = HTTPHeaders()
        for name in names:
            signed[name] = request.headers.get(name, "")
        asked = "&".join(f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}" for name, value in
                         (request.query if query is None else query))  # fmt: skip
        rebuilt = AWSRequest(request.method, f"http://{request.headers.get('host', '')}{request.path}?{asked}")
        # What is sent in a URL has no digest of a body.
        digest = request.headers.get("x-amz-content-sha256", "") if query is None else "UNSIGNED-PAYLOAD"
        rebuilt.headers["X-Amz-Content-SHA256"] = digest
        rebuilt.context["timestamp"] = f"{at:%Y%m%dT%H%M%SZ}"
        signer: Any = S3SigV4Auth(Credentials(self.access, self.secret), "s3", scope["region"])
        signer.headers_to_sign = lambda _: signed  # what this client has signed, not what botocore would
        expected = signer.signature(signer.string_to_sign(rebuilt, signer.canonical_request(rebuilt)), rebuilt)
        right = hmac.compare_digest(expected.encode(), signature.encode())
        if not hmac.compare_digest(scope["key"].encode(), self.access.encode()):
            raise S3Error("InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records.")
        if not right:
            raise S3Error(
                "SignatureDoesNotMatch",
                "The request signature we calculated does not match the signature you provided. Check your key and "
                "signing method.",
            )


def _time(text: str) -> datetime:
    """A time as signatures have it: 20130524T000000Z. Raises S3Error."""
    try:
        return datetime.strptime(text, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        raise S3Error(
            "AccessDenied", "AWS authentication requires a valid x-amz-date, as in 20130524T000000Z"
        ) from None
