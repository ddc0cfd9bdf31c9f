"""What the S3 endpoint answers, without its bodies: statuses, headers, XML. Plain functions of what was found.

Forms: Amazon S3 API Reference, GetObject, HeadObject, ListObjects, ListObjectsV2, ListBuckets, GetBucketLocation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime
from hashlib import sha256
from typing import NamedTuple
from urllib.parse import quote
from xml.etree import ElementTree

from weightd.daemon.s3.errors import S3Error
from weightd.daemon.s3.listing import Page, Query, token_of
from weightd.daemon.sources.base import Object

_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
_TAG = re.compile(r"[\x21\x23-\x7e]{1,128}")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
OVERRIDES = {
    f"response-{name}": name
    for name in (
        "cache-control", "content-disposition", "content-encoding", "content-language", "content-type", "expires",
    )
}  # fmt: skip


class Range(NamedTuple):
    """Bytes of an object; ``partial``: that only a part was asked for."""

    first: int
    nbytes: int
    partial: bool


def etag(stored: Object) -> str:
    """The origin's own ETag; of what has none, one of its version."""
    tag = stored.version if _TAG.fullmatch(stored.version) else sha256(stored.version.encode()).hexdigest()[:32]
    return f'"{tag}"'


def range_of(header: str, size: int) -> Range:
    """What a Range header asks for. What is malformed, or several ranges, is the whole, as S3 has it. Raises S3Error
    where there is nothing of it."""
    found = _RANGE.fullmatch(header.replace(" ", ""))
    if found is None or found[1] == found[2] == "":
        return Range(0, size, False)
    if not found[1]:
        count = min(int(found[2][:20]), size)
        first, last = size - count, size - 1
    else:
        first, last = int(found[1][:20]), min(int(found[2][:20] or size - 1), size - 1)
        if found[2] and int(found[2][:20]) < first:
            return Range(0, size, False)
    if first >= size or last < first:
        raise S3Error(
            "InvalidRange",
            "The requested range is not satisfiable",
            {"ActualObjectSize": str(size), "RangeRequested": header},
        )
    return Range(first, last - first + 1, True)


def check_conditions(stored: Object, headers: Mapping[str, str]) -> bool:
    """Whether an object is to be sent; False: it has not been modified. Raises S3Error (RFC 9110, section 13.2.2)."""
    tag = etag(stored)
    at = int(stored.modified)
    if (wanted := headers.get("if-match")) is not None:
        if not _matches(wanted, tag):
            raise _failed("If-Match")
    elif (since := _seconds(headers.get("if-unmodified-since"))) is not None and at > since:
        raise _failed("If-Unmodified-Since")
    if (unwanted := headers.get("if-none-match")) is not None:
        return not _matches(unwanted, tag)
    since = _seconds(headers.get("if-modified-since"))
    return since is None or at > since


def _failed(condition: str) -> S3Error:
    return S3Error(
        "PreconditionFailed", "At least one of the pre-conditions you specified did not hold", {"Condition": condition}
    )


def _matches(header: str, tag: str) -> bool:
    wanted = [part.strip().removeprefix("W/").strip('"') for part in header.split(",")]
    return "*" in wanted or tag.strip('"') in wanted


def _seconds(date: str | None) -> float | None:
    try:
        return parsedate_to_datetime(date).timestamp() if date else None
    except (ValueError, OverflowError):
        return None


def http_date(seconds: float) -> str:
    """As HTTP has dates."""
    return format_datetime(datetime.fromtimestamp(seconds, UTC), usegmt=True)


def object_headers(stored: Object, asked: Range, query: Mapping[str, str]) -> dict[str, str]:
    """Headers of an answer with an object, or a part of it."""
    headers = {
        "accept-ranges": "bytes",
        "content-type": "binary/octet-stream",
        "content-length": str(asked.nbytes),
        "etag": etag(stored),
        "last-modified": http_date(stored.modified),
    }
    if asked.partial:
        headers["content-range"] = f"bytes {asked.first}-{asked.first + asked.nbytes - 1}/{stored.size}"
    for name, header in OVERRIDES.items():
        value = query.get(name, "").strip()
        if value and value.isprintable() and value.isascii():
            headers[header] = value
    return headers


def error_xml(error: S3Error, resource: str, request_id: str) -> bytes:
    """An error as S3 says it."""
    root = ElementTree.Element("Error")
    for name, text in {
        "Code": error.code, "Message": str(error), **error.details, "Resource": resource, "RequestId": request_id,
    }.items():  # fmt: skip
        _add(root, name, text)
    return _text(root)


def buckets_xml(buckets: Sequence[str], since: float) -> bytes:
    """The answer to ListBuckets; ``since``: when they are said to have been made."""
    root = ElementTree.Element("ListAllMyBucketsResult", xmlns=_NAMESPACE)
    owner = ElementTree.SubElement(root, "Owner")
    _add(owner, "ID", "weightd")
    _add(owner, "DisplayName", "weightd")
    listed = ElementTree.SubElement(root, "Buckets")
    for bucket in buckets:
        found = ElementTree.SubElement(listed, "Bucket")
        _add(found, "Name", bucket)
        _add(found, "CreationDate", _iso(since))
    return _text(root)


def location_xml() -> bytes:
    """The answer to GetBucketLocation: us-east-1, which is called nothing."""
    return _text(ElementTree.Element("LocationConstraint", xmlns=_NAMESPACE))


def list_xml(bucket: str, asked: Mapping[str, str], query: Query, page: Page) -> bytes:
    """The answer to ListObjectsV2, or to ListObjects where ``asked`` has no list-type 2."""
    second = asked.get("list-type") == "2"
    by_url = asked.get("encoding-type") == "url"

    def said(text: str) -> str:
        return quote(text, safe="/~") if by_url else text

    root = ElementTree.Element("ListBucketResult", xmlns=_NAMESPACE)
    _add(root, "Name", bucket)
    _add(root, "Prefix", said(query.prefix))
    if query.delimiter:
        _add(root, "Delimiter", said(query.delimiter))
    _add(root, "MaxKeys", str(query.most))
    if by_url:
        _add(root, "EncodingType", "url")
    if second:
        _add(root, "KeyCount", str(len(page.objects) + len(page.prefixes)))
        for name, parameter in (("ContinuationToken", "continuation-token"), ("StartAfter", "start-after")):
            if parameter in asked:
                _add(root, name, asked[parameter] if name == "ContinuationToken" else said(asked[parameter]))
    else:
        _add(root, "Marker", said(asked.get("marker", "")))
    _add(root, "IsTruncated", "true" if page.truncated else "false")
    if page.truncated:
        _add(root, *(("NextContinuationToken", token_of(page.last)) if second else ("NextMarker", said(page.last))))
    for stored in page.objects:
        found = ElementTree.SubElement(root, "Contents")
        _add(found, "Key", said(stored.key))
        _add(found, "LastModified", _iso(stored.modified))
        _add(found, "ETag", etag(stored))
        _add(found, "Size", str(stored.size))
        _add(found, "StorageClass", "STANDARD")
    for prefix in page.prefixes:
        _add(ElementTree.SubElement(root, "CommonPrefixes"), "Prefix", said(prefix))
    return _text(root)


def _add(parent: ElementTree.Element, name: str, text: str) -> None:
    ElementTree.SubElement(parent, name).text = text


def _text(root: ElementTree.Element) -> bytes:
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
