"""Segment manifests as descriptors: a stage's side of ``weightd.ipc.manifest``."""

from __future__ import annotations

import fcntl
import os

from weightd.daemon.stage import Stage
from weightd.ipc.manifest import Manifest

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def segment_manifest(
    stage: Stage,
    index: int,
    digests: list[str] | None = None,
    digest: str | None = None,
    checkpoint_digest: str | None = None,
) -> Manifest:
    """The manifest of a planned stage's segment; digests where it has them."""
    assert stage.plan is not None
    recipe = stage.plan.recipes[index]
    parallel = stage.request.parallel
    return Manifest(
        stage=stage.id,
        model=stage.uri,
        device=stage.device,
        tp_rank=recipe.rank,
        tp_size=parallel.tp_size if parallel else 1,
        nbytes=recipe.nbytes,
        digest=digest,
        checkpoint_digest=checkpoint_digest,
        metadata=stage.plan.metadata_folder,
        names=[entry.name for entry in recipe.entries],
        dtypes=[entry.dtype for entry in recipe.entries],
        shapes=[entry.shape for entry in recipe.entries],
        offsets=[entry.offset for entry in recipe.entries],
        digests=digests,
    )


def manifest_fd(manifest: Manifest) -> int:
    """A manifest in its wire form, in a sealed memfd of exactly its size."""
    text = manifest.encode()
    fd = os.memfd_create("weightd:manifest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(text)
        while view:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd
