"""What the daemon keeps on disk: which files beside the weights, how much of it, and what a killed writer leaves."""

from __future__ import annotations

import fcntl
import os
from array import array
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from tests.checkpoint_files import INDEX, write_checkpoint
from tests.checkpoints.lies import TRUE, listed, opened
from tests.servers import Daemon, until
from weightd.daemon.checkpoints import metadata
from weightd.daemon.checkpoints.cache import Cache
from weightd.daemon.checkpoints.metadata import choose
from weightd.daemon.errors import CredentialsRefused, DaemonError, SourceFailed, UnreadableFile
from weightd.daemon.sources.base import SourceFile
from weightd.daemon.sources.file import FileSource


def files(*names: str, size: int = 10) -> list[SourceFile]:
    return [SourceFile(name, size, "v") for name in names]


# ---------------------------------------------------------------------- which files


def test_many_small_files_crowd_out_nothing_that_engines_read() -> None:
    needed = files("config.json", "tokenizer.json", "tokenizer.model", "modeling_own.py", "1_Pooling/config.json",
                   size=5_000_000)  # fmt: skip
    small = files(*(f"logs/{i}.txt" for i in range(700)), *(f"eval-{i}.md" for i in range(700)), size=1)
    chosen, left_out = choose([*small, *needed])
    assert len(chosen) == metadata.MAX_FILES
    assert set(needed) <= set(chosen)
    assert len(left_out) == len(needed) + 1400 - metadata.MAX_FILES
    assert {file.reason for file in left_out} == {"more than 512 files beside the weights"}


def test_the_top_level_comes_before_what_lies_below() -> None:
    below = files(*(f"checkpoint-{i}/config.json" for i in range(700)), size=1)
    chosen, _ = choose([*below, *files("config.json", "tokenizer.json", "custom.json", "own.py")])
    assert [file.name for file in chosen[:4]] == ["config.json", "tokenizer.json", "custom.json", "own.py"]


def test_one_file_too_large_leaves_others_their_place() -> None:
    large = SourceFile("tokenizer.json", metadata.MAX_FILE_BYTES + 1, "v")
    chosen, left_out = choose([large, *files("config.json", "README.md")])
    assert [file.name for file in chosen] == ["config.json", "README.md"]
    assert [file.name for file in left_out] == ["tokenizer.json"]
    many = [SourceFile(f"{i}.json", metadata.MAX_FILE_BYTES, "v") for i in range(5)]
    chosen, left_out = choose([*many, *files("z.txt")])
    assert len(chosen) == metadata.MAX_TOTAL_BYTES // metadata.MAX_FILE_BYTES
    assert len(left_out) == 2


class Partly(FileSource):
    """A folder of which some files cannot be read."""

    errors: dict[str, DaemonError] = {}

    def read(self, name: str, offset: int, length: int) -> bytes:
        if name in self.errors:
            raise self.errors[name]
        return super().read(name, offset, length)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "m", {"model.safetensors": TRUE})
    for name in ("config.json", "tokenizer.json", "README.md"):
        (folder / name).write_text(name)
    return folder


def partly(folder: Path, **errors: DaemonError) -> Partly:
    source, _ = listed(folder)
    found = Partly(folder, source._allow)
    found.errors = {name.replace("_", "."): error for name, error in errors.items()}
    return found


@pytest.mark.parametrize("error", [UnreadableFile("mode"), CredentialsRefused("403"), SourceFailed("500")])
def test_a_file_that_cannot_be_read_is_left_out_and_tried_again(
    error: DaemonError, folder: Path, tmp_path: Path
) -> None:
    cache, listing = Cache(tmp_path / "cache"), listed(folder)[1]
    kept, left_out = cache.metadata(partly(folder, README_md=error), listing)
    assert kept is not None
    assert sorted(os.listdir(kept)) == ["config.json", "tokenizer.json"]
    assert [(file.name, file.reason) for file in left_out] == [("README.md", f"cannot be read: {error}")]
    assert cache.metadata(partly(folder), listing) == (kept, ())
    assert (kept / "README.md").read_text() == "README.md"
    everything = dict.fromkeys(("config_json", "tokenizer_json", "README_md"), error)
    assert cache.metadata(partly(folder, **everything), listing) == (kept, ()), "all of it is here"


def test_a_source_that_answers_for_no_file_is_away(folder: Path, tmp_path: Path) -> None:
    errors = {name: SourceFailed("away") for name in ("config_json", "tokenizer_json", "README_md")}
    with pytest.raises(SourceFailed, match="away"):
        Cache(tmp_path / "cache").metadata(partly(folder, **errors), listed(folder)[1])


