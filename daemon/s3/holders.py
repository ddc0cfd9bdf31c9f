"""Which stages hold the file at a URI, or will, and as which of their files."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from typing import NamedTuple

from weightd.daemon.sources.base import SourceFile
from weightd.daemon.stages.stage import Stage


class Holder(NamedTuple):
    """A stage that holds a file. ``weight``: which of the stage's weights it is; -1: one of its configuration files."""

    stage: Stage
    file: SourceFile
    weight: int


def folder(stage: Stage) -> str:
    """The URI, ending with a slash, below which a stage's files are called as its listing has them."""
    assert stage.listing is not None
    uri = stage.uri.partition("@")[0] if stage.uri.startswith("hf:") else stage.uri
    if [file.name for file in stage.listing.weights] == [posixpath.basename(uri)]:
        return uri.rpartition("/")[0] + "/"
    return uri.rstrip("/") + "/"


def held(stage: Stage) -> list[Holder]:
    """All files of a stage, which has been listed."""
    assert stage.listing is not None
    weights = [Holder(stage, file, index) for index, file in enumerate(stage.listing.weights)]
    return weights + [Holder(stage, file, -1) for file in stage.listing.metadata]


def holders(stages: Iterable[Stage], uri: str) -> list[Holder]:
    """Stages that hold the file at a URI; the best first."""
    found = []
    for stage in stages:
        if stage.finished and stage.state != "ready":
            continue
        if stage.revoked_until is None and stage.listing is not None and uri.startswith(folder(stage)):
            name = uri[len(folder(stage)) :]
            found += [holder for holder in held(stage) if holder.file.name == name]
    return sorted(found, key=_worth, reverse=True)


def _worth(holder: Holder) -> tuple[bool, bool, bool, int]:
    stage = holder.stage
    tensors = sum(info.tensors for info in stage.infos)
    # Of an engine's own layout no file can be made.
    return not stage.request.layouts, stage.state == "ready", stage.device.startswith("cpu"), tensors


def is_of_a_revision(stage: Stage) -> bool:
    """Whether it is of a revision of the Hugging Face Hub that was named, which the main one may not be."""
    return stage.uri.startswith("hf:") and "@" in stage.uri
