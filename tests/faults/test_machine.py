"""What the machine can do to it: full disks, no descriptors, no memory, leftovers of the dead, a clock that jumps."""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy
import pytest
from safetensors.numpy import save_file

from tests.conftest import command, lacking
from tests.servers import Daemon, until
from weightd.daemon.devices.cpu import CpuDevice
from weightd.daemon.filling.ledger import Ledger
from weightd.daemon.keeper.deposits import Deposits
from weightd.daemon.lending.entrance import KEPT, reserve
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.stages.eviction import evictable, expires_at
from weightd.daemon.stages.request import StageRequest
from weightd.daemon.stages.residency import Residency
from weightd.daemon.stages.stage import Stage
from weightd.ipc import AttachTimeout, DaemonUnavailable, RequestRefused, Weights

Start = Callable[..., Daemon]
GiB = 1 << 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "model")


def checkpoint(folder: Path) -> Path:
    folder.mkdir()
    save_file({f"w{i}": numpy.full((64, 1024), i, numpy.float32) for i in range(4)}, folder / "m.safetensors")
    (folder / "tokenizer.json").write_text(json.dumps(list(range(20_000))))
    return folder


def prlimit(*limits: str) -> list[str]:
    return [command("prlimit", "apt-get install util-linux"), *limits]


def goes_on(daemon: Daemon, folder: Path) -> None:
    """It is the same daemon still, and does its work."""
    assert daemon.ready()
    assert daemon.stage(folder)["state"] == "ready"
    with daemon.attach(folder) as weights:
        assert [float(weights[f"w{i}"].max()) for i in range(4)] == [0, 1, 2, 3]
    assert daemon.status["restarts"] == 0


# ---------------------------------------------------------------------- disks


def on_a_tiny_disk(path: Path) -> list[str]:
    """Runs a command with an almost full file system at ``path`` that nobody else sees."""
    script = f'mount -t tmpfs -o size=16k tmpfs {path} && exec "$@"'
    namespaces = ["--mount"] if os.geteuid() == 0 else ["--mount", "--map-root-user"]
    prefix = [command("unshare", "apt-get install util-linux"), *namespaces, "sh", "-c", script, "sh"]
    path.mkdir()
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        lacking("a file system to fill up: needs root, or user namespaces")
    return prefix


@pytest.mark.parametrize("disk", ["full", "no folder"])
def test_without_a_disk_for_its_cache_it_stages_without_configuration_files(
    start_daemon: Start, folder: Path, tmp_path: Path, disk: str
) -> None:
    cache = tmp_path / "cache"
    prefix: list[str] = []
    if disk == "full":
        prefix = on_a_tiny_disk(cache)
    else:
        cache.write_text("a file")
        cache = cache / "below"
    daemon = start_daemon(env={"WEIGHTD_CACHE_DIR": str(cache)}, command=prefix)
    record = daemon.stage(folder)
    assert record["state"] == "ready"
    assert record["metadata"] is None
    assert daemon.client.manifest(record["id"])["metadata"] is None
    with daemon.attach(folder) as weights:
        assert weights.metadata is None
    assert "cannot keep configuration files" in daemon.log.read_text()
    goes_on(daemon, folder)


# ---------------------------------------------------------------------- descriptors


@pytest.fixture
def held() -> Iterator[list[Weights]]:
    found: list[Weights] = []
    yield found
    for weights in found:
        weights.close()


def test_without_descriptors_it_refuses_and_works_again_once_there_are_some(
    start_daemon: Start, folder: Path, tmp_path: Path, held: list[Weights]
) -> None:
    limit = 80
    daemon = start_daemon(command=prlimit(f"--nofile={limit}:{limit}"))
    stage = daemon.stage(folder)["id"]
    fds = Path(f"/proc/{daemon.pid}/fd")
    with pytest.raises(RequestRefused, match="ulimit -n"):  # noqa: PT012
        while len(held) < limit:
            held.append(daemon.attach(stage=stage, timeout=60))
    assert limit - reserve(limit) - 2 <= len(os.listdir(fds)) <= limit - reserve(limit) + 2 * KEPT
    assert len(held) > 10
    another = checkpoint(tmp_path / "another")
    assert daemon.stage(another)["state"] == "ready", "what connections leave is enough to work with"

    # Less than that, so that there is nothing left at all.
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (len(os.listdir(fds)) + 1, limit))
    other = checkpoint(tmp_path / "other")
    try:
        said = str(daemon.stage(other)["error"])  # it is listed by descriptors
    except RequestRefused as refused:
        said = str(refused)
    assert "Too many open files" in said
    assert all(float(weights["w3"].max()) == 3 for weights in held)
    with pytest.raises((AttachTimeout, DaemonUnavailable, RequestRefused)):
        daemon.attach(stage=stage, timeout=3)

    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (limit, limit))
    while held:
        held.pop().close()
    until(lambda: not daemon.client.leases(), "no lease is left")
    goes_on(daemon, other)


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize("limit", [f"--as={6 * GiB}", f"--fsize={GiB}"])
def test_memory_that_the_system_refuses_is_507_and_nothing_else_suffers(
    start_daemon: Start, folder: Path, tmp_path: Path, limit: str
) -> None:
    """Once the address space is too small for the segment, once no file may be as large as it."""
    huge = tmp_path / "huge.safetensors"
    nbytes = 16 * GiB
    header = json.dumps({"w": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}).encode()
    with huge.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + nbytes)
    daemon = start_daemon("--capacity", "cpu=100GiB", command=prlimit(limit))
    with pytest.raises(RequestRefused, match=str(nbytes)) as refused:
        daemon.stage(huge)
    assert (refused.value.code, refused.value.details["status"]) == ("insufficient_capacity", 507)
    until(lambda: daemon.used_bytes == 0, "nothing is taken for it")
    goes_on(daemon, folder)


