"""The safetensors header: parsed as what it is, bytes from a stranger.

Format (safetensors 0.8): 8 bytes little-endian header length N; N bytes of UTF-8 JSON, an object from tensor name to
``{"dtype", "shape", "data_offsets": [begin, end]}`` plus an optional string-to-string ``__metadata__``; then the data,
which the tensors' byte ranges tile without hole or overlap, offsets counted from the end of the header.

Everything is checked here, once; what comes out is trusted by the rest of the daemon.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from weightd.daemon.errors import InvalidCheckpoint
from weightd.daemon.tensors import TensorInfo
from weightd.ipc.dtypes import DTYPES

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit (safetensors: MAX_HEADER_SIZE)."""
MAX_TENSORS = 1_000_000
"""Tensors in one checkpoint, over all its files."""
MAX_DIMENSIONS = 64
"""Dimensions of one tensor; torch takes no more."""
MAX_NAME_BYTES = 4096
MAX_TENSOR_BYTES = 2**62

_FIELDS = {"dtype", "shape", "data_offsets"}
_BITS = {name: dtype.bits for name, dtype in DTYPES.items()}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

_PAGE = rb"\s*(?:\xef\xbb\xbf\s*)?"
_IMPOSTORS = {
    rb"version https://git-lfs\.github\.com/spec/": "a Git LFS pointer, not the file itself: fetch that (git lfs pull)",
    _PAGE + rb"(?i:<!doctype html|<html|<head|<body)": "an HTML page, an error or a login: fetch the file again",
    _PAGE + rb"(?:<\?xml|<Error>)": "an XML document, a storage's error perhaps: fetch the file again",
    rb"PK\x03\x04": "a ZIP archive, as torch.save writes: save it as safetensors",
    rb"\x80[\x02-\x05].": "a Python pickle, as torch.save writes: save it as safetensors",
    rb"GGUF": "a GGUF file, which is not staged: save it as safetensors",
    rb"\x1f\x8b\x08": "compressed with gzip: store the file itself",
}
"""What is found in place of files, by how it begins."""


def check_genuine(file: str, begin: bytes) -> None:
    """Refuse what is plainly something else than a file of a checkpoint, by its name. Raises InvalidCheckpoint."""
    for pattern, what in _IMPOSTORS.items():
        if re.match(pattern, begin):
            raise InvalidCheckpoint(f"{file} is {what}")


def is_pointer(begin: bytes) -> bool:
    """Whether a file that begins so is a Git LFS pointer."""
    return re.match(next(iter(_IMPOSTORS)), begin) is not None


def header_length(file: str, prefix: bytes, size: int) -> int:
    """Bytes of JSON that follow the first 8 bytes of ``file``, ``size`` bytes long. Raises InvalidCheckpoint."""
    if size < 8 or len(prefix) < 8:
        raise InvalidCheckpoint(f"{file}: the file has {size} bytes, a safetensors file has at least 8")
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER_BYTES or 8 + length > size:
        check_genuine(file, prefix)
    if length > MAX_HEADER_BYTES:
        raise InvalidCheckpoint(
            f"{file}: header length is {length} bytes, allowed are {MAX_HEADER_BYTES}; "
            "is this a safetensors file at all?"
        )
    if 8 + length > size:
        raise InvalidCheckpoint(
            f"{file}: header length is {length} bytes, past the end of the file: "
            f"{size - 8} bytes follow the length; the file is cut short"
        )
    return length


