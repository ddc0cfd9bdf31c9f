"""The ``weightd`` command, run as a user runs it."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from tests.servers import Daemon, until
from weightd.daemon.settings import Settings

WEIGHTD = str(Path(sys.executable).parent / "weightd")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": numpy.zeros((8, 8), numpy.float32), "b": numpy.ones(3)}, tmp_path / "m.safetensors")
    return tmp_path


def weightd(daemon: Daemon | None, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    own = {"WEIGHTD_RUNTIME_DIR": str(daemon.runtime_dir)} if daemon else {}
    return subprocess.run(
        [WEIGHTD, *arguments],
        env={**os.environ, **own, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_stage_waits_with_progress_on_stderr_and_the_result_on_stdout(daemon: Daemon, folder: Path) -> None:
    result = weightd(daemon, "stage", str(folder), "--wait", "--json")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["state"] == "ready"
    assert f"{record['id']} ready" in result.stderr
    shown = weightd(daemon, "show", record["id"])
    assert record["checkpoint_digest"] in shown.stdout
    listed = weightd(daemon, "ls")
    assert record["id"] in listed.stdout
    assert [item["id"] for item in json.loads(weightd(daemon, "ls", "--json").stdout) if item["id"] == record["id"]]
    with daemon.attach(folder) as weights:
        assert weights.lease in weightd(daemon, "leases").stdout
        refused = weightd(daemon, "rm", record["id"])
        assert refused.returncode == 1
        assert "stage_leased" in refused.stderr
        assert str(os.getpid()) in refused.stderr
    until(lambda: not json.loads(weightd(daemon, "leases", "--json").stdout), "no lease is left")
    assert json.loads(weightd(daemon, "rm", record["id"], "--json").stdout)["state"] == "evicted"


def test_a_relative_path_means_the_callers_folder(
    daemon: Daemon, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    record = json.loads(weightd(daemon, "stage", folder.name, "--wait", "--json").stdout)
    assert record["model"] == f"file://{folder}"


def test_ranks_are_staged_by_flags(daemon: Daemon, folder: Path) -> None:
    arguments = ("--tp-size", "2", "--tp-rank", "all", "--tp-map", "a=1", "--tp-map", "*=replicate")
    record = json.loads(weightd(daemon, "stage", str(folder), "--wait", "--json", *arguments).stdout)
    assert [segment["tp_rank"] for segment in record["segments"]] == [0, 1]
    with daemon.attach(folder, tp_rank=1) as weights:
        assert weights["a"].shape == (8, 4)


def test_the_weights_are_named_by_flags_and_shown(daemon: Daemon, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        save_file({name: numpy.ones(3)}, tmp_path / f"{name}.safetensors")
    assert "ambiguous_checkpoint" in weightd(daemon, "stage", str(tmp_path), "--wait").stdout
    shown = weightd(
        daemon, "stage", str(tmp_path), "--weights", "a.safetensors", "--weights", "[c-z].safetensors", "--wait"
    ).stdout
    assert "a.safetensors, c.safetensors: the request's" in shown
    assert "b.safetensors (another file, not named" in shown


def test_on_a_terminal_there_is_a_progress_bar(daemon: Daemon, folder: Path) -> None:
    leader, follower = pty.openpty()
    env = {**os.environ, "WEIGHTD_RUNTIME_DIR": str(daemon.runtime_dir), "TERM": "xterm"}
    process = subprocess.Popen(
        [WEIGHTD, "stage", str(folder), "--wait", "--json"], env=env, stderr=follower, stdout=subprocess.PIPE
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            data = os.read(leader, 4096)
        except OSError:  # the other side is closed
            break
        if not data:
            break
        shown += data
    os.close(leader)
    assert process.stdout
    assert json.loads(process.stdout.read())["state"] == "ready"
    assert process.wait() == 0
    assert b"ready" in shown
    assert b"\x1b[" in shown


def test_a_failed_stage_is_exit_code_1_with_the_reason(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"\0" * 20)
    result = weightd(daemon, "stage", str(tmp_path), "--wait")
    assert result.returncode == 1
    assert "bad.safetensors" in result.stdout
    assert "invalid_checkpoint" in result.stdout


def test_without_a_daemon_one_line_says_what_to_do(tmp_path: Path) -> None:
    for arguments in (("ls",), ("stage", "/x"), ("leases",)):
        result = weightd(None, *arguments, WEIGHTD_RUNTIME_DIR=str(tmp_path))
        assert result.returncode == 1
        assert "weightd serve" in result.stderr
        assert "Traceback" not in result.stderr


def test_doctor_looks_at_everything_and_says_the_remedy(daemon: Daemon, tmp_path: Path) -> None:
    result = weightd(daemon, "doctor", "--json")
    findings = {finding["what"]: finding for finding in json.loads(result.stdout)}
    assert {"daemon", "api.sock", "lease.sock", "memlock", "/dev/shm", "streamer library", "credentials s3://",
            "credentials gs://", "credentials az://", "credentials hf://"} <= findings.keys()  # fmt: skip
    assert findings["streamer library"]["level"] == "ok", findings["streamer library"]
    assert findings["daemon"]["level"] == "ok"
    for finding in findings.values():
        assert finding["level"] == "ok" or finding["remedy"], finding
    assert "→" in weightd(daemon, "doctor").stdout
    alone = weightd(None, "doctor", WEIGHTD_RUNTIME_DIR=str(tmp_path))
    assert alone.returncode == 1
    assert "weightd serve" in alone.stdout


def test_help_lists_every_setting_with_its_variable() -> None:
    text = weightd(None, "serve", "--help", COLUMNS="300", TERM="dumb").stdout
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in text
        assert f"WEIGHTD_{name.upper()}" in text
    assert "--no-listen" in text


def test_the_readme_lists_every_setting() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    rows = {
        name
        for row in re.findall(r"^\| (`WEIGHTD_.*?) \|", readme, re.MULTILINE)
        for name in re.findall(r"WEIGHTD_[A-Z0-9_]+", row)
    }
    assert rows == {f"WEIGHTD_{name.upper()}" for name in Settings.model_fields}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--listen", "nonsense"), "HOST:PORT"),
        (("--listen", "127.0.0.1:65536"), "HOST:PORT"),
        (("--listen", "192.0.2.1:80"), "WEIGHTD_TOKEN"),
        (("--listen", "192.0.2.1:80", "--token", "s3cret"), "cannot listen on 192.0.2.1:80"),
        (("--no-listen", "--listen", "127.0.0.1:80"), "--no-listen"),
        (("--no-listen", "--capacity", "cpu"), "DEVICE=SIZE"),
        (("--no-listen", "--capacity", "cpu=lots"), "capacity"),
        (("--no-listen", "--capacity", "gpu=1GiB"), "gpu"),
        (("--no-listen", "--read-threads", "0"), "read_threads"),
        (("--no-listen", "--allow", "ftp://x"), "ftp://x"),
    ],
)
def test_bad_settings_are_one_line_and_leave_nothing(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    result = weightd(None, "serve", *arguments, WEIGHTD_RUNTIME_DIR=str(tmp_path / "run"))
    assert result.returncode in (1, 2)
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "run").glob("*.sock"))


def test_flags_win_over_variables_and_variables_over_defaults(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(env={"WEIGHTD_CAPACITY": "cpu=3MiB"})
    assert daemon.client.node()["devices"][0]["capacity_bytes"] == 3 << 20
    daemon = start_daemon("--capacity", "cpu=5MiB", env={"WEIGHTD_CAPACITY": "cpu=3MiB"})
    assert daemon.client.node()["devices"][0]["capacity_bytes"] == 5 << 20


def test_a_second_daemon_on_the_same_directory_is_refused_and_the_first_goes_on(daemon: Daemon) -> None:
    result = weightd(daemon, "serve", "--no-listen")
    assert result.returncode == 1
    assert f"pid {daemon.keeper_pid}" in result.stderr
    assert daemon.status["state"] == "running"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly_and_what_a_killed_one_left_is_no_obstacle(
    start_daemon: Callable[..., Daemon], folder: Path, number: signal.Signals
) -> None:
    daemon = start_daemon()
    weights = daemon.attach(folder)
    assert daemon.process
    daemon.process.send_signal(number)
    assert daemon.process.wait(30) == 0
    assert not list(daemon.runtime_dir.glob("*.sock"))
    assert weights["b"].sum() == 3, "what is mapped outlives the daemon"
    weights.close()
    daemon.start()
    daemon.process.kill()
    daemon.process.wait()
    assert (daemon.runtime_dir / "api.sock").exists()
    daemon.start()
    assert daemon.stage(folder)["state"] == "ready"


def test_the_daemon_imports_no_torch_and_the_clients_side_next_to_nothing(daemon: Daemon, folder: Path) -> None:
    daemon.stage(folder)
    maps = Path(f"/proc/{daemon.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "cupy" not in maps
    script = (
        "import sys; import weightd.ipc; "
        "heavy = {'torch', 'httpx', 'fastapi', 'pydantic', 'uvicorn', 'numpy'} & set(sys.modules); "
        "own = [name for name in sys.modules if name.startswith(('weightd.daemon', 'weightd.api'))]; "
        "sys.exit(f'{heavy} {own}' if heavy or own else 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
