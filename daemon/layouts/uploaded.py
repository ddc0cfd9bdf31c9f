"""Layouts that engines have uploaded: what they sent, checked as hostile input, and as recipes for a checkpoint.

What is sent is described in ``weightd.ipc.recipe``. It is checked twice: as it comes, by itself, and as a whole once
the checkpoint's headers are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from weightd.daemon.errors import InvalidRequest
from weightd.daemon.layouts.casts import Cast
from weightd.daemon.layouts.recipe import (
    ALIGNMENT,
    Copy,
    Entry,
    Recipe,
    check_box,
    check_targets,
    contiguous,
    validate,
)
from weightd.daemon.tensors import TensorInfo
from weightd.ipc.dtypes import DTYPES
from weightd.ipc.recipe import Box, Constant, digest_of, headers_digest

MAX_ENTRIES = 500_000
MAX_COPIES = 500_000
MAX_CONSTANTS = 500_000
_MAX_DIMENSIONS = 64
_MAX_NAME = 1024
_MAX_NUMBER = 1 << 52
_FIELDS = {
    "headers": str, "engine": str, "version": str, "dtype": str, "config": str, "rank": int, "parallel": dict,
    "backends": list,
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """One uploaded layout. Copies name tensors by their place among the checkpoint's, sorted by name."""

    key: str
    """What it is asked for by: the digest of what decides it."""
    digest: str
    """Of all of it: two that differ have different ones."""
    about: dict[str, Any]
    """What decides it, as the engine has written it: ``weightd.ipc.recipe.Key``."""
    recipe: Recipe
    casts: frozenset[int]
    """Copies (their indices) that are casts: from which dtype, the checkpoint tells."""

    def recipe_for(self, tensors: Sequence[TensorInfo], rank: int) -> Recipe:
        """It as the recipe of one segment of a checkpoint. Raises InvalidRequest where it is not of this one."""
        found = headers_digest((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors)
        if found != self.about["headers"]:
            raise InvalidRequest(
                f"layout {self.key}: it is of a checkpoint with headers {self.about['headers']}, these are {found}: "
                "trace the engine's layout of this checkpoint"
            )
        order = sorted(range(len(tensors)), key=lambda index: tensors[index].name)
        copies = []
        for index, copy in enumerate(self.recipe.copies):
            if copy.tensor >= len(order):
                raise InvalidRequest(f"copies: a copy names tensor {copy.tensor}, there are {len(order)}")
            number = order[copy.tensor]
            tensor, entry = tensors[number], self.recipe.entries[copy.entry]
            if DTYPES[tensor.dtype].bits < 8:
                raise InvalidRequest(
                    f"tensor {tensor.name!r} is {tensor.dtype}: what is packed within bytes is staged as it is stored"
                )
            cast = Cast(tensor.dtype, entry.dtype) if index in self.casts else None
            whole = copy.source == contiguous((prod(tensor.shape),)) or copy.source == contiguous(tensor.shape)
            placed = copy.target == contiguous((prod(entry.shape),)) or copy.target == contiguous(entry.shape)
            if cast is None and whole and placed and tensor.dtype == entry.dtype and tensor.nbytes == entry.nbytes:
                copies.append(Copy(number, copy.entry))
            else:
                copies.append(copy._replace(tensor=number, cast=cast))
        recipe = self.recipe._replace(copies=copies, rank=rank)
        validate(recipe, tensors)
        return recipe


def parse_layout(key: str, document: Any) -> Layout:
    """Check what was uploaded, as far as that goes without its checkpoint. Raises InvalidRequest naming the field."""
    about = _about(document)
    if (found := digest_of(about)) != key:
        raise InvalidRequest(f"key: what is described has the key {found}, not {key}")
    entries = _entries(_rows(document, "entries", MAX_ENTRIES))
    boxes = [_box(number, row) for number, row in enumerate(_rows(document, "boxes", MAX_COPIES))]
    copies = []
    for number, row in enumerate(_rows(document, "copies", MAX_COPIES)):
        tensor, entry, box, source, target = _numbers(f"copies.{number}", row, 5)
        if entry >= len(entries) or box >= len(boxes):
            raise InvalidRequest(
                f"copies.{number}: it names entry {entry} and box {box}, there are {len(entries)} and {len(boxes)}"
            )
        shape, from_strides, to_strides = boxes[box]
        to = Box(target, shape, to_strides)
        check_box(f"copies.{number}: entry {entries[entry].name!r}", to, entries[entry].shape)
        copies.append(Copy(tensor, entry, Box(source, shape, from_strides), to))
    casts = _numbers("casts", document.get("casts", []), None)
    if any(index >= len(copies) for index in casts):
        raise InvalidRequest(f"casts: they name copies up to {max(casts)}, there are {len(copies)}")
    constants = [
        _constant(number, row, len(entries)) for number, row in enumerate(_rows(document, "constants", MAX_CONSTANTS))
    ]
    nbytes = entries[-1].offset + entries[-1].nbytes if entries else 0
    digest = digest_of(document)
    recipe = Recipe(entries, copies, nbytes, 0, constants, digest)
    check_targets(recipe)
    return Layout(key, digest, about, recipe, frozenset(casts))


def _about(document: Any) -> dict[str, Any]:
    if not isinstance(document, dict) or not isinstance(document.get("key"), dict):
        raise InvalidRequest("key: an object that says what decides the layout")
    if unknown := sorted(document.keys() - {"key", "entries", "boxes", "copies", "casts", "constants"}):
        raise InvalidRequest(f"{unknown[0]}: a layout has no such field")
    about: dict[str, Any] = document["key"]
    if about.keys() != _FIELDS.keys():
        raise InvalidRequest(f"key: its fields are {sorted(about)}, they have to be {sorted(_FIELDS)}")
    for field, kind in _FIELDS.items():
        if type(about[field]) is not kind:
            raise InvalidRequest(f"key.{field}: a {type(about[field]).__name__}, it has to be a {kind.__name__}")
    if not all(isinstance(size, int) for size in about["parallel"].values()):
        raise InvalidRequest("key.parallel: its values are whole numbers")
    if not all(isinstance(name, str) for name in about["backends"]):
        raise InvalidRequest("key.backends: a list of strings")
    texts = [text for text in about.values() if isinstance(text, str)]
    if not all(map(_is_text, [*texts, *about["parallel"], *about["backends"]])):
        raise InvalidRequest("key: half of a surrogate pair is no character")
    return about


def _is_text(text: str) -> bool:
    """Whether it can be written: JSON may say halves of surrogate pairs, which no encoding has."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _rows(document: dict[str, Any], field: str, most: int) -> list[Any]:
    found = document.get(field)
    if not isinstance(found, list) or len(found) > most:
        raise InvalidRequest(f"{field}: a list of at most {most}")
    return found


def _numbers(field: str, row: Any, count: int | None) -> list[int]:
    if not isinstance(row, list) or (count is not None and len(row) != count):
        raise InvalidRequest(f"{field}: a list of {'' if count is None else f'{count} '}whole numbers")
    for number in row:
        if type(number) is not int or not 0 <= number <= _MAX_NUMBER:
            raise InvalidRequest(f"{field}: {str(number)[:40]} is no whole number from 0 to {_MAX_NUMBER}")
    return row


def _sizes(field: str, row: Any) -> tuple[int, ...]:
    found = _numbers(field, row, None)
    if len(found) > _MAX_DIMENSIONS:
        raise InvalidRequest(f"{field}: {len(found)} dimensions, at most {_MAX_DIMENSIONS} may be there")
    return tuple(found)


def _entries(rows: Sequence[Any]) -> list[Entry]:
    found: list[Entry] = []
    offset = 0
    for number, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != 3 or not isinstance(row[0], str):
            raise InvalidRequest(f"entries.{number}: a name, a dtype and a shape")
        name, dtype, _ = row
        shape = _sizes(f"entries.{number}", row[2])
        if not 0 < len(name) <= _MAX_NAME:
            raise InvalidRequest(f"entries.{number}: a name of {len(name)} characters, allowed are 1 to {_MAX_NAME}")
        if not _is_text(name):
            raise InvalidRequest(f"entries.{number}: half of a surrogate pair is no character of a name")
        if not isinstance(dtype, str) or dtype not in DTYPES or DTYPES[dtype].bits < 8:
            raise InvalidRequest(f"entries.{number}: {str(dtype)[:40]!r} is no dtype of whole bytes")
        nbytes = prod(shape) * DTYPES[dtype].bits // 8
        if offset + nbytes > _MAX_NUMBER:
            raise InvalidRequest(f"entries.{number}: {shape} is more than any memory has")
        found.append(Entry(name, dtype, shape, offset, nbytes))
        offset = -(-(offset + nbytes) // ALIGNMENT) * ALIGNMENT
    return found


def _box(number: int, row: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    if not isinstance(row, list) or len(row) != 3:
        raise InvalidRequest(f"boxes.{number}: a shape, strides in the tensor and strides in the entry")
    shape, source, target = (_sizes(f"boxes.{number}", part) for part in row)
    if not len(shape) == len(source) == len(target):
        raise InvalidRequest(f"boxes.{number}: {len(shape)} sizes, {len(source)} and {len(target)} strides")
    return shape, source, target


def _constant(number: int, row: Any, entries: int) -> Constant:
    field = f"constants.{number}"
    if not isinstance(row, list) or len(row) != 5 or not isinstance(row[1], str):
        raise InvalidRequest(f"{field}: an entry, a value in hexadecimal digits, an offset, a shape and strides")
    entry, offset = _numbers(field, [row[0], row[2]], 2)
    if entry >= entries:
        raise InvalidRequest(f"{field}: it names entry {entry}, there are {entries}")
    shape, strides = _sizes(field, row[3]), _sizes(field, row[4])
    try:
        value = bytes.fromhex(row[1])
    except ValueError:
        raise InvalidRequest(f"{field}: {row[1][:40]!r} are no hexadecimal digits") from None
    return Constant(entry, value, Box(offset, shape, strides))
