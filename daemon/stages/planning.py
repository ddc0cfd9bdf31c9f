"""Planning a stage: headers, layout and configuration files. Nothing is allocated, no byte of weights is read.

Plain blocking functions, run in threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from weightd.daemon.checkpoints.cache import Cache
from weightd.daemon.checkpoints.contents import Checkpoint, open_checkpoint
from weightd.daemon.checkpoints.kept import KeptSource
from weightd.daemon.checkpoints.listing import Listing
from weightd.daemon.checkpoints.selection import LeftOut
from weightd.daemon.devices.base import Device
from weightd.daemon.errors import InvalidRequest, SourceFailed
from weightd.daemon.layouts.checkpoint import checkpoint_layout
from weightd.daemon.layouts.recipe import Recipe
from weightd.daemon.observing.clock import Clock
from weightd.daemon.sources.base import Source
from weightd.daemon.stages.request import Parallel, StageRequest


@dataclass(frozen=True)
class SegmentInfo:
    """What is to be known of a segment without its manifest. ``nbytes`` is what its layout takes."""

    rank: int
    nbytes: int
    tensors: int


@dataclass(frozen=True)
class Plan:
    """Everything that is known before a byte of weights is read."""

    checkpoint: Checkpoint
    recipes: Sequence[Recipe]
    metadata: str | None
    """Folder with its configuration files."""
    left_out: tuple[LeftOut, ...] = ()
    """Configuration files that are not in there."""

    @property
    def infos(self) -> tuple[SegmentInfo, ...]:
        """Its segments."""
        return tuple(SegmentInfo(recipe.rank, recipe.nbytes, len(recipe.entries)) for recipe in self.recipes)


def make_plan(
    source: Source,
    listing: Listing,
    request: StageRequest,
    cache: Cache,
    clock: Clock | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Plan:
    """Read the headers, compute the layout, fetch the configuration files. Allocates nothing. Tells ``clock``.

    Raises InvalidCheckpoint, InvalidRequest, UnknownLayout, CheckpointNotFound, CheckpointChanged, SourceFailed;
    Cancelled once ``cancelled`` says so.
    """
    clock = clock or Clock()
    clock.enter("source")
    source.fetch(listing.weights)
    clock.enter("headers")
    checkpoint = open_checkpoint(source, listing)
    parallel = request.parallel or Parallel()
    recipes = [
        cache.layout(key).recipe_for(checkpoint.tensors, rank) for rank, key in enumerate(request.layouts)
    ] or checkpoint_layout(
        checkpoint.tensors,
        include=request.tensors.include,
        exclude=request.tensors.exclude,
        tp_size=parallel.tp_size,
        tp_ranks=parallel.ranks,
        splits=parallel.map,
        cancelled=cancelled,
    )
    expected_sha256(checkpoint, request)
    folder, left_out = cache.metadata(source, listing)
    return Plan(checkpoint, recipes, str(folder) if folder else None, left_out)


def read_headers(source: Source, listing: Listing, cache: Cache) -> tuple[Checkpoint, str | None]:
    """A checkpoint's headers, from the cache where it has them, and the folder with its configuration files.

    Reads no weights. Raises as ``make_plan`` does.
    """
    folder, _ = cache.metadata(source, listing)
    kept = None
    if cache.kept_listing(listing.identity) is not None:
        with contextlib.suppress(SourceFailed):  # some of it was given up for room
            kept = open_checkpoint(KeptSource(source, cache, listing), listing)
    if kept is None:
        source.fetch(listing.weights)
        kept = open_checkpoint(source, listing)
    cache.keep_headers(kept)
    return kept, str(folder) if folder else None


def expected_sha256(checkpoint: Checkpoint, request: StageRequest) -> dict[int, str]:
    """File index → SHA-256 that the request expects of it. Raises InvalidRequest for files that are not there."""
    expected = request.expect_digest
    names = [file.name for file in checkpoint.listing.weights]
    if isinstance(expected, str):
        if expected.startswith("xxh3:"):
            return {}
        if len(names) != 1:
            raise InvalidRequest(
                f"expect_digest: one SHA-256 is given and the checkpoint has {len(names)} files: "
                "map each file name to its own"
            )
        _check_hashable(checkpoint, names, [0])
        return {0: expected}
    if unknown := sorted((expected or {}).keys() - set(names)):
        raise InvalidRequest(f"expect_digest: {unknown[0]!r} is no file of the checkpoint, its files are {names[:10]}")
    _check_hashable(checkpoint, names, [names.index(name) for name in expected or {}])
    return {names.index(name): digest for name, digest in (expected or {}).items()}


def _check_hashable(checkpoint: Checkpoint, names: Sequence[str], files: Sequence[int]) -> None:
    for file in checkpoint.gaps.intersection(files):
        raise InvalidRequest(
            f"expect_digest: {names[file]} holds tensors that {checkpoint.listing.index} leaves out: these are not "
            "read, and so not hashed: expect the checkpoint digest (xxh3:...), or stage the file by its own URI"
        )


def allocated(recipes: Sequence[Recipe], devices: Sequence[Device]) -> dict[str, int]:
    """Bytes of capacity that the recipes' segments take of each device, by name; ``devices`` has each segment's."""
    needed: dict[str, int] = {}
    for recipe, device in zip(recipes, devices, strict=True):
        needed[device.name] = needed.get(device.name, 0) + device.footprint(recipe.nbytes)
    return needed
