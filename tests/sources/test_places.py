"""What lies where: links in folders, markers and hidden folders in buckets, names that need escapes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy
import obstore
import pytest
from safetensors.numpy import save_file

from tests.checkpoint_files import INDEX, Tensor, write_checkpoint
from tests.checkpoints.lies import TRUE, listed, opened
from tests.fault_proxy import FaultProxy
from tests.servers import Daemon, SeaweedFS
from tests.sources.test_sources import assert_holds, checkpoint
from weightd.daemon.checkpoints.listing import list_checkpoint
from weightd.daemon.errors import CheckpointNotFound, InvalidCheckpoint, UnreadableFile
from weightd.daemon.sources import file as files
from weightd.daemon.sources.file import FileSource
from weightd.daemon.sources.object_store import ObjectStoreSource
from weightd.daemon.sources.uris import Allow, canonical, file_path, file_uri, open_source

ONE: dict[str, Tensor] = {"w": ("U8", (3,), b"abc")}

# ---------------------------------------------------------------------- links


def test_a_shard_in_a_linked_folder_is_a_shard(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "elsewhere", {"a.safetensors": ONE})
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "shards").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "m" / INDEX).write_text(json.dumps({"weight_map": {"w": "shards/a.safetensors"}}))
    assert [file.name for file in opened(tmp_path / "m").listing.weights] == ["shards/a.safetensors"]


def test_links_in_circles_are_followed_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"model.safetensors": ONE})
    (tmp_path / "self").symlink_to(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "to-b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "to-a").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text("{}")
    _, listing = listed(tmp_path)
    assert {file.name for file in listing.metadata} == {"a/config.json", "b/to-a/config.json"}


def test_folders_that_link_to_each_other_without_end_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_FOLDERS", 500)
    for one in range(20):
        (tmp_path / str(one)).mkdir()
        for other in range(20):
            (tmp_path / str(one) / str(other)).symlink_to(tmp_path / str(other))
    with pytest.raises(InvalidCheckpoint, match="more than 500 folders"):
        listed(tmp_path)


def test_a_linked_folder_that_may_not_be_staged_is_not_looked_into(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "allowed", {"model.safetensors": ONE})
    write_checkpoint(tmp_path / "secret", {"hidden.safetensors": ONE})
    write_checkpoint(tmp_path / "allowed" / "real", {"seen.safetensors": ONE})
    (tmp_path / "allowed" / "out").symlink_to(tmp_path / "secret")
    (tmp_path / "allowed" / "in").symlink_to(tmp_path / "allowed" / "real")
    source = FileSource(tmp_path / "allowed", Allow([str(tmp_path / "allowed")]))
    names = {file.name for file in source.list()}
    assert names == {"model.safetensors", "real/seen.safetensors", "in/seen.safetensors"}


def test_hidden_folders_are_passed_over_and_hidden_files_are_not(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"model.safetensors": ONE})
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config.json").write_text("{}")
    (tmp_path / ".gitattributes").write_text("")
    _, listing = listed(tmp_path)
    assert [file.name for file in listing.metadata] == [".gitattributes"]


# ---------------------------------------------------------------------- escapes


@pytest.mark.parametrize("name", ["llama-50%25off", "llama-50%off", "100%", "%", "a%2Fb", "%2525", "a b+c", "ü"])
def test_a_folder_of_any_name_survives_its_own_records_uri(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / name, {"model.safetensors": ONE})
    uri = canonical(str(tmp_path / name))
    assert canonical(uri) == uri
    assert file_path(uri) == str(tmp_path / name)
    assert [file.name for file in list_checkpoint(uri, open_source(uri, Allow())).weights] == ["model.safetensors"]
    allowed = Allow([str(tmp_path / name)])
    open_source(uri, allowed)
    assert Allow(allowed.prefixes).prefixes == allowed.prefixes == (file_uri(str(tmp_path / name)),)


def test_a_record_of_a_folder_with_a_percent_sign_leads_back_to_its_stage(daemon: Daemon, tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path / "llama-50%25off", shards=1)
    record = daemon.stage(tmp_path / "llama-50%25off")
    assert record["state"] == "ready", record["error"]
    assert daemon.stage(record["model"])["id"] == record["id"]
    with daemon.attach(record["model"]) as weights:
        assert_holds(weights, tensors)


def test_a_hint_of_a_folder_below_one_with_a_percent_sign_can_be_followed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "50%off" / "25%25", {"model.safetensors": ONE})
    uri = canonical(str(tmp_path / "50%off"))
    with pytest.raises(CheckpointNotFound) as refusal:
        list_checkpoint(uri, open_source(uri, Allow()))
    hint = (
        str(refusal.value).partition("there are some in ")[2].partition(":  ")[0].removesuffix(": stage one of these")
    )
    assert list_checkpoint(hint, open_source(canonical(hint), Allow())).weights


# ---------------------------------------------------------------------- buckets


@pytest.fixture
def bucket(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> SeaweedFS:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    return s3


def test_markers_of_folders_and_hidden_folders_in_a_bucket_are_passed_over(
    start_daemon: Callable[..., Daemon], bucket: SeaweedFS, tmp_path: Path
) -> None:
    checkpoint(tmp_path / "m", shards=1)
    (tmp_path / "m" / ".git").mkdir()
    (tmp_path / "m" / ".git" / "config.json").write_text("{}")
    uri = bucket.upload(tmp_path / "m", "marked")
    listing = list_checkpoint(uri, ObjectStoreSource(uri))
    assert {file.name for file in listing.metadata} == {"config.json", "1_Pooling/config.json", INDEX}
    record = start_daemon(env=bucket.env).stage(uri)
    assert record["state"] == "ready", record["error"]
    assert (Path(record["metadata"]) / "1_Pooling" / "config.json").read_text() == "{}"


class Meta:
    """A store that lists what SeaweedFS, whose folders are real, cannot hold."""

    def __init__(self, *objects: tuple[str, int]) -> None:
        self._objects = objects

    def list(self, prefix: str) -> list[list[dict[str, object]]]:
        return [[{"path": f"{prefix}/{name}", "size": size, "e_tag": name} for name, size in self._objects]]


def test_an_empty_object_of_a_folders_name_is_no_file(bucket: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ObjectStoreSource("s3://models/m")
    objects = [
        ("1_Pooling", 0), ("1_Pooling/config.json", 2), ("a", 0), ("a/b", 0), ("a/b/c", 1), ("empty", 0), ("x", 5),
        ("x/y", 1), (".git/HEAD", 7), ("a/.cache/z", 7), (".hidden", 1),
    ]  # fmt: skip
    monkeypatch.setattr(source, "_store", Meta(*objects))
    assert [file.name for file in source.list()] == [
        ".hidden", "1_Pooling/config.json", "a/b/c", "empty", "x", "x/y",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_an_unreadable_file_beside_the_weights_is_left_out_with_the_reason(
    kind: str, start_daemon: Callable[..., Daemon], s3: SeaweedFS, tmp_path: Path
) -> None:
    tensors = checkpoint(tmp_path / "m", shards=1)
    (tmp_path / "m" / "tokenizer.json").write_text('{"a": 1}')
    (tmp_path / "m" / "vocab.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    if kind == "folder":
        os.truncate(tmp_path / "m" / "tokenizer.json", 65 << 20)  # more than is kept of one file
        record = start_daemon().stage(tmp_path / "m")
        assert {file["name"] for file in record["selection"]["left_out"]} == {"tokenizer.json", "vocab.txt"}
        return
    uri = s3.upload(tmp_path / "m", "partly-readable")
    store = s3.store()

    def away(request: object) -> None:
        # Between listing and reading: what lists it is before what reads it.
        if request.path.endswith("tokenizer.json") and request.method == "GET":
            obstore.delete(store, "partly-readable/tokenizer.json")

    with FaultProxy(s3.url, away) as proxy:  # type: ignore[arg-type]
        daemon = start_daemon(env={**s3.env, "AWS_ENDPOINT_URL": proxy.url})
        record = daemon.stage(uri)
        assert record["state"] == "ready", record["error"]
        left_out = {file["name"]: file["reason"] for file in record["selection"]["left_out"]}
        assert "not found" in left_out["tokenizer.json"]
        assert "Git LFS pointer" in left_out["vocab.txt"]
        assert sorted(os.listdir(record["metadata"])) == ["1_Pooling", "config.json", INDEX]
        with daemon.attach(stage=record["id"]) as weights:
            assert_holds(weights, tensors)


def test_a_file_that_this_user_may_not_read_is_said_to_be_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, {"model.safetensors": TRUE})
    real = os.open

    def closed(path: object, *arguments: object, **more: object) -> int:
        if str(path).endswith("model.safetensors"):
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", closed)
    with pytest.raises(UnreadableFile, match=r"model\.safetensors: Permission denied"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("status code: 403 Forbidden: <Error><Code>InvalidObjectState</Code>", "archived: restore it first"),
        ("status code: 409 Conflict: <Code>BlobArchived</Code>", "archived: restore it first"),
        ("status code: 400 Bad Request: <Code>KMS.DisabledException</Code>", "encrypted with a key that is refused"),
    ],
)
def test_an_archived_or_encrypted_object_is_not_a_matter_of_credentials(
    bucket: SeaweedFS, text: str, words: str
) -> None:
    from obstore.exceptions import GenericError

    source = ObjectStoreSource("s3://models/m")
    with pytest.raises(UnreadableFile, match=rf"s3://models/m/x is {words}"), source._errors("s3://models/m/x"):
        raise GenericError(text)


# ---------------------------------------------------------------------- naming the weights


def test_what_was_taken_and_left_out_is_in_the_record_and_choosing_makes_another_stage(
    daemon: Daemon, tmp_path: Path
) -> None:
    whole, copy = {"w": numpy.ones(5, numpy.float32)}, {"v": numpy.zeros(7, numpy.float32)}
    save_file(whole, tmp_path / "model.safetensors")
    save_file(copy, tmp_path / "consolidated.safetensors")
    record = daemon.stage(tmp_path)
    assert record["selection"]["files"] == ["model.safetensors"]
    assert record["selection"]["rule"] == "model.safetensors is there"
    assert [file["name"] for file in record["selection"]["left_out"]] == ["consolidated.safetensors"]
    other = daemon.stage(tmp_path, weights="consolidated.safetensors")
    assert other["id"] != record["id"]
    assert other["selection"]["files"] == ["consolidated.safetensors"]
    assert daemon.stage(tmp_path, weights=["consolidated.safetensors"])["id"] == other["id"]
    assert daemon.stage(tmp_path)["id"] == record["id"]
    with daemon.attach(tmp_path, weights="consol*.safetensors") as weights:
        assert_holds(weights, copy)
    with daemon.attach(tmp_path) as weights:
        assert_holds(weights, whole)


def test_what_cannot_be_told_names_the_candidates_and_the_way_out(daemon: Daemon, tmp_path: Path) -> None:
    for rank in range(2):
        save_file({"w": numpy.full(5, rank, numpy.float32)}, tmp_path / f"model-rank-{rank}-part-0.safetensors")
    record = daemon.stage(tmp_path)
    assert record["state"] == "failed"
    assert record["error"]["code"] == "ambiguous_checkpoint"
    assert record["error"]["details"]["candidates"] == [f"model-rank-{rank}-part-0.safetensors" for rank in range(2)]
    for rank in range(2):
        with daemon.attach(tmp_path, weights=f"model-rank-{rank}-part-*.safetensors") as weights:
            assert_holds(weights, {"w": numpy.full(5, rank, numpy.float32)})
