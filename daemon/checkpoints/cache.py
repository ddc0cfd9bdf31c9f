"""What the daemon keeps on disk: checkpoints' configuration files, and the leaf digests of what it has verified.

Both can be deleted at any time; they are fetched or computed again. Writing never fails a stage: without a disk, an
engine cannot be pointed at a local folder and a corrupt leaf cannot be named, and that is said in the log.
"""

from __future__ import annotations

import json
import logging
import posixpath
import shutil
import tempfile
from array import array
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from weightd.daemon.checkpoints.contents import Checkpoint
from weightd.daemon.checkpoints.listing import Listing
from weightd.daemon.layouts.digests import Leaves
from weightd.daemon.sources.base import Source, SourceFile

log = logging.getLogger(__name__)

MAX_FILES = 512
"""Configuration files kept of one checkpoint."""
MAX_FILE_BYTES = 64 << 20
MAX_TOTAL_BYTES = 256 << 20


class Cache:
    """A folder with ``checkpoints/<identity>/``, ``headers/<identity>/`` and ``digests/<digest>.json``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def metadata(self, source: Source, listing: Listing) -> Path | None:
        """The folder with the checkpoint's files that are not weights, fetched once; None where the disk refuses.

        The smallest files first, as many as the bounds allow. Raises what the source raises.
        """
        folder = self.folder / "checkpoints" / listing.identity
        if folder.is_dir():
            return folder
        chosen: list[SourceFile] = []
        total = 0
        for file in sorted(listing.metadata, key=lambda file: file.size):
            total += file.size
            if len(chosen) == MAX_FILES or file.size > MAX_FILE_BYTES or total > MAX_TOTAL_BYTES:
                log.warning("%s: %d files are not kept beside the weights, from %s (%d bytes) on", listing.uri,
                            len(listing.metadata) - len(chosen), file.name, file.size)  # fmt: skip
                break
            chosen.append(file)
        with ThreadPoolExecutor(16, thread_name_prefix="metadata") as pool:
            contents = list(pool.map(lambda file: source.read(file.name, 0, file.size), chosen))
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
            try:
                for file, content in zip(chosen, contents, strict=True):
                    path = partial / posixpath.normpath(file.name)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                partial.chmod(0o755)
                partial.rename(folder)
            except OSError:
                shutil.rmtree(partial, ignore_errors=True)
                if not folder.is_dir():  # else another stage of the same checkpoint was faster
                    raise
        except OSError as error:
            log.warning("%s: cannot keep configuration files in %s: %s", listing.uri, self.folder, error)
            return None
        return folder

    def keep_headers(self, checkpoint: Checkpoint) -> None:
        """Keep what peers without a way to the origin need to plan: the listing, and the files' headers."""
        listing = checkpoint.listing
        folder = self.folder / "headers" / listing.identity
        if folder.is_dir():
            return
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
            try:
                text = json.dumps({"uri": listing.uri, "weights": listing.weights, "metadata": listing.metadata})
                (partial / "listing.json").write_text(text)
                for index, prefix in enumerate(checkpoint.prefixes):
                    (partial / str(index)).write_bytes(prefix)
                partial.rename(folder)
            except OSError:
                shutil.rmtree(partial, ignore_errors=True)
                if not folder.is_dir():
                    raise
        except OSError as error:
            log.warning("%s: cannot keep headers for peers in %s: %s", listing.uri, self.folder, error)

    def kept_listing(self, identity: str) -> dict[str, Any] | None:
        """What ``keep_headers`` kept of a listing: uri, weights and metadata, each of (name, size, version)."""
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
        if path.exists():
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".partial-", delete=False) as file:
                partial = Path(file.name)
                try:
                    json.dump({name: [f"{leaf:x}" for leaf in of] for name, of in leaves.items()}, file)
                    file.close()
                    partial.replace(path)
                except OSError:
                    partial.unlink(missing_ok=True)
                    raise
        except OSError as error:
            log.warning("cannot keep digests in %s: %s", path.parent, error)

    def load_leaves(self, digest: str) -> dict[str, array[int]]:
        """What ``save_leaves`` kept; empty where nothing is known."""
        try:
            table = json.loads(self._digest_path(digest).read_bytes())
            return {str(name): array("Q", [int(leaf, 16) for leaf in leaves]) for name, leaves in table.items()}
        except (OSError, ValueError, AttributeError, TypeError, OverflowError):
            return {}

    def _digest_path(self, digest: str) -> Path:
        return self.folder / "digests" / (digest.replace(":", "-") + ".json")
