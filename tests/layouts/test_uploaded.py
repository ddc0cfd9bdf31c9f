"""What is refused of an uploaded layout before anything has to be written of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from weightd.daemon.errors import InvalidRequest
from weightd.daemon.layouts.uploaded import parse_layout
from weightd.ipc.recipe import Box, Constant, Key, Parameter, digest_of, encode


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(depth):
        found = {"a": found}
    return found


@pytest.mark.parametrize(
    ("words", "about"),
    [
        ("key: half of a surrogate pair", {"engine": "\ud800"}),
        ("key: half of a surrogate pair", {"parallel": {"\udfff": 1}}),
        ("key: half of a surrogate pair", {"backends": ["\ud800"]}),
        ("key.parallel: its values are whole numbers", {"parallel": nested(500)}),
        ("key.backends: a list of strings", {"backends": [[]]}),
    ],
)
def test_a_key_that_no_answer_could_tell_of_is_refused(words: str, about: dict[str, Any]) -> None:
    key = {**Key("0" * 64, "tests", "1", "bfloat16", "0" * 64).document(), **about}
    document = {"key": key, "entries": [], "boxes": [], "copies": [], "casts": [], "constants": []}
    with pytest.raises(InvalidRequest, match=words):
        parse_layout(digest_of(key), document)


def test_a_name_that_no_manifest_could_tell_of_is_refused() -> None:
    key = Key("0" * 64, "tests", "1", "bfloat16", "0" * 64)
    made = encode(key, [], [Parameter("\ud800", "U8", (1,))], [], [Constant(0, b"\1", Box(0, (1,), (1,)))])
    with pytest.raises(InvalidRequest, match="half of a surrogate pair is no character of a name"):
        parse_layout(key.digest, json.loads(json.dumps(made)))
