"""Checkpoints of several files: shards, indexes, what is no regular file, and what identifies them."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint_files import INDEX, Tensor, write_checkpoint
from tests.checkpoints.lies import ALL, FILE, SHORT, TRUE, lie, listed, long, named, opened
from weightd.daemon.checkpoints import contents
from weightd.daemon.checkpoints.contents import open_checkpoint
from weightd.daemon.checkpoints.selection import read_index
from weightd.daemon.errors import CheckpointChanged, CheckpointNotFound, DaemonError, InvalidCheckpoint

# ---------------------------------------------------------------------------- several files


def test_a_tensor_in_two_shards_is_refused_with_both_names(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a.safetensors": TRUE, "b.safetensors": {"second.weight": ("U8", (1,), b"x")}})
    with pytest.raises(InvalidCheckpoint, match=r"'second\.weight'.*two files.*a\.safetensors.*b\.safetensors"):
        opened(tmp_path, ALL)


def test_a_lie_in_the_second_shard_names_the_second_shard(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a.safetensors": {"a": ("U8", (1,), b"x")}})
    (tmp_path / "b.safetensors").write_bytes(lie(dtype="F33"))
    with pytest.raises(InvalidCheckpoint, match=r"^b\.safetensors: tensor 'second\.weight'"):
        opened(tmp_path, ALL)


def test_a_header_longer_than_the_first_read_is_read_whole(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {f"layer.{i:06}." + "x" * 100: ("U8", (1,), bytes([i % 256])) for i in range(4000)}
    write_checkpoint(tmp_path, {FILE: tensors})
    found = opened(tmp_path)
    content = (tmp_path / FILE).read_bytes()
    assert len(found.prefixes[0]) > 256 << 10
    assert found.prefixes[0] == content[: len(found.prefixes[0])]
    assert {tensor.name: content[tensor.start : tensor.start + 1] for tensor in found.tensors} == {
        name: data for name, (_, _, data) in tensors.items()
    }


def test_headers_too_long_together_are_refused_before_they_are_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards: dict[str, dict[str, Tensor]] = {f"{i}.safetensors": {f"t{i}": ("U8", (1,), b"x")} for i in range(5)}
    write_checkpoint(tmp_path, shards)
    longest = 5 * len(opened(tmp_path, ALL).prefixes[0])
    monkeypatch.setattr(contents, "_MAX_HEADERS_BYTES", longest - 1)
    with pytest.raises(InvalidCheckpoint, match=rf"headers take {longest} bytes.*allowed are {longest - 1}"):
        opened(tmp_path, ALL)
    monkeypatch.setattr(contents, "_MAX_HEADERS_BYTES", longest)
    assert len(opened(tmp_path, ALL).tensors) == 5


@pytest.mark.parametrize("left", [0, 4, 100])
def test_a_file_cut_short_between_listing_and_reading_is_refused(left: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {FILE: TRUE})
    source, listing = listed(tmp_path)
    os.truncate(tmp_path / FILE, left)
    with pytest.raises((CheckpointChanged, InvalidCheckpoint), match=FILE):
        open_checkpoint(source, listing)


# ---------------------------------------------------------------------------- the index


def test_the_shards_are_those_that_the_index_names(tmp_path: Path) -> None:
    shards: dict[str, dict[str, Tensor]] = {
        "b.safetensors": {"x": ("U8", (1,), b"x")},
        "a.safetensors": {"y": ("U8", (1,), b"y")},
    }
    write_checkpoint(tmp_path, shards, index=True)
    write_checkpoint(tmp_path, {"unnamed.safetensors": {"x": ("U8", (1,), b"z")}})
    found = opened(tmp_path)
    assert [file.name for file in found.listing.weights] == ["a.safetensors", "b.safetensors"]
    assert [(tensor.name, tensor.file) for tensor in found.tensors] == [("y", 0), ("x", 1)]


def test_without_an_index_the_second_copy_that_some_publish_is_left_out(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"model.safetensors": TRUE, "consolidated.safetensors": TRUE})
    assert [file.name for file in opened(tmp_path).listing.weights] == ["model.safetensors"]


def test_a_second_copy_alone_is_the_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"consolidated.safetensors": TRUE})
    assert [file.name for file in opened(tmp_path).listing.weights] == ["consolidated.safetensors"]


def test_configuration_and_tokenizer_are_metadata_and_other_weights_are_not(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {FILE: TRUE}, index=True)
    for name in ("config.json", "tokenizer.model", "pytorch_model.bin", "model.gguf", "tf_model.h5"):
        (tmp_path / name).write_text("{}")
    _, listing = listed(tmp_path)
    assert {file.name for file in listing.metadata} == {"config.json", "tokenizer.model", INDEX}


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"t": "../x.safetensors"}, ("'t'", "'../x.safetensors'", "below the index's own folder")),
        ({"t": "a/../../x.safetensors"}, ("'t'", "'a/../../x.safetensors'", "below")),
        ({"t": "/etc/x.safetensors"}, ("'t'", "'/etc/x.safetensors'", "below")),
        ({"t": "..\\x.safetensors"}, ("'t'", "below")),
        ({"t": "x\0.safetensors"}, ("'t'", r"x\x00.safetensors", "below")),
        ({"t": "/etc/passwd"}, ("'t'", "'/etc/passwd'", ".safetensors")),
        ({"t": "pytorch_model.bin"}, ("'t'", "'pytorch_model.bin'", ".safetensors")),
        ({"t": ""}, ("'t'", "''", ".safetensors")),
        ({"t": 7}, ("'t'", "'7'", ".safetensors")),
        ({"t": None}, ("'t'", "'None'", ".safetensors")),
        ({"t": {"file": "x.safetensors"}}, ("'t'", ".safetensors")),
        ({long(): long()}, (".safetensors",)),
        ({}, ("weight_map", "not empty")),
        ([["t", FILE]], ("weight_map", "object")),
        (None, ("weight_map", "object")),
    ],
    ids=lambda value: repr(value)[:40] if not isinstance(value, tuple) else "",
)
def test_a_lying_weight_map_is_refused(weight_map: object, words: tuple[str, ...], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {FILE: TRUE})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InvalidCheckpoint) as refusal:
        opened(tmp_path)
    message = str(refusal.value)
    assert [word for word in (INDEX, *words) if word not in message] == [], message
    assert len(message) < SHORT


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "JSON"),
        (b"[]", "object, found list"),
        (b"{}", "weight_map"),
        (b'{"weight_map": {"t": NaN}}', "NaN"),
        (b'{"weight_map": {"t": "a.safetensors", "t": "b.safetensors"}}', "'t' is there more than once"),
        (b'{"weight_map": ' * 50_000, "nested too deeply"),
        (b'{"weight_map": {"\xff": "a.safetensors"}}', "UTF-8 at byte 17"),
    ],
)
def test_an_index_that_is_no_index_is_refused(text: bytes, words: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=INDEX) as refusal:
        read_index(INDEX, text)
    assert words in str(refusal.value)


def test_an_index_too_large_is_refused_unread(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {FILE: TRUE})
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate((256 << 20) + 1)
    with pytest.raises(InvalidCheckpoint, match=rf"{INDEX}: {(256 << 20) + 1} bytes, allowed are {256 << 20}"):
        listed(tmp_path)


def test_a_shard_that_the_index_names_and_that_is_not_there_is_named(tmp_path: Path) -> None:
    weight_map = {"first.weight": FILE, "a": "gone-1.safetensors", "b": "gone-2.safetensors"}
    write_checkpoint(tmp_path, {FILE: TRUE}, index=weight_map)
    with pytest.raises(CheckpointNotFound, match=rf"{INDEX}.*'gone-1\.safetensors'.*2 of 3 shards") as refusal:
        listed(tmp_path)
    assert refusal.value.details["missing"] == ["gone-1.safetensors", "gone-2.safetensors"]


def test_a_missing_shard_whose_name_is_half_a_surrogate_pair_can_still_be_reported(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {FILE: TRUE}, index={"a": "\ud800.safetensors"})
    with pytest.raises(DaemonError) as refusal:
        listed(tmp_path)
    str(refusal.value).encode()
    json.dumps(refusal.value.details, ensure_ascii=False).encode()  # as the HTTP API sends it


def test_a_tensor_in_another_shard_than_the_index_says_is_named_with_both(tmp_path: Path) -> None:
    shards: dict[str, dict[str, Tensor]] = {
        "a.safetensors": {"x": ("U8", (1,), b"x")},
        "b.safetensors": {"y": ("U8", (1,), b"y")},
    }
    write_checkpoint(tmp_path, shards, index={"x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors"})
    with pytest.raises(InvalidCheckpoint, match=rf"{INDEX}: tensor 'y'.*a\.safetensors.*b\.safetensors"):
        opened(tmp_path)


def test_a_tensor_that_the_index_names_and_no_shard_has_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {FILE: TRUE}, index={"first.weight": FILE, "fourth.weight": FILE})
    with pytest.raises(InvalidCheckpoint, match=rf"{INDEX}: tensor 'fourth\.weight'.*none of the shards"):
        opened(tmp_path)


# ---------------------------------------------------------------------------- what is no regular file


def in_time(action: Callable[[], object]) -> BaseException | None:
    """What the action raises; fails where it hangs, which opening a FIFO would."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it hangs"
    return raised[0] if raised else None


