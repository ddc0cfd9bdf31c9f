"""hf://: the repository's own list of files decides, whatever the local cache has of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from tests.checkpoint_files import Tensor, write_checkpoint, write_index
from tests.servers import Daemon
from tests.sources.hub import COMMIT, Hub, cache
from tests.sources.test_sources import assert_holds, checkpoint
from weightd.daemon.checkpoints.listing import Listing, list_checkpoint
from weightd.daemon.errors import CheckpointNotFound, DaemonError, InvalidRequest, NotAllowed, SourceFailed
from weightd.daemon.sources.hub import HubSource, open_source
from weightd.daemon.sources.uris import Allow
from weightd.ipc import RequestRefused

SHARDS = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]


def tensor(name: str) -> dict[str, Tensor]:
    return {name: ("U8", (3,), b"abc")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository with shards, a second copy, an adapter in a folder, and files beside."""
    folder = write_checkpoint(tmp_path / "repository", {name: tensor(name) for name in SHARDS})
    write_index(folder)
    write_checkpoint(folder, {"consolidated.safetensors": tensor("all")})
    write_checkpoint(folder / "original", {"model.safetensors": tensor("original")})
    (folder / "config.json").write_text("{}")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of the hub's cache, for this process."""
    from huggingface_hub import constants

    home = tmp_path / "hf"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return home