def parse_header(file: str, index: int, header: bytes, size: int) -> list[TensorInfo]:
    """The tensors of one file in the order of their bytes.

    ``header`` is the JSON part; ``size`` the size of the whole file in bytes; ``index`` becomes ``TensorInfo.file``.
    Raises InvalidCheckpoint naming the file, the field, the number found and the number allowed.
    """
    table = _parse_json(file, header)
    metadata = table.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise InvalidCheckpoint(f"{file}: __metadata__ must map strings to strings")
    data_start = 8 + len(header)
    data_size = size - data_start
    tensors = [_tensor(file, index, name, info, data_start, data_size) for name, info in table.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    position, previous = data_start, "the header"
    for tensor in tensors:
        if tensor.start != position:
            found = "overlaps" if tensor.start < position else "leaves a hole after"
            raise InvalidCheckpoint(
                f"{file}: tensor {tensor.name!r}: data_offsets begins at {tensor.start - data_start} and {found} "
                f"{previous}, which ends at {position - data_start}"
            )
        position = tensor.start + tensor.nbytes
        previous = f"tensor {tensor.name!r}"
    if position != size:
        raise InvalidCheckpoint(
            f"{file}: the tensors leave a hole at the end: data_offsets reach {position - data_start}, "
            f"the data has {data_size} bytes"
        )
    return tensors


def parse_object(what: str, text: bytes) -> dict[str, Any]:
    """One JSON object from outside: UTF-8, no duplicate keys, no bottomless nesting. Raises InvalidCheckpoint."""
    # A tensor is one object with two lists. Counting brackets first bounds the memory that parsing can take: 100 MB
    # could otherwise hold 30 million empty lists. Brackets inside names count too, hence the slack.
    brackets = text.count(b"{") + text.count(b"[")
    if brackets > 4 * MAX_TENSORS:
        raise InvalidCheckpoint(
            f"{what}: {brackets} objects and lists, allowed are {4 * MAX_TENSORS} ({MAX_TENSORS} tensors)"
        )
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except _Duplicate as error:
        raise InvalidCheckpoint(f"{what}: key {str(error)!r} is there more than once") from None
    except UnicodeDecodeError as error:
        raise InvalidCheckpoint(f"{what}: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise InvalidCheckpoint(f"{what}: the JSON is nested too deeply") from None
    except ValueError as error:
        raise InvalidCheckpoint(f"{what}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidCheckpoint(f"{what}: must be a JSON object, found {type(value).__name__}")
    return value


class _Duplicate(Exception):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Duplicate(key[:200])
            seen.add(key)
    return table


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _parse_json(file: str, header: bytes) -> dict[str, Any]:
    table = parse_object(f"{file}: header", header)
    count = len(table) - ("__metadata__" in table)
    if count > MAX_TENSORS:
        raise InvalidCheckpoint(f"{file}: the header holds {count} tensors, allowed are {MAX_TENSORS}")
    return table


def _tensor(file: str, index: int, name: str, info: Any, data_start: int, data_size: int) -> TensorInfo:
    def reject(why: str) -> NoReturn:
        raise InvalidCheckpoint(f"{file}: tensor {name[:200]!r}: {why}")

    check_name(file, name)
    if type(info) is not dict or info.keys() != _FIELDS:
        found = _shown(sorted(map(str, info))[:8]) if isinstance(info, dict) else type(info).__name__
        reject(f"must be an object with dtype, shape and data_offsets only (no nesting), found {found}")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    bits = _BITS.get(dtype) if type(dtype) is str else None
    if bits is None:
        reject(f"dtype {str(dtype)[:50]!r} is unknown, known are {', '.join(_BITS)}")
    if type(shape) is not list or len(shape) > MAX_DIMENSIONS:
        reject(f"shape must be a list of at most {MAX_DIMENSIONS} sizes, found {_shown(shape)}")
    extent = bits  # as if no size were 0: torch multiplies the strides of empty tensors too
    for size in shape:
        if type(size) is not int or size < 0:
            reject(f"shape {_shown(shape)} holds {_shown(size)}, sizes are whole numbers from 0")
        if size > MAX_TENSOR_BYTES:
            reject(f"shape holds {_shown(size)}, allowed is {MAX_TENSOR_BYTES}")
        bits *= size
        extent *= max(size, 1)
    if extent > 8 * MAX_TENSOR_BYTES:
        reject(f"shape {_shown(shape)} with {dtype} takes {extent // 8} bytes, allowed are {MAX_TENSOR_BYTES}")
    if bits % 8:
        reject(f"shape {_shown(shape)} with {dtype} takes {bits} bits, not a whole number of bytes")
    if type(offsets) is not list or len(offsets) != 2 or type(offsets[0]) is not int or type(offsets[1]) is not int:
        reject(f"data_offsets must be two whole numbers, found {_shown(offsets)}")
    begin, end = offsets
    if begin < 0:
        reject(f"data_offsets begins at {begin}, allowed is 0 and up")
    if end < begin:
        reject(f"data_offsets run backwards, from {begin} to {end}")
    if end > data_size:
        reject(f"data_offsets end at {end}, past the end of the data at {data_size}")
    if end - begin != bits // 8:
        reject(f"data_offsets hold {end - begin} bytes, shape {_shown(shape)} with {dtype} takes {bits // 8}")
    return TensorInfo(name, dtype, tuple(shape), index, data_start + begin, end - begin)


def check_name(file: str, name: str) -> None:
    """Refuse tensor names that are no names: empty, endless, unprintable, or paths. Raises InvalidCheckpoint."""
    if name.isascii():
        length = len(name)
    else:
        try:
            length = len(name.encode("utf-8"))
        except UnicodeEncodeError:
            raise InvalidCheckpoint(f"{file}: a tensor name holds half a surrogate pair: {name[:50]!a}") from None
    if not 0 < length <= MAX_NAME_BYTES:
        raise InvalidCheckpoint(f"{file}: a tensor name has {length} bytes, allowed are 1 to {MAX_NAME_BYTES}")
    if _CONTROL.search(name):
        raise InvalidCheckpoint(f"{file}: tensor {name[:200]!r}: control characters in the name")
    if ("/" in name or "\\" in name or "." in name[:2]) and is_path_trick(name):
        raise InvalidCheckpoint(f"{file}: tensor {name[:200]!r}: the name is a path that leaves its folder")


def is_path_trick(name: str) -> bool:
    """Whether a relative path is absolute, climbs with ``..`` or uses backslashes."""
    return "\\" in name or name.startswith("/") or "\0" in name or ".." in name.split("/")


def check_unique(files: Sequence[str], tensors: Sequence[TensorInfo]) -> None:
    """Refuse a checkpoint in which two files hold the same tensor name, or that has too many tensors."""
    if len(tensors) > MAX_TENSORS:
        raise InvalidCheckpoint(f"the checkpoint holds {len(tensors)} tensors, allowed are {MAX_TENSORS}")
    seen: dict[str, int] = {}
    for tensor in tensors:
        first = seen.setdefault(tensor.name, tensor.file)
        if first != tensor.file:
            raise InvalidCheckpoint(
                f"tensor {tensor.name!r} is in two files, {files[first]} and {files[tensor.file]}: "
                'remove one, let an index name one file only, or name the files in the request\'s "weights"'
            )


def _shown(value: Any) -> str:
    text = (
        repr(value) if not isinstance(value, int) or abs(value) < 2**200 else f"a number of {value.bit_length()} bits"
    )
    return text if len(text) <= 100 else text[:97] + "..."
