"""Checkpoints in folders and single files: parallel ``preadv``."""

from __future__ import annotations

import errno
import os
import resource
import stat as modes
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from weightd.daemon.errors import (
    CheckpointChanged,
    CheckpointNotFound,
    InvalidCheckpoint,
    NotAllowed,
    SourceFailed,
    UnreadableFile,
)
from weightd.daemon.filling.sink import Landing, Sink
from weightd.daemon.layouts.extents import Extent
from weightd.daemon.sources.base import Reader, SourceFile, changed, is_index
from weightd.daemon.sources.reading import read_in_threads
from weightd.daemon.sources.uris import Allow, file_path, file_uri

MAX_FILES = 100_000
"""Files in one folder, over which it is taken for no checkpoint."""
MAX_FOLDERS = 10_000
"""Folders in one, links to folders counted as often as they are met."""
_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG)
"""Gone, a link to itself, a folder that may not be entered: nothing that can be read. All else is no answer."""
MAX_DEPTH = 4
"""Folders below the checkpoint's own that are looked into."""
_READ_AHEAD = 128 << 10  # what Linux brings at once, as it comes
_IOV_MAX = 1024  # linux/uio.h: more views than these in one call are EINVAL


_Files = list[SourceFile]
_Names = list[str]


def open_source(uri: str, allow: Allow) -> FileSource:
    """A folder or a single file. Raises CheckpointNotFound; NotAllowed where links lead out of what is allowed."""
    return FileSource(Path(file_path(uri)), allow)


class FileSource:
    """A checkpoint below ``root``, or the one file that ``root`` is."""

    kind = "file"
    buffered = True
    max_extent = 2 << 20  # what was read is still in the processor's cache when it is hashed
    max_runs = 1 << 20
    min_range = 64 << 10
    min_gap = 8 << 10  # about what is copied from the page cache in the time that another call takes
    partial = ""

    def __init__(self, root: Path, allow: Allow) -> None:
        self._allow = allow
        allow.check(file_uri(os.path.realpath(root)))
        self.single = root.name if os.path.isfile(root) else None
        self._root = root.parent if self.single else root

    def _opened(self, path: Path, flags: int = 0) -> int:
        """A descriptor that only names what is at a path, which is allowed. Raises OSError, NotAllowed.

        Links are followed first, as one inside an allowed folder must not open what lies outside of it; and it is what
        has been opened that is looked at, as a link may be another by the time that its path is opened.
        """
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC | flags)
        try:
            self._allow.check(file_uri(os.readlink(f"/proc/self/fd/{fd}")))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def list(self) -> list[SourceFile]:
        if self.single and not is_index(self.single):
            return [self.stat(self.single)]
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
        found: _Files = []
        folders = 0
        waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
        while waiting:
            folder, above = waiting.pop()
            folders += 1
            try:
                fd = self._opened(root / folder, os.O_DIRECTORY)
            except NotAllowed:
                if not folder:
                    raise
                continue  # what is in there is nobody's business here, names included
            except OSError as error:
                self._check_nothing(folder, error)
                continue
            try:
                status = os.fstat(fd)
                here = (status.st_dev, status.st_ino)
                if here in above:
                    continue  # a link to a folder that it is in
                files, within = self._entries(folder, fd)
            finally:
                os.close(fd)
            found += files
            if len(above) < MAX_DEPTH:
                waiting += [(name, (*above, here)) for name in within]
            if len(found) > MAX_FILES or folders > MAX_FOLDERS:
                what = f"{MAX_FILES} files" if len(found) > MAX_FILES else f"{MAX_FOLDERS} folders"
                raise InvalidCheckpoint(f"{self._root}: more than {what}: name the checkpoint's own folder")
        return sorted(found)

    def _entries(self, folder: str, fd: int) -> tuple[_Files, _Names]:
        """Files of a folder that is open, and folders in it, without hidden ones."""
        files: _Files = []
        folders: _Names = []
        try:
            entries = list(os.scandir(f"/proc/self/fd/{fd}"))
        except OSError as error:
            self._check_nothing(folder, error)
            return files, folders
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            try:
                if entry.is_dir():
                    if not entry.name.startswith("."):
                        folders.append(name)
                elif entry.is_file():
                    files.append(_source_file(name, os.stat(entry.path)))
            except OSError as error:
                self._check_nothing(name, error)
        return files, folders

    def _check_nothing(self, name: str, error: OSError) -> None:
        """Raise what an error means: of a file or folder below, that may be meant so; of the root, it is no answer."""
        if not name or error.errno not in _NOTHING_THERE:
            raise _unlistable(self._root / name, error) from None

    def _status(self, name: str) -> os.stat_result | None:
        try:
            return os.stat(self._root / name)
        except OSError as error:
            self._check_nothing(name, error)
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
        except PermissionError as error:
            raise UnreadableFile(f"{path}: {error.strerror}") from None
        except (FileNotFoundError, NotADirectoryError) as error:
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
        return StreamerReader(self, files, paths, opened=opened)


