"""Lending: what another process maps, what it cannot do to it, and when its lease ends."""

from __future__ import annotations

import errno
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.numpy import save_file

from tests.checkpoint_files import write_index
from tests.fault_proxy import FaultProxy
from tests.servers import Daemon, SeaweedFS, until
from weightd.ipc import (
    AttachTimeout,
    DaemonUnavailable,
    NotReady,
    RequestRefused,
    StageFailed,
    UnsupportedDtype,
    attach,
    wire,
)
from weightd.ipc.runtime_dir import API_SOCKET


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = numpy.random.default_rng(0)
    save_file({f"w{i}": rng.standard_normal((256, 1024), numpy.float32) for i in range(8)}, tmp_path / "m.safetensors")
    return tmp_path


CHILD = """
import sys, torch
from weightd.ipc import attach
weights = attach(sys.argv[1], strict="strict" in sys.argv)
print("attached", weights.lease, flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Child:
    """A process that has attached, and runs lines of Python that it is given."""

    def __init__(self, daemon: Daemon, model: Path, *arguments: str) -> None:
        env = {**os.environ, "WEIGHTD_RUNTIME_DIR": str(daemon.runtime_dir)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(model), *arguments],
            env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout
        self.lease = self.process.stdout.readline().split()[-1]

    def run(self, line: str) -> bool:
        """Whether the process survived it."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline() == "done\n"

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def leases(daemon: Daemon) -> dict[str, dict[str, Any]]:
    return {lease["id"]: lease for lease in daemon.client.leases()}


def test_a_lease_names_its_process_and_ends_with_it(daemon: Daemon, folder: Path) -> None:
    with Child(daemon, folder) as child:
        lease = leases(daemon)[child.lease]
        assert (lease["pid"], lease["uid"], lease["tp_rank"]) == (child.process.pid, os.getuid(), 0)
        stage = daemon.stage(folder)
        assert stage["leases"] == 1
        with pytest.raises(RequestRefused, match=str(child.process.pid)) as refused:
            daemon.client.remove(stage["id"])
        assert refused.value.code == "stage_leased"
        assert refused.value.details["leases"][0]["pid"] == child.process.pid
        child.process.send_signal(signal.SIGKILL)
        child.process.wait()
        until(lambda: child.lease not in leases(daemon), "the lease of a dead process is gone")
    assert daemon.client.remove(stage["id"])["state"] == "evicted"


LESSEE = """
import socket, sys
from weightd.ipc import wire
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
wire.send(connection, {"op": "lease", "stage": sys.argv[2]})
print(wire.receive(connection)[0]["lease"], flush=True)
sys.stdin.read()
"""


def test_a_dead_process_has_no_lease_any_more_100_ms_later(daemon: Daemon, folder: Path) -> None:
    """Of several, at least once: a machine that has other things to do may take its time."""
    stage = daemon.stage(folder)["id"]
    took: list[float] = []
    while not took or min(took) > 0.1:
        assert len(took) < 20, f"the lease was gone after {sorted(took)} s"
        command = [sys.executable, "-c", LESSEE, str(daemon.runtime_dir / "lease.sock"), stage]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout
            lease = child.stdout.readline().strip()
            assert lease in leases(daemon)
            child.kill()
            child.wait()
            died = time.monotonic()
            until(lambda lease=lease: lease not in leases(daemon), "its lease is gone")  # type: ignore[misc]
            took.append(time.monotonic() - died)


def test_closing_ends_the_lease_and_tensors_stay_valid(daemon: Daemon, folder: Path) -> None:
    with daemon.attach(folder) as weights:
        kept = weights["w3"]
        expected = kept.clone()
        lease = weights.lease
    until(lambda: lease not in leases(daemon), "a closed lease is gone")
    del weights
    assert daemon.client.remove(daemon.stage(folder)["id"])["state"] == "evicted"
    assert torch.equal(kept, expected)


def test_a_stray_write_stays_in_the_process_that_made_it(daemon: Daemon, folder: Path) -> None:
    with daemon.attach(folder) as weights, Child(daemon, folder) as child:
        before = weights["w0"].clone()
        assert child.run("weights['w0'].fill_(7); assert weights['w0'].sum() == 7 * weights['w0'].numel()")
        assert torch.equal(weights["w0"], before)
        weights["w0"].zero_()
        assert child.run("assert weights['w0'].sum() == 7 * weights['w0'].numel()")
        with Child(daemon, folder) as third:
            assert third.run(f"assert abs(weights['w0'].sum() - {before.sum()}) < 1e-3")


