"""Which bucket and key here is what at which origin.

``s3://models/llama`` is the same bucket and key here as there. Buckets of other kinds of storage are ``gs--BUCKET``,
``az--CONTAINER`` and ``hf--ORG--NAME``; stages have one of their own, by their ids: ``weightd/ST-ID/FILE``.
"""

from __future__ import annotations

import re

from weightd.daemon.s3.errors import S3Error

STAGES = "weightd"
"""The bucket in which every stage is a folder."""

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
MAX_KEY_BYTES = 1024


def root_of(bucket: str) -> str:
    """The URI at whose origin the bucket's keys are. Raises S3Error where no bucket can be called so."""
    if not _BUCKET.fullmatch(bucket) or bucket == STAGES:
        raise S3Error("NoSuchBucket", "The specified bucket does not exist")
    scheme, separator, rest = bucket.partition("--")
    if separator and scheme in ("gs", "az"):
        return f"{scheme}://{rest}"
    if separator and scheme == "hf":
        owner, both, name = rest.partition("--")
        if not both:
            raise S3Error("NoSuchBucket", "a bucket of the Hugging Face Hub is called hf--ORG--NAME")
        return f"hf://{owner}/{name}"
    return f"s3://{bucket}"


def bucket_of(uri: str) -> str | None:
    """The bucket whose keys are at a stage's URI; None where there is none but the stages' own."""
    scheme, _, rest = uri.partition("://")
    parts = rest.partition("@")[0].split("/")
    if scheme == "s3":
        return parts[0]
    if scheme in ("gs", "az"):
        return f"{scheme}--{parts[0]}"
    return f"hf--{parts[0]}--{parts[1]}" if scheme == "hf" and len(parts) > 1 and "@" not in rest else None


def check_key(key: str) -> None:
    """Raises S3Error where no object can be called so."""
    if len(key.encode(errors="surrogateescape")) > MAX_KEY_BYTES:
        raise S3Error("KeyTooLongError", "Your key is too long", {"MaxSizeAllowed": str(MAX_KEY_BYTES)})
    if any(ord(character) < 32 or character == "\x7f" or 0xD800 <= ord(character) < 0xE000 for character in key):
        raise S3Error("InvalidURI", "the key holds control characters, or is no UTF-8")
    if any(part in ("", ".", "..") for part in key.removesuffix("/").split("/")):
        raise S3Error("NoSuchKey", "The specified key does not exist.", {"Key": key})
