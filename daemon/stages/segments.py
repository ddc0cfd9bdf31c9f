"""What is known of a stage's segments, as planned or as they are: manifests, leaf digests, what peers know them by."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import xxhash

from weightd.daemon.errors import UnknownStage
from weightd.daemon.layouts.digests import leaf_count
from weightd.daemon.stages.planning import Plan
from weightd.daemon.stages.stage import Stage
from weightd.ipc.manifest import Manifest


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
        tp_size=parallel.tp_size if parallel else len(plan.recipes),
        nbytes=recipe.nbytes,
        digest=digest,
        checkpoint_digest=checkpoint_digest,
        metadata=stage.metadata,
        names=[entry.name for entry in recipe.entries],
        dtypes=[entry.dtype for entry in recipe.entries],
        shapes=[entry.shape for entry in recipe.entries],
        offsets=[entry.offset for entry in recipe.entries],
        digests=digests,
        layout=recipe.layout or None,
    )


def entry_files(plan: Plan, index: int) -> list[int]:
    """For each tensor of a planned segment, the index of the checkpoint's file that it is from."""
    recipe, tensors = plan.recipes[index], plan.checkpoint.tensors
    files = {copy.entry: tensors[copy.tensor].file for copy in recipe.copies}
    return [files.get(entry, 0) for entry in range(len(recipe.entries))]


def segment_leaves(stage: Stage, index: int) -> list[memoryview]:
    """Leaf digests of each tensor of a ready stage's segment. Raises UnknownStage where it goes meanwhile."""
    ledger = stage.ledger
    counts = [_leaf_counts(stage, before) for before in range(index + 1)]
    if ledger is None:
        raise UnknownStage(f"stage {stage.id} has gone meanwhile: stage it again")
    # The ledger has them of all segments, one after another.
    return ledger.leaves(counts[-1], sum(sum(before) for before in counts[:-1]))


def _leaf_counts(stage: Stage, index: int) -> Sequence[int]:
    """Leaves of each tensor of a ready stage's segment, for which its manifest is decoded once."""
    counts = stage.leaf_counts.get(index)
    if counts is None:
        manifests = stage.manifests
        if index >= len(manifests):
            raise UnknownStage(f"stage {stage.id} has gone meanwhile: stage it again")
        counts = stage.leaf_counts[index] = array(
            "I", (leaf_count(entry.nbytes) for entry in manifests[index].read()[0])
        )
    return counts


def key_of(stage: Stage) -> str:
    """What peers know a planned or ready stage by.

    Equal for stages with the same bytes in the same places: the checkpoint's identity, and all segments' layouts.
    """
    assert stage.listing is not None
    if stage.manifests:
        manifests = [manifest.read()[0] for manifest in stage.manifests]
    else:
        assert stage.plan is not None
        manifests = [segment_manifest(stage, stage.plan, index) for index in range(len(stage.plan.recipes))]
    state = xxhash.xxh3_128(stage.listing.identity.encode())
    for manifest in manifests:
        state.update((manifest.layout or "").encode())
        for name, dtype, shape, offset in zip(
            manifest.names, manifest.dtypes, manifest.shapes, manifest.offsets, strict=True
        ):
            state.update(f"\0{name}\0{dtype}{tuple(shape)}{offset}".encode())
        state.update(b"\n")
    return str(state.hexdigest())
