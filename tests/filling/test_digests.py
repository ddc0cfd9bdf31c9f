"""Digests as bytes land: leaves, tensors, checkpoints, SHA-256 of files, and what is expected of them."""

from __future__ import annotations

import hashlib
import itertools
import random
import threading
from array import array
from pathlib import Path
from typing import Any

import pytest
import xxhash

from tests.checkpoint_files import nbytes
from tests.filling.fills import DEFAULTS, MiB, bring, in_time, land, leaves_of, noise, prepared, roomy, store, tensor
from weightd.daemon.errors import DigestMismatch
from weightd.daemon.filling.fill import Fill
from weightd.daemon.filling.sink import Landing
from weightd.daemon.layouts.checkpoint import Split, checkpoint_layout
from weightd.daemon.layouts.digests import LEAF, checkpoint_digest, leaf_count, leaf_digest, tensor_digest
from weightd.daemon.layouts.extents import Extent
from weightd.daemon.limits import FillLimits


def test_leaf_digests_are_xxh3() -> None:
    assert MiB == LEAF
    assert leaf_digest(b"") == 0x2D06800538D394C2  # XXH3_64bits of nothing, from xxHash's own test vectors
    assert leaf_digest(memoryview(b"weights")) == xxhash.xxh3_64(b"weights", seed=0).intdigest()
    assert [leaf_count(size) for size in (0, 1, MiB - 1, MiB, MiB + 1, 5 * MiB)] == [0, 1, 1, 1, 2, 5]


@pytest.mark.parametrize(
    ("dtype", "shape", "prefix"),
    [
        ("F32", (), b"F32||4\n"),
        ("U8", (0,), b"U8|0|0\n"),
        ("BF16", (3, 5), b"BF16|3,5|30\n"),
        ("U8", (3, MiB), b"U8|3,1048576|3145728\n"),
        ("F4", (3, 2), b"F4|3,2|3\n"),
    ],
)
def test_a_tensor_digest_is_over_dtype_shape_length_and_little_endian_leaves(
    dtype: str, shape: tuple[int, ...], prefix: bytes
) -> None:
    data = noise(nbytes(dtype, shape), 3)
    leaves = leaves_of(data)
    text = prefix + b"".join(leaf.to_bytes(8, "little") for leaf in leaves)
    found = tensor_digest(dtype, shape, len(data), array("Q", leaves))
    assert found == "xxh3:" + xxhash.xxh3_128(text, seed=0).hexdigest()


def test_a_checkpoint_digest_is_over_names_and_tensor_digests_sorted_by_name() -> None:
    pairs = [("b", "xxh3:" + "1" * 32), ("a", "xxh3:" + "2" * 32), ("é", "xxh3:" + "3" * 32)]
    text = f"a\0xxh3:{'2' * 32}\nb\0xxh3:{'1' * 32}\né\0xxh3:{'3' * 32}\n".encode()
    want = "xxh3:" + xxhash.xxh3_128(text, seed=0).hexdigest()
    assert {checkpoint_digest(order) for order in itertools.permutations(pairs)} == {want}
    assert checkpoint_digest([]) == "xxh3:99aa06d3014798d86001c324468d497f"  # XXH3_128bits of nothing


def test_digests_stay_what_they_were_in_the_first_release() -> None:
    digest = tensor_digest("F32", (2, 2), 16, array("Q", leaves_of(bytes(range(16)))))
    assert digest == "xxh3:29a0b9683faf36e23acfe21f08ed5699"
    assert checkpoint_digest([("w", digest)]) == "xxh3:34a180c1d00b1fbeffeea112334a7ca5"


def test_the_same_bytes_under_another_dtype_or_shape_are_another_value() -> None:
    leaves = array("Q", leaves_of(bytes(16)))
    found = {tensor_digest(*identity, 16, leaves) for identity in (("F32", (4,)), ("I32", (4,)), ("F32", (2, 2)))}
    assert len(found) == 3


