"""What the daemon keeps on disk: checkpoints' configuration files and headers, leaf digests of what it verified, and
layouts that engines have uploaded.

All of it can be deleted at any time; it is fetched or computed again. Writing never fails a stage: without a disk, an
engine cannot be pointed at a local folder and a corrupt leaf cannot be named, and that is said in the log.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import posixpath
import shutil
import tempfile
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from weightd.daemon.checkpoints import metadata
from weightd.daemon.checkpoints.contents import Checkpoint
from weightd.daemon.checkpoints.listing import Listing
from weightd.daemon.checkpoints.selection import LeftOut
from weightd.daemon.errors import CacheFailed, InvalidRequest, UnknownLayout
from weightd.daemon.layouts.digests import Leaves
from weightd.daemon.layouts.uploaded import Layout, parse_layout
from weightd.daemon.sources.base import Source, SourceFile

log = logging.getLogger(__name__)

_KINDS = ("checkpoints", "headers", "digests", "layouts")
_PARTIAL = ".partial-"
_OF_THE_NAME = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.EILSEQ}
"""What a name alone is refused for, while others can be written."""


class Metadata(NamedTuple):
    """A checkpoint's files that are not weights, as far as they are kept."""

    folder: Path | None
    """None where the disk refuses."""
    left_out: tuple[LeftOut, ...]
    """What is not in there."""


class Cache:
    """A folder with ``checkpoints/<identity>/``, ``headers/<identity>/``, ``digests/<digest>.json`` and
    ``layouts/<key>.json``.

    ``max_bytes`` bounds all of it together, except for what ``trim`` is told to leave; None: nothing does.
    """

    def __init__(self, folder: Path, max_bytes: int | None = None) -> None:
        self.folder = folder
        self._max_bytes = max_bytes

    def metadata(self, source: Source, listing: Listing) -> Metadata:
        """The folder with the checkpoint's files that are not weights, fetched once.

        As many as the bounds allow, by what they are worth; one that cannot be read, or has a name that cannot be
        kept, is left out, and tried again the next time. Raises SourceFailed where the source answers for none.
        """
        folder = self.folder / "checkpoints" / listing.identity
        chosen, left_out = metadata.choose(listing.metadata)
        try:
            missing = [file for file in chosen if not (folder / posixpath.normpath(file.name)).is_file()]
        except (OSError, ValueError):
            missing = list(chosen)
        found: list[tuple[SourceFile, bytes]] = []
        if missing:
            found, unread = metadata.fetch(source, missing)
            left_out += unread
        if left_out:
            log.warning("%s: %d files are not kept beside the weights, among them %s: %s", listing.uri,
                        len(left_out), *left_out[-1])  # fmt: skip
        try:
            if folder.is_dir():
                left_out += _write(folder, found)
            else:
                with self._folder_to_be(folder) as partial:
                    left_out += _write(partial, found)
                    partial.chmod(0o755)
            _used(folder)
        except OSError as error:
            log.warning("%s: cannot keep configuration files in %s: %s", listing.uri, self.folder, error)
            return Metadata(None, tuple(left_out))
        return Metadata(folder, tuple(left_out))

    @contextlib.contextmanager
    def _folder_to_be(self, folder: Path) -> Iterator[Path]:
        """A folder to fill, which then is ``folder``, unless another stage of the same checkpoint was faster."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder.parent))
        with _held(partial):
            try:
                yield partial
                partial.rename(folder)
            except OSError:
                shutil.rmtree(partial, ignore_errors=True)
                if not folder.is_dir():
                    raise

    def keep_headers(self, checkpoint: Checkpoint) -> None:
        """Keep what is needed to plan without a way to the origin: the listing, and the files' headers."""
        listing = checkpoint.listing
        folder = self.folder / "headers" / listing.identity
        try:
            if not folder.is_dir():
                with self._folder_to_be(folder) as partial:
                    kept = {"uri": listing.uri, "weights": listing.weights, "metadata": listing.metadata}
                    (partial / "listing.json").write_text(json.dumps({**kept, "index": listing.index}))
                    for index, prefix in enumerate(checkpoint.prefixes):
                        (partial / str(index)).write_bytes(prefix)
            _used(folder)
        except OSError as error:
            log.warning("%s: cannot keep headers in %s: %s", listing.uri, self.folder, error)

    def kept_listing(self, identity: str) -> dict[str, Any] | None:
        """What ``keep_headers`` kept of a listing: uri, index, weights, metadata, these of (name, size, version)."""
        try:
            found: dict[str, Any] = json.loads((self.folder / "headers" / identity / "listing.json").read_bytes())
        except (OSError, ValueError):
            return None
        return found

    def kept_bytes(self, identity: str, name: str, offset: int, length: int) -> bytes | None:
        """Bytes of a header or of a configuration file that was kept; None where they are not here."""
        listing = self.kept_listing(identity)
        if listing is None:
            return None
        weights = [file[0] for file in listing["weights"]]
        if name in weights:
            path = self.folder / "headers" / identity / str(weights.index(name))
        elif name in (file[0] for file in listing["metadata"]):
            path = self.folder / "checkpoints" / identity / posixpath.normpath(name)
        else:
            return None
        try:
            with path.open("rb") as file:
                file.seek(offset)
                return file.read(length)
        except OSError:
            return None

    def save_leaves(self, digest: str, leaves: Mapping[str, Leaves]) -> None:
        """Remember the leaf digests (by tensor name) of what has a digest (``xxh3:...`` or ``sha256:...``)."""
        path = self._digest_path(digest)
        try:
            if path.exists():
                _used(path)
                return
            _write_json(path, {name: [f"{leaf:x}" for leaf in of] for name, of in leaves.items()})
        except OSError as error:
            log.warning("cannot keep digests in %s: %s", path.parent, error)

    def load_leaves(self, digest: str) -> dict[str, array[int]]:
        """What ``save_leaves`` kept; empty where nothing is known."""
        try:
            path = self._digest_path(digest)
            table = json.loads(path.read_bytes())
            _used(path)
            return {str(name): array("Q", [int(leaf, 16) for leaf in leaves]) for name, leaves in table.items()}
        except (OSError, ValueError, AttributeError, TypeError, OverflowError):
            return {}

    def _digest_path(self, digest: str) -> Path:
        return self.folder / "digests" / (digest.replace(":", "-") + ".json")

    def keep_layout(self, layout: Layout, document: dict[str, Any]) -> None:
        """Keep a layout, of which ``document`` is what was uploaded. Raises CacheFailed: nothing else has it."""
        path = self._layout_path(layout.key)
        try:
            _write_json(path, document)
        except OSError as error:
            raise CacheFailed(f"layout {layout.key} cannot be kept in {path.parent}: {error.strerror}") from None

    def layout(self, key: str) -> Layout:
        """A layout that is kept. Raises UnknownLayout."""
        path = self._layout_path(key)
        try:
            found = parse_layout(key, json.loads(path.read_bytes()))
        except (OSError, ValueError, InvalidRequest) as error:
            if not isinstance(error, FileNotFoundError):
                log.warning("%s: %s", path, error)
            raise UnknownLayout(f"no layout is kept by the key {key}") from None
        _used(path)
        return found

    def layouts(self) -> list[str]:
        """The keys of all layouts that are kept, those used lately first."""
        found = [path for path in _entries(self.folder / "layouts") if not path.name.startswith(_PARTIAL)]
        return [path.name.removesuffix(".json") for path in sorted(found, key=_when_used, reverse=True)]

    def forget_layout(self, key: str) -> None:
        """Keep a layout no longer. Raises UnknownLayout."""
        try:
            self._layout_path(key).unlink()
        except OSError:
            raise UnknownLayout(f"no layout is kept by the key {key}") from None

    def _layout_path(self, key: str) -> Path:
        return self.folder / "layouts" / f"{key}.json"

    # ------------------------------------------------------------------ how much of it

    def clean(self) -> None:
        """Remove what writers that were killed have left unfinished. What one that lives is at, it holds locked."""
        for kind in _KINDS:
            for path in _entries(self.folder / kind):
                if not path.name.startswith(_PARTIAL):
                    continue
                with contextlib.suppress(OSError), _held(path):
                    _remove(path)

    def trim(self, in_use: Collection[str]) -> None:
        """Remove what was not used for longest, until the rest is within the bound.

        ``in_use``: identities and digests of what is resident or on its way, which stay whatever they take.
        """
        if self._max_bytes is None:
            return
        kept = {name.replace(":", "-") for name in in_use}
        found: list[tuple[float, int, Path]] = []
        total = 0
        for kind in _KINDS:
            for path in _entries(self.folder / kind):
                with contextlib.suppress(OSError):
                    nbytes, used = _size(path), path.stat().st_mtime
                    total += nbytes
                    if path.name.removesuffix(".json") not in kept and not path.name.startswith(_PARTIAL):
                        found.append((used, nbytes, path))
        for _, nbytes, path in sorted(found):
            if total <= self._max_bytes:
                return
            log.info("%s: %d bytes go, %d are kept and allowed are %d", path, nbytes, total, self._max_bytes)
            _remove(path)
            total -= nbytes


