"""Mappings of one process: shared by attachments that may do the same with them, and by no others."""

from __future__ import annotations

import re
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from tests.servers import Daemon


def protections(stage: str) -> list[str]:
    """How this process maps a stage's memory."""
    found = re.findall(rf"^\S+ (\S+) .*memfd:weightd:{stage}", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return sorted(found)


@pytest.mark.parametrize("first", [True, False], ids=["strict first", "plain first"])
def test_strict_and_plain_attachments_share_no_mapping(daemon: Daemon, tmp_path: Path, first: bool) -> None:
    save_file({"w": numpy.zeros(4096, numpy.float32)}, tmp_path / "m.safetensors")
    stage = daemon.stage(tmp_path)["id"]
    one, other = daemon.attach(stage=stage, strict=first), daemon.attach(stage=stage, strict=not first)
    assert protections(stage) == ["r--p", "rw-p"]
    strict, plain = (one, other) if first else (other, one)
    plain["w"].fill_(7)
    assert strict["w"].sum() == 0, "a write to a plain mapping shows in a strict one"
    again = daemon.attach(stage=stage, strict=first)
    assert protections(stage) == ["r--p", "rw-p"], "the same again is the same mapping"
    for weights in (one, other, again):
        weights.close()
