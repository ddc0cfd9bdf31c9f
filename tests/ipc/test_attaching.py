"""Attaching to a daemon whose every word a test says: what is asked, what comes of it, and what is kept."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.servers import until
from weightd.daemon.stages.manifests import SealedManifest
from weightd.ipc import (
    AttachTimeout,
    DeviceUnavailable,
    DigestMismatch,
    NotReady,
    RequestRefused,
    StageFailed,
    UnsupportedDtype,
    attach,
    lease,
    wire,
)
from weightd.ipc.lease import socket_path
from weightd.ipc.manifest import Manifest

DTYPES = ["F32", "F4", "U8", "F6_E2M3", "F4", "BOOL"]
SHAPES = [[2, 3], [1, 2, 4], [0, 5], [4], [2, 3], []]
NAMES = ["a", "packed", "empty", "six", "odd", "flag"]
NBYTES = 256 * 6
VALUES = bytes(range(256)) * 6


def manifest(**more: Any) -> SealedManifest:
    fields: dict[str, Any] = {
        "stage": "st-1", "model": "file:///x", "device": "cpu", "tp_rank": 3, "tp_size": 4, "nbytes": NBYTES,
        "digest": "xxh3:1", "checkpoint_digest": None, "metadata": "/cache/x", "names": NAMES, "dtypes": DTYPES,
        "shapes": SHAPES, "offsets": [256 * i for i in range(6)], "digests": None, **more,
    }  # fmt: skip
    return SealedManifest.seal(Manifest(**fields))


class Told:
    """A daemon that says what it is told to, and remembers what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[dict[str, Any]] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "lease.sock"))
        self._listener.listen()
        self.connections: list[socket.socket] = []
        self._script: list[Callable[[socket.socket], object]] = []
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        for act in self._script:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # the test is over
                return
            with contextlib.suppress(OSError):  # who attached has gone
                self.connections.append(connection)
                self.asked.append(wire.receive(connection)[0])
                act(connection)

    def says(self, *script: Callable[[socket.socket], object]) -> None:
        self._script = list(script)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for connection in (self._listener, *self.connections):
            connection.close()

    def attach(self, model: str | None = "/x", **options: Any) -> Any:
        return attach(model, socket=self.folder, **{"timeout": 60, **options})


def lend(ready: bool = True, values: bytes = VALUES, **more: Any) -> Callable[[socket.socket], None]:
    def act(connection: socket.socket) -> None:
        segment, sealed = os.memfd_create("weightd:st-1"), manifest(**more)
        os.write(segment, values)
        reply = {
            "type": "lease", "lease": "le-1", "stage": "st-1", "nbytes": NBYTES, "ready": ready,
            "manifest_nbytes": sealed.nbytes, "gpu": None, "footprint": NBYTES,
        }  # fmt: skip
        wire.send(connection, reply, [segment, sealed.fd])
        os.close(segment)
        sealed.close()

    return act


def say(*messages: dict[str, Any]) -> Callable[[socket.socket], None]:
    def act(connection: socket.socket) -> None:
        for message in messages:
            wire.send(connection, message)

    return act


def both(*acts: Callable[[socket.socket], object]) -> Callable[[socket.socket], None]:
    def act(connection: socket.socket) -> None:
        for one in acts:
            one(connection)

    return act


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Told]:
    daemon = Told(tmp_path)
    yield daemon
    daemon.close()


