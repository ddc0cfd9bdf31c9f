"""What a request to the S3 endpoint asks for, and who may ask. Plain functions of what was sent.

Forms: Amazon S3 API Reference, GetObject, HeadObject, ListObjects, ListObjectsV2, ListBuckets, GetBucketLocation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote

from weightd.daemon.s3.answers import OVERRIDES
from weightd.daemon.s3.errors import S3Error
from weightd.daemon.s3.listing import MAX_KEYS, Query, after_of
from weightd.daemon.s3.signatures import Keys, Request

_ABSOLUTE = re.compile("https?://[^/]*", re.IGNORECASE)
_OF_LISTS = {"list-type", "prefix", "delimiter", "marker", "max-keys", "encoding-type", "continuation-token",
             "start-after", "fetch-owner", "x-id"}  # fmt: skip
"""Parameters of lists; others name something of a bucket that is not here."""
_OF_OBJECTS = {"partNumber", "versionId", "x-id"} | OVERRIDES.keys()
_MAX_PARAMETERS = 100


@dataclass(frozen=True)
class Access:
    """Who may ask. ``keys``: None takes any signature. ``hosts``: names of this endpoint, below which a
    bucket's name may stand (``models.localhost``)."""

    keys: Keys | None
    hosts: tuple[str, ...]


@dataclass(frozen=True)
class Asked:
    """A request that was let in. ``operation``: as S3 calls it. ``headers``: names in lower case."""

    operation: str
    bucket: str
    key: str
    headers: Mapping[str, str]
    parameters: Mapping[str, str]


def path_of(target: str) -> str:
    """The path of a request's target, as sent: of a whole URL, as to a proxy, too (the AWS SDK for C++ sends it)."""
    path = target.partition("?")[0]
    absolute = _ABSOLUTE.match(path)
    return path if absolute is None else path[absolute.end() :] or "/"


def read(method: str, target: str, sent: Sequence[tuple[bytes, bytes]], access: Access) -> Asked:
    """What is asked for. ``sent``: the headers. Raises S3Error where it is nothing that is done here, or for others."""
    headers: dict[str, str] = {}
    for raw, value in sent:
        name, text = raw.decode(), value.decode("utf-8", "surrogateescape")
        headers[name] = f"{headers[name]},{text}" if name in headers else text
    path = path_of(target)
    # What follows a '#' no client means to send as it is, and no signature is of it.
    if not path.startswith("/") or "#" in path:
        raise S3Error("InvalidURI", "Couldn't parse the specified URI.")
    try:
        query = parse_qsl(target.partition("?")[2], keep_blank_values=True, max_num_fields=_MAX_PARAMETERS)
    except ValueError:
        raise S3Error("InvalidURI", "Couldn't parse the specified URI.") from None
    if access.keys is not None:
        access.keys.check(Request(method, path, query, headers))
    bucket, key = _place(headers.get("host", ""), unquote(path, errors="surrogateescape"), access)
    parameters = {name: value for name, value in query if not name.lower().startswith("x-amz-")}
    return Asked(_operation(method, bucket, key, parameters), bucket, key, headers, parameters)


def _place(host: str, path: str, access: Access) -> tuple[str, str]:
    """Bucket and key: by path, or where the host's name says the bucket."""
    name = (host if host.endswith("]") else host.rpartition(":")[0] if ":" in host else host).lower()
    for base in access.hosts:
        if name.endswith(f".{base}"):
            return name[: -len(base) - 1], path[1:]
    # A page in a browser can reach loopback under a name of its own (DNS rebinding): the host tells.
    if access.keys is None and name not in access.hosts:
        raise S3Error("AccessDenied", f"Host is {host[:100]!r}: without keys this endpoint is for the local machine")
    bucket, _, key = path[1:].partition("/")
    return bucket, key


def _operation(method: str, bucket: str, key: str, parameters: Mapping[str, str]) -> str:
    if method in ("PUT", "POST", "DELETE"):
        raise S3Error("AccessDenied", "this endpoint only reads: write to the origin")
    if method not in ("GET", "HEAD"):
        raise S3Error("MethodNotAllowed", "The specified method is not allowed against this resource.")
    if not bucket:
        return "ListBuckets"
    if not key:
        if method == "HEAD":
            return "HeadBucket"
        if "location" in parameters:
            return "GetBucketLocation"
        if others := sorted(parameters.keys() - _OF_LISTS):
            raise S3Error("NotImplemented", f"{others[0]!r} of a bucket is not implemented here")
        return "ListObjects"
    if others := sorted(parameters.keys() - _OF_OBJECTS):
        raise S3Error("NotImplemented", f"{others[0]!r} of an object is not implemented here")
    if parameters.get("versionId", "null") != "null" or parameters.get("partNumber", "1") != "1":
        raise S3Error("NotImplemented", "versions and parts of objects are not implemented here")
    return "HeadObject" if method == "HEAD" else "GetObject"


def list_query(parameters: Mapping[str, str]) -> Query:
    """Which part of a list is asked for. Raises S3Error."""
    most = parameters.get("max-keys", str(MAX_KEYS))
    if not (most.isascii() and most.isdecimal()) or len(most) > 10:
        raise S3Error("InvalidArgument", "Provided max-keys not an integer or within integer range")
    if parameters.get("encoding-type", "url") != "url":
        raise S3Error("InvalidArgument", "Invalid Encoding Method specified in Request")
    if parameters.get("list-type", "2") != "2":
        raise S3Error("InvalidArgument", "list-type is 2, or left out")
    if parameters.get("list-type") == "2":
        after = parameters.get("start-after", "")
        if token := parameters.get("continuation-token"):
            after = after_of(token)
        elif "continuation-token" in parameters:
            raise S3Error("InvalidArgument", "The continuation token provided is incorrect")
    else:
        after = parameters.get("marker", "")
    return Query(parameters.get("prefix", ""), parameters.get("delimiter", ""), after, min(int(most), MAX_KEYS))