def test_a_stray_write_to_a_strict_mapping_kills_only_the_writer(daemon: Daemon, folder: Path) -> None:
    with daemon.attach(folder) as weights, Child(daemon, folder, "strict") as child:
        before = weights["w0"].clone()
        assert child.run("assert weights['w0'].shape == (256, 1024)")
        assert not child.run("weights['w0'].zero_()")
        assert child.process.wait() == -signal.SIGSEGV
        assert torch.equal(weights["w0"], before)


REOPENED = "os.open(f'/proc/self/fd/{fd}', os.O_RDWR)"
CHANGED = {errno.EPERM, errno.EACCES}
"""By the seals, which hold root as well, or before that by the file's mode, which does not."""
ATTACKS = {
    "os.pwrite(fd, b'x', 0)": {errno.EBADF},
    "os.ftruncate(fd, 0)": {errno.EINVAL},
    f"os.pwrite({REOPENED}, b'x', 0)": CHANGED,
    f"os.ftruncate({REOPENED}, 0)": CHANGED,
    "mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)": {errno.EACCES},
    f"mmap.mmap({REOPENED}, 4096, mmap.MAP_SHARED, mmap.PROT_WRITE)": CHANGED,
    f"os.fchmod(fd, 0o777), os.pwrite({REOPENED}, b'x', 0)": CHANGED,
    f"os.posix_fallocate({REOPENED}, 0, 1 << 26)": CHANGED,
}
"""What a client may try → what the kernel says to it."""


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("streaming", [False, True])
def test_no_client_can_change_what_others_see(
    start_daemon: Callable[..., Daemon], s3: SeaweedFS, folder: Path, attack: str, streaming: bool
) -> None:
    import mmap  # noqa: F401  # for the attack

    uri = s3.upload(folder, "attacked")
    opened = threading_event()
    with FaultProxy(s3.url, lambda request: opened.wait(60) and None if request.nbytes > 1 << 20 else None) as proxy:
        daemon = start_daemon(env={**s3.env, "AWS_ENDPOINT_URL": proxy.url})
        if not streaming:
            opened.set()
            daemon.stage(uri)
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(daemon.runtime_dir / "lease.sock"))
        wire.send(connection, {"op": "lease", "request": {"model": uri}, "stream": streaming})
        fds: list[int] = []
        while not fds:
            reply, fds = wire.receive(connection)
            assert reply["type"] in ("progress", "lease"), reply
        assert reply["ready"] is not streaming
        fd = fds[0]  # noqa: F841 - for the attack
        try:
            with pytest.raises(OSError) as refused:  # noqa: PT011 - which one is looked at next
                exec(attack)
            assert refused.value.errno in ATTACKS[attack], refused.value
        finally:
            opened.set()
            wire.close_all(fds)
            connection.close()
        with daemon.attach(uri) as weights:
            expected = daemon.stage(folder)["checkpoint_digest"]
            assert weights.manifest.checkpoint_digest == expected


def threading_event() -> Any:
    import threading

    return threading.Event()


def test_streaming_yields_verified_tensors_while_later_ones_load(
    start_daemon: Callable[..., Daemon], s3: SeaweedFS, tmp_path: Path
) -> None:
    rng = numpy.random.default_rng(0)
    tensors = {f"w{i}": rng.standard_normal((1024, 1024), numpy.float32) for i in range(6)}
    for name, tensor in tensors.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    write_index(tmp_path)
    uri = s3.upload(tmp_path, "one-tensor-a-file")
    gate = threading_event()
    with FaultProxy(
        s3.url, lambda request: gate.wait(60) and None if "w5" in request.path and request.nbytes > 1 << 20 else None
    ) as proxy:
        daemon = start_daemon(env={**s3.env, "AWS_ENDPOINT_URL": proxy.url})
        weights = daemon.attach(uri, wait=False)
        assert not weights.ready
        seen = {}
        for name, tensor in weights.stream(timeout=60):
            assert numpy.array_equal(tensor.numpy(), tensors[name])
            seen[name] = tensor
            if len(seen) == 5:
                assert set(seen) == {f"w{i}" for i in range(5)}
                with pytest.raises(NotReady, match="w5"):
                    weights["w5"]
                assert daemon.client.stages()[0]["state"] == "loading"
                gate.set()
    assert set(seen) == set(tensors)
    assert weights.ready
    assert weights.digest == daemon.stage(uri)["checkpoint_digest"]
    weights.close()


