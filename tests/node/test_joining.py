"""Requests for what is there: which stages they join, what joining changes, and what outlives a restart of it."""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from tests.fault_proxy import FaultProxy
from tests.node.adopting import replaced
from tests.servers import Daemon, SeaweedFS, until

Start = Callable[..., Daemon]
FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards, each of one tensor."""
    folder = tmp_path / "model"
    folder.mkdir()
    for value, (name, shard) in enumerate(zip("ab", (FIRST, SECOND), strict=True)):
        save_file({name: numpy.full(1024, value, numpy.float32)}, folder / shard)
    (folder / "config.json").write_text("{}")
    return folder


def sha256(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


def test_a_stage_that_met_a_part_of_what_is_expected_is_not_what_is_expected(daemon: Daemon, folder: Path) -> None:
    true = sha256(folder)
    first = daemon.stage(folder, expect_digest={FIRST: true[FIRST]})
    assert first["state"] == "ready", first["error"]
    same = daemon.stage(folder, expect_digest={FIRST: true[FIRST]})
    assert same["id"] == first["id"]
    refused = daemon.stage(folder, expect_digest={**true, SECOND: "0" * 64})
    assert refused["state"] == "failed", "one file of two was enough"
    assert refused["error"]["code"] == "digest_mismatch"
    whole = daemon.stage(folder, expect_digest=true)
    assert whole["state"] == "ready", whole["error"]
    assert whole["id"] != first["id"], "nobody has looked at the other file"
    for part in ({FIRST: true[FIRST]}, {SECOND: true[SECOND]}):
        assert daemon.stage(folder, expect_digest=part)["id"] in (first["id"], whole["id"])
    assert daemon.stage(folder, expect_digest={SECOND: true[SECOND]})["id"] == whole["id"]


def test_joining_raises_the_priority_and_pins_and_never_the_other_way(start_daemon: Start, folder: Path) -> None:
    daemon = start_daemon()
    first = daemon.stage(folder, priority=5)

    def joined(**request: object) -> tuple[int, bool]:
        record = daemon.stage(folder, **request)
        assert record["id"] == first["id"]
        return record["priority"], record["pin"]

    assert joined(priority=-3) == (5, False)
    assert joined() == (5, False)
    assert joined(priority=7) == (7, False)
    assert joined(pin=True) == (7, True)
    assert joined(priority=6) == (7, True)


def test_a_pin_is_set_and_taken_away_by_patch_and_decides_what_goes(start_daemon: Start, tmp_path: Path) -> None:
    models = []
    for value in range(3):
        (tmp_path / f"m{value}").mkdir()
        save_file({"w": numpy.full(1 << 18, value, numpy.float32)}, tmp_path / f"m{value}" / "m.safetensors")
        models.append(tmp_path / f"m{value}")
    daemon = start_daemon("--capacity", "cpu=1MiB")
    stage = daemon.stage(models[0])["id"]
    assert daemon.client.change(stage, pin=True)["pin"] is True
    assert daemon.client.show(stage)["pin"] is True
    assert daemon.client.change(stage, priority=4)["pin"] is True, "what is not said stays"
    with pytest.raises(Exception, match="unpin"):
        daemon.stage(models[1])
    assert daemon.client.show(stage)["state"] == "ready"
    changed = daemon.client.change(stage, pin=False)
    assert (changed["pin"], changed["priority"]) == (False, 4)
    assert daemon.stage(models[1])["state"] == "ready"
    assert daemon.client.show(stage)["state"] == "evicted"


def test_a_pin_a_priority_and_what_was_met_outlive_the_daemon(start_daemon: Start, folder: Path) -> None:
    daemon = start_daemon()
    true = sha256(folder)
    record = daemon.stage(folder, expect_digest=true)
    daemon.client.change(record["id"], pin=True, priority=9)
    replaced(daemon)
    after = daemon.client.show(record["id"])
    assert (after["state"], after["pin"], after["priority"]) == ("ready", True, 9)
    # Asked for in other words than it was staged with, so that only what it has met can tell.
    for expected in ({FIRST: true[FIRST]}, {SECOND: true[SECOND]}):
        assert daemon.stage(folder, expect_digest=expected)["id"] == record["id"]
    daemon.client.change(record["id"], pin=False)
    replaced(daemon)
    assert daemon.client.show(record["id"])["pin"] is False


def test_what_is_resident_is_served_where_the_origin_says_nothing(
    start_daemon: Start, s3: SeaweedFS, folder: Path
) -> None:
    uri = s3.upload(folder, "stalls")
    stalled, over = threading.Event(), threading.Event()

    def stall(request: object) -> None:
        if stalled.is_set():
            over.wait()

    with FaultProxy(s3.url, stall) as origin:
        daemon = start_daemon(env={**s3.env, "AWS_ENDPOINT_URL": origin.url})
        record = daemon.stage(uri)
        assert record["state"] == "ready", record["error"]
        try:
            stalled.set()
            asked, began = len(origin.seen), time.monotonic()
            assert daemon.stage(uri)["id"] == record["id"]
            assert time.monotonic() - began < 60, "it was waited for until its own deadlines"
            with daemon.attach(uri) as weights:
                assert float(weights["b"][0]) == 1
            assert len(origin.seen) > asked, "the origin was not asked"
            assert "its source cannot be asked" in daemon.log.read_text()
        finally:
            over.set()


def test_a_cache_that_is_deleted_under_the_daemon_is_made_anew(start_daemon: Start, folder: Path) -> None:
    daemon = start_daemon()
    record = daemon.stage(folder)
    digest = record["checkpoint_digest"]
    assert (Path(record["metadata"]) / "config.json").exists()
    for _ in range(2):
        shutil.rmtree(daemon.cache_dir)
        with daemon.attach(folder) as weights:
            assert float(weights["b"][0]) == 1, "what is resident does not need it"
        daemon.client.remove(record["id"])
        until(lambda: daemon.used_bytes == 0, "it is gone")
        record = daemon.stage(folder, expect_digest=digest)
        assert (record["state"], record["checkpoint_digest"]) == ("ready", digest), record["error"]
        assert (Path(record["metadata"]) / "config.json").read_text() == "{}"
    assert daemon.status["restarts"] == 0
