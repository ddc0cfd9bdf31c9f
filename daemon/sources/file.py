"""Checkpoints in folders and single files: parallel ``preadv``."""

from __future__ import annotations

import errno
import os
import stat as modes
import threading
from collections.abc import Sequence
from pathlib import Path

from weightd.daemon.errors import CheckpointChanged, CheckpointNotFound, InvalidCheckpoint, SourceFailed
from weightd.daemon.filling.sink import Landing, Sink
from weightd.daemon.layouts.extents import Extent
from weightd.daemon.sources.base import Reader, SourceFile, changed
from weightd.daemon.sources.uris import Allow

MAX_FILES = 100_000
"""Files in one folder, over which it is taken for no checkpoint."""
_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG)
"""Gone, a link to itself, a folder that may not be entered: nothing that can be read. All else is no answer."""
MAX_DEPTH = 4
"""Folders below the checkpoint's own that are looked into."""


_Files = list[SourceFile]


def open_source(uri: str, allow: Allow) -> FileSource:
    """A folder or a single file. Raises CheckpointNotFound; NotAllowed where links lead out of what is allowed."""
    return FileSource(Path(uri.removeprefix("file://")), allow)


class FileSource:
    """A checkpoint below ``root``, or the one file that ``root`` is."""

    kind = "file"
    buffered = True
    max_extent = 2 << 20  # what was read is still in the processor's cache when it is hashed
    max_runs = 1 << 20
    min_range = 64 << 10
    copies = False

    def __init__(self, root: Path, allow: Allow) -> None:
        self._allow = allow
        allow.check("file://" + os.path.realpath(root))
        self._single = root.name if os.path.isfile(root) else None
        self._root = root.parent if self._single else root

    def _opened(self, path: Path, flags: int = 0) -> int:
        """A descriptor that only names what is at a path, which is allowed. Raises OSError, NotAllowed.

        Links are followed first, as one inside an allowed folder must not open what lies outside of it; and it is what
        has been opened that is looked at, as a link may be another by the time that its path is opened.
        """
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC | flags)
        try:
            self._allow.check("file://" + os.readlink(f"/proc/self/fd/{fd}"))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def list(self, *, anew: bool = False) -> list[SourceFile]:
        if self._single:
            return [self.stat(self._single)]
        try:
            fd = self._opened(self._root, os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointNotFound(f"{self._root}: no such folder or file") from None
        except OSError as error:
            raise _unlistable(self._root, error) from None
        try:
            return self._listed(Path(f"/proc/self/fd/{fd}"))
        finally:
            os.close(fd)

    def _listed(self, root: Path) -> _Files:
        """All files below a folder that is open."""

        def unlisted(error: OSError) -> None:
            """Of a folder below, that may be meant so; of the checkpoint's own, it is no answer."""
            if error.errno not in _NOTHING_THERE or error.filename == os.fspath(root):
                raise _unlistable(self._root / os.path.relpath(error.filename, root), error)

        names: list[str] = []
        for folder, folders, files in os.walk(root, onerror=unlisted):
            inside = os.path.relpath(folder, root)
            depth = 0 if inside == "." else inside.count(os.sep) + 1
            folders[:] = sorted(name for name in folders if not name.startswith(".")) if depth < MAX_DEPTH else []
            names += [name if depth == 0 else f"{inside}/{name}" for name in files]
            if len(names) > MAX_FILES:
                raise InvalidCheckpoint(f"{self._root}: more than {MAX_FILES} files: name the checkpoint's own folder")
        found = []
        for name in sorted(names):
            status = self._status(name, root)
            if status is not None and modes.S_ISREG(status.st_mode):
                found.append(_source_file(name, status))
        return found

    def _status(self, name: str, root: Path | None = None) -> os.stat_result | None:
        try:
            return os.stat((root or self._root) / name)
        except OSError as error:
            if error.errno not in _NOTHING_THERE:
                raise _unlistable(self._root / name, error) from None
            return None

    def stat(self, name: str) -> SourceFile:
        status = self._status(name)
        if status is None:
            raise CheckpointNotFound(f"{self._root / name}: no such file")
        return _source_file(name, status)

    def open(self, name: str) -> int:
        """A descriptor for reading. Raises CheckpointNotFound, InvalidCheckpoint for what is no regular file."""
        path = self._root / name
        try:
            named = self._opened(path)
            try:
                if not modes.S_ISREG(os.fstat(named).st_mode):
                    raise InvalidCheckpoint(f"{path}: not a regular file")
                return os.open(f"/proc/self/fd/{named}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            finally:
                os.close(named)
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise CheckpointNotFound(f"{path}: {error.strerror}") from None

    def read(self, name: str, offset: int, length: int) -> bytes:
        fd = self.open(name)
        try:
            return os.pread(fd, length, offset)
        finally:
            os.close(fd)

    def fetch(self, files: Sequence[SourceFile]) -> None:
        """They are here."""

    def reader(self, files: Sequence[SourceFile], *, native: bool = False) -> Reader:
        if not native:
            return FileReader(self, files)
        from weightd.daemon.sources.streamed import StreamerReader

        paths = [str(self._root / file.name) for file in files]
        if not self._allow.prefixes:
            return StreamerReader(self, files, paths)
        # The library opens by path: it is given what has been looked at, by descriptor.
        opened: list[int] = []
        try:
            opened.extend(self.open(file.name) for file in files)
        except BaseException:
            for fd in opened:
                os.close(fd)
            raise
        return StreamerReader(self, files, paths, opened)


def _unlistable(path: Path, error: OSError) -> SourceFailed:
    return SourceFailed(
        f"{path}: cannot be looked at: {error.strerror}: check that the daemon may read the folder, and that the "
        "file system it is on answers"
    )


def _source_file(name: str, status: os.stat_result) -> SourceFile:
    # Who writes a file anew may set its mtime back (rsync --inplace -t), its ctime nobody.
    return SourceFile(name, status.st_size, f"{status.st_ino}-{status.st_mtime_ns}-{status.st_ctime_ns}")


class FileReader:
    """Threads that take extents from the sink and read them to where they belong."""

    def __init__(self, source: FileSource, files: Sequence[SourceFile]) -> None:
        self._source = source
        self._files = files
        self._fds: dict[int, int] = {}
        self._lock = threading.Lock()

    def run(self, sink: Sink) -> None:
        errors: list[BaseException] = []

        def work() -> None:
            try:
                while (extent := sink.next()) is not None:
                    self._bring(sink, extent)
            except BaseException as error:
                errors.append(error)
                sink.stop()

        threads = [threading.Thread(target=work, name=f"read-{i}") for i in range(sink.threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def _bring(self, sink: Sink, extent: Extent) -> None:
        landing = sink.landing(extent)
        if landing is None:
            return
        while True:
            if sink.stopped:
                return
            try:
                with sink.phase("source"):
                    self._read(extent, landing)
                break
            except OSError as error:
                sink.wait(sink.failed(extent, self._files[extent.file].name, error.strerror or str(error)))
        sink.landed(extent, landing)

    def _read(self, extent: Extent, landing: Landing) -> None:
        fd = self._fd(extent.file)
        views = landing.views
        position, end = extent.offset, extent.offset + extent.nbytes
        while True:
            count = os.preadv(fd, views, position)
            position += count
            if position == end:
                return
            if count == 0:
                name = self._files[extent.file].name
                raise CheckpointChanged(f"{name}: ends at byte {position}, had {self._files[extent.file].size} bytes")
            while count:  # a short read: go on where it stopped
                taken = min(count, len(views[0]))
                views = [views[0][taken:], *views[1:]] if taken < len(views[0]) else views[1:]
                count -= taken

    def _fd(self, index: int) -> int:
        fd = self._fds.get(index)
        if fd is not None:
            return fd
        with self._lock:
            if index not in self._fds:
                planned = self._files[index]
                try:
                    fd = self._source.open(planned.name)
                except CheckpointNotFound as error:
                    raise CheckpointChanged(f"{planned.name} was there when planning: {error}") from None
                found = _source_file(planned.name, os.fstat(fd))
                if found != planned:
                    os.close(fd)
                    raise changed(planned, found)
                self._fds[index] = fd
            return self._fds[index]

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