@pytest.fixture
def hub(folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    with Hub(folder) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


@pytest.fixture
def offline(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub answers."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def listed(uri: str, *weights: str) -> Listing:
    return list_checkpoint(uri, open_source(uri, Allow()), weights)


def names(listing: Listing) -> list[str]:
    return [file.name for file in listing.weights]


CACHED: dict[str, list[str]] = {
    "nothing": [],
    "one shard and config.json": [SHARDS[0], "config.json"],
    "the second copy": ["consolidated.safetensors"],
    "the second copy and config.json": ["consolidated.safetensors", "config.json"],
    "the index": ["model.safetensors.index.json"],
    "all of it": [*SHARDS, "model.safetensors.index.json", "config.json", ".gitattributes"],
    "what is below": ["original/model.safetensors"],
}


def test_whatever_is_cached_of_a_revision_it_is_the_same_checkpoint(hub: Hub, home: Path, folder: Path) -> None:
    found = set()
    for cached in CACHED.values():
        cache(home, folder)
        for path in (home / "hub" / "models--org--name").rglob("*"):
            if path.is_symlink() or path.suffix == ".json":
                path.unlink()
        cache(home, folder, *cached)
        listing = listed("hf://org/name")
        assert names(listing) == SHARDS
        found.add(listing.identity)
    assert len(found) == 1


def test_the_list_of_a_commit_is_asked_for_once_and_is_known_offline_from_then_on(
    hub: Hub, folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = HubSource("hf://org/name")
    listing = list_checkpoint("hf://org/name", source)
    source.fetch(listing.weights)
    assert hub.listed() == 1
    assert listed("hf://org/name").identity == listing.identity
    assert hub.listed() == 1
    hub.close()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = listed("hf://org/name")
    assert again.identity == listing.identity
    assert again.left_out == listing.left_out
    assert names(listed(f"hf://org/name@{COMMIT}")) == SHARDS


def test_the_list_that_the_hubs_own_library_keeps_is_taken(
    offline: None, home: Path, folder: Path, tmp_path: Path
) -> None:
    cache(home, folder, "consolidated.safetensors")
    trees = home / "hub" / "models--org--name" / "trees"
    trees.mkdir()
    only = {"size": 3, "blob_id": "0" * 40, "lfs_sha256": "1" * 64, "lfs_size": 77}
    (trees / f"{COMMIT}.json").write_text(
        json.dumps({"format_version": 1, "files": {"consolidated.safetensors": only}})
    )
    listing = listed("hf://org/name")
    assert [tuple(file) for file in listing.weights] == [("consolidated.safetensors", 77, "1" * 64)]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1, "files": {"x": 7}}', '{"format_version": 2}'])
def test_a_list_that_is_none_is_asked_for_again(hub: Hub, home: Path, folder: Path, text: str) -> None:
    cache(home, folder, "consolidated.safetensors")
    for place in ("trees", ".weightd"):
        (home / "hub" / "models--org--name" / place).mkdir()
        (home / "hub" / "models--org--name" / place / f"{COMMIT}.json").write_text(text)
    assert names(listed("hf://org/name")) == SHARDS


@pytest.mark.parametrize(
    "cached",
    [
        ["consolidated.safetensors"],
        ["consolidated.safetensors", "config.json"],
        [SHARDS[0], "config.json"],
        [SHARDS[0], "model.safetensors.index.json"],
        ["original/model.safetensors"],
        [],
    ],
)
def test_offline_a_part_in_the_cache_is_said_to_be_perhaps_a_part(
    offline: None, home: Path, folder: Path, cached: list[str]
) -> None:
    cache(home, folder, *cached)
    with pytest.raises((SourceFailed, CheckpointNotFound), match=r"may have but a part|has no file"):
        listed("hf://org/name")


@pytest.mark.parametrize("cached", [[*SHARDS, "model.safetensors.index.json"], SHARDS])
def test_offline_a_whole_checkpoint_is_one_without_its_config(
    offline: None, home: Path, folder: Path, cached: list[str]
) -> None:
    cache(home, folder, *cached)
    assert names(listed("hf://org/name")) == SHARDS


def test_offline_what_is_named_is_taken(offline: None, home: Path, folder: Path) -> None:
    cache(home, folder, "consolidated.safetensors", SHARDS[0])
    assert names(listed("hf://org/name", "consolidated.safetensors")) == ["consolidated.safetensors"]
    assert names(listed("hf://org/name/consolidated.safetensors")) == ["consolidated.safetensors"]
    with pytest.raises(SourceFailed, match="may have but a part"):
        listed("hf://org/name", "consol*.safetensors")


def test_offline_a_shard_that_the_cache_lacks_is_named(
    hub: Hub, home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = listed("hf://org/name")
    cache(home, folder, SHARDS[0])
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    source = HubSource(f"hf://org/name@{COMMIT}")
    source.list()
    with pytest.raises(SourceFailed, match=rf"{SHARDS[1]}: the hub's local cache is partial"):
        source.fetch(listing.weights)


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_a_folder_of_a_repository_is_a_checkpoint(hub: Hub, revision: str) -> None:
    listing = listed(f"hf://org/name/original{revision}")
    assert names(listing) == ["model.safetensors"]
    assert not listing.metadata
    source = HubSource(f"hf://org/name/original{revision}")
    source.list()
    assert b"original" in source.read("model.safetensors", 0, 100)
    assert names(listed(f"hf://org/name/original/model.safetensors{revision}")) == ["model.safetensors"]


def test_a_folder_that_is_not_there_is_said_not_to_be(hub: Hub) -> None:
    with pytest.raises(CheckpointNotFound, match="no file in nowhere/"):
        listed("hf://org/name/nowhere")


def test_a_hint_of_a_folder_can_be_followed(hub: Hub, folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    with pytest.raises(CheckpointNotFound, match=r"hf://org/name/original@main: stage one of these"):
        listed("hf://org/name@main")
    assert names(listed("hf://org/name/original@main")) == ["model.safetensors"]


@pytest.mark.parametrize("uri", ["hf://../..", "hf://org/-", "hf://a b/c"])
def test_what_is_no_repositorys_name_is_refused(uri: str) -> None:
    with pytest.raises(InvalidRequest, match="hf:"):
        HubSource(uri)


@pytest.mark.parametrize(
    ("prefix", "uri", "fine"),
    [
        ("hf://org", "hf://org/name/x@main", True),
        ("hf://org/name", "hf://org/name/original@main", True),
        ("hf://org/name", "hf://org/name@main", True),
        ("hf://org/name", "hf://org/names", False),
        ("hf://org/name/original", "hf://org/name/original/x@v1", True),
        ("hf://org/name/original", "hf://org/name@v1", False),
        ("hf://org/name@v1", "hf://org/name/original@v1", True),
        ("hf://org/name@v1", "hf://org/name@v1/other", False),
        ("hf://org/name@v1", "hf://org/name@v2", False),
        ("hf://org/name@v1", "hf://org/name", False),
    ],
)
def test_what_may_be_staged_is_a_matter_of_folder_and_revision(prefix: str, uri: str, fine: bool) -> None:
    allow = Allow([prefix])
    if fine:
        allow.check(uri)
    else:
        with pytest.raises(NotAllowed):
            allow.check(uri)


def test_a_repository_is_downloaded_into_the_hubs_cache_and_staged_from_there(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    tensors = checkpoint(tmp_path / "repo", shards=2)
    below = {"w": numpy.arange(7, dtype=numpy.int32)}
    save_file(below, tmp_path / "repo" / "1_Pooling" / "model.safetensors")
    with Hub(tmp_path / "repo") as hub:
        daemon = start_daemon(env=hub.env(tmp_path / "hf"))
        record = daemon.stage("hf://org/name@main")
        assert record["state"] == "ready", record["error"]
        assert record["selection"]["files"] == SHARDS
        assert [file["name"] for file in record["selection"]["left_out"]] == ["1_Pooling/model.safetensors"]
        with daemon.attach("hf://org/name@main") as weights:
            assert_holds(weights, tensors)
            assert weights.metadata is not None
            assert (weights.metadata / "config.json").exists()
        again = daemon.stage("hf://org/name@main")
        assert again["id"] == record["id"], "the cache is what the hub had"
        with daemon.attach("hf://org/name/1_Pooling@main") as weights:
            assert_holds(weights, below)
        assert any(path.startswith("/org/name/resolve/") for path in hub.asked)
    # A second daemon, with the hub gone: the cache has it.
    daemon = start_daemon(env=hub.env(tmp_path / "hf"))
    with daemon.attach("hf://org/name@main") as weights:
        assert_holds(weights, tensors)
    missing = daemon.stage("hf://org/other")
    assert missing["state"] == "failed"
    assert "hf://org/other" in missing["error"]["message"]
    with pytest.raises(RequestRefused, match="hf:"):
        daemon.stage("hf://../..")


def test_credentials_that_the_hub_refuses_do_not_take_what_is_cached_away(
    home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache(home, folder, *SHARDS, "model.safetensors.index.json")

    def refused(*_: object) -> object:
        raise DaemonError("refused")

    monkeypatch.setattr(HubSource, "_ask_hub", refused)
    assert names(listed("hf://org/name")) == SHARDS


def test_what_a_file_is_can_be_asked_without_a_list_before(hub: Hub, folder: Path) -> None:
    listing = listed("hf://org/name")
    assert open_source("hf://org/name", Allow()).stat(SHARDS[0]) == listing.weights[0]
    with pytest.raises(CheckpointNotFound, match="nothing-here"):
        open_source("hf://org/name", Allow()).stat("nothing-here")
    with pytest.raises(CheckpointNotFound, match="nothing-here"):
        open_source("hf://org/name/nothing-here.safetensors", Allow()).list()
