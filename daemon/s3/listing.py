"""Pages of a bucket's list: prefixes, delimiters and where to go on, as ListObjects and ListObjectsV2 have them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from dataclasses import dataclass, field

from weightd.daemon.s3.errors import S3Error
from weightd.daemon.sources.base import Object

MAX_KEYS = 1000
"""Keys and common prefixes in one answer at most, whatever is asked for."""


@dataclass(frozen=True)
class Query:
    """Which part of a bucket's list is asked for."""

    prefix: str = ""
    delimiter: str = ""
    after: str = ""
    """Keys up to and with this one are left out; and those below it, where it ends with the delimiter."""
    most: int = MAX_KEYS


@dataclass
class Page:
    """One answer."""

    objects: list[Object] = field(default_factory=list)
    prefixes: list[str] = field(default_factory=list)
    truncated: bool = False
    last: str = ""
    """The last key or common prefix in it: where the next page goes on."""


def page(objects: Iterable[Object], query: Query) -> Page:
    """One page of ``objects``, which come sorted by key and may be more than what is asked for."""
    found = Page()
    if query.most <= 0:
        return found
    for stored in objects:
        key = stored.key
        if not key.startswith(query.prefix):
            if key > query.prefix:
                break
            continue
        if key <= query.after or _is_below(key, query):
            continue
        common = ""
        if query.delimiter:
            rest, separator, _ = key[len(query.prefix) :].partition(query.delimiter)
            common = query.prefix + rest + separator if separator else ""
        if common and found.prefixes and common == found.prefixes[-1]:
            continue
        if len(found.objects) + len(found.prefixes) >= query.most:
            found.truncated = True
            break
        found.last = common or key
        if common:
            found.prefixes.append(common)
        else:
            found.objects.append(stored)
    return found


def _is_below(key: str, query: Query) -> bool:
    """Whether a key is of a common prefix that was the last of the page before: where the part behind the prefix asked
    for ends with the delimiter, as no key's does that is listed itself."""
    beyond = query.after[len(query.prefix) :]
    return bool(query.delimiter) and beyond.endswith(query.delimiter) and key.startswith(query.after)


def token_of(last: str) -> str:
    """A continuation token: opaque to clients."""
    return base64.urlsafe_b64encode(last.encode()).decode()


def after_of(token: str) -> str:
    """Where a continuation token goes on. Raises S3Error."""
    try:
        return base64.b64decode(token, b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise S3Error("InvalidArgument", "The continuation token provided is incorrect") from None
