"""What ``weightd doctor`` says of S3: how it is asked, and where each value came from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from weightd.daemon.doctor.report import Finding
from weightd.daemon.errors import DaemonError
from weightd.daemon.sources import aws

_KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give the service account a role"


def examine_s3() -> Iterator[Finding]:
    """As this process finds it: run it where the daemon runs, with the daemon's environment."""
    try:
        access = aws.resolve()
    except DaemonError as error:
        yield Finding("credentials s3://", "error", str(error), "mend the variable or the file that it names")
        return
    for what, found in (
        ("endpoint s3://", access.endpoint),
        ("region s3://", access.region),
        ("addressing s3://", access.addressing),
    ):
        yield Finding(what, "ok", f"{found.value} ({found.origin})")
    if access.ca_bundle.value:
        yield _authorities(access)
    yield _credentials(access)


def _authorities(access: aws.S3Access) -> Finding:
    path, origin = access.ca_bundle
    if Path(path).is_file():
        return Finding("authorities s3://", "ok", f"{path} ({origin})")
    return Finding("authorities s3://", "error", f"{path} ({origin}) does not exist", "mount it, or unset that")


def _credentials(access: aws.S3Access) -> Finding:
    if access.credentials is None:
        asked = access.signing.origin in aws.UNSIGNED
        found = f"unsigned ({access.signing.origin}): public buckets only"
        return Finding("credentials s3://", "ok" if asked else "warning", found, "" if asked else _KEYS)
    try:
        access.keys()
    except DaemonError as error:
        return Finding("credentials s3://", "error", str(error), _KEYS)
    return Finding("credentials s3://", "ok", f"signed ({access.signing.origin})")
