"""Manifests and leaves as they are read in threads, while the stage that they are of may go."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from weightd.daemon.errors import UnknownStage
from weightd.daemon.filling.ledger import Ledger
from weightd.daemon.stages.manifests import SealedManifest
from weightd.daemon.stages.request import StageRequest
from weightd.daemon.stages.segments import segment_leaves
from weightd.daemon.stages.stage import Stage
from weightd.ipc.manifest import Manifest

MiB = 1 << 20


def sealed(name: str, *sizes: int) -> SealedManifest:
    names = [f"{name}.{index}" for index in range(len(sizes))]
    offsets = [sum(sizes[:index]) for index in range(len(sizes))]
    return SealedManifest.seal(
        Manifest(
            "st-1", "file:///x", "cpu", 0, 1, sum(sizes), None, None, None, names, ["U8"] * len(sizes),
            [[size] for size in sizes], offsets, None,
        ),
        [0] * len(sizes),
    )  # fmt: skip


@pytest.fixture
def stage() -> Iterator[Stage]:
    """Two segments: of tensors with 1 and 3 leaves, and of one with 2."""
    stage = Stage("file:///x", ["cpu", "cpu"], StageRequest(model="/x"), None)
    stage.manifests = [sealed("a", MiB, 2 * MiB + 1), sealed("b", 2 * MiB)]
    stage.ledger = Ledger.new(0, 6, bytes(16))
    stage.ledger.leaves([6])[0][:] = memoryview(bytes(range(48))).cast("Q")
    yield stage
    for manifest in stage.manifests:
        manifest.close()
    if stage.ledger is not None:
        stage.ledger.close()


def test_what_is_closed_is_not_read_by_its_number_which_may_be_anothers() -> None:
    one = sealed("one", 5)
    with contextlib.closing(one.again()) as kept:
        number = one.fd
        one.close()
        one.close()
        with contextlib.closing(sealed("other", 7)) as other:
            assert other.fd == number, "the system gives the lowest number that is free"
            with pytest.raises(UnknownStage):
                one.read()
            with pytest.raises(UnknownStage):
                one.again()
        assert kept.read()[0].names == ["one.0"], "who holds it has it as long as it wants"


def test_a_segments_leaves_are_found_among_those_of_all_and_manifests_decoded_once(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = list(memoryview(bytes(range(48))).cast("Q"))
    decoded: list[SealedManifest] = []
    read = SealedManifest.read

    def counting(self: SealedManifest) -> tuple[Manifest, list[int]]:
        decoded.append(self)
        return read(self)

    monkeypatch.setattr(SealedManifest, "read", counting)
    for _ in range(3):
        assert [list(of) for of in segment_leaves(stage, 1)] == [digests[4:6]]
        assert [list(of) for of in segment_leaves(stage, 0)] == [digests[:1], digests[1:4]]
    assert decoded == stage.manifests


def test_leaves_of_a_stage_that_goes_meanwhile_are_refused_as_such(stage: Stage) -> None:
    stage.manifests[0].close()
    with pytest.raises(UnknownStage):
        segment_leaves(stage, 0)
    stage.manifests = []
    with pytest.raises(UnknownStage):
        segment_leaves(stage, 0)
