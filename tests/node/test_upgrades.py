"""From one version to another: what an earlier version has staged and lent is there with this one, and goes on."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import load_file, save_file

import weightd.daemon
from tests.conftest import lacking
from tests.fault_proxy import FaultProxy
from tests.lending.test_leases import leases
from tests.node.adopting import Gate, bytes_read, ended, everything, replaced, same
from tests.servers import Daemon, SeaweedFS, until

ROOT = Path(__file__).parents[2]
FOLDERS = ("api", "daemon", "ipc")
VERSIONS = {"before the rooms": "a161cfdc4fcbbb9ec9b5432f509701c3f84787a8"}
"""Earlier versions, by the commit that they are at."""
OLD = "this is the version before"
"""What each daemon of the earlier version says on its standard error."""
MOVING = {"leases", "state_seconds", "source_seconds", "seconds"}
"""What of a record goes on with time, or with who leases it."""
ENGINE = """
import sys
from weightd import ipc
with ipc.attach(sys.argv[1]) as weights:
    print("attached", weights.lease, ipc.__file__, flush=True)
    for line in sys.stdin:
        exec(line)
        print("done", flush=True)
"""


@pytest.fixture(params=VERSIONS)
def path(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder for PYTHONPATH whose ``weightd`` is an earlier version."""
    commit = VERSIONS[request.param]
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", "--format=tar", commit, *FOLDERS], capture_output=True, check=False
    )
    if archive.returncode:
        lacking(f"commit {commit} of this repository, which a shallow clone leaves out: {archive.stderr.decode()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(tmp_path / "path" / "weightd", filter="data")
    main = tmp_path / "path" / "weightd" / "api" / "__main__.py"
    main.write_text(
        main.read_text().replace("import sys\n", f"import sys\n\nprint({OLD!r}, file=sys.stderr, flush=True)\n", 1)
    )
    return tmp_path / "path"


def old_path(path: Path) -> Path:
    """A folder for PYTHONPATH with the earlier version, once it has been upgraded from."""
    (path / "old").mkdir()
    (path / "old" / "weightd").symlink_to(path / "before")
    return path / "old"


def upgraded(path: Path) -> None:
    """From now on whoever starts there gets the version that is tested."""
    (path / "weightd").rename(path / "before")
    (path / "weightd").mkdir()
    for folder in FOLDERS:
        (path / "weightd" / folder).symlink_to(Path(weightd.daemon.__file__).parents[1] / folder)


def test_a_reload_to_this_version_adopts_what_the_one_before_has_staged_and_lent(
    path: Path, tmp_path: Path, start_daemon: Callable[..., Daemon]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    rng = numpy.random.default_rng(11)
    truth = {f"w{i}": rng.standard_normal((300, 1000 + i), numpy.float32) for i in range(5)}
    save_file(truth, folder / "m.safetensors")
    (folder / "config.json").write_text("{}")
    env = {"PYTHONPATH": str(path)}
    daemon = start_daemon(env=env)
    record = daemon.stage(folder)
    split = daemon.stage(
        folder, pin=True, parallel={"tp_size": 2, "tp_rank": "all", "map": {"*": 0}}, ttl_seconds=100_000
    )
    before = everything(daemon)
    engine = subprocess.Popen(
        [sys.executable, "-c", ENGINE, str(folder)],
        env={**os.environ, **env, "WEIGHTD_RUNTIME_DIR": str(daemon.runtime_dir)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with engine:
        assert engine.stdin
        assert engine.stdout
        _, lease, module = engine.stdout.readline().split()
        assert module.startswith(str(path)), "the engine is not of the version before"
        assert daemon.log.read_text().count(OLD) == 1
        assert "weightd.daemon.keeper" in Path(f"/proc/{daemon.keeper_pid}/cmdline").read_text()
        upgraded(path)
        pid = daemon.pid
        reload = [sys.executable, "-m", "weightd.daemon.cli", "reload", "--runtime-dir", str(daemon.runtime_dir)]
        result = subprocess.run(reload, capture_output=True, text=True, check=False, timeout=120)
        assert result.returncode == 0, result.stderr
        assert daemon.pid != pid
        assert daemon.log.read_text().count(OLD) == 1, "the daemon is still of the version before"
        after = everything(daemon)
        assert after.keys() == before.keys() == {record["id"], split["id"]}
        for stage, (was, manifests) in before.items():
            now, same_manifests = after[stage]
            now["request"] = {key: value for key, value in now["request"].items() if key in was["request"]}
            assert same_manifests == manifests
            assert {key: value for key, value in now.items() if key in was and key not in MOVING} == {
                key: value for key, value in was.items() if key not in MOVING
            }
        until(lambda: lease in leases(daemon), "the engine of the version before has its lease again", 60)
        engine.stdin.write("assert weights['w3'].sum() == weights['w3'].sum()\n")
        engine.stdin.flush()
        assert engine.stdout.readline() == "done\n"
        with daemon.attach(folder) as weights:
            assert same(weights, truth)
            assert weights.digest == record["checkpoint_digest"]
        assert daemon.get("/metrics").count("\nweightd_source_read_bytes_total{") == 0, "something was read anew"
        old = [sys.executable, "-c", ENGINE, str(folder)]
        again = {**os.environ, "PYTHONPATH": str(old_path(path)), "WEIGHTD_RUNTIME_DIR": str(daemon.runtime_dir)}
        found = subprocess.run(old, env=again, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
        assert str(path) in found.stdout, "an engine of the version before attaches to the daemon of this one"


def test_a_load_that_the_version_before_had_begun_goes_on(
    path: Path, tmp_path: Path, start_daemon: Callable[..., Daemon], s3: SeaweedFS
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    rng = numpy.random.default_rng(12)
    save_file({f"w{i}": rng.standard_normal((512, 1024), numpy.float32) for i in range(6)}, folder / "m.safetensors")
    uri = s3.upload(folder, f"upgraded-{tmp_path.name}")
    gate = Gate(4)
    with FaultProxy(s3.url, gate) as proxy:
        env = {**s3.env, "AWS_ENDPOINT_URL": proxy.url, "PYTHONPATH": str(path)}
        daemon = start_daemon("--extent", "1MiB", env=env)
        try:
            stage = daemon.client.stage(uri)["id"]
            until(lambda: daemon.client.show(stage)["bytes_done"] > 0, "something of it has landed", 60)
            landed = daemon.client.show(stage)["bytes_done"]
            upgraded(path)
            replaced(daemon)
            gate.opened.set()
            record = ended(daemon, stage)
        finally:
            gate.opened.set()
        assert (record["id"], record["state"]) == (stage, "ready"), record["error"]
        assert daemon.log.read_text().count(OLD) == 1
        assert bytes_read(daemon) <= record["bytes_total"] - landed
        with daemon.attach(uri) as weights:
            assert same(weights, load_file(folder / "m.safetensors"))