def _write_json(path: Path, value: Any) -> None:
    """Write a file, whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=_PARTIAL, delete=False) as file:
        partial = Path(file.name)
        try:
            with _held(partial):
                json.dump(value, file, separators=(",", ":"))
                file.close()
                partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def _when_used(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _write(folder: Path, files: Sequence[tuple[SourceFile, bytes]]) -> list[LeftOut]:
    """Write files below a folder, each whole or not at all; returned are those of impossible names. Raises OSError."""
    left_out: list[LeftOut] = []
    for file, content in files:
        path = folder / posixpath.normpath(file.name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd, partial = tempfile.mkstemp(prefix=_PARTIAL, dir=path.parent)
            try:
                with open(fd, "wb") as whole:
                    whole.write(content)
                os.chmod(partial, 0o644)
                os.rename(partial, path)
            except OSError:
                os.unlink(partial)
                raise
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno not in _OF_THE_NAME:
                raise
            left_out.append(LeftOut(file.name, f"a file cannot be called so here: {error}"))
    return left_out


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold a file or folder locked. Raises BlockingIOError where another process does."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _used(path: Path) -> None:
    """Note that it is used now."""
    with contextlib.suppress(OSError):
        os.utime(path)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _size(path: Path) -> int:
    """Bytes that a file, or all files below a folder, take."""
    if not path.is_dir():
        return path.stat().st_blocks * 512
    return sum(os.lstat(os.path.join(folder, name)).st_blocks * 512 for folder, _, names in os.walk(path)
               for name in [*names, "."])  # fmt: skip


def _remove(path: Path) -> None:
    if path.is_dir():
        # Out of the way first, so that nobody takes half of it for all.
        gone = path.with_name(_PARTIAL + path.name.removeprefix(_PARTIAL))
        with contextlib.suppress(OSError):
            path = path.rename(gone)
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