def _unlistable(path: Path, error: OSError) -> SourceFailed | UnreadableFile:
    if isinstance(error, PermissionError):
        return UnreadableFile(
            f"{path}: cannot be looked at: {error.strerror}: check that the daemon may read the folder"
        )
    return SourceFailed(f"{path}: cannot be looked at: {error.strerror}: check that the file system it is on answers")


def _source_file(name: str, status: os.stat_result) -> SourceFile:
    # Who writes a file anew may set its mtime back (rsync --inplace -t), its ctime nobody.
    return SourceFile(name, status.st_size, f"{status.st_ino}-{status.st_mtime_ns}-{status.st_ctime_ns}")


class FileReader:
    """Threads that take extents from the sink and read them to where they belong."""

    def __init__(self, source: FileSource, files: Sequence[SourceFile]) -> None:
        self._source = source
        self._files = files
        self._fds = _Descriptors(self._open)

    def run(self, sink: Sink) -> None:
        read_in_threads(sink, "read", partial(self._bring, sink))

    def _bring(self, sink: Sink, extent: Extent) -> None:
        landing = sink.landing(extent)
        if landing is None:
            return
        while True:
            if sink.stopped:
                return
            try:
                with sink.phase("source"), self._fds.of(extent.file) as fd:
                    self._read(fd, extent, landing)
                break
            except OSError as error:
                sink.wait(sink.failed(extent, self._files[extent.file].name, error.strerror or str(error)))
        sink.landed(extent, landing)

    def _read(self, fd: int, extent: Extent, landing: Landing) -> None:
        if extent.rows == 1:
            self._read_range(fd, extent.file, extent.offset, extent.nbytes, landing.views)
            return
        (view,), run = landing.views, extent.nbytes // extent.rows
        asked = extent.offset
        for row in range(extent.rows):
            position = extent.offset + row * extent.stride
            if position >= asked:
                # Else of what is on disk each row would be waited for by itself.
                os.posix_fadvise(fd, position, _READ_AHEAD, os.POSIX_FADV_WILLNEED)
                asked = position + _READ_AHEAD
            self._read_range(fd, extent.file, position, run, [view[row * run : (row + 1) * run]])

    def _read_range(self, fd: int, file: int, position: int, nbytes: int, views: list[memoryview]) -> None:
        first, end = 0, position + nbytes
        while True:
            count = os.preadv(fd, views[first : first + _IOV_MAX], position)
            position += count
            if position == end:
                return
            if count == 0:
                planned = self._files[file]
                raise CheckpointChanged(f"{planned.name}: ends at byte {position}, had {planned.size} bytes")
            while count >= len(views[first]):  # go on where it stopped
                count -= len(views[first])
                first += 1
            if count:
                views = [views[first][count:], *views[first + 1 :]]
                first = 0

    def _open(self, index: int) -> int:
        planned = self._files[index]
        try:
            fd = self._source.open(planned.name)
        except CheckpointNotFound as error:
            raise CheckpointChanged(f"{planned.name} was there when planning: {error}") from None
        found = _source_file(planned.name, os.fstat(fd))
        if found != planned:
            os.close(fd)
            raise changed(planned, found)
        return fd

    def close(self) -> None:
        self._fds.close()


class _Descriptors:
    """Descriptors of files, opened when they are needed; of those that nobody uses a bounded number stays open."""

    def __init__(self, open_file: Callable[[int], int]) -> None:
        self._open_file = open_file
        # A share of what the process may have: other stages read too, and engines come with connections.
        self._bound = max(8, min(512, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8))
        self._open: OrderedDict[int, int] = OrderedDict()
        """File's index → its descriptor, least recently used first."""
        self._users: dict[int, int] = {}
        self._lock = threading.Lock()

    @contextmanager
    def of(self, index: int) -> Iterator[int]:
        """A file's descriptor, which stays open meanwhile. Raises OSError, and what opening raises."""
        with self._lock:
            if index not in self._open:
                self._close_idle(self._bound - 1)
                try:
                    self._open[index] = self._open_file(index)
                except OSError as error:
                    if error.errno not in (errno.EMFILE, errno.ENFILE):
                        raise
                    self._close_idle(0)  # rather than wait for what is held here
                    self._open[index] = self._open_file(index)
            self._open.move_to_end(index)
            self._users[index] = self._users.get(index, 0) + 1
            fd = self._open[index]
        try:
            yield fd
        finally:
            with self._lock:
                self._users[index] -= 1
                if not self._users[index]:
                    del self._users[index]

    def _close_idle(self, keep: int) -> None:
        for index in list(self._open):
            if len(self._open) <= keep:
                return
            if index not in self._users:
                os.close(self._open.pop(index))

    def close(self) -> None:
        self._close_idle(0)