def test_tensors_that_a_model_shares_its_memory_with_lie_inside_the_segment(daemon: Daemon, folder: Path) -> None:
    with daemon.attach(folder) as weights:
        addresses = sorted(weights[name].data_ptr() - weights.entry(name).offset for name in weights)
        assert addresses[0] == addresses[-1]
        assert all(weights[name].data_ptr() % 256 == 0 for name in weights)


DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


def test_every_dtype_is_carried_and_those_without_a_torch_type_say_so(daemon: Daemon, tmp_path: Path) -> None:
    table, data = {}, b""
    for name, bits in [
        *((name, dtype.itemsize * 8) for name, dtype in DTYPES.items()),
        ("F4", 4),
        ("F6_E2M3", 6),
        ("F6_E3M2", 6),
    ]:
        body = os.urandom(8 * 4 * bits // 8) if name != "BOOL" else bytes(i % 2 for i in range(32))
        table[name] = {"dtype": name, "shape": [8, 4], "data_offsets": [len(data), len(data) + len(body)]}
        data += body
    header = json.dumps(table).encode()
    (tmp_path / "all.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    with daemon.attach(tmp_path) as weights:
        for name in table:
            begin, end = table[name]["data_offsets"]
            assert bytes(weights.raw(name)) == data[begin:end]
        for name, dtype in DTYPES.items():
            tensor = weights[name]
            assert tensor.dtype == dtype
            assert tensor.shape == (8, 4)
            assert bytes(tensor.view(torch.uint8).flatten().numpy()) == bytes(weights.raw(name))
        assert weights["F4"].shape == (8, 2)
        for name in ("F6_E2M3", "F6_E3M2"):
            with pytest.raises(UnsupportedDtype, match=name):
                weights[name]


def test_without_a_daemon_the_error_says_where_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnavailable, match="weightd serve") as error:
        attach("/x", socket=tmp_path)
    assert str(tmp_path) in str(error.value)
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "lease.sock"))
    dead.close()
    with pytest.raises(DaemonUnavailable):
        attach("/x", socket=tmp_path / "lease.sock")


def test_attach_says_why_the_stage_failed(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(StageFailed, match=r"bad\.safetensors: header length") as error:
        daemon.attach(tmp_path)
    assert error.value.code == "invalid_checkpoint"
    with pytest.raises(RequestRefused, match="neither an absolute path"):
        daemon.attach("ftp://x/y")
    with pytest.raises(RequestRefused, match="st-nope"):
        daemon.attach(stage="st-nope")


def test_attach_times_out_and_the_stage_goes_on(
    start_daemon: Callable[..., Daemon], s3: SeaweedFS, folder: Path
) -> None:
    uri = s3.upload(folder, "slow")
    gate = threading_event()
    with FaultProxy(s3.url, lambda request: gate.wait(60) and None if request.nbytes > 1 << 20 else None) as proxy:
        daemon = start_daemon(env={**s3.env, "AWS_ENDPOINT_URL": proxy.url})
        with pytest.raises(AttachTimeout):
            daemon.attach(uri, timeout=1)
        with pytest.raises(AttachTimeout):
            daemon.attach(uri, wait=False).wait(timeout=0.2)
        gate.set()
        with daemon.attach(uri) as weights:
            assert len(weights) == 8


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\x05", b"\xff\xff\xff\xff", b"\x02\0\0\0{}", b"\x04\0\0\0null", b"\x03\0\0\0[[[", b"\x08\0\0\0not json",
     wire.encode({"op": "lease"}), wire.encode({"op": "lease", "request": {"model": 5}}),
     wire.encode({"op": "lease", "request": {"model": "/x", "surprise": 1}}), wire.encode({"op": "rob"}),
     wire.encode({"op": "lease", "request": {"model": "/x"}, "tp_rank": "a"}), b"\x10\x27\0\0" + b"[" * 10000],
)  # fmt: skip
def test_garbage_on_the_lease_socket_is_answered_or_dropped(daemon: Daemon, garbage: bytes) -> None:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(daemon.runtime_dir / "lease.sock"))
    connection.sendall(garbage)
    connection.shutdown(socket.SHUT_WR)
    connection.settimeout(60)
    try:
        reply, _ = wire.receive(connection)
        assert reply["type"] == "error"
        assert reply["code"] == "invalid_request"
    except wire.Closed:
        assert len(garbage) < 4 or garbage[:2] == b"\x05"
    assert daemon.status["restarts"] == 0


def test_clients_that_say_nothing_hold_up_nobody(daemon: Daemon, folder: Path) -> None:
    silent = []
    for _ in range(50):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(daemon.runtime_dir / "lease.sock"))
        silent.append(connection)
    with daemon.attach(folder) as weights:
        assert len(weights) == 8
    for connection in silent:
        connection.close()


