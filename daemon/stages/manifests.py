"""Segment manifests as descriptors: a stage's side of ``weightd.ipc.manifest``."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
from collections.abc import Sequence

from weightd.daemon.layouts.digests import leaf_count
from weightd.daemon.stages.stage import Plan, Stage
from weightd.ipc.manifest import Manifest

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SealedManifest:
    """A manifest in a sealed memfd: its wire form, then what only the daemon wants to know again.

    ``nbytes`` is the length of the wire form; behind it, a list in JSON with the index of each tensor's file.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        """Take over a descriptor."""
        self.fd = fd
        self.nbytes = nbytes

    @classmethod
    def seal(cls, manifest: Manifest, files: Sequence[int] = ()) -> SealedManifest:
        """Write it down. Raises OSError."""
        text = manifest.encode()
        fd = os.memfd_create("weightd:manifest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            view = memoryview(text + json.dumps(list(files), separators=(",", ":")).encode())
            while view:
                view = view[os.write(fd, view) :]
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError:
            os.close(fd)
            raise
        return cls(fd, len(text))

    def read(self) -> tuple[Manifest, list[int]]:
        """The manifest, and the index of each tensor's file."""
        text = os.pread(self.fd, os.fstat(self.fd).st_size, 0)
        return Manifest.decode(text[: self.nbytes]), json.loads(text[self.nbytes :])

    def close(self) -> None:
        """Let the descriptor go."""
        os.close(self.fd)


def segment_manifest(
    stage: Stage,
    plan: Plan,
    index: int,
    digests: list[str] | None = None,
    digest: str | None = None,
    checkpoint_digest: str | None = None,
) -> Manifest:
    """The manifest of one of a planned stage's segments; digests where it has them.

    The plan is the caller's: the stage may become ready meanwhile, and lets its own go then.
    """
    recipe = plan.recipes[index]
    parallel = stage.request.parallel
    return Manifest(
        stage=stage.id,
        model=stage.uri,
        device=stage.devices[index],
        tp_rank=recipe.rank,
        tp_size=parallel.tp_size if parallel else 1,
        nbytes=recipe.nbytes,
        digest=digest,
        checkpoint_digest=checkpoint_digest,
        metadata=stage.metadata,
        names=[entry.name for entry in recipe.entries],
        dtypes=[entry.dtype for entry in recipe.entries],
        shapes=[entry.shape for entry in recipe.entries],
        offsets=[entry.offset for entry in recipe.entries],
        digests=digests,
    )


def entry_files(plan: Plan, index: int) -> list[int]:
    """For each tensor of a planned segment, the index of the checkpoint's file that it is from."""
    recipe, tensors = plan.recipes[index], plan.checkpoint.tensors
    files = {copy.entry: tensors[copy.tensor].file for copy in recipe.copies}
    return [files.get(entry, 0) for entry in range(len(recipe.entries))]


def segment_leaves(stage: Stage, index: int) -> list[memoryview]:
    """Leaf digests of each tensor of a ready stage's segment."""
    assert stage.ledger is not None
    # The ledger has them of all segments, one after another.
    counts = [[leaf_count(entry.nbytes) for entry in manifest.read()[0]] for manifest in stage.manifests[: index + 1]]
    return stage.ledger.leaves(itertools.chain.from_iterable(counts))[-len(counts[-1]) :]
