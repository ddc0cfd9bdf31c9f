"""Engines' own layouts between nodes: who has the same one gives it, and nobody is given another's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from tests.fault_proxy import FaultProxy
from tests.layouts.uploads import Upload, checkpoint, other, upload
from tests.peers.fleet import Fleet, from_peers, weight_bytes
from tests.servers import Daemon, SeaweedFS
from weightd.ipc import attach


def holds(daemon: Daemon, uri: str, made: Upload) -> bool:
    daemon.client.put_layout(made.key.digest, made.document)
    with attach(uri, layout=made.key.digest, socket=daemon.runtime_dir, timeout=120) as weights:
        return all(torch.equal(weights[name], expected) for name, expected in made.expected.items())


def test_a_node_has_an_engines_layout_from_one_that_is_ready(
    fleet: Callable[[int], Fleet], origin: FaultProxy, s3: SeaweedFS, tmp_path: Path
) -> None:
    made = upload(checkpoint(tmp_path / "model"))
    uri = s3.upload(tmp_path / "model", "layouts-of-peers")
    nodes = fleet(2)
    assert holds(nodes.start(), uri, made)
    before = weight_bytes(origin)
    second = nodes.start()
    assert holds(second, uri, made)
    (stage,) = second.client.stages()
    assert stage["bytes_by_source"]["peer"] == stage["bytes_done"] > 0
    # What is cast, padded or there twice is moved as it lies in the segment.
    assert 0 < from_peers(second) <= sum(segment["nbytes"] for segment in stage["segments"])
    assert weight_bytes(origin) == before


def test_two_layouts_that_look_alike_are_not_taken_for_each_other(
    fleet: Callable[[int], Fleet], s3: SeaweedFS, tmp_path: Path
) -> None:
    made = upload(checkpoint(tmp_path / "model"))
    uri = s3.upload(tmp_path / "model", "layouts-alike")
    # The same key, entries and offsets, in other words: what is the same to the byte is not known to be.
    alike = Upload(made.key, other(made), made.expected)
    nodes = fleet(2)
    first = nodes.start()
    assert holds(first, uri, made)
    second = nodes.start()
    assert holds(second, uri, alike)
    keys = [daemon.client.stages()[0]["key"] for daemon in (first, second)]
    assert keys[0] != keys[1]
    assert from_peers(second) == 0