def test_lease_connections_are_bounded(start_daemon: Callable[..., Daemon], folder: Path) -> None:
    daemon = start_daemon("--max-leases", "2")
    held = [daemon.attach(folder) for _ in range(2)]
    with pytest.raises(RequestRefused, match="WEIGHTD_MAX_LEASES"):
        daemon.attach(folder)
    held.pop().close()
    until(lambda: len(leases(daemon)) == 1, "the closed lease is gone")
    daemon.attach(folder).close()
    held.pop().close()


def test_an_untrusted_user_is_refused_by_credentials_even_where_the_file_mode_lets_him_in(
    folder: Path,
) -> None:
    if os.getuid():
        pytest.skip("needs root, to become another user")
    with tempfile.TemporaryDirectory() as base, Daemon(Path(base) / "d") as daemon:
        Path(base).chmod(0o755)
        for path in (daemon.runtime_dir, Path(base) / "d"):
            path.chmod(0o755)
        for path in daemon.runtime_dir.glob("*.sock"):
            path.chmod(0o666)
        script = (
            "import os, sys, datetime, httpx, httpcore, h11, ssl\nimport weightd.ipc.client\n"
            "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
            "from weightd.ipc import attach, Client, RequestRefused\n"
            "for call in (lambda: attach('/x'), lambda: Client().node()):\n"
            "    try: call(); sys.exit('let in')\n"
            "    except RequestRefused as error: assert error.code == 'peer_not_allowed', error; print(error)\n"
        )
        env = {**os.environ, "WEIGHTD_RUNTIME_DIR": str(daemon.runtime_dir)}
        result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("WEIGHTD_PEER_UIDS") == 2


STRANGER = """
import os, sys, datetime, httpx, httpcore, h11, ssl
import weightd.ipc.client
from weightd.ipc import Client, RequestRefused, wire
import socket
os.setgroups([int(group) for group in sys.argv[2:]])
os.setgid(65534)
os.setuid(65534)
try:
    Client().node()
    print("api")
except RequestRefused as error:
    print(error.code)
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
wire.send(connection, {"op": "lease", "stage": "st-none"})
print(wire.receive(connection)[0]["code"])
"""


def test_a_group_that_may_use_the_sockets_lets_its_members_in() -> None:
    if os.getuid():
        pytest.skip("needs root, to become another user")
    with tempfile.TemporaryDirectory() as base:
        daemon = Daemon(Path(base) / "d", env={"WEIGHTD_PEER_GIDS": "4711, 65534"})
        other = Daemon(Path(base) / "other", env={"WEIGHTD_PEER_GIDS": "4711"})
        Path(base).chmod(0o755)
        with daemon, other:

            def told(server: Daemon, *groups: int) -> list[str]:
                for path in (server.runtime_dir, server.runtime_dir.parent):
                    path.chmod(0o755)
                for path in server.runtime_dir.glob("*.sock"):
                    path.chmod(0o666)
                lease = str(server.runtime_dir / "lease.sock")
                command = [sys.executable, "-c", STRANGER, lease, *map(str, groups)]
                env = {**os.environ, "WEIGHTD_RUNTIME_DIR": str(server.runtime_dir)}
                return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()

            admitted, refused = ["api", "unknown_stage"], ["peer_not_allowed"] * 2
            assert told(daemon) == admitted, "by its own group"
            assert told(other) == refused
            assert told(other, 4711) == admitted, "by one more"
            assert told(other, 4710, 4712) == refused


def test_who_lets_go_before_a_stage_is_removed_is_not_in_the_way(daemon: Daemon, folder: Path) -> None:
    """However late the daemon comes to look: here, at both at once."""
    stage = daemon.stage(folder)["id"]
    weights = daemon.attach(stage=stage)
    connection = http.client.HTTPConnection("weightd")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(daemon.runtime_dir / API_SOCKET))
    connection.request("GET", f"/v1/stage/{stage}")
    assert json.load(connection.getresponse())["leases"] == 1
    pid = daemon.status["daemon_pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        weights.close()
        connection.request("DELETE", f"/v1/stage/{stage}")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert json.load(connection.getresponse())["state"] == "evicted"
    connection.close()
