"""Streaming over a restart of the daemon: what was verified was so in the memory of before."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest

from weightd.daemon.stages.manifests import SealedManifest
from weightd.ipc import NotReady, attach, wire
from weightd.ipc.manifest import Manifest

NAMES = ["a", "b", "c"]
NBYTES = 4096


def manifest() -> SealedManifest:
    sizes = [[1024]] * len(NAMES)
    offsets = [NBYTES * i for i in range(len(NAMES))]
    whole = Manifest(
        "st-1", "file:///x", "cpu", 0, 1, NBYTES * 3, None, None, None, NAMES, ["F32"] * 3, sizes, offsets, None
    )
    return SealedManifest.seal(whole)


def lend(connection: socket.socket, value: float) -> None:
    """A segment that holds ``value`` everywhere, and is not ready."""
    segment = os.memfd_create("weightd:st-1")
    os.write(segment, numpy.full(NBYTES * 3 // 4, value, numpy.float32).tobytes())
    sealed = manifest()
    lease = {
        "type": "lease", "lease": "le-0123456789ab", "stage": "st-1", "nbytes": NBYTES * 3, "ready": False,
        "manifest_nbytes": sealed.nbytes, "gpu": None, "footprint": NBYTES * 3,
    }  # fmt: skip
    wire.receive(connection)
    wire.send(connection, lease, [segment, sealed.fd])
    os.close(segment)
    sealed.close()


@pytest.fixture
def restarted(tmp_path: Path) -> Iterator[Path]:
    """A daemon that verifies ``a`` and dies; the next one verifies ``b`` only, in other memory."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "lease.sock"))
    listener.listen()
    over = threading.Event()

    def serve() -> None:
        first, _ = listener.accept()
        with first:
            lend(first, 1)
            wire.send(first, {"type": "verified", "entries": [[0, 0]]})
        second, _ = listener.accept()
        with second:
            lend(second, 2)
            wire.send(second, {"type": "verified", "entries": [[1, 1]]})
            over.wait(60)

    thread = threading.Thread(target=serve)
    thread.start()
    yield tmp_path
    over.set()
    thread.join()
    listener.close()


def test_what_was_verified_before_a_restart_is_not_in_the_memory_that_comes_after_it(restarted: Path) -> None:
    with attach("/x", wait=False, socket=restarted, timeout=60) as weights:
        stream = weights.stream(timeout=60)
        name, kept = next(stream)
        assert (name, float(kept[0])) == ("a", 1)
        name, tensor = next(stream)
        assert (name, float(tensor[0])) == ("b", 2)
        for unknown in ("a", "c"):
            with pytest.raises(NotReady, match=unknown):
                weights[unknown]
        assert float(kept[0]) == 1, "what was handed out stays what it is"
