"""Hugging Face repositories, ``hf://org/name[/folder][@revision]``: the hub's own local cache, filled where it lacks.

What a revision holds is what the repository says, never what happens to be cached: its list of files is asked of the
hub once for each commit, and kept beside what is cached of it. Where the hub cannot be asked and the list is not known,
what is cached counts, and is said to be perhaps but a part. Files are downloaded, whole, before they are read, which
is while a stage is planned; from then on they are files.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from weightd.daemon.errors import CheckpointNotFound, CredentialsRefused, DaemonError, InvalidRequest, SourceFailed
from weightd.daemon.sources.base import Reader, SourceFile, is_file_name, is_hidden, is_index
from weightd.daemon.sources.file import FileSource
from weightd.daemon.sources.uris import Allow


def open_source(uri: str, allow: Allow) -> HubSource:
    """One revision of a repository, or of a folder in it, or one file. Raises NotAllowed, InvalidRequest."""
    allow.check(uri)
    return HubSource(uri)


_Files = list[SourceFile]
_PARALLEL_DOWNLOADS = 8
_COMMIT = re.compile("[0-9a-f]{40}")
_MAX_LIST_BYTES = 64 << 20
_TREES = ("trees", ".weightd")
"""Folders of a cached repository with ``COMMIT.json``, the list of a commit's files: huggingface_hub's, and our own.

