"""Hugging Face repositories, ``hf://org/name[@revision]``: the hub's own local cache, filled where it lacks files.

What a revision holds is asked of the hub only where the cache does not have all of it. Files are downloaded, whole,
before they are read, which is while a stage is planned; from then on they are files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from weightd.daemon.errors import CheckpointNotFound, CredentialsRefused, DaemonError, InvalidRequest, SourceFailed
from weightd.daemon.sources.base import Reader, SourceFile
from weightd.daemon.sources.file import FileSource
from weightd.daemon.sources.uris import Allow


def open_source(uri: str, allow: Allow) -> HubSource:
    """One revision of a repository. Raises NotAllowed, InvalidRequest."""
    allow.check(uri)
    repository, _, revision = uri.removeprefix("hf://").partition("@")
    return HubSource(uri, repository, revision or None)


_Files = list[SourceFile]
_PARALLEL_DOWNLOADS = 8


class HubSource:
    """The files of one revision. A file's version is its blob's name, the same in the cache and on the hub."""

    kind = "hf"
    buffered = FileSource.buffered
    max_extent = FileSource.max_extent
    max_runs = FileSource.max_runs
    min_range = FileSource.min_range
    copies = True

    def __init__(self, uri: str, repository: str, revision: str | None) -> None:
        self._uri = uri
        self._repository = repository
        self._asked = revision
        self._revision = revision  # a commit's, once listed
        self._was_cached = False
        self._files: dict[str, SourceFile] = {}

    def list(self, *, anew: bool = False) -> _Files:
        folder = None if anew else self._cached()
        if folder is not None:
            found = [SourceFile(f.name, f.size, _blob(folder / f.name) or f.version) for f in _local(folder).list()]
            self._revision, self._was_cached = folder.name, True
        else:
            self._revision, self._was_cached = self._asked, False
            found = self._ask_hub()
        self._files = {file.name: file for file in found}
        return found

    def _cached(self) -> Path | None:
        """The revision's folder in the cache, where it has weights: interrupted downloads leave some out."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(self._repository, revision=self._revision, local_files_only=True))
        except LocalEntryNotFoundError:
            return None
        except HFValidationError as error:
            raise InvalidRequest(f"model: {self._uri}: {error}") from None
        return folder if any(folder.glob("*.safetensors")) and (folder / "config.json").exists() else None

    def _ask_hub(self) -> _Files:
        from huggingface_hub import HfApi

        try:
            info = HfApi().model_info(self._repository, revision=self._revision, files_metadata=True, timeout=30)
        except Exception as error:  # whatever the HTTP client of this release of huggingface_hub raises
            raise _meaning(f"{self._uri}: not in the local cache, and on the hub", error) from None
        self._revision = info.sha or self._revision
        return [
            SourceFile(item.rfilename, item.size or 0, (item.lfs.sha256 if item.lfs else item.blob_id) or "")
            for item in info.siblings or ()
        ]

    def stat(self, name: str) -> SourceFile:
        try:
            return self._files[name]  # a commit's files never change
        except KeyError:
            raise CheckpointNotFound(f"{self._uri}: no file {name!r}") from None

    def _fetch(self, name: str, revision: str | None = None) -> Path:
        """The file in the cache, downloaded where it is not there yet."""
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self._repository, name, revision=revision or self._revision))
        except Exception as error:
            raise _meaning(f"{self._uri}: {name}", error) from None

    def read(self, name: str, offset: int, length: int) -> bytes:
        with self._fetch(name).open("rb") as file:
            return os.pread(file.fileno(), length, offset)

    def fetch(self, files: Sequence[SourceFile]) -> None:
        if files and not self._was_cached:
            with ThreadPoolExecutor(_PARALLEL_DOWNLOADS, thread_name_prefix="hub") as pool:
                list(pool.map(lambda file: self._fetch(file.name), files))

    def reader(self, files: Sequence[SourceFile], *, native: bool = False) -> Reader:
        paths = [self._fetch(file.name) for file in files]
        if not self._was_cached and files:
            # Under the name that was asked for, so that the cache knows next time which commit that is.
            self._fetch(files[0].name, self._asked or "main")
        folder = Path(str(paths[0]).removesuffix(files[0].name)) if paths else Path()
        local = _local(folder)
        return local.reader([local.stat(file.name) for file in files], native=native)


def _local(folder: Path) -> FileSource:
    # The daemon chose the folder: what a repository's URI is allowed to be was checked already.
    return FileSource(folder, Allow())


def _meaning(where: str, error: BaseException) -> DaemonError:
    """What an error of huggingface_hub is to whoever asked for the repository."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # why it had to do with what is cached
    response = error.response if isinstance(error, HfHubHTTPError) else None
    status = response.status_code if response is not None else 0
    # Of a repository that is not there, the hub says 401 to those who may not know.
    missing = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
    if status in (401, 403) and not missing:
        return CredentialsRefused(f"{where}: the hub refused the credentials (HF_TOKEN): {error}")
    if missing or status == 404 or isinstance(error, RemoteEntryNotFoundError):
        return CheckpointNotFound(f"{where}: {error}")
    return SourceFailed(f"{where}: {error}")


def _blob(path: Path) -> str | None:
    """The name of the blob that a snapshot's file links to."""
    return os.path.basename(os.readlink(path)) if path.is_symlink() else None
