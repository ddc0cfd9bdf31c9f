"""Renewing: the same lease from the next daemon, for who can say what bytes it was on."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from tests.servers import Daemon
from weightd.ipc import wire

LEASE = "le-0123456789ab"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints that differ in their values alone."""
    found = []
    for value in (1, 2):
        found.append(tmp_path_factory.mktemp("model"))
        save_file({"w": numpy.full(1024, value, numpy.float32)}, found[-1] / "m.safetensors")
    return found[0], found[1]


def renewed(daemon: Daemon, stage: str, renews: object) -> dict[str, Any]:
    """What a daemon says to who had a lease."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(daemon.runtime_dir / "lease.sock"))
        wire.send(connection, {"op": "lease", "stage": stage, "tp_rank": 0, "renews": renews})
        reply, fds = wire.receive(connection)
        wire.close_all(fds)
        return reply


def test_a_lease_is_renewed_under_its_id_for_who_says_the_segments_digest(
    daemon: Daemon, folders: tuple[Path, Path]
) -> None:
    stage = daemon.stage(folders[0])
    reply = renewed(daemon, stage["id"], {"lease": LEASE, "digest": stage["segments"][0]["digest"]})
    assert (reply["type"], reply.get("lease")) == ("lease", LEASE)


def test_a_lease_on_other_bytes_or_on_none_is_not_renewed(daemon: Daemon, folders: tuple[Path, Path]) -> None:
    stage, other = (daemon.stage(folder) for folder in folders)
    assert stage["segments"][0]["digest"] != other["segments"][0]["digest"]
    for digest in ({"digest": other["segments"][0]["digest"]}, {"digest": None}, {"digest": ""}, {}):
        reply = renewed(daemon, stage["id"], {"lease": LEASE, **digest})
        assert (reply["type"], reply.get("code")) == ("error", "digest_mismatch"), digest
    assert LEASE not in {lease["id"] for lease in daemon.client.leases()}


@pytest.mark.parametrize("renews", [1, "le-0123456789ab", [], {}, {"lease": "le-1"}, {"lease": LEASE + "\n"}], ids=str)
def test_what_is_no_lease_is_not_renewed(daemon: Daemon, folders: tuple[Path, Path], renews: object) -> None:
    stage = daemon.stage(folders[0])
    if isinstance(renews, dict):
        renews = {"digest": stage["segments"][0]["digest"], **renews}
    reply = renewed(daemon, stage["id"], renews)
    assert (reply["type"], reply.get("code")) == ("error", "invalid_request")


def test_a_renewal_takes_no_id_that_somebody_has(daemon: Daemon, folders: tuple[Path, Path]) -> None:
    with daemon.attach(os.fspath(folders[0])) as weights:
        stage = daemon.stage(folders[0])
        reply = renewed(daemon, stage["id"], {"lease": weights.lease, "digest": weights.digest})
        assert reply["type"] == "lease"
        assert reply["lease"] != weights.lease
