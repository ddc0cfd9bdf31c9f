"""A stage under which daemon after daemon dies: out of memory, say, each time that it is taken up again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.node.adopting import Start, ended, half_loaded, replaced, serving
from tests.servers import SeaweedFS, until
from weightd.daemon.stages import record

TABLE: dict[str, Any] = {
    "format": record.FORMAT, "id": "st-1", "uri": "/m", "devices": ["cpu"], "request": {"model": "/m"}, "identity": "x",
    "weights": [], "state": "loading", "source_kind": "file", "priority": 0, "pin": False, "created_at": 1.0,
    "ready_at": None, "revoked_until": None, "revoke_deadline": None, "seconds": {}, "phase_seconds": {},
    "bytes_total": 1, "bytes_read": 0, "footprints": [4096], "infos": [{"rank": 0, "nbytes": 1, "tensors": 1}],
    "metadata": None, "segment_digests": [], "checkpoint_digest": None, "satisfied": [], "manifest_nbytes": [],
}  # fmt: skip
"""A record of the version before, which counted no deaths."""


def deaths(**changes: Any) -> int:
    fd = os.memfd_create("weightd:test")
    try:
        os.write(fd, json.dumps(TABLE | changes).encode())
        return record._read(fd)[0].deaths
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 1),
        ({"deaths": 1}, 2),
        ({"deaths": 1, "handed_over": True}, 1),
        ({"deaths": 1, "state": "ready"}, 1),
        ({"state": "ready"}, 0),
    ],
    ids=str,
)
def test_a_death_counts_where_the_stage_was_on_its_way_and_nobody_made_room(changes: Any, count: int) -> None:
    assert deaths(**changes) == count


def test_a_stage_under_which_two_daemons_died_fails_and_everything_else_goes_on(
    start_daemon: Start,
    s3: SeaweedFS,
    folder: Path,
) -> None:
    uri = s3.upload(folder, "poison")
    with half_loaded(start_daemon, s3, uri) as (daemon, _, gate, stage):
        kept = daemon.stage(folder)
        replaced(daemon)
        assert daemon.client.show(stage)["state"] not in ("ready", "failed"), "once is no pattern"
        replaced(daemon)
        record = daemon.client.show(stage)
        assert (record["state"], record["error"]["code"]) == ("failed", "interrupted")
        assert "2 daemons died" in record["error"]["message"]
        until(lambda: daemon.used_bytes == kept["footprint_bytes"], "its memory is free")
        gate.opened.set()
        again = daemon.stage(uri)
        assert (again["state"], again["id"] != stage) == ("ready", True)
        replaced(daemon)
        assert {record["state"] for record in daemon.client.stages()} == {"ready"}


def test_daemons_that_make_room_are_none_that_died(
    start_daemon: Start,
    s3: SeaweedFS,
    folder: Path,
) -> None:
    uri = s3.upload(folder, "handed-over")
    with half_loaded(start_daemon, s3, uri) as (daemon, _, gate, stage):
        for _ in range(3):
            pid = daemon.pid
            os.kill(daemon.keeper_pid, signal.SIGHUP)
            serving(daemon, pid)
        replaced(daemon)
        gate.opened.set()
        assert ended(daemon, stage)["state"] == "ready"