def test_a_name_that_no_file_can_have_costs_only_that_file(folder: Path, tmp_path: Path) -> None:
    source, listing = listed(folder)
    content = {"a": b"1", "a/b": b"2", "x" * 300: b"3", "config.json": b"4"}

    class Odd(FileSource):
        def read(self, name: str, offset: int, length: int) -> bytes:
            return content[name]

    odd = Odd(folder, source._allow)
    listing = type(listing)(listing.uri, "odd", listing.weights, None, tuple(SourceFile(n, 1, "v") for n in content))
    kept, left_out = Cache(tmp_path / "cache").metadata(odd, listing)
    assert kept is not None
    assert (kept / "config.json").read_bytes() == b"4"
    assert {"x" * 300} < {file.name for file in left_out} < set(content)
    assert len(left_out) == 2


# ---------------------------------------------------------------------- how much


def filled(cache: Cache, number: int, used: float) -> str:
    """Keep leaves of about 40 KB under a digest, used at a time."""
    digest = f"xxh3:{number:032x}"
    cache.save_leaves(digest, {"w": array("Q", range(2**40, 2**40 + 3000))})
    os.utime(cache.folder / "digests" / f"xxh3-{number:032x}.json", (used, used))
    return digest


def test_what_was_not_used_for_longest_goes_and_what_is_in_use_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 150_000)
    digests = [filled(cache, number, 1000 + number) for number in range(6)]
    cache.load_leaves(digests[1])  # which is a use of it
    cache.trim({digests[0]})
    left = [digest for digest in digests if (tmp_path / "digests" / f"{digest.replace(':', '-')}.json").exists()]
    assert left == [digests[0], digests[1], digests[5]]
    cache.trim(digests)
    assert len(list((tmp_path / "digests").iterdir())) == 3


def test_folders_of_configuration_and_headers_count_and_go_as_a_whole(folder: Path, tmp_path: Path) -> None:
    cache, checkpoint = Cache(tmp_path / "cache", 0), opened(folder)
    cache.metadata(partly(folder), checkpoint.listing)
    cache.keep_headers(checkpoint)
    identity = checkpoint.listing.identity
    cache.trim({identity})
    assert cache.kept_listing(identity) is not None
    cache.trim(())
    assert [list((tmp_path / "cache" / kind).iterdir()) for kind in ("checkpoints", "headers")] == [[], []]


def test_without_a_bound_nothing_goes(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    filled(cache, 1, 1000)
    cache.trim(())
    assert len(list((tmp_path / "digests").iterdir())) == 1


def test_what_killed_writers_left_goes_and_what_one_is_writing_stays(tmp_path: Path) -> None:
    for kind in ("checkpoints", "headers", "digests"):
        (tmp_path / kind / ".partial-left" / "below").mkdir(parents=True)
        (tmp_path / kind / ".partial-left" / "below" / "x").write_text("x")
        (tmp_path / kind / ".partial-file").write_text("x")
        (tmp_path / kind / "whole").mkdir()
    (tmp_path / "checkpoints" / ".partial-written").mkdir()
    fd = os.open(tmp_path / "checkpoints" / ".partial-written", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    cache = Cache(tmp_path)
    cache.clean()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [".partial-written", "whole"]
    assert os.listdir(tmp_path / "headers") == os.listdir(tmp_path / "digests") == ["whole"]
    os.close(fd)
    cache.clean()
    assert os.listdir(tmp_path / "checkpoints") == ["whole"]


def test_versions_that_were_staged_and_dropped_do_not_stay_for_ever(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = start_daemon("--cache-bytes", "100kB")
    (daemon.cache_dir / "checkpoints" / ".partial-left").mkdir(parents=True)
    left = daemon.cache_dir / "checkpoints" / ".partial-left"

    def staged(version: int) -> dict[str, str]:
        folder = tmp_path / f"v{version}"
        folder.mkdir()
        save_file({"w": numpy.full(100, version, numpy.float32)}, folder / "model.safetensors")
        (folder / "tokenizer.json").write_text(str(version) * 40_000)
        record = daemon.stage(folder)
        assert record["state"] == "ready", record["error"]
        return record

    resident = staged(0)
    for version in range(1, 6):
        daemon.client.remove(staged(version)["id"])
    staged(6)
    until(lambda: len(os.listdir(daemon.cache_dir / "checkpoints")) <= 4, "old versions have gone")
    assert (Path(resident["metadata"]) / "tokenizer.json").read_text() == "0" * 40_000
    os.kill(daemon.pid, 9)
    until(lambda: not left.exists(), "the next daemon cleans up", 60)
    until(lambda: daemon.client.show(resident["id"])["state"] == "ready", "it was adopted", 60)
    assert daemon.client.show(resident["id"])["selection"]["files"] == ["model.safetensors"]
    assert (Path(resident["metadata"]) / "tokenizer.json").exists()


def test_the_index_that_was_used_is_kept_and_one_that_was_not_is_not(folder: Path, tmp_path: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"gone": "gone.safetensors"}}')
    kept, _ = Cache(tmp_path / "cache").metadata(*listed(folder))
    assert kept is not None
    assert INDEX not in os.listdir(kept)