def lent() -> set[int]:
    """Inodes of the memory that this process has a descriptor of, by whatever test it was lent."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one of the list itself
            if "memfd:weightd" in os.readlink(f"/proc/self/fd/{fd}"):
                found.add(os.fstat(int(fd)).st_ino)
    return found


# ---------------------------------------------------------------------------- what is asked


def test_what_is_wanted_is_asked_for_and_what_is_not_said_is_left_out(daemon: Told) -> None:
    daemon.says(lend(), lend(), lend(), lend())
    daemon.attach("s3://b/m").close()
    daemon.attach(
        "m", device="cpu", weights=("a", "b"), parallel={"tp_size": 2}, tensors={"include": ["x"]},
        expect_digest={"f": "1"}, tp_rank=1, wait=True,
    ).close()  # fmt: skip
    daemon.attach("m", weights="a", expect_digest="xxh3:1").close()
    daemon.attach(None, stage="st-1", wait=False).close()
    assert daemon.asked == [
        {
            "op": "lease", "stage": None, "tp_rank": None, "stream": False,
            "request": {"model": "s3://b/m", "device": None},
        },
        {
            "op": "lease", "stage": None, "tp_rank": 1, "stream": False,
            "request": {
                "model": os.path.abspath("m"), "device": "cpu", "weights": ["a", "b"], "parallel": {"tp_size": 2},
                "tensors": {"include": ["x"]}, "expect_digest": {"f": "1"},
            },
        },
        {
            "op": "lease", "stage": None, "tp_rank": None, "stream": False,
            "request": {"model": os.path.abspath("m"), "device": None, "weights": "a", "expect_digest": "xxh3:1"},
        },
        {"op": "lease", "stage": "st-1", "tp_rank": None, "stream": True},
    ]  # fmt: skip


def test_either_a_model_or_a_stage_is_named_and_a_copy_is_of_what_is_ready(daemon: Told) -> None:
    for options in ({"stage": "st-1", "model": "/x"}, {"model": None}, {"private": True, "wait": False}):
        with pytest.raises(RequestRefused) as error:
            daemon.attach(**{"model": "/x", **options})
        assert error.value.code == "invalid_request"
    assert daemon.asked == []
    daemon.says(lambda connection: None)


@pytest.mark.parametrize("name", ["lease.sock", "there", "missing", "missing.sock"])
def test_a_socket_is_named_by_itself_or_by_its_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    path = tmp_path / name
    assert socket_path(str(path)) == (path if name.endswith(".sock") else path / "lease.sock")
    monkeypatch.setenv("WEIGHTD_RUNTIME_DIR", str(path))
    assert socket_path(None) == socket_path(path)


def test_a_file_that_is_there_is_a_socket_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "socket").touch()
    assert socket_path(tmp_path / "socket") == tmp_path / "socket"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("digest_mismatch", DigestMismatch), ("source_failed", StageFailed), ("anything_new", StageFailed),
        *((code, RequestRefused) for code in sorted(lease._REFUSED)),
    ],
)  # fmt: skip
def test_what_the_daemon_says_is_wrong_is_raised_as_what_can_be_done_about_it(
    code: str, kind: type[Exception], daemon: Told
) -> None:
    daemon.says(say({"type": "error", "code": code, "message": "no", "details": {"a": 1}}))
    with pytest.raises(kind, match=r"^no$") as error:
        daemon.attach()
    assert type(error.value) is kind
    assert (error.value.code, error.value.details) == (code, {"a": 1})  # type: ignore[attr-defined]


def test_an_error_without_details_has_none(daemon: Told) -> None:
    daemon.says(say({"type": "error", "code": "x", "message": "no"}))
    with pytest.raises(StageFailed) as error:
        daemon.attach()
    assert error.value.details == {}


def test_a_stage_that_is_not_ready_in_time_is_not_waited_for(daemon: Told) -> None:
    daemon.says(say({"type": "progress"}))
    with pytest.raises(AttachTimeout, match=r"not ready within 0.01 s; it goes on loading"):
        daemon.attach(timeout=0.01)


def test_of_a_deadline_that_is_over_nothing_is_left() -> None:
    with pytest.raises(TimeoutError):
        lease._left(time.monotonic() - 5)
    left = lease._left(time.monotonic() + 500)
    assert left is not None
    assert 400 < left <= 500
    assert lease._left(None) is None


# ---------------------------------------------------------------------------- what comes of it


def test_tensors_lie_where_the_manifest_says_in_their_shapes(daemon: Told) -> None:
    before = lent()
    daemon.says(lend())
    weights = daemon.attach()
    assert list(weights) == NAMES
    assert (len(weights), "a" in weights, "b" in weights) == (6, True, False)
    want = torch.frombuffer(bytearray(VALUES[:24]), dtype=torch.float32).reshape(2, 3)
    assert torch.equal(weights["a"].view(torch.int32), want.view(torch.int32))
    assert weights["a"].stride() == (3, 1)
    assert (weights["empty"].shape, weights["flag"].shape) == ((0, 5), ())
    assert weights["flag"].data_ptr() - weights["a"].data_ptr() == 256 * 5
    assert bytes(weights.raw("six")) == VALUES[:3]
    assert bytes(weights.raw("flag")) == VALUES[:1]
    assert (weights.entry("packed").offset, weights.entry("packed").nbytes) == (256, 4)
    for name, message in (("six", "torch .* has no type"), ("odd", "which is odd here")):
        with pytest.raises(UnsupportedDtype, match=f"'{name}'.*{message}.*raw"):
            weights[name]
    packed = weights["packed"]
    assert (packed.shape, packed.stride()) == ((1, 2, 2), (4, 2, 1))
    with pytest.raises(KeyError):
        weights["b"]
    with pytest.raises(DeviceUnavailable) as error:
        weights.cupy()
    assert error.value.code == "not_on_gpu"
    assert (weights.device, weights.digest, weights.metadata) == ("cpu", "xxh3:1", Path("/cache/x"))
    assert (weights.lease, weights.ready) == ("le-1", True)
    assert repr(weights) == f"<Weights of file:///x: 6 tensors, {NBYTES} bytes, lease le-1>"
    assert [name for name, _ in zip(NAMES, weights, strict=True)] == NAMES
    weights.close()
    weights.close()
    assert torch.equal(weights["a"].view(torch.int32), want.view(torch.int32)), "it stays mapped"
    until(lambda: len(lent() - before) == 1, "the mapping's own is left, of the segment")  # and who lent has closed its


def test_a_lease_ends_when_the_weights_are_forgotten_or_their_block_ends(daemon: Told) -> None:
    daemon.says(lend(metadata=None), lend())
    with daemon.attach() as weights:
        assert weights.metadata is None
    forgotten = daemon.attach()
    del forgotten
    gc.collect()
    for connection in daemon.connections:
        connection.settimeout(30)
        assert connection.recv(1) == b""


def test_the_lease_is_kept_and_asked_for_again_by_its_id_and_digest(daemon: Told) -> None:
    daemon.says(both(lend(), lambda connection: connection.close()), lend())
    with daemon.attach("/x"):
        assert [thread.daemon for thread in threading.enumerate() if thread.name == "weightd-lease"] != []
        assert all(thread.daemon for thread in threading.enumerate() if thread.name == "weightd-lease")
        until(lambda: len(daemon.asked) == 2, "it came back")
        assert daemon.asked[1] == {
            "op": "lease", "stage": "st-1", "tp_rank": 3, "renews": {"lease": "le-1", "digest": "xxh3:1"},
        }  # fmt: skip


def test_a_revocation_is_told_to_all_who_want_to_know_and_to_those_who_ask_later(daemon: Told) -> None:
    go = threading.Event()
    daemon.says(both(lend(), lambda _: go.wait(60), say({"type": "revoked", "seconds": 500})))
    with daemon.attach() as weights:
        heard: list[float] = []

        def fails(seconds: float) -> None:
            raise ZeroDivisionError

        weights.on_revoke(fails)
        weights.on_revoke(heard.append)
        assert heard == []
        go.set()
        until(lambda: heard, "it is told")
        assert heard == [500.0]
        weights.on_revoke(heard.append)
        assert 400 < heard[1] <= 500


# ---------------------------------------------------------------------------- while it loads


def verified(*entries: list[int]) -> dict[str, Any]:
    return {"type": "verified", "entries": entries}


READY = {"type": "ready", "digest": "xxh3:9", "checkpoint_digest": "xxh3:8"}


def test_tensors_are_yielded_once_as_they_are_verified_and_the_rest_at_the_end(daemon: Told) -> None:
    names = {"names": ["a", "b", "c", "d"], "dtypes": ["U8"] * 4, "shapes": [[256]] * 4, "offsets": [0, 256, 512, 768]}
    daemon.says(both(lend(False, digest=None, **names), say(verified([1, 2]), verified([2, 2]), READY)))
    with daemon.attach(wait=False) as weights:
        assert (weights.ready, weights.digest) == (False, None)
        with pytest.raises(NotReady, match="'a' is not verified yet"):
            weights["a"]
        stream = weights.stream(timeout=60)
        assert [next(stream)[0], next(stream)[0]] == ["b", "c"]
        with pytest.raises(NotReady):
            weights.raw("d")
        assert [name for name, _ in stream] == ["a", "d"]
        assert (weights.ready, weights.digest, weights.manifest.checkpoint_digest) == (True, "xxh3:9", "xxh3:8")
        assert [name for name, _ in weights.stream()] == ["a", "b", "c", "d"]
        weights.wait(0.0)


def test_waiting_ends_with_the_last_tensor_or_at_its_deadline(daemon: Told) -> None:
    go = threading.Event()
    daemon.says(both(lend(False), say(verified([0, 1])), lambda _: go.wait(60), say(READY)))
    with daemon.attach(wait=False) as weights:
        with pytest.raises(AttachTimeout, match=r"within 0.01 s"):
            weights.wait(0.01)
        assert [name for name, _ in zip(("a", "packed"), weights.stream(60), strict=False)] == ["a", "packed"]
        go.set()
        weights.wait(60)
        assert weights.ready


def test_what_fails_on_the_way_is_said_so(daemon: Told) -> None:
    daemon.says(both(lend(False), say({"type": "error", "code": "source_failed", "message": "away"})))
    with daemon.attach(wait=False) as weights, pytest.raises(StageFailed, match="away"):
        weights.wait(60)


def test_a_stage_that_comes_back_with_another_layout_is_none_to_go_on_with(daemon: Told) -> None:
    gone = both(lend(False), lambda connection: connection.close())
    daemon.says(gone, lend(True, names=["z", *NAMES[1:]]))
    with (
        daemon.attach(wait=False) as weights,
        pytest.raises(StageFailed, match="stage st-1 came back with another layout"),
    ):
        weights.wait(60)


def test_a_stage_that_comes_back_ready_is(daemon: Told) -> None:
    gone = both(lend(False), say(verified([0, 0])), lambda connection: connection.close())
    daemon.says(gone, lend(True, values=b"\1" * NBYTES))
    with daemon.attach(wait=False) as weights:
        weights.wait(60)
        assert weights.ready
        assert bytes(weights.raw("flag")) == b"\1", "it is in the memory that came last"
        assert [name for name, _ in zip(NAMES, weights, strict=True)] == NAMES