def test_a_fifo_in_place_of_a_shard_is_not_there(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE)
    assert isinstance(in_time(lambda: opened(tmp_path)), CheckpointNotFound)
    assert isinstance(in_time(lambda: opened(tmp_path / FILE)), CheckpointNotFound)


def test_a_fifo_that_the_index_names_is_not_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, index={"t": FILE})
    os.mkfifo(tmp_path / FILE)
    assert isinstance(in_time(lambda: opened(tmp_path)), CheckpointNotFound)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
def test_a_shard_that_becomes_something_else_after_listing_is_refused(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, {FILE: TRUE})
    source, listing = listed(tmp_path)
    (tmp_path / FILE).unlink()
    make(tmp_path / FILE)
    error = in_time(lambda: open_checkpoint(source, listing))
    assert isinstance(error, InvalidCheckpoint)
    assert FILE in str(error)
    assert "not a regular file" in str(error)


def test_a_link_to_itself_beside_the_weights_hides_none_of_them(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {FILE: TRUE})
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "dangling.json").symlink_to("nowhere.json")
    assert len(opened(tmp_path).tensors) == len(TRUE)


def test_a_file_name_that_is_no_text_is_refused_or_read_but_breaks_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {FILE: TRUE})
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.safetensors")).write_bytes(named("other"))
    error = in_time(lambda: opened(tmp_path))
    assert error is None or isinstance(error, DaemonError)


def test_the_identity_of_a_listing_changes_with_any_of_its_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a.safetensors": TRUE})
    (tmp_path / "config.json").write_text("{}")

    def identity() -> str:
        return listed(tmp_path, ALL)[1].identity

    found = [identity()]
    assert identity() == found[0]
    os.utime(tmp_path / "a.safetensors", ns=(0, 1))
    found.append(identity())
    os.utime(tmp_path / "config.json", ns=(0, 1))
    found.append(identity())
    write_checkpoint(tmp_path, {"b.safetensors": {"other": ("U8", (1,), b"x")}})
    found.append(identity())
    (tmp_path / "tokenizer.json").write_text("{}")
    found.append(identity())
    (tmp_path / "config.json").unlink()
    found.append(identity())
    assert len(set(found)) == 6
