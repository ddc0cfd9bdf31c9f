"""Headers and indexes from strangers: every way to lie is refused by name and number."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint_files import INDEX, header_of, raw_file, safetensors_bytes
from tests.checkpoints.lies import DATA, FILE, SHORT, TRUE, lie, long, named, opened, shaped, twice
from weightd.daemon.checkpoints.header import (
    MAX_DIMENSIONS,
    MAX_HEADER_BYTES,
    MAX_NAME_BYTES,
    MAX_TENSOR_BYTES,
    MAX_TENSORS,
    TensorInfo,
    check_unique,
    parse_header,
)
from weightd.daemon.checkpoints.selection import read_index
from weightd.daemon.errors import InvalidCheckpoint

LIES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    # the length
    "a header length over the limit": (
        raw_file(b"{}", length=MAX_HEADER_BYTES + 1),
        ("header length", "100000001", "100000000"),
    ),
    "the largest header length there is": (raw_file(b"{}", length=2**64 - 1), (str(2**64 - 1), "100000000")),
    "a header length past the end of the file": (
        raw_file(b"{}", length=3),
        ("header length is 3 bytes", "2 bytes follow"),
    ),
    "an empty file": (b"", ("0 bytes", "at least 8")),
    "a file shorter than its length field": (b"\2\0\0\0\0\0\0", ("7 bytes", "at least 8")),
    # the text
    "no header": (raw_file(b""), ("header", "JSON")),
    "invalid UTF-8": (raw_file(b'{"\xff": 1}'), ("header", "UTF-8", "byte 2")),
    "a byte order mark": (raw_file(b"\xef\xbb\xbf{}"), ("header", "JSON")),
    "invalid JSON": (raw_file(b'{"a":}'), ("header", "JSON", "char 5")),
    "something after the JSON": (raw_file(b"{} {}"), ("header", "JSON", "char 3")),
    "a raw control character in a string": (raw_file(b'{"a\n": 1}'), ("header", "JSON")),
    "NaN": (raw_file(b'{"t": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, 0]}}'), ("header", "NaN")),
    "Infinity": (raw_file(b'{"t": {"dtype": "U8", "shape": [-Infinity], "data_offsets": [0, 0]}}'), ("-Infinity",)),
    "a float too large to be one": (
        raw_file(b'{"t": {"dtype": "U8", "shape": [1e9999], "data_offsets": [0, 0]}}'),
        ("'t'", "shape", "inf"),
    ),
    "a number of ten thousand digits": (
        raw_file(b'{"t": {"dtype": "U8", "shape": [' + b"9" * 10_000 + b'], "data_offsets": [0, 0]}}'),
        ("header", "JSON", "4300"),
    ),
    "a list at the top level": (raw_file(b"[]"), ("header", "object", "list")),
    "a string at the top level": (raw_file(b'"{}"'), ("header", "object", "str")),
    "null at the top level": (raw_file(b"null"), ("header", "object", "NoneType")),
    "lists nested a hundred thousand deep": (raw_file(b'{"t":' + b"[" * 100_000), ("header", "nested too deeply")),
    "objects nested a hundred thousand deep": (raw_file(b'{"t":' * 100_000), ("header", "nested too deeply")),
    # keys
    "the same tensor twice": (
        twice(
            '{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"t":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}'
        ),
        ("header", "'t'", "more than once"),
    ),
    "the same tensor twice in two spellings": (
        twice('{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"\\u0074":{}}'),
        ("header", "'t'", "more than once"),
    ),
    "two shapes of one tensor": (
        twice('{"t":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}}'),
        ("header", "'shape'", "more than once"),
    ),
    "two __metadata__": (twice('{"__metadata__":{},"__metadata__":{}}'), ("'__metadata__'", "more than once")),
    "an object where a tensor is expected": (
        raw_file({"layer": {"weight": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}}, b"x"),
        ("'layer'", "no nesting", "'weight'"),
    ),
    "a list where a tensor is expected": (raw_file({"t": [1]}), ("'t'", "object", "list")),
    "null where a tensor is expected": (raw_file({"t": None}), ("'t'", "object", "NoneType")),
    "a field too many": (lie(offset=0), ("'second.weight'", "'offset'")),
    "a field too few": (raw_file({"t": {"dtype": "U8", "shape": [0]}}), ("'t'", "data_offsets", "['dtype', 'shape']")),
    "metadata that is a list": (raw_file({"__metadata__": []}), ("__metadata__", "strings")),
    "metadata that holds a number": (raw_file({"__metadata__": {"step": 7}}), ("__metadata__", "strings")),
    # dtype
    "an unknown dtype": (lie(dtype="F33"), ("'second.weight'", "dtype", "'F33'", "BF16")),
    "a dtype in lower case": (lie(dtype="bf16"), ("'second.weight'", "dtype", "'bf16'", "BF16")),
    "a dtype that is a number": (lie(dtype=16), ("'second.weight'", "dtype", "'16'", "BF16")),
    "a dtype that is null": (lie(dtype=None), ("'second.weight'", "dtype", "'None'", "BF16")),
    "a dtype that is a list": (lie(dtype=["BF16"]), ("'second.weight'", "dtype", "BF16")),
    # shape
    "a negative size": (lie(shape=[-4]), ("'second.weight'", "shape", "-4", "from 0")),
    "two negative sizes that multiply to the right one": (lie(shape=[-2, -2]), ("'second.weight'", "shape", "-2")),
    "an absurd size": (lie(shape=[2**70]), ("'second.weight'", "shape", str(2**70), str(MAX_TENSOR_BYTES))),
    "a size of 400 bits": (lie(shape=[2**399]), ("'second.weight'", "shape", "400 bits", str(MAX_TENSOR_BYTES))),
    "sizes whose product is absurd": (
        lie(shape=[2**32, 2**32]),
        ("'second.weight'", "shape", str(2**65), str(MAX_TENSOR_BYTES)),
    ),
    "sizes whose product is 0 in 64 bits": (shaped(2**32, 2**32), ("'t'", "shape", str(2**64), str(MAX_TENSOR_BYTES))),
    # torch cannot view it, and safetensors refuses it: strides and products count the other dimensions.
    "an absurd product made empty by a last 0": (shaped(2**40, 2**40, 0), ("'t'", "shape", str(MAX_TENSOR_BYTES))),
    "an absurd product made empty by a first 0": (shaped(0, 2**40, 2**40), ("'t'", "shape", str(MAX_TENSOR_BYTES))),
    "a size that is true": (lie(shape=[True, 4]), ("'second.weight'", "shape", "True")),
    "a size that is a float": (lie(shape=[4.0]), ("'second.weight'", "shape", "4.0")),
    "a size that is a string": (lie(shape=["4"]), ("'second.weight'", "shape", "'4'")),
    "a size that is null": (lie(shape=[None]), ("'second.weight'", "shape", "None")),
    "a size that is a list": (lie(shape=[[4]]), ("'second.weight'", "shape", "[4]")),
    "a shape that is a number": (lie(shape=4), ("'second.weight'", "shape", "found 4", str(MAX_DIMENSIONS))),
    "a shape that is an object": (lie(shape={"0": 4}), ("'second.weight'", "shape", "'0'")),
    "too many dimensions": (lie(shape=[4] + [1] * 64), ("'second.weight'", "shape", "[4, 1, ", str(MAX_DIMENSIONS))),
    "packed elements that end within a byte": (
        shaped(3, dtype="F4", data=b"xx"),
        ("'t'", "shape", "[3]", "F4", "12 bits"),
    ),
    "six-bit elements that end within a byte": (
        shaped(2, dtype="F6_E2M3", data=b"xx"),
        ("'t'", "shape", "[2]", "F6_E2M3", "12 bits"),
    ),
    # byte ranges
    "a shape that takes more than the byte range": (lie(shape=[5]), ("'second.weight'", "8 bytes", "takes 10")),
    "a shape that takes less than the byte range": (lie(shape=[3]), ("'second.weight'", "8 bytes", "takes 6")),
    "a wider dtype than the byte range": (lie(dtype="F32"), ("'second.weight'", "F32", "8 bytes", "takes 16")),
    "a scalar with the bytes of four": (lie(shape=[]), ("'second.weight'", "8 bytes", "takes 2")),
    "an overlap": (
        lie(data_offsets=[20, 28]),
        ("'second.weight'", "data_offsets", "20", "overlaps", "'first.weight'", "24"),
    ),
    "two tensors at the same bytes": (
        raw_file({name: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]} for name in "ab"}, b"x"),
        ("'b'", "data_offsets", "0", "overlaps", "'a'", "1"),
    ),
    "an empty tensor within another": (
        raw_file(
            {
                "whole": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
                "empty": {"dtype": "U8", "shape": [0], "data_offsets": [2, 2]},
            },
            b"xxxx",
        ),
        ("'empty'", "data_offsets", "2", "overlaps", "'whole'", "4"),
    ),
    "a hole at the start": (
        raw_file({"t": {"dtype": "U8", "shape": [4], "data_offsets": [3, 7]}}, bytes(7)),
        ("'t'", "data_offsets", "3", "hole after", "the header", "0"),
    ),
    "a hole in the middle": (
        lie("third.weight", data_offsets=[33, 37], shape=[4]),
        ("'third.weight'", "data_offsets", "33", "hole after", "'second.weight'", "32"),
    ),
    "a hole at the end": (raw_file(header_of(TRUE), DATA + b"tail"), ("hole at the end", "data_offsets", "37", "41")),
    "data without a tensor": (raw_file({}, b"xyz"), ("hole at the end", "0", "3")),
    "a byte range that runs backwards": (lie(data_offsets=[32, 24]), ("'second.weight'", "backwards", "32", "24")),
    "a byte range that begins before the data": (
        lie("first.weight", data_offsets=[-1, 24]),
        ("'first.weight'", "data_offsets", "-1", "0"),
    ),
    "a byte range past the end of the file": (
        raw_file(header_of(TRUE), DATA[:-1]),
        ("'third.weight'", "data_offsets", "37", "36"),
    ),
    "a byte range of absurd numbers": (lie(data_offsets=[2**64, 2**64 + 8]), ("'second.weight'", str(2**64 + 8), "37")),
    "three numbers as byte range": (
        lie(data_offsets=[24, 32, 32]),
        ("'second.weight'", "data_offsets", "[24, 32, 32]"),
    ),
    "one number as byte range": (lie(data_offsets=[24]), ("'second.weight'", "data_offsets", "[24]")),
    "floats as byte range": (lie(data_offsets=[24.0, 32.0]), ("'second.weight'", "data_offsets", "24.0")),
    "booleans as byte range": (
        lie("third.weight", data_offsets=[False, True], shape=[1]),
        ("'third.weight'", "data_offsets", "False"),
    ),
    "strings as byte range": (lie(data_offsets=["24", "32"]), ("'second.weight'", "data_offsets", "'24'")),
    "null as byte range": (lie(data_offsets=None), ("'second.weight'", "data_offsets", "None")),
    # names
    "a name that climbs": (named("../x"), ("'../x'", "path")),
    "a name that climbs from within": (named("a/../b"), ("'a/../b'", "path")),
    "a name that ends climbing": (named("a/.."), ("'a/..'", "path")),
    "a name of two dots": (named(".."), ("'..'", "path")),
    "an absolute name": (named("/x"), ("'/x'", "path")),
    "a name with a backslash": (named("a\\b"), ("path",)),
    "a name with a NUL": (named("a\0b"), (r"'a\x00b'", "control characters")),
    "a name with a line break": (named("a\nb"), (r"'a\nb'", "control characters")),
    "a name with an escape sequence": (named("\x1b[2J"), (r"'\x1b[2J'", "control characters")),
    "an empty name": (named(""), ("0 bytes", f"1 to {MAX_NAME_BYTES}")),
    "a name that is too long": (named("n" * 4097), ("4097 bytes", f"1 to {MAX_NAME_BYTES}")),
    "a name that is too long in UTF-8": (named("é" * 2049), ("4098 bytes", f"1 to {MAX_NAME_BYTES}")),
    "a name with half a surrogate pair": (
        raw_file(rb'{"a\ud800b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', b"x"),
        (r"'a\ud800b'", "surrogate"),
    ),
    # size
    "more tensors than allowed": (
        raw_file(b"{" + b",".join(b'"%x":0' % i for i in range(MAX_TENSORS + 2)) + b"}"),
        ("1000002", "1000000"),
    ),
    "more lists than tensors could have": (
        raw_file(b'{"t":[' + b"[]," * 4 * MAX_TENSORS + b"[]]}"),
        ("4000003", "4000000"),
    ),
}
"""Way to lie → (file, what the message says beside the file's name)."""


@pytest.mark.parametrize("how", LIES)
def test_a_lying_file_is_refused_with_its_name_the_field_the_number_and_the_limit(how: str, tmp_path: Path) -> None:
    content, words = LIES[how]
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(InvalidCheckpoint) as refusal:
        opened(tmp_path)
    message = str(refusal.value)
    assert [word for word in (FILE, *words) if word not in message] == [], message
    assert len(message) < SHORT
    message.encode()  # half a surrogate pair in it could not be sent to anybody


def test_the_file_that_all_lies_are_made_from_is_accepted(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(safetensors_bytes(TRUE))
    assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in opened(tmp_path).tensors} == {
        name: (dtype, shape) for name, (dtype, shape, _) in TRUE.items()
    }


@pytest.mark.parametrize(
    "content",
    [
        twice(f'{{"{long()}":0,"{long()}":0}}'),
        raw_file({"t": {long(): 0}}),
        raw_file({"t": {long(str(i)): 0 for i in range(8)}}),
        raw_file({long(): 0}),
        lie(dtype=long()),
        lie(dtype=[long()]),
        lie(shape=long()),
        lie(shape=[long()]),
        lie(shape=[1] * 100_000),
        lie(shape={long(): 1}),
        lie(data_offsets=[long()]),
        lie(data_offsets=[0] * 100_000),
        lie(data_offsets=[-(2**10_000), 0]),
        lie(data_offsets=[0, 2**10_000]),
        lie(data_offsets=[2**10_000, 0]),
    ],
    ids=[
        "duplicate key", "unknown field", "unknown fields", "name", "dtype", "dtype in a list", "shape", "size",
        "sizes", "shape object", "byte range", "byte ranges", "negative start", "end", "start",
    ],
)  # fmt: skip
def test_a_message_about_something_endless_is_short(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(InvalidCheckpoint) as refusal:
        opened(tmp_path)
    assert len(str(refusal.value)) < SHORT


@pytest.mark.parametrize(
    "name", ["a/b", "a..b", "...", ".hidden", "a/.b", "a./b", "é", "層.0", "😀", "C:", "~", "a b", "%2e%2e/x", "'\""]
)
def test_a_name_that_is_unusual_but_no_path_trick_is_accepted(name: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(named(name))
    assert [tensor.name for tensor in opened(tmp_path).tensors] == [name]


@pytest.mark.parametrize(
    ("read", "count"),
    [
        (lambda text: parse_header(FILE, 0, text, 8 + len(text)), MAX_HEADER_BYTES // 3 - 10),
        (lambda text: read_index(INDEX, text), 4 * MAX_TENSORS + 10),
    ],
    ids=["header", "index"],
)
def test_millions_of_empty_lists_are_refused_fast_and_without_memory(
    read: Callable[[bytes], object], count: int
) -> None:
    text = b'{"weight_map":{"t":[' + b"[]," * count + b"[]]}}"
    tracemalloc.start()
    try:
        start = time.monotonic()
        with pytest.raises(InvalidCheckpoint, match="4000000"):
            read(text)
        assert time.monotonic() - start < 5
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_too_many_tensors_over_all_files_are_refused() -> None:
    tensor = TensorInfo("t", "U8", (1,), 0, 0, 1)
    with pytest.raises(InvalidCheckpoint, match=r"1000001.*1000000"):
        check_unique(["a", "b"], [tensor] * (MAX_TENSORS + 1))
