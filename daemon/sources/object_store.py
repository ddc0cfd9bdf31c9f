"""Object stores: S3, Google Cloud Storage, Azure Blob Storage.

Listing, ETags and headers come through obstore; weights through the native streamer of runai-model-streamer, whose
threads write each range to its final address. Both take credentials and endpoints from the same environment.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from weightd.daemon.errors import CheckpointChanged, CheckpointNotFound, InvalidRequest, NotAllowed, SourceFailed
from weightd.daemon.extents import Extent
from weightd.daemon.fill import Fill, Landing
from weightd.daemon.sources import Allow, libstreamer
from weightd.daemon.sources.base import SourceFile, changed
from weightd.daemon.sources.window import Window

if TYPE_CHECKING:
    from obstore.store import ObjectStore

MAX_OBJECTS = 100_000
"""Objects below one prefix, over which it is taken for no checkpoint."""

# Codes of libstreamer 0.17, by what they mean for the range. Trying again can help: file access (what every HTTP error
# comes out as), end of file, too many open files, unknown, unexpected number of bytes, retryable.
_RETRYABLE = frozenset({2, 3, 6, 11, 15, 19})
# After an unknown error the library may still write to the destination, which must not be used again before the
# streamer has been closed.
_UNSETTLED = frozenset({11})


def open_source(uri: str, allow: Allow) -> ObjectStoreSource:
    """The objects below a prefix, or one object. Raises NotAllowed, SourceFailed."""
    allow.check(uri)
    return ObjectStoreSource(uri)


def _connect(scheme: str, bucket: str) -> ObjectStore:
    """A store whose endpoint and credentials are the environment's, named as the cloud's own tools name them."""
    from obstore.store import AzureStore, GCSStore, S3Store

    def options(endpoint: str) -> dict[str, Any]:
        return {
            "client_options": {"allow_http": endpoint.startswith("http://"), "timeout": timedelta(seconds=30)},
            "retry_config": {
                "max_retries": 5,
                "retry_timeout": timedelta(seconds=60),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=100),
                    "max_backoff": timedelta(seconds=5),
                    "base": 2,
                },
            },
        }

    if scheme == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
        virtual = os.environ.get("RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING", "1") != "0" and not endpoint
        arguments: dict[str, Any] = {"virtual_hosted_style_request": virtual, **options(endpoint)}
        if _aws_profile():
            # obstore reads no profiles; boto3, which the streamer's S3 plugin brings along, does.
            from obstore.auth.boto3 import Boto3CredentialProvider

            arguments["credential_provider"] = Boto3CredentialProvider()
        return S3Store(bucket, **arguments)
    if scheme == "gs":
        endpoint = os.environ.get("CLOUD_STORAGE_EMULATOR_ENDPOINT", "")
        emulator: dict[str, Any] = {"base_url": endpoint, "skip_signature": True} if endpoint else {}
        return GCSStore(bucket, **emulator, **options(endpoint))
    account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", "")
    suffix = os.environ.get("AZURE_STORAGE_ENDPOINT_SUFFIX", "")
    place: dict[str, Any] = {"endpoint": f"https://{account}.{suffix}"} if account and suffix else {}
    return AzureStore(bucket, **place, **options(""))


def _aws_profile() -> bool:
    if os.environ.get("AWS_PROFILE"):
        return True
    path = os.environ.get("AWS_SHARED_CREDENTIALS_FILE", os.path.expanduser("~/.aws/credentials"))
    return not os.environ.get("AWS_ACCESS_KEY_ID") and os.path.exists(path)


class ObjectStoreSource:
    """The objects below one prefix."""

    kind = "object-store"
    buffered = False
    max_extent = 1 << 30
    # One request brings one contiguous range; scattering it is the bounce buffer's work.
    max_runs = 1
    min_range = 1 << 20

    def __init__(self, uri: str) -> None:
        from obstore.exceptions import BaseError

        self.uri = uri
        scheme, _, rest = uri.partition("://")
        bucket, _, prefix = rest.partition("/")
        single = prefix.endswith(".safetensors")
        self._prefix, _, name = prefix.rpartition("/") if single else (prefix, "", "")
        self._single = name or None
        self.base = "/".join(part for part in (f"{scheme}://{bucket}", self._prefix) if part)
        try:
            self._store = _connect(scheme, bucket)
        except BaseError as error:
            raise SourceFailed(f"{uri}: cannot connect: {_reason(error)}") from None

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def list(self) -> list[SourceFile]:
        if self._single:
            return [self.stat(self._single)]
        found: list[SourceFile] = []
        with self._errors(self.uri):
            for batch in self._store.list(self._prefix or None):
                for meta in batch:
                    name = str(meta["path"])[len(self._prefix) :].lstrip("/")
                    if name:
                        found.append(SourceFile(name, meta["size"], _version(meta)))
                if len(found) > MAX_OBJECTS:
                    raise InvalidRequest(
                        f"{self.uri}: more than {MAX_OBJECTS} objects: name the checkpoint's own prefix"
                    )
        if not found:
            raise CheckpointNotFound(f"{self.uri}: nothing is below this prefix")
        return sorted(found)

    def stat(self, name: str) -> SourceFile:
        with self._errors(f"{self.base}/{name}"):
            meta = self._store.head(self._key(name))
            return SourceFile(name, meta["size"], _version(meta))

    def read(self, name: str, offset: int, length: int) -> bytes:
        if not length:
            return b""
        with self._errors(f"{self.base}/{name}"):
            return bytes(self._store.get_range(self._key(name), start=offset, length=length))

    @contextlib.contextmanager
    def _errors(self, uri: str) -> Any:
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        try:
            yield
        except FileNotFoundError:
            raise CheckpointNotFound(f"{uri}: not found") from None
        except (PermissionDeniedError, UnauthenticatedError, PermissionError) as error:
            raise NotAllowed(
                f"{uri}: the object store refused the credentials: {_reason(error)}: "
                "weightd doctor shows which are in use"
            ) from None
        except (BaseError, OSError) as error:
            # Listing a bucket that does not exist is a generic error; its text has the store's own answer.
            if "NoSuchBucket" in str(error) or "404 Not Found" in str(error):
                raise CheckpointNotFound(f"{uri}: no such bucket") from None
            raise SourceFailed(f"{uri}: {_reason(error)}") from None

    def reader(self, files: Sequence[SourceFile]) -> ObjectStoreReader:
        return ObjectStoreReader(self, files)


def _version(meta: Any) -> str:
    # Listings and HEAD answers of one store differ in whether the ETag comes with its quotes.
    tag = str(meta["e_tag"] or "").strip('"')
    return tag or f"{meta['size']}-{meta['last_modified'].isoformat()}"


def _reason(error: BaseException) -> str:
    """The error's first line: obstore appends a debug dump that repeats it."""
    return str(error).strip().splitlines()[0][:500]


