"""Any bytes as a file: refused by name, or taken for exactly what safetensors itself reads in them."""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoint_files import BITS, Tensor, header_of, nbytes, raw_file, safetensors_bytes, write_checkpoint
from tests.checkpoints.lies import DATA, FILE, SHORT, TRUE, opened
from weightd.daemon.checkpoints.header import TensorInfo, header_length, parse_header
from weightd.daemon.errors import InvalidCheckpoint
from weightd.ipc.dtypes import DTYPES


def parse(content: bytes) -> list[TensorInfo]:
    length = header_length(FILE, content[:8], len(content))
    return parse_header(FILE, 0, content[8 : 8 + length], len(content))


def assert_true(content: bytes, tensors: list[TensorInfo]) -> None:
    """What was accepted is what the JSON says, its bytes tile the data, and safetensors itself reads the same."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    assert {tensor.name for tensor in tensors} == header.keys()
    position = 8 + length
    for tensor in tensors:
        said = header[tensor.name]
        assert (tensor.dtype, list(tensor.shape)) == (said["dtype"], said["shape"])
        assert tensor.start == position == 8 + length + said["data_offsets"][0]
        assert tensor.nbytes == said["data_offsets"][1] - said["data_offsets"][0]
        assert 8 * tensor.nbytes == prod(tensor.shape) * BITS[tensor.dtype]
        position += tensor.nbytes
    assert position == len(content)
    assert len(tensors) == len(header)
    theirs = {
        name: (info["dtype"], info["shape"], bytes(info["data"])) for name, info in safetensors.deserialize(content)
    }
    assert theirs == {
        tensor.name: (tensor.dtype, list(tensor.shape), content[tensor.start : tensor.start + tensor.nbytes])
        for tensor in tensors
    }


def check(content: bytes) -> None:
    """The file is refused by name, or accepted for what it is."""
    try:
        tensors = parse(content)
    except InvalidCheckpoint as error:
        message = str(error)
    else:
        assert_true(content, tensors)
        return
    assert message.startswith(FILE)
    assert len(message) < SHORT


letters = st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="\\/")
names = st.text(letters, min_size=1, max_size=12).filter(lambda name: name not in ("..", "__metadata__"))
sizes = st.integers(-3, 9) | st.sampled_from([2**31, 2**40, 2**62, 2**63, 2**64, 2**70])
wild = st.recursive(
    st.none() | st.booleans() | sizes | st.floats() | st.text(max_size=4) | st.sampled_from(sorted(BITS)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
plausible = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(BITS)),
        "shape": st.lists(sizes, max_size=3),
        "data_offsets": st.lists(sizes, min_size=2, max_size=2),
    }
)


@given(st.binary(max_size=200) | st.builds(raw_file, st.binary(max_size=100), st.binary(max_size=9)))
@settings(deadline=None, max_examples=200)
def test_any_bytes_are_refused_or_tile_their_file(content: bytes) -> None:
    check(content)


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_a_true_file_with_some_bytes_replaced_or_cut_off_is_refused_or_tiles_itself(data: st.DataObject) -> None:
    content = bytearray(safetensors_bytes(TRUE))
    end = len(content) - len(DATA)
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.integers(0, 7) | st.integers(8, end - 1))
        content[place] = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789,:"[]{}- '))
    check(bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))]))


@given(
    st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), plausible | wild, max_size=4), st.binary(max_size=16)
)
@settings(deadline=None, max_examples=300)
def test_any_json_is_refused_or_tiles_its_file(header: dict[str, Any], data: bytes) -> None:
    check(raw_file(json.dumps(header).encode(), data))


@st.composite
def tensor(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(sorted(BITS)))
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    if prod(shape) * BITS[dtype] % 8:
        shape = (*shape, 4)  # four elements of any dtype are whole bytes
    size = nbytes(dtype, shape)
    return dtype, shape, draw(st.binary(min_size=size, max_size=size) if size < 64 else st.just(os.urandom(size)))


tables = st.dictionaries(names, tensor(), max_size=6)


def test_the_dtypes_are_those_of_the_format() -> None:
    assert {name: dtype.bits for name, dtype in DTYPES.items()} == BITS


@given(tables, st.randoms(use_true_random=False), st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5)))
@settings(deadline=None, max_examples=200)
def test_a_true_file_is_read_exactly_whatever_the_order_of_its_keys(
    tensors: dict[str, Tensor], random: Any, metadata: dict[str, str] | None
) -> None:
    header = list(header_of(tensors, metadata).items())
    random.shuffle(header)
    content = raw_file(
        json.dumps(dict(header), indent=random.choice([None, 0, 3])).encode() + b" " * random.randrange(9),
        b"".join(data for _, _, data in tensors.values()),
    )
    found = parse(content)
    assert {
        info.name: (info.dtype, info.shape, content[info.start : info.start + info.nbytes]) for info in found
    } == tensors
    assert_true(content, found)


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_every_dtype_is_read_as_safetensors_reads_it(dtype: str, tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {
        "empty": (dtype, (0, 7), b""),
        "full": (dtype, (3, 4), os.urandom(nbytes(dtype, (3, 4)))),
        "last": (dtype, (2, 0, 2), b""),
    }
    write_checkpoint(tmp_path, {FILE: tensors})
    found = {info.name: (info.dtype, list(info.shape)) for info in opened(tmp_path).tensors}
    with safetensors.safe_open(tmp_path / FILE, framework="numpy") as theirs:
        assert found == {
            name: (theirs.get_slice(name).get_dtype(), theirs.get_slice(name).get_shape())
            for name in theirs.keys()  # noqa: SIM118
        }
    assert found.keys() == tensors.keys()


@given(tables.filter(bool), st.data())
@settings(deadline=None, max_examples=300)
def test_a_true_header_with_one_field_replaced_is_never_taken_for_something_else(
    tensors: dict[str, Tensor], data: st.DataObject
) -> None:
    header = header_of(tensors)
    content = b"".join(value for _, _, value in tensors.values())
    victim = data.draw(st.sampled_from(sorted(tensors)))
    field = data.draw(
        st.sampled_from(["dtype", "shape", "data_offsets", "size", "begin", "end", "both", "name", "gone"])
    )
    info = header[victim]
    offsets = info["data_offsets"]
    delta = data.draw(st.integers(-9, 9))
    match field:
        case "dtype":
            info["dtype"] = data.draw(st.sampled_from(sorted(BITS)) | wild)
        case "shape":
            info["shape"] = data.draw(st.permutations(info["shape"]) | st.lists(sizes, max_size=4) | wild)
        case "size":
            info["shape"] = [*info["shape"][1:], data.draw(sizes | wild)]
        case "data_offsets":
            info["data_offsets"] = data.draw(st.lists(sizes, max_size=3) | wild)
        case "begin":
            offsets[0] += delta
        case "end":
            offsets[1] += delta
        case "both":
            info["data_offsets"] = [offsets[0] + delta, offsets[1] + delta]
        case "name":
            header[data.draw(st.text(max_size=4))] = header.pop(victim)
        case "gone":
            del header[victim]
    check(raw_file(json.dumps(header).encode(), content))