@pytest.mark.parametrize("expect", ["right", "wrong"])
@pytest.mark.parametrize("way", ["direct", "grouped", "bounced", "sliced", "unwanted"])
def test_a_leaf_that_is_not_the_expected_one_fails_the_fill_and_is_named(way: str, expect: str, tmp_path: Path) -> None:
    large, small = tensor("U8", (4, 2 * MiB), 1), tensor("U8", (1000,), 2)
    stored = store(tmp_path, {"first": tensor("U8", (10,)), "large": large, "small": small, "last": small})
    name, leaf = ("small", 0) if way == "grouped" else ("large", 5)
    known = {key: array("Q", leaves_of(stored.data[key])) for key in stored.data}
    if expect == "wrong":
        known[name][leaf] ^= 1 << 17
    wanted = DEFAULTS._replace(whole_tensors=way in ("sliced", "unwanted"))
    include = [key for key in stored.data if way != "unwanted" or key != "large"]
    ranks, size = {"bounced": ((0, 1), 2), "sliced": ((1,), 2)}.get(way, ((0,), 1))
    splits: dict[str, Split] = {"large": "replicate" if way == "bounced" else 1, "*": "replicate"}
    recipes = checkpoint_layout(stored.checkpoint.tensors, include=include, tp_size=size, tp_ranks=ranks, splits=splits)
    with prepared(stored, recipes, wanted, expected_leaves=known) as filled:
        if expect == "right":
            bring(stored, filled.fill)
            assert sorted(filled.verified[0]) == list(range(len(include)))
            return
        with pytest.raises(DigestMismatch) as mismatch:
            bring(stored, filled.fill)
        message = str(mismatch.value)
        right = leaves_of(stored.data[name])[leaf]
        for word in (f"tensor {name!r}", f"leaf {leaf} ", f"{leaf * MiB} ", f"{right:016x}", f"{right ^ 1 << 17:016x}"):
            assert word in message
        assert mismatch.value.details == {"tensor": name, "leaf": leaf}
        assert filled.fill.stopped
        for segment, recipe in enumerate(recipes):
            names = [recipe.entries[index].name for index in filled.verified[segment]]
            assert name not in names


@pytest.mark.parametrize("direction", ["forwards", "backwards", "shuffled"])
def test_sha256_is_that_of_the_file_in_whatever_order_its_ranges_land(direction: str, tmp_path: Path) -> None:
    stored = store(tmp_path, {f"t{i}": tensor("U8", (MiB * 3 // 2 + i,), i) for i in range(5)})
    content = stored.files()[0].read_bytes()
    recipes = checkpoint_layout(stored.checkpoint.tensors, tp_size=2, tp_ranks=(0, 1), splits={"*": "replicate"})
    wanted = DEFAULTS._replace(whole_files={0})
    prefixes = {0: stored.checkpoint.prefixes[0]}
    with prepared(stored, recipes, wanted, roomy(wanted, 1), sha256_prefixes=prefixes) as filled:
        extents = list(iter(filled.fill.next, None))
        if direction == "backwards":
            extents.reverse()
        elif direction == "shuffled":
            random.Random(1).shuffle(extents)
        for extent in extents:
            land(filled.fill, extent, content)
        assert filled.fill.sha256[0].hexdigest() == hashlib.sha256(content).hexdigest()


class LateFill(Fill):
    """Its first extent asks for its bounce buffer only after two others have landed, as a busy machine may have it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.first: Extent | None = None
        self.others = threading.Semaphore(0)

    def next(self) -> Extent | None:
        extent = super().next()
        self.first = self.first or extent
        return extent

    def landing(self, extent: Extent, *, wait: bool = True) -> Landing | None:
        if extent is self.first:
            self.others.acquire(timeout=0.5)
            self.others.acquire(timeout=0.5)
        return super().landing(extent, wait=wait)

    def landed(self, extent: Extent, landing: Landing) -> None:
        super().landed(extent, landing)
        self.others.release()


def test_ranges_that_wait_for_their_turn_in_a_files_sha256_never_starve_the_one_they_wait_for(tmp_path: Path) -> None:
    stored = store(tmp_path, {"t": tensor("U8", (6 * MiB,), 1)})
    recipes = checkpoint_layout(stored.checkpoint.tensors, tp_size=2, tp_ranks=(0, 1), splits={"*": "replicate"})
    wanted = DEFAULTS._replace(whole_files={0})
    limits = FillLimits(3, MiB, MiB, 2, 60.0)
    with prepared(
        stored, recipes, wanted, limits, LateFill, sha256_prefixes={0: stored.checkpoint.prefixes[0]}
    ) as filled:
        reader = stored.reader()
        in_time(lambda: reader.run(filled.fill), filled.fill, 6)
        reader.close()
        digest = hashlib.sha256(stored.files()[0].read_bytes()).hexdigest()
        assert filled.fill.sha256[0].hexdigest() == digest


@pytest.mark.parametrize("more", [1, MiB, 3 * MiB])
def test_a_tensor_that_is_longer_than_the_one_that_is_expected_is_refused_as_another(tmp_path: Path, more: int) -> None:
    stored = store(tmp_path, {"t": tensor("U8", (2 * MiB + more,))})
    known = {"t": array("Q", leaves_of(stored.data["t"][: 2 * MiB]))}
    with prepared(stored, checkpoint_layout(stored.checkpoint.tensors), expected_leaves=known) as filled:
        with pytest.raises(DigestMismatch, match="expected are 2: it is longer") as error:
            bring(stored, filled.fill)
        assert error.value.details["tensor"] == "t"
        account = filled.fill.account
        assert account.expected_leaf(0, 0, 1) == known["t"][1]
        assert account.expected_leaf(0, 0, 2) == -1, "what a peer brings of it is nothing that is expected"
