"""Which files are the checkpoint: the rule, row by row, and against what Transformers' from_pretrained takes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from tests.checkpoint_files import INDEX, Tensor, write_checkpoint, write_index
from tests.checkpoints.lies import TRUE, listed, opened
from weightd.daemon.checkpoints.selection import Selection, below, left_out, select
from weightd.daemon.errors import (
    AmbiguousCheckpoint,
    CheckpointNotFound,
    DaemonError,
    InvalidCheckpoint,
    InvalidRequest,
)

WHOLE = "model.safetensors"


def numbered(count: int, stem: str = "model", *, without: Iterable[int] = ()) -> list[str]:
    return [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1) if i not in set(without)]


def index_of(*files: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": {f"t{i}": file for i, file in enumerate(files)}}).encode()


def chosen(names: Iterable[str], config: Any = None, wanted: Iterable[str] = (), **indexes: bytes) -> Selection:
    """What is taken of these names; ``indexes`` has each index by its name up to the first dot."""

    def read(name: str) -> bytes:
        return indexes[name.rpartition("/")[2].partition(".")[0]]

    text = None if config is None else config if isinstance(config, bytes) else json.dumps(config).encode()
    return select("s3://b/m", list(names), text, read, list(wanted))


TAKEN: dict[str, tuple[list[str], dict[str, Any], list[str]]] = {
    "the whole file": ([WHOLE], {}, [WHOLE]),
    "the whole file before a stale index": ([WHOLE, INDEX], {"model": index_of(*numbered(2))}, [WHOLE]),
    "the whole file before a complete index": (
        [WHOLE, INDEX, *numbered(2)], {"model": index_of(*numbered(2))}, [WHOLE],
    ),
    "the whole file before shards": ([WHOLE, *numbered(2)], {}, [WHOLE]),
    "the whole file before an incomplete variant": ([WHOLE, *numbered(3, "model.fp32", without=[2])], {}, [WHOLE]),
    "the whole file before a variant": ([WHOLE, "model.fp16.safetensors"], {}, [WHOLE]),
    "the whole file before an adapter": ([WHOLE, "adapter_model.safetensors"], {}, [WHOLE]),
    "the whole file before another library's": ([WHOLE, "open_clip_model.safetensors"], {}, [WHOLE]),
    "the whole file before a backup": ([WHOLE, "model-backup.safetensors", "model (copy).safetensors"], {}, [WHOLE]),
    "the whole file before a second copy": ([WHOLE, "consolidated.safetensors"], {}, [WHOLE]),
    "the whole file before a rank's part": ([WHOLE, "model-rank-0-part-0.safetensors"], {}, [WHOLE]),
    "the whole file before what lies below": ([WHOLE, "original/model.safetensors", "onnx/model.onnx"], {}, [WHOLE]),
    "an index": ([INDEX, *numbered(2)], {"model": index_of(*numbered(2))}, numbered(2)),
    "what the index names and no more": (
        [INDEX, "a.safetensors", "b.safetensors"], {"model": index_of("b.safetensors")}, ["b.safetensors"],
    ),
    "shards in folders": ([INDEX, "x/a.safetensors"], {"model": index_of("x/a.safetensors")}, ["x/a.safetensors"]),
    "shards written with a dot": ([INDEX, "a.safetensors"], {"model": index_of("./a.safetensors")}, ["a.safetensors"]),
    "the index before others": (
        [INDEX, "consolidated.safetensors.index.json", *numbered(2), *numbered(2, "consolidated")],
        {"model": index_of(*numbered(2))}, numbered(2),
    ),
    "the only index, of any name": (
        ["unet.safetensors.index.json", *numbered(2, "unet"), "other.safetensors"],
        {"unet": index_of(*numbered(2, "unet"))}, numbered(2, "unet"),
    ),
    "an index of another name with shards of this": (
        ["x.safetensors.index.json", *numbered(2)], {"x": index_of(*numbered(2))}, numbered(2),
    ),
    "a variant's index decides nothing": (
        ["model.safetensors.index.fp32.json", *numbered(2, "model.fp32"), *numbered(3)], {}, numbered(3),
    ),
    "a complete set": (numbered(3), {}, numbered(3)),
    "a set of one": (numbered(1), {}, numbered(1)),
    "a set counted from 0": (
        ["model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"], {},
        ["model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"],
    ),
    "a complete set of another name": (numbered(2, "unet"), {}, numbered(2, "unet")),
    "a complete set before a single file": ([*numbered(2, "unet"), "extra.safetensors"], {}, numbered(2, "unet")),
    "the set called model before others": (
        [*numbered(2), *numbered(2, "model.fp32"), "x.safetensors"], {}, numbered(2),
    ),
    "the only file": (["unet.safetensors"], {}, ["unet.safetensors"]),
    "a second copy alone": (["consolidated.safetensors"], {}, ["consolidated.safetensors"]),
    "an adapter alone": (["adapter_model.safetensors"], {}, ["adapter_model.safetensors"]),
    "a file beside its own variant": (["unet.safetensors", "unet.fp16.safetensors"], {}, ["unet.safetensors"]),
    "a file beside an adapter": (["unet.safetensors", "adapter_model.safetensors"], {}, ["unet.safetensors"]),
    "the only file at the top": (["unet.safetensors", "x/a.safetensors", "x/b.safetensors"], {}, ["unet.safetensors"]),
}  # fmt: skip


@pytest.mark.parametrize(("names", "indexes", "taken"), TAKEN.values(), ids=TAKEN)
def test_what_is_taken(names: list[str], indexes: dict[str, bytes], taken: list[str]) -> None:
    found = chosen(names, **indexes)
    assert list(found.weights) == taken
    rest = {file.name: file.reason for file in left_out(found, names)}
    assert set(rest) == set(names) - set(taken) - {found.index}
    assert all(rest.values())


REFUSED: dict[str, tuple[list[str], dict[str, Any], type[DaemonError], str]] = {
    "nothing": (["config.json"], {}, CheckpointNotFound, "no .safetensors file"),
    "an incomplete set": (numbered(3, without=[2]), {}, CheckpointNotFound, "'model-00002-of-00003.safetensors'"),
    "one shard": (numbered(2, without=[2]), {}, CheckpointNotFound, "1 of 2 files"),
    "one shard beside a second copy": (
        [*numbered(2, without=[1]), "consolidated.safetensors"], {}, CheckpointNotFound, "model-00001-of-00002",
    ),
    "an incomplete set of another name beside a file": (
        [*numbered(2, "unet", without=[2]), "x.safetensors"], {}, CheckpointNotFound, "unet-00002-of-00002",
    ),
    "one of very many": (
        ["model-00001-of-999999999.safetensors"], {}, CheckpointNotFound, "1 of 999999999 files",
    ),
    "sets of two saves": ([*numbered(2), *numbered(3)], {}, AmbiguousCheckpoint, "model-*-of-00003.safetensors"),
    "half of one save, all of another": (
        [*numbered(2), *numbered(3, without=[3])], {}, AmbiguousCheckpoint, "model-*-of-00002.safetensors",
    ),
    "sets of two names": ([*numbered(2, "a"), *numbered(2, "b")], {}, AmbiguousCheckpoint, "b-*-of-00002.safetensors"),
    "one number written twice": (
        [*numbered(2), "model-1-of-00002.safetensors"], {}, CheckpointNotFound, "model-*-of-00002.safetensors",
    ),
    "a shard that the index names is absent": (
        [INDEX, *numbered(2, without=[2])], {"model": index_of(*numbered(2))}, CheckpointNotFound, "1 of 2 shards",
    ),
    "a shard of an index of another name is absent": (
        ["unet.safetensors.index.json", *numbered(2, "unet", without=[2])],
        {"unet": index_of(*numbered(2, "unet"))}, CheckpointNotFound, "unet-00002-of-00002.safetensors",
    ),
    "two indexes of other names": (
        ["a.safetensors.index.json", "b.safetensors.index.json", "x.safetensors"],
        {}, AmbiguousCheckpoint, "b.safetensors.index.json",
    ),
    "an index of another name beside a set called model": (
        ["consolidated.safetensors.index.json", *numbered(2, "consolidated"), *numbered(2)],
        {"consolidated": index_of(*numbered(2, "consolidated"))}, AmbiguousCheckpoint, "model-*-of-00002.safetensors",
    ),
    "two files": (["a.safetensors", "b.safetensors"], {}, AmbiguousCheckpoint, "a.safetensors, b.safetensors"),
    "a file and a second copy": (
        ["unet.safetensors", "consolidated.safetensors"], {}, AmbiguousCheckpoint, "unet.safetensors",
    ),
    "second copies in numbers beside a file": (
        [*numbered(2, "consolidated"), "x.safetensors"], {}, AmbiguousCheckpoint, "consolidated-*-of-00002",
    ),
    "two variants": (["model.fp16.safetensors", "model.bf16.safetensors"], {}, AmbiguousCheckpoint, "model.bf16"),
    "ranks' parts": (
        [f"model-rank-{rank}-part-{part}.safetensors" for rank in range(2) for part in range(2)],
        {}, AmbiguousCheckpoint, '"weights": "model-rank-0-part-*.safetensors"',
    ),
    "one rank's part": (["model-rank-0-part-0.safetensors"], {}, AmbiguousCheckpoint, "each rank's is a checkpoint"),
    "one of DeepSeek's": (["model3-mp8.safetensors"], {}, AmbiguousCheckpoint, "model3-mp8.safetensors"),
    "only files below": (
        ["a/model.safetensors", "b/c/x.safetensors"], {}, CheckpointNotFound, "s3://b/m/a, s3://b/m/b/c: stage one",
    ),
    "another format": (["pytorch_model.bin"], {}, CheckpointNotFound, "pytorch_model.bin, of a format"),
    "a name that leaves the folder": (["../model.safetensors"], {}, InvalidCheckpoint, "leaves its folder"),
}  # fmt: skip


@pytest.mark.parametrize(("names", "indexes", "kind", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(names: list[str], indexes: dict[str, bytes], kind: type[DaemonError], words: str) -> None:
    with pytest.raises(DaemonError) as refusal:
        chosen(names, **indexes)
    assert type(refusal.value) is kind
    assert words in str(refusal.value)
    if kind is AmbiguousCheckpoint:
        assert refusal.value.details["candidates"]
        assert '"weights"' in str(refusal.value)


# ---------------------------------------------------------------------------- config.json


def test_the_file_that_config_json_names_comes_first() -> None:
    names = [WHOLE, INDEX, "other.safetensors", *numbered(2)]
    assert chosen(names, {"transformers_weights": "other.safetensors"}).weights == ("other.safetensors",)
    found = chosen(names, {"transformers_weights": INDEX}, model=index_of(*numbered(2)))
    assert list(found.weights) == numbered(2)
    assert found.index == INDEX


@pytest.mark.parametrize("config", [{}, {"transformers_weights": None}, [], b"", b"{", b"\xff", b"[" * 100_000, b"7"])
def test_a_config_json_that_names_none_or_is_none_changes_nothing(config: Any) -> None:
    assert chosen([WHOLE, "other.safetensors"], config).weights == (WHOLE,)


def test_a_config_json_is_read_as_leniently_as_transformers_reads_it() -> None:
    config = b'{"limit": Infinity, "a": 1, "a": 2, "transformers_weights": "other.safetensors"}'
    assert chosen([WHOLE, "other.safetensors"], config).weights == ("other.safetensors",)


@pytest.mark.parametrize(
    "value", ["x.bin", "", "model", 7, ["a.safetensors"], "../x.safetensors", "/etc/x.safetensors", "model.index.json"]
)
def test_a_config_json_that_names_what_cannot_be_is_refused(value: Any) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"config\.json: transformers_weights is"):
        chosen([WHOLE], {"transformers_weights": value})


def test_a_file_that_config_json_names_and_that_is_not_there_is_named() -> None:
    with pytest.raises(CheckpointNotFound, match=r"config\.json names gone\.safetensors"):
        chosen([WHOLE], {"transformers_weights": "gone.safetensors"})


# ---------------------------------------------------------------------------- by name

EVERYTHING = [
    WHOLE, INDEX, *numbered(2), *numbered(2, "model.fp32"), "model.safetensors.index.fp32.json",
    "consolidated.safetensors", "original/a.safetensors", "original/b.safetensors", "odd[1].safetensors",
    "original/model.safetensors.index.json",
    *(f"model-rank-{rank}-part-{part}.safetensors" for rank in range(2) for part in range(2)),
    *numbered(3, "half", without=[2]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "taken"),
    [
        (["consolidated.safetensors"], ["consolidated.safetensors"]),
        (["model.fp32-*.safetensors"], numbered(2, "model.fp32")),
        (["model-rank-1-part-*.safetensors"], [f"model-rank-1-part-{p}.safetensors" for p in range(2)]),
        (["model-0000?-of-00002.safetensors"], numbered(2)),
        (["original/*.safetensors"], ["original/a.safetensors", "original/b.safetensors"]),
        (["./original/a.safetensors", WHOLE], [WHOLE, "original/a.safetensors"]),
        (["odd[1].safetensors"], ["odd[1].safetensors"]),
        (["half-00001-of-00003.safetensors"], ["half-00001-of-00003.safetensors"]),
        ([INDEX], numbered(2)),
        (["model.safetensors.index.fp32.json"], numbered(2)),
        (["original/model.safetensors.index.json"], ["original/a.safetensors"]),
    ],
)  # fmt: skip
def test_what_is_named_is_taken(wanted: list[str], taken: list[str]) -> None:
    files = numbered(2) if not wanted[0].startswith("original") else ["a.safetensors"]
    assert list(chosen(EVERYTHING, wanted=wanted, model=index_of(*files)).weights) == taken


@pytest.mark.parametrize(
    ("wanted", "kind", "words"),
    [
        (["gone.safetensors"], CheckpointNotFound, "there is"),
        (["gone-*.safetensors"], CheckpointNotFound, "model-*-of-00002.safetensors"),
        (["x.safetensors.index.json"], CheckpointNotFound, "x.safetensors.index.json"),
        (["half-*.safetensors"], CheckpointNotFound, "half-00002-of-00003.safetensors"),
        (["*"], CheckpointNotFound, "half-00002-of-00003.safetensors"),
        (["../m/model.safetensors"], InvalidRequest, "leaves"),
        (["/model.safetensors"], InvalidRequest, "leaves"),
        (["config.json"], InvalidRequest, "must be a .safetensors file"),
        ([INDEX, WHOLE], InvalidRequest, "give it alone"),
    ],
)
def test_what_is_named_and_cannot_be_taken_is_refused(wanted: list[str], kind: type[DaemonError], words: str) -> None:
    with pytest.raises(kind) as refusal:
        chosen(EVERYTHING, wanted=wanted, model=index_of(*numbered(2)))
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://b/m", "s3://b/m/50%off"),
        ("hf://org/name", "hf://org/name/50%off"),
        ("hf://org/name@refs/pr/1", "hf://org/name/50%off@refs/pr/1"),
        ("file:///m", "file:///m/50%25off"),
    ],
)
def test_hints_of_folders_are_uris_that_can_be_staged(uri: str, expected: str) -> None:
    assert below(uri, "50%off") == expected


# ---------------------------------------------------------------------------- as Transformers does


def transformers_takes(folder: Path, explicit: str | None) -> list[str] | None:
    """The files that from_pretrained would load; None where it has no reading."""
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    try:
        files, _ = _get_resolved_checkpoint_files(
            str(folder), variant=None, gguf_file=None, use_safetensors=True, user_agent={}, is_remote_code=False,
            transformers_explicit_filename=explicit,
        )  # fmt: skip
    except (OSError, ValueError):
        return None
    assert files is not None
    return sorted(Path(file).relative_to(folder).as_posix() for file in files)


PARTS: Mapping[str, Callable[[Path], None]] = {
    "whole": lambda folder: put(folder, WHOLE),
    "shards": lambda folder: put(folder, *numbered(2)),
    "index": lambda folder: (folder / INDEX).write_bytes(index_of(*numbered(2))) and None,
    "stale index": lambda folder: (folder / INDEX).write_bytes(index_of(*numbered(3))) and None,
    "variant": lambda folder: put(folder, "model.fp16.safetensors"),
    "variant shards": lambda folder: put(folder, *numbered(2, "model.fp32")),
    "adapter": lambda folder: put(folder, "adapter_model.safetensors"),
    "second copy": lambda folder: put(folder, "consolidated.safetensors"),
    "backup": lambda folder: put(folder, "backup.safetensors"),
    "below": lambda folder: put(folder, "original/model.safetensors"),
    "rank": lambda folder: put(folder, "model-rank-0-part-0.safetensors"),
}
EXPLICIT = [None, "backup.safetensors", WHOLE, INDEX, "original/model.safetensors", "x.bin"]


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


@settings(max_examples=100, deadline=None)
@given(some.sets(some.sampled_from(sorted(PARTS)), min_size=1), some.sampled_from(EXPLICIT))
def test_where_transformers_has_a_reading_it_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, parts: set[str], explicit: str | None
) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    for part in sorted(parts):
        PARTS[part](folder)
    (folder / "config.json").write_text(json.dumps({"transformers_weights": explicit}))
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    expected = transformers_takes(folder, explicit)
    try:
        found = select(
            "file:///m", names, (folder / "config.json").read_bytes(), lambda name: (folder / name).read_bytes()
        )
    except DaemonError:
        # It names files without looking whether they are there.
        assert expected is None or not all((folder / name).is_file() for name in expected)
        return
    if expected is not None:
        assert list(found.weights) == expected
    assert {WHOLE, INDEX}.isdisjoint(names) or explicit or expected is not None


# ---------------------------------------------------------------------------- of files


def test_a_tensor_in_two_shards_is_taken_from_the_one_that_the_index_names(tmp_path: Path) -> None:
    shards: dict[str, dict[str, Tensor]] = {
        "a.safetensors": {"x": ("U8", (1,), b"a"), "y": ("U8", (1,), b"y"), "left out": ("U8", (2,), b"no")},
        "b.safetensors": {"x": ("U8", (1,), b"b")},
    }
    write_checkpoint(tmp_path, shards, index={"x": "b.safetensors", "y": "a.safetensors"})
    found = opened(tmp_path)
    assert [(tensor.name, tensor.file) for tensor in found.tensors] == [("y", 0), ("x", 1)]
    assert found.gaps == {0}


def test_two_saves_into_one_folder_give_what_transformers_loads(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {name: {name: ("U8", (1,), b"x")} for name in numbered(2)})
    write_index(tmp_path)
    write_checkpoint(tmp_path, {WHOLE: TRUE})
    assert transformers_takes(tmp_path, None) == [WHOLE]
    found = opened(tmp_path)
    assert {tensor.name for tensor in found.tensors} == set(TRUE)
    assert {file.name for file in found.listing.left_out} == {INDEX, *numbered(2)}


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
PAGE = b"\n <!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>" + b"x" * 300 + b"</body></html>"


@pytest.mark.parametrize(("text", "words"), [(POINTER, "is a Git LFS pointer"), (PAGE, "is an HTML page")])
@pytest.mark.parametrize("place", ["weights", "shard", "index", "file of an index"])
def test_what_was_put_in_a_files_place_is_called_what_it_is(
    text: bytes, words: str, place: str, tmp_path: Path
) -> None:
    name = {"weights": WHOLE, "index": INDEX}.get(place, numbered(2)[1])
    if place != "weights":
        write_checkpoint(tmp_path, {shard: {shard: ("U8", (1,), b"x")} for shard in numbered(2)})
    if place == "file of an index":
        write_index(tmp_path)
    (tmp_path / name).write_bytes(text)
    with pytest.raises(InvalidCheckpoint) as refusal:
        opened(tmp_path)
    assert f"{name} {words}" in str(refusal.value)


@pytest.mark.parametrize(
    ("begin", "words"),
    [
        (b"PK\x03\x04", "ZIP"),
        (b"\x80\x02}q", "pickle"),
        (b"GGUF\x03", "GGUF"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"<?xml version='1.0'?><Error>", "XML"),
    ],
)
def test_other_formats_are_called_by_their_names(begin: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / WHOLE).write_bytes(begin + bytes(range(1, 256)))
    with pytest.raises(InvalidCheckpoint, match=rf"{WHOLE} is .*{words}|{WHOLE} is compressed with {words}"):
        opened(tmp_path)


def test_the_file_of_an_index_can_be_named_by_its_own_uri(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {name: {name: ("U8", (1,), b"x")} for name in (*numbered(2), WHOLE)})
    variant = tmp_path / "model.safetensors.index.fp32.json"
    variant.write_text(json.dumps({"weight_map": {name: name for name in numbered(2)}}))
    (tmp_path / "config.json").write_text("{}")
    _, listing = listed(variant)
    assert [file.name for file in listing.weights] == numbered(2)
    assert {file.name for file in listing.metadata} == {variant.name, "config.json"}


def test_each_way_to_choose_has_an_identity_of_its_own(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {name: {name: ("U8", (1,), b"x")} for name in (*numbered(2), WHOLE)})
    write_index(tmp_path)
    ways = [(), (INDEX,), ("model-*.safetensors",), (numbered(2)[0],)]
    found = [listed(tmp_path, *way)[1].identity for way in ways]
    assert all(one != other for one, other in itertools.combinations(found, 2))