class _Due(NamedTuple):
    """An extent to be asked for at a time (monotonic seconds), earlier ones in a file first."""

    at: float
    file: int
    offset: int
    extent: Extent


class ObjectStoreReader:
    """Keeps a bounded number of bytes in flight in one native streamer, and takes ranges as they land.

    A streamer serves one stage, and so one set of credentials, however many files there are: closing it is the
    library's only way to say that nothing writes to this stage's memory any more.
    """

    def __init__(self, source: ObjectStoreSource, files: Sequence[SourceFile]) -> None:
        self._source = source
        self._files = files
        self._uris = [f"{source.base}/{file.name}" for file in files]
        try:
            self._streamer = libstreamer.Streamer()
        except (libstreamer.StreamerUnavailable, OSError) as error:
            raise SourceFailed(f"{source.uri}: {error}") from None

    def run(self, fill: Fill) -> None:
        in_flight: dict[int, tuple[Extent, Landing]] = {}
        waiting: list[_Due] = []
        nbytes = 0
        window = Window(fill.in_flight_bytes, fill.extent_bytes)
        last_progress = time.monotonic()
        while not fill.stopped:
            if not in_flight:
                last_progress = time.monotonic()
            deferred: list[_Due] = []  # due, but with no bounce buffer to be had
            while nbytes < window.nbytes and len(deferred) <= len(in_flight):
                extent = self._next(fill, waiting)
                if extent is None:
                    break
                landing = fill.landing(extent, wait=False)
                if landing is None:
                    deferred.append(_Due(time.monotonic(), extent.file, extent.offset, extent))
                    continue
                in_flight[self._submit(fill, extent, landing)] = (extent, landing)
                nbytes += extent.nbytes
            for due in deferred:
                heapq.heappush(waiting, due)
            if not in_flight:
                if not waiting:
                    return
                fill.wait(max(0.001, waiting[0].at - time.monotonic()))
                continue
            with fill.phase("source"):
                response = self._streamer.response(0.1)
            if response is None:
                fill.check_stall(last_progress, [self._uris[extent.file] for extent, _ in in_flight.values()])
                continue
            last_progress = time.monotonic()
            extent, landing = in_flight.pop(response.submission)
            nbytes -= extent.nbytes
            if response.code == libstreamer.SUCCESS:
                window.landed(extent.nbytes, last_progress)
                fill.landed(extent, landing)
                continue
            at = time.monotonic() + self._failed(fill, extent, response.code)
            again = [(extent, landing)]
            if response.code in _UNSETTLED:
                # All that is in flight is asked for anew, once nothing of the old streamer can still write.
                self._streamer.close()
                self._streamer = libstreamer.Streamer()
                again += in_flight.values()
                in_flight.clear()
                nbytes = 0
            for other, place in again:
                fill.abandon(place)
                heapq.heappush(waiting, _Due(at, other.file, other.offset, other))

    def _next(self, fill: Fill, waiting: list[_Due]) -> Extent | None:
        """What to ask for next: what failed and is due again before what is new."""
        if waiting and waiting[0].at <= time.monotonic():
            return heapq.heappop(waiting).extent
        return fill.next()

    def _failed(self, fill: Fill, extent: Extent, code: int) -> float:
        """Seconds until the next try; raises where there is no point in one. HEAD says why, the library does not."""
        uri, planned = self._uris[extent.file], self._files[extent.file]
        if code not in _RETRYABLE:
            raise SourceFailed(f"{uri}: {libstreamer.describe(code)} (libstreamer code {code})")
        if not extent.attempts:
            try:
                found = self._source.stat(planned.name)
            except CheckpointNotFound:
                raise CheckpointChanged(f"{uri} was there when planning, and is gone: stage it again") from None
            except SourceFailed:
                pass  # the store is away: that may pass
            else:
                if found != planned:
                    raise changed(planned, found)
        return fill.failed(extent, uri, libstreamer.describe(code))

    def _submit(self, fill: Fill, extent: Extent, landing: Landing) -> int:
        while True:
            try:
                return self._streamer.submit(
                    self._uris[extent.file], [extent.offset], [extent.nbytes], [landing.address]
                )
            except OSError as error:
                fill.wait(fill.failed(extent, self._uris[extent.file], str(error)))

    def close(self) -> None:
        self._streamer.close()