# ---------------------------------------------------------------------- the runtime directory


def serve(runtime_dir: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "weightd.daemon.cli", "serve", "--no-listen"],
        env={**os.environ, "WEIGHTD_RUNTIME_DIR": str(runtime_dir)},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("inside", "words"),
    [("file/run", "Not a directory"), ("x" * 120, "at most 107 bytes"), ("taken", "Is a directory")],
)
def test_a_runtime_directory_that_cannot_be_used_is_one_line_and_exit_code_1(
    tmp_path: Path, inside: str, words: str
) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "taken" / "api.sock").mkdir(parents=True)
    result = serve(tmp_path / inside)
    assert result.returncode == 1
    assert words in result.stderr
    assert inside in result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr


def test_a_runtime_directory_that_somebody_else_has_made_in_tmp_is_not_used(tmp_path: Path) -> None:
    if os.getuid():
        pytest.skip("needs root, to become another user")
    tmp_path.chmod(0o1777)
    folder, precious = tmp_path / "weightd-0", tmp_path / "precious"
    precious.write_text("not to be emptied")
    folder.mkdir(0o755)
    (folder / "lock").symlink_to(precious)
    os.chown(folder, 1234, 1234)
    (tmp_path / "link").symlink_to(folder)
    os.chown(tmp_path / "link", 1234, 1234, follow_symlinks=False)
    for path in (folder, tmp_path / "link"):
        result = serve(path)
        assert result.returncode == 1
        assert f"{path} was made by uid 1234" in result.stderr
    assert precious.read_text() == "not to be emptied"


def test_what_a_dead_daemon_has_left_in_the_runtime_directory_is_replaced(tmp_path: Path, folder: Path) -> None:
    daemon = Daemon(tmp_path / "daemon")
    daemon.runtime_dir.mkdir(parents=True)
    for name in ("api.sock", "lease.sock"):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(daemon.runtime_dir / name))
            left.listen()
    gone = subprocess.Popen(["true"])
    gone.wait()
    (daemon.runtime_dir / "lock").write_text(f"{gone.pid} and more than a pid\n")
    (daemon.runtime_dir / "keeper.json").write_text('{"pid": ')
    with daemon:
        goes_on(daemon, folder)
        assert (daemon.runtime_dir / "lock").read_text() == f"{daemon.keeper_pid}\n"
        assert daemon.status["pid"] == daemon.keeper_pid
        assert {path.name for path in daemon.runtime_dir.iterdir()} == {
            "api.sock", "keeper.json", "lease.sock", "lock",
        }  # fmt: skip


def test_a_runtime_directory_that_is_removed_takes_nothing_from_who_is_attached(
    start_daemon: Start, folder: Path
) -> None:
    daemon = start_daemon()
    with daemon.attach(folder) as weights:
        client, pid = daemon.client, daemon.pid
        shutil.rmtree(daemon.runtime_dir)
        assert client.node()["pid"] == pid
        assert client.leases()[0]["id"] == weights.lease
        assert float(weights["w3"].max()) == 3
    assert daemon.process
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(60) == 0


# ---------------------------------------------------------------------- clocks


YEAR = 365 * 86400.0


@pytest.fixture
def stage() -> Iterator[tuple[Residency, Stage]]:
    """A ready stage that lives for an hour without a lease."""
    residency = Residency({"cpu": CpuDevice("cpu", GiB)}, Deposits(), Metrics(), lease_grace=30, max_leases_per_user=9)
    found = Stage("file:///x", ["cpu"], StageRequest(model="/x", ttl_seconds=3600), None)
    residency.keep(found)
    found.reserved = {"cpu": mmap.PAGESIZE}
    found.segments = [CpuDevice("cpu", GiB).allocate(mmap.PAGESIZE, found.id)]
    found.ledger = Ledger.new(0, 0, bytes(16))
    found.enter("ready")
    residency.leases.note(found)
    yield residency, found
    residency.release(found)


@pytest.mark.parametrize("jump", [-YEAR, YEAR])
def test_a_clock_that_jumps_ends_no_time_to_live_and_no_waiting_for_lessees(
    stage: tuple[Residency, Stage], jump: float
) -> None:
    residency, found = stage
    lease = residency.leases.begin(found, 0, uid=0, gid=0, pid=1)
    before = time.monotonic()
    with mock.patch("time.time", return_value=time.time() + jump):
        residency.leases.await_holders(found)
        assert found.awaited == 1
        assert found.protected_until >= before + 30
        assert not evictable(found, time.monotonic())
        residency.leases.end(lease)
        due = expires_at(found)
        assert due is not None
        assert before + 3600 <= due <= time.monotonic() + 3600

        async def expire() -> None:
            task = asyncio.create_task(residency.expire())
            for _ in range(5):
                await asyncio.sleep(0)
            assert not task.done()
            task.cancel()

        asyncio.run(expire())
    assert found.state == "ready"
    assert expires_at(found) == due


@pytest.mark.parametrize("jump", [-YEAR, YEAR])
def test_a_clock_that_jumps_gives_lessees_as_long_to_let_go_as_they_were_told(
    stage: tuple[Residency, Stage], jump: float
) -> None:
    residency, found = stage
    residency.leases.begin(found, 0, uid=0, gid=0, pid=1)

    async def revoke() -> None:
        started = time.monotonic()
        residency.revoke(found, 0.5)
        task = asyncio.create_task(residency.revoked(found))
        await asyncio.sleep(0)
        with mock.patch("time.time", return_value=time.time() + jump):
            found.notify()
            await asyncio.wait_for(task, 60)
        assert time.monotonic() - started >= 0.499
        assert found.state == "evicted"

    asyncio.run(revoke())
