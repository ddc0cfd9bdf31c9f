"""Bounds of checkpoints, each at its very edge: what is allowed is taken, one more is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint_files import raw_file
from tests.checkpoints.lies import FILE, named, opened, shaped
from weightd.daemon.checkpoints import header
from weightd.daemon.checkpoints.header import (
    MAX_DIMENSIONS,
    MAX_HEADER_BYTES,
    MAX_NAME_BYTES,
    MAX_TENSOR_BYTES,
    MAX_TENSORS,
    check_name,
    check_unique,
    header_length,
    parse_header,
    parse_object,
)
from weightd.daemon.errors import InvalidCheckpoint, InvalidRequest
from weightd.daemon.sources.file import MAX_DEPTH, FileSource
from weightd.daemon.sources.uris import MAX_URI_BYTES, Allow, canonical
from weightd.daemon.tensors import TensorInfo

FEW = 5
"""Tensors, where a million would take long."""


def few(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_TENSORS == 1_000_000
    monkeypatch.setattr(header, "MAX_TENSORS", FEW)


def tensors(count: int, metadata: bool) -> bytes:
    """A header of so many empty tensors."""
    table = [f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(count)]
    return ("{" + ",".join([*table, *(['"__metadata__":{}'] if metadata else [])]) + "}").encode()


def length(nbytes: int) -> int:
    return header_length(FILE, nbytes.to_bytes(8, "little"), 1 << 40)


@pytest.mark.parametrize(
    ("take", "most"),
    [
        (length, MAX_HEADER_BYTES),
        (lambda count: length(count) and header_length(FILE, (100).to_bytes(8, "little"), 108 - count), 0),
        (lambda count: check_name(FILE, "n" * count), MAX_NAME_BYTES),
        (lambda count: check_name(FILE, "é" * (count // 2) + "n" * (count % 2)), MAX_NAME_BYTES),
        (lambda count: check_unique(["a"], [TensorInfo("t", "U8", (), 0, 0, 0)] * count), MAX_TENSORS),
    ],
    ids=["bytes of a header", "bytes past the end of the file", "a name", "a name in UTF-8", "tensors of all files"],
)
def test_a_number_is_taken_up_to_its_limit_and_no_further(take: Callable[[int], object], most: int) -> None:
    take(most)
    with pytest.raises(InvalidCheckpoint):
        take(most + 1)


@pytest.mark.parametrize("metadata", [False, True], ids=["alone", "beside metadata"])
def test_a_header_holds_so_many_tensors_and_no_more(metadata: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    for count in (FEW, FEW + 1):
        text = tensors(count, metadata)
        parse = lambda text=text: parse_header(FILE, 0, text, 8 + len(text))  # noqa: E731
        if count == FEW:
            assert len(parse()) == FEW
        else:
            with pytest.raises(InvalidCheckpoint, match=f"{FEW + 1} tensors, allowed are {FEW}"):
                parse()


def test_a_header_holds_so_many_objects_and_lists_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    text = b'{"t":[' + b",".join([b"[]"] * (4 * FEW - 2)) + b"]}"
    assert list(parse_object(FILE, text)) == ["t"]
    with pytest.raises(InvalidCheckpoint, match=f"{4 * FEW + 1} objects and lists, allowed are {4 * FEW}"):
        parse_object(FILE, text.replace(b"]]}", b"],[]]}"))


@pytest.mark.parametrize(
    ("most", "more"),
    [
        (named("n" * MAX_NAME_BYTES), named("n" * (MAX_NAME_BYTES + 1))),
        (shaped(*[1] * MAX_DIMENSIONS, data=b"x"), shaped(*[1] * (MAX_DIMENSIONS + 1), data=b"x")),
        (shaped(MAX_TENSOR_BYTES, 0), shaped(MAX_TENSOR_BYTES + 1, 0)),
        (shaped(2, MAX_TENSOR_BYTES // 2, 0), shaped(2, MAX_TENSOR_BYTES // 2 + 1, 0)),
        (raw_file(b'{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
         raw_file(b'{"t":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"x")),
    ],
    ids=["a name", "dimensions", "a size", "a product", "bytes of data"],
)  # fmt: skip
def test_a_file_at_a_limit_is_a_checkpoint_and_one_past_it_is_none(most: bytes, more: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(most)
    assert len(opened(tmp_path).tensors) == 1
    (tmp_path / FILE).write_bytes(more)
    with pytest.raises(InvalidCheckpoint):
        opened(tmp_path)


def test_a_file_is_found_as_deep_as_is_looked_and_no_deeper(tmp_path: Path) -> None:
    folder = tmp_path
    for depth in range(MAX_DEPTH + 2):
        (folder / f"{depth}.txt").touch()
        folder = folder / "d"
        folder.mkdir()
    found = {file.name.rpartition("/")[2] for file in FileSource(tmp_path, Allow()).list()}
    assert found == {f"{depth}.txt" for depth in range(MAX_DEPTH + 1)}


def test_a_uri_has_so_many_bytes_and_no_more() -> None:
    bucket = "s3://bucket/"
    assert canonical(bucket + "k" * (MAX_URI_BYTES - len(bucket)))
    with pytest.raises(InvalidRequest, match=str(MAX_URI_BYTES)):
        canonical(bucket + "k" * (MAX_URI_BYTES + 1 - len(bucket)))