Ours is not put among its: it takes such a list for a download that was begun, and calls what we left out missing.
"""


class HubSource:
    """The files of one revision. A file's version is its blob's name, the same in the cache and on the hub."""

    kind = "hf"
    buffered = FileSource.buffered
    max_extent = FileSource.max_extent
    max_runs = FileSource.max_runs
    min_range = FileSource.min_range
    min_gap = FileSource.min_gap

    def __init__(self, uri: str) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils._validators import validate_repo_id

        self._uri = uri
        path, _, revision = uri.removeprefix("hf://").partition("@")
        parts = path.split("/")
        self._repository, inside = "/".join(parts[:2]), parts[2:]
        try:
            validate_repo_id(self._repository)
        except HFValidationError as error:
            raise InvalidRequest(f"model: {uri}: {error}") from None
        self.single = inside.pop() if inside and is_file_name(inside[-1]) else None
        self._folder = "".join(f"{part}/" for part in inside)
        self._asked = revision or "main"
        self._commit = self._asked  # a commit's, once listed
        self._files: dict[str, SourceFile] = {}
        self._is_listed = False
        self.partial = ""

    def list(self) -> _Files:
        self.partial = ""
        commit = self._cached_commit()
        found = self._known(commit) if commit else None
        if found is None:
            try:
                found, commit = self._ask_hub(commit)
                self._keep(commit, found)
            except DaemonError as error:
                if commit is None:
                    raise
                found = self._cached(commit)
                self.partial = f"the hub's local cache may have but a part of the repository, and {error}"
        assert commit is not None
        self._commit, self._is_listed = commit, True
        self._files = {
            file.name.removeprefix(self._folder): file._replace(name=file.name.removeprefix(self._folder))
            for file in found
            if file.name.startswith(self._folder)
        }
        if self.single and not is_index(self.single):
            return [self.stat(self.single)]
        listed = [file for file in self._files.values() if not is_hidden(file.name)]
        if not listed:
            raise CheckpointNotFound(f"{self._uri}: the repository has no file in {self._folder or 'it'}")
        return sorted(listed)

    # ------------------------------------------------------------------ the list of a commit's files

    @property
    def _cache(self) -> Path:
        """Where the hub's cache has this repository."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"models--{self._repository.replace('/', '--')}"

    def _cached_commit(self) -> str | None:
        """The commit that the revision is in the cache, where something of it is there."""
        commit = self._asked
        if not _COMMIT.fullmatch(commit):
            try:
                commit = (self._cache / "refs" / self._asked).read_text().strip()
            except (OSError, ValueError):
                return None
        return commit if _COMMIT.fullmatch(commit) and (self._cache / "snapshots" / commit).is_dir() else None

    def _cached(self, commit: str) -> _Files:
        folder = self._cache / "snapshots" / commit
        return [SourceFile(f.name, f.size, _blob(folder / f.name) or f.version) for f in _local(folder).list()]

    def _known(self, commit: str) -> _Files | None:
        """All files of a commit, where the cache has their list."""
        for folder in _TREES:
            path = self._cache / folder / f"{commit}.json"
            try:
                if path.stat().st_size > _MAX_LIST_BYTES:
                    continue
                table = json.loads(path.read_bytes())
                if table["format_version"] == 1 and table["files"]:
                    return [_listed(name, item) for name, item in table["files"].items()]
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue
        return None

    def _keep(self, commit: str, files: _Files) -> None:
        table = {
            "format_version": 1,
            "files": {file.name: {"size": file.size, "blob_id": file.version} for file in files},
        }
        folder = self._cache / _TREES[-1]
        with contextlib.suppress(OSError):  # asked of the hub again, then
            folder.mkdir(parents=True, exist_ok=True)
            _replace(folder / f"{commit}.json", json.dumps(table))

    def _ask_hub(self, commit: str | None) -> tuple[_Files, str]:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RevisionNotFoundError

        where = f"{self._uri}: {'what all of it is is not known here' if commit else 'not in the local cache'}"
        try:
            try:
                info = self._info(HfApi(), commit or self._asked)
            except RevisionNotFoundError:
                if commit in (None, self._asked):
                    raise
                info = self._info(HfApi(), self._asked)  # the cached commit is no more
        except Exception as error:  # whatever the HTTP client of this release of huggingface_hub raises
            raise _meaning(f"{where}, and on the hub", error) from None
        files = [
            SourceFile(item.rfilename, item.size or 0, (item.lfs.sha256 if item.lfs else item.blob_id) or "")
            for item in info.siblings or ()
        ]
        return files, str(info.sha or commit or self._asked)

    def _info(self, api: Any, revision: str) -> Any:
        return api.model_info(self._repository, revision=revision, files_metadata=True, timeout=30)

    # ------------------------------------------------------------------ files

    def stat(self, name: str) -> SourceFile:
        if not self._is_listed:
            self.list()
        try:
            return self._files[name]  # a commit's files never change
        except KeyError:
            raise CheckpointNotFound(f"{self._uri}: no file {name!r}") from None

    def _fetch(self, name: str, revision: str | None = None) -> Path:
        """The file in the cache, downloaded where it is not there yet."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self._repository, self._folder + name, revision=revision or self._commit))
        except Exception as error:
            where = f"{self._uri}: {name}"
            if isinstance(error, LocalEntryNotFoundError):
                where += ": the hub's local cache is partial, it has not this file"
            raise _meaning(where, error) from None

    def read(self, name: str, offset: int, length: int) -> bytes:
        with self._fetch(name).open("rb") as file:
            return os.pread(file.fileno(), length, offset)

    def fetch(self, files: Sequence[SourceFile]) -> None:
        with ThreadPoolExecutor(_PARALLEL_DOWNLOADS, thread_name_prefix="hub") as pool:
            list(pool.map(lambda file: self._fetch(file.name), files))
        self._remember()

    def _remember(self) -> None:
        """Have the cache know which commit the revision is, as if it had been downloaded by that name."""
        if self._cached_commit() == self._commit:
            return
        ref = self._cache / "refs" / self._asked
        with contextlib.suppress(OSError):
            ref.parent.mkdir(parents=True, exist_ok=True)
            _replace(ref, self._commit)

    def reader(self, files: Sequence[SourceFile], *, native: bool = False) -> Reader:
        paths = [self._fetch(file.name) for file in files]
        folder = Path(str(paths[0]).removesuffix(files[0].name)) if paths else Path()
        local = _local(folder)
        return local.reader([local.stat(file.name) for file in files], native=native)


def _replace(path: Path, text: str) -> None:
    """Write a file so that nobody ever reads a part of it."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".partial-", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def _listed(name: str, item: dict[str, Any]) -> SourceFile:
    size, version = item.get("lfs_size") or item["size"], item.get("lfs_sha256") or item["blob_id"]
    if not isinstance(name, str) or not isinstance(size, int) or not isinstance(version, str):
        raise ValueError(f"no file: {name!r}")
    return SourceFile(name, size, version)


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
