"""Records that the daemon does not understand: what belongs to them is left alone, and shown."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from tests.servers import Daemon, until
from weightd.daemon.checkpoints.listing import Listing
from weightd.daemon.checkpoints.selection import LeftOut
from weightd.daemon.keeper.supervisor import FD_VARIABLE, LOCK, lock
from weightd.daemon.sources.base import SourceFile
from weightd.daemon.stages import record
from weightd.daemon.stages.request import parse_request
from weightd.daemon.stages.stage import Stage
from weightd.ipc import Client

WEIGHTD = str(Path(sys.executable).parent / "weightd")
MiB = 1 << 20
Start = Callable[..., Daemon]


class Holder:
    """A keeper that holds what a test has made, and writes down what the daemon says."""

    def __init__(self, folder: Path, held: dict[str, int]) -> None:
        self.said: list[str] = []
        self._held = held
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        env = {"WEIGHTD_RUNTIME_DIR": str(folder), "WEIGHTD_CACHE_DIR": str(folder / "cache"), "WEIGHTD_LISTEN": ""}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "weightd.api"],
                env={**os.environ, **env, FD_VARIABLE: str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
            )
        self._thread = threading.Thread(target=self._hear)
        self._thread.start()

    def _hear(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self._channel, 4096, 4)
            for fd in fds:
                os.close(fd)
            if not data:
                return
            self.said.append(data.decode())
            if data == b"list":
                for name, fd in self._held.items():
                    socket.send_fds(self._channel, [f"held {name}".encode()], [fd])
                self._channel.send(b"end")

    def stop(self) -> int:
        self._channel.send(b"stop")
        return self.process.wait(60)

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._thread.join()
        self._channel.close()


RECORDS = {
    "of the future": (b'{"format": 99, "id": "st-x"}', "format 99"),
    "of this format with nothing in it": (b'{"format": 1}', "cannot be read"),
    "no object": (b"[1]", "no record"),
    "no JSON": (b"\xff\0", "no record"),
    "nothing": (b"", "no record"),
}


def test_what_is_not_understood_is_left_alone_and_shown_and_what_has_no_record_is_dropped(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:

        def memfd(content: bytes, size: int = 0) -> int:
            fd = os.memfd_create("weightd:test")
            stack.callback(os.close, fd)
            os.write(fd, content)
            os.ftruncate(fd, max(size, len(content)))
            return fd

        held = {LOCK: lock(str(tmp_path / "run")), "st-incomplete/segment/0": memfd(b"", 4096)}
        stack.callback(os.close, held[LOCK])
        for number, (record, _) in enumerate(RECORDS.values()):
            held[f"st-{number}/segment/0"] = memfd(b"", 8192)
            held[f"st-{number}/segment/1"] = memfd(b"", 4096)
            held[f"st-{number}/record"] = memfd(record)
        holder = stack.enter_context(Holder(tmp_path / "run", held))
        until(lambda: "up" in holder.said, "the daemon serves", 60)
        with Client(runtime_directory=tmp_path / "run") as client:
            unadopted = client.node()["unadopted"]
            assert [(left["name"], left["nbytes"]) for left in unadopted] == [
                (f"st-{number}", 12288) for number in range(len(RECORDS))
            ]
            for left, (_, words) in zip(unadopted, RECORDS.values(), strict=True):
                assert words in left["reason"]
            assert client.stages() == []
            assert client.node()["devices"][0]["used_bytes"] == 12288 * len(RECORDS)
            env = {**os.environ, "WEIGHTD_RUNTIME_DIR": str(tmp_path / "run")}
            shown = subprocess.run([WEIGHTD, "ls"], env=env, capture_output=True, text=True, check=True).stdout
            assert shown.count("unadopted") >= len(RECORDS)
            assert "weightd rm --unadopted" in shown
            for wrong in ([], ["st-1", "--unadopted"]):
                refused = subprocess.run([WEIGHTD, "rm", *wrong], env=env, capture_output=True, text=True, check=False)
                assert refused.returncode == 2
            assert [said for said in holder.said if said.startswith("drop ")] == ["drop st-incomplete"]
            removed = subprocess.run(
                [WEIGHTD, "rm", "--unadopted"], env=env, capture_output=True, text=True, check=True
            )
            assert removed.stdout.count("dropped") == len(RECORDS)
            assert client.node()["unadopted"] == []
            assert client.node()["devices"][0]["used_bytes"] == 0
        assert holder.stop() == 0
        assert [said for said in holder.said if said.startswith("drop ")] == [
            "drop st-incomplete", *(f"drop st-{number}" for number in range(len(RECORDS)))
        ]  # fmt: skip


def test_a_record_says_what_was_taken_and_one_from_before_that_was_said_is_read_as_well() -> None:
    left_out = (LeftOut("consolidated.safetensors", "a second copy"),)
    weights = (SourceFile("model.safetensors", 7, "v"),)
    listing = Listing("file:///m", "1d", weights, None, (), None, "it is there", left_out)
    request = parse_request({"model": "/m", "weights": ["b*.safetensors", "a.safetensors"]})
    written = {**record._describe(Stage("file:///m", ["cpu"], request, listing)), "footprints": [7]}

    def read(table: object) -> Stage:
        fd = os.memfd_create("record")
        try:
            os.write(fd, json.dumps(table).encode())
            return record._read(fd)[0]
        finally:
            os.close(fd)

    stage = read(written)
    assert stage.listing is not None
    assert (stage.listing.rule, stage.left_out, stage.request.files) == ("it is there", left_out, request.files)
    for field in ("rule", "left_out"):
        del written[field]
    del written["request"]["weights"]
    stage = read(written)
    assert stage.listing is not None
    assert (stage.listing.weights, stage.listing.rule, stage.left_out) == (weights, "", ())
    assert stage.request.files == ()
