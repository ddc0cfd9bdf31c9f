"""Object stores: S3, Google Cloud Storage, Azure Blob Storage.

Listing, ETags and headers come through obstore; weights through the native streamer of runai-model-streamer, whose
threads write each range to its final address. For S3 both are told where and how to ask; for the others both take
credentials and endpoints from the same environment.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from weightd.daemon.devices import libstreamer
from weightd.daemon.errors import (
    CheckpointChanged,
    CheckpointNotFound,
    CredentialsRefused,
    InvalidRequest,
    SourceFailed,
    UnreadableFile,
)
from weightd.daemon.sources import aws
from weightd.daemon.sources.base import Object, SourceFile, is_file_name, is_hidden, is_index
from weightd.daemon.sources.streamed import StreamerReader
from weightd.daemon.sources.uris import Allow

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_REFUSED = re.compile("status code: 40[13] |<Code>(?:ExpiredToken|InvalidToken|TokenRefreshRequired)<")
"""What tells in an error's text that credentials were refused: S3 answers 400 to a session that has expired."""
_UNREADABLE = re.compile("InvalidObjectState|BlobArchived|KMS")
"""What tells that one object is archived, or encrypted with a key that is refused, whatever the status."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
MAX_OBJECTS = 100_000
"""Objects below one prefix, over which it is taken for no checkpoint."""


def open_source(uri: str, allow: Allow) -> ObjectStoreSource:
    """The objects below a prefix, or one object. Raises NotAllowed, SourceFailed."""
    allow.check(uri)
    return ObjectStoreSource(uri)


def _options(endpoint: str) -> dict[str, Any]:
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


def _connect_s3(bucket: str, access: aws.S3Access) -> ObjectStore:
    from obstore.store import S3Store

    options = _options(access.endpoint.value)
    if authorities := access.authorities():
        options["client_options"]["root_certificate"] = authorities
    return S3Store(bucket, **access.listing(bucket), **options)


def _connect(scheme: str, bucket: str) -> ObjectStore:
    """A store whose endpoint and credentials are the environment's, named as the cloud's own tools name them."""
    from obstore.store import AzureStore, GCSStore

    if scheme == "gs":
        endpoint = os.environ.get("CLOUD_STORAGE_EMULATOR_ENDPOINT", "")
        emulator: dict[str, Any] = {"base_url": endpoint, "skip_signature": True} if endpoint else {}
        return GCSStore(bucket, **emulator, **_options(endpoint))
    account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", "")
    suffix = os.environ.get("AZURE_STORAGE_ENDPOINT_SUFFIX", "")
    place: dict[str, Any] = {"endpoint": f"https://{account}.{suffix}"} if account and suffix else {}
    return AzureStore(bucket, **place, **_options(""))


class ObjectStoreSource:
    """The objects below one prefix."""

    buffered = False
    max_extent = 1 << 30
    # One request brings one contiguous range; scattering it is the bounce buffer's work.
    max_runs = 1
    min_range = 1 << 20
    min_gap = 0
    partial = ""

    def __init__(self, uri: str) -> None:
        from obstore.exceptions import BaseError

        self.uri = uri
        scheme, _, rest = uri.partition("://")
        self.kind = scheme
        bucket, _, prefix = rest.partition("/")
        self._prefix, _, name = prefix.rpartition("/") if is_file_name(prefix) else (prefix, "", "")
        self.single = name or None
        self.base = "/".join(part for part in (f"{scheme}://{bucket}", self._prefix) if part)
        self._access = aws.resolve() if scheme == "s3" else None
        try:
            self._store = _connect_s3(bucket, self._access) if self._access else _connect(scheme, bucket)
        except BaseError as error:
            raise SourceFailed(f"{uri}: cannot connect: {_reason(error)}") from None

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def list(self) -> list[SourceFile]:
        if self.single and not is_index(self.single):
            return [self.stat(self.single)]
        found: list[SourceFile] = []
        with self._errors(self.uri):
            for batch in self._store.list(self._prefix or None):
                for meta in batch:
                    name = str(meta["path"])[len(self._prefix) :].lstrip("/")
                    if name and not is_hidden(name):
                        found.append(SourceFile(name, meta["size"], _version(meta)))
                if len(found) > MAX_OBJECTS:
                    raise InvalidRequest(
                        f"{self.uri}: more than {MAX_OBJECTS} objects: name the checkpoint's own prefix"
                    )
        if not found:
            raise CheckpointNotFound(f"{self.uri}: nothing is below this prefix")
        # What consoles and some file systems leave to mark a folder: an empty object of the folder's name.
        folders = {folder for file in found for folder in _folders(file.name)}
        return sorted(file for file in found if file.size or file.name not in folders)

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
        except (BaseError, OSError) as error:
            # Of listings everything is a generic error, and so is a token that is not to be had; the text has the
            # store's own answer.
            if found := _UNREADABLE.search(str(error)):
                what = "encrypted with a key that is refused" if found[0] == "KMS" else "archived: restore it first"
                raise UnreadableFile(f"{uri} is {what} ({_reason(error)})") from None
            kinds = (PermissionDeniedError, UnauthenticatedError, PermissionError)
            if isinstance(error, kinds) or _REFUSED.search(str(error)):
                what = "the credentials"
                if self._access is not None and self._access.signing.value == "unsigned":
                    what = f"requests without a signature ({self._access.signing.origin})"
                raise CredentialsRefused(
                    f"{uri}: the object store refused {what}: {_reason(error)}: weightd doctor shows which are in use"
                ) from None
            if "NoSuchBucket" in str(error) or "404 Not Found" in str(error):
                raise CheckpointNotFound(f"{uri}: no such bucket", missing="bucket") from None
            raise SourceFailed(f"{uri}: {_reason(error)}") from None

    def fetch(self, files: Sequence[SourceFile]) -> None:
        """They are read where they are."""

    def reader(self, files: Sequence[SourceFile], *, native: bool = False) -> StreamerReader:
        uris = [f"{self.base}/{file.name}" for file in files]
        if self._access is None:
            return StreamerReader(self, files, uris)
        libstreamer.address_by(virtual=self._access.addressing.value == "virtual")
        return StreamerReader(self, files, uris, self._access.reading)


class StoredObjects:
    """All objects of one bucket, as ``buckets.Bucket`` has it."""

    def __init__(self, root: str) -> None:
        self._source = ObjectStoreSource(root)
        self._store = self._source._store

    def head(self, key: str) -> Object:
        with self._source._errors(f"{self._source.uri}/{key}"):
            found = _object(self._store.head(key))
        if found.key != key:  # the store leaves a slash at the end out
            raise CheckpointNotFound(f"{self._source.uri}/{key}: not found")
        return found

    def objects(self, prefix: str, after: str) -> Iterator[Object]:
        folder = prefix.rpartition("/")[0]  # the store's own prefixes end at a slash
        if not _can_be(folder):
            return
        offset = max(after, folder) if _can_be(after.removesuffix("/")) else folder
        with self._source._errors(f"{self._source.uri}/{prefix}"):
            batches = self._store.list(folder or None, offset=offset or None)
            yield from _without_marks(map(_object, itertools.chain.from_iterable(batches)))

    def read(self, stored: Object, first: int, count: int) -> bytes:
        with self._source._errors(f"{self._source.uri}/{stored.key}"):
            found = self._store.get(stored.key, options={"range": (first, first + count)})
            data = bytes(found.bytes())
        if len(data) != count or _version(found.meta) != stored.version:
            raise CheckpointChanged(f"{self._source.uri}/{stored.key} has changed meanwhile")
        return data

    def level(self, folder: str) -> list[Object]:
        folder = folder.removesuffix("/")
        if not _can_be(folder):
            return []
        with self._source._errors(f"{self._source.uri}/{folder}"):
            found = self._store.list_with_delimiter(folder or None)
        folders = [Object(f"{prefix}/", 0, "", 0.0) for prefix in found["common_prefixes"]]
        marked = {prefix.key[:-1] for prefix in folders}
        objects = [stored for stored in map(_object, found["objects"]) if stored.size or stored.key not in marked]
        return sorted([*objects, *folders])


def _can_be(path: str) -> bool:
    """Whether anything can have a path, as the store has them: it refuses others."""
    return not any(part in ("", ".", "..") or _CONTROL.search(part) for part in path.split("/") if path)


def _without_marks(objects: Iterator[Object]) -> Iterator[Object]:
    """Without what marks folders: empty objects before what is in them, whose slash at the end the store leaves out."""
    before: Object | None = None
    for stored in objects:
        if before is not None and (before.size or not stored.key.startswith(f"{before.key}/")):
            yield before
        before = stored
    if before is not None:
        yield before


def _object(meta: Any) -> Object:
    return Object(str(meta["path"]), meta["size"], _version(meta), meta["last_modified"].timestamp())


def _folders(name: str) -> Iterator[str]:
    """The folders that a file is in, from its own up."""
    while name := name.rpartition("/")[0]:
        yield name


def _version(meta: Any) -> str:
    # Listings and HEAD answers of one store differ in whether the ETag comes with its quotes.
    tag = str(meta["e_tag"] or "").strip('"')
    return tag or f"{meta['size']}-{meta['last_modified'].isoformat()}"


def _reason(error: BaseException) -> str:
    """The error's first line: obstore appends a debug dump that repeats it."""
    return str(error).strip().splitlines()[0][:500]
