"""What the HTTP API says of checkpoints' headers, and of engines' own layouts."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, Field

from weightd.daemon.checkpoints.contents import Checkpoint
from weightd.daemon.layouts.uploaded import Layout
from weightd.ipc.recipe import headers_digest


class CheckpointRecord(BaseModel):
    """What a checkpoint's headers say."""

    model: str = Field(description="Canonical URI of the checkpoint.")
    identity: str = Field(description="What tells it from another at the same URI: files' names, sizes, versions.")
    headers: str = Field(description="Digest of its tensors' names, dtypes and shapes: what layouts are keyed by.")
    nbytes: int = Field(description="Bytes of its tensors.")
    metadata: str | None = Field(description="Folder with its configuration files, as the daemon sees it.")
    tensors: list[tuple[str, str, list[int]]] = Field(description="Name, dtype and shape of each of its tensors.")


class LayoutRecord(BaseModel):
    """An engine's own layout of a checkpoint for one of its processes."""

    key: str = Field(description="What stage requests name it by: the digest of `about`.")
    digest: str = Field(description="Of all of it, which a segment's manifest names as well.")
    about: dict[str, Any] = Field(description="What decides it: engine, version, parallel plan and rank, ...")
    entries: int = Field(description="Parameters in it.")
    copies: int = Field(description="Boxes of tensors that it takes.")
    nbytes: int = Field(description="Bytes of a segment in it.")


class LayoutList(BaseModel):
    """Layouts that are kept, those used last first; at most 100."""

    layouts: list[LayoutRecord] = Field(description="The layouts.")


def checkpoint_json(checkpoint: Checkpoint, metadata: str | None) -> bytes:
    """A CheckpointRecord. Takes a while where there are many tensors."""
    tensors = [(tensor.name, tensor.dtype, tensor.shape) for tensor in checkpoint.tensors]
    record = {
        "model": checkpoint.listing.uri,
        "identity": checkpoint.listing.identity,
        "headers": headers_digest(tensors),
        "nbytes": checkpoint.nbytes,
        "metadata": metadata,
        "tensors": tensors,
    }
    return json.dumps(record, separators=(",", ":")).encode()


def layout_record(layout: Layout) -> LayoutRecord:
    """What is to be known of a layout without all of it."""
    recipe = layout.recipe
    return LayoutRecord(
        key=layout.key,
        digest=layout.digest,
        about=layout.about,
        entries=len(recipe.entries),
        copies=len(recipe.copies),
        nbytes=recipe.nbytes,
    )
