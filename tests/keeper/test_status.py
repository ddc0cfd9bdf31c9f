"""What a keeper says of itself, in its status, its log and the lock; and what is told to it from outside."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.keeper.made import Time
from weightd.daemon.keeper import control, supervisor
from weightd.daemon.keeper.control import NoKeeper, keeper_status, reload_daemon
from weightd.daemon.keeper.supervisor import lock


def test_the_status_says_which_state_it_is_in_and_is_gone_with_it(make: Any) -> None:
    keeper = make()
    for pid, stopping, start_at, state in (
        (0, False, 5.0, "restarting"), (0, False, None, "crash loop"), (0, True, None, "stopping"),
        (7, True, None, "running"), (7, False, None, "running"),
    ):  # fmt: skip
        keeper._pid, keeper._stopping, keeper._start_at = pid, stopping, start_at
        keeper._write_status()
        assert (keeper.status()["state"], keeper.status()["daemon_pid"]) == (state, pid)
    keeper.deposits.up()
    keeper.take()
    assert (keeper.status()["serving"], keeper._served) == (True, True)
    keeper._clean()
    assert not Path(keeper._folder, "keeper.json").exists()
    keeper._clean()


def test_what_is_held_is_written_down_soon_but_not_each_time(make: Any, clock: Time) -> None:
    keeper = make()
    keeper._write_status()
    assert keeper._status_at is None
    keeper.put("a")
    assert keeper._status_at == 1000.5
    clock.now += 0.2
    keeper.put("b")
    assert keeper._status_at == 1000.5
    keeper._write_status()
    clock.now += 5
    keeper.deposits.drop("b")
    keeper.take()
    assert keeper._status_at == clock.now
    keeper._write_status()
    assert keeper.status()["held"] == 2


def test_where_the_status_cannot_be_written_that_is_said(make: Any, capfd: pytest.CaptureFixture[str]) -> None:
    keeper = make()
    keeper._folder = "/nowhere"
    keeper._write_status()
    assert "cannot say in /nowhere/keeper.json how things are" in capfd.readouterr().err


@pytest.mark.parametrize(("form", "text"), [("text", True), ("json", False), ("auto", False), (None, False)])
def test_it_logs_as_daemons_do(form: str | None, text: bool, monkeypatch: pytest.MonkeyPatch,
                               capfd: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.delenv("WEIGHTD_LOG_FORMAT", raising=False)
    if form:
        monkeypatch.setenv("WEIGHTD_LOG_FORMAT", form)
    monkeypatch.setattr(supervisor, "time", Time())
    supervisor.log("hello")
    err = capfd.readouterr().err
    if text:
        assert err == "%H:%M:%S     INFO    keeper: hello\n"
    else:
        assert json.loads(err) == {
            "time": "%Y-%m-%dT%H:%M:%SZ", "level": "info", "logger": "weightd.keeper", "message": "hello",
        }  # fmt: skip


def test_a_runtime_directory_is_locked_by_one_who_is_named_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    fd = lock(str(folder))
    assert (folder / "lock").read_text() == f"{os.getpid()}\n"
    assert folder.stat().st_mode & 0o777 == 0o750
    assert (folder / "lock").stat().st_mode & 0o777 == 0o640
    assert not os.get_inheritable(fd)
    with pytest.raises(SystemExit, match=f"in use by another weightd, pid {os.getpid()}: stop it"):
        lock(str(folder))
    (folder / "lock").write_text("")
    with pytest.raises(SystemExit, match="pid unknown"):
        lock(str(folder))
    os.close(fd)
    os.close(lock(str(folder)))
    with pytest.raises(SystemExit, match="cannot use the runtime directory /dev/null/x"):
        lock("/dev/null/x")


@pytest.mark.parametrize(
    ("above", "owner", "me", "used"),
    [
        (0o1777, 1234, 0, False),
        (0o1772, 1, 0, False),
        (0o1771, 1234, 0, True),
        (0o777, 1234, 0, True),
        (0o755, 1234, 0, True),
        (0o1777, 0, 1234, True),
        (0o1777, 1234, 1234, True),
    ],
)
def test_in_a_folder_of_anybodys_only_what_root_or_its_own_user_has_made_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, above: int, owner: int, me: int, used: bool
) -> None:
    if os.getuid():
        pytest.skip("needs root, to make what is another user's")
    folder = tmp_path / "above" / "run"
    folder.mkdir(parents=True)
    os.chown(folder, owner, owner)
    folder.parent.chmod(above)
    monkeypatch.setattr(os, "geteuid", lambda: me)
    if used:
        os.close(lock(str(folder)))
    else:
        with pytest.raises(SystemExit, match=f"run was made by uid {owner}, who may put there"):
            lock(str(folder))


# ---------------------------------------------------------------------------- from outside


def test_there_is_a_keeper_only_where_somebody_holds_the_lock(tmp_path: Path) -> None:
    with pytest.raises(NoKeeper, match="No such file or directory: start one"):
        keeper_status(tmp_path)
    fd = lock(str(tmp_path))
    with pytest.raises(NoKeeper, match="does not say how it fares"):
        keeper_status(tmp_path)
    (tmp_path / "keeper.json").write_text('{"pid": 5}')
    before = len(os.listdir("/proc/self/fd"))
    assert keeper_status(tmp_path) == {"pid": 5}
    fcntl.flock(fd, fcntl.LOCK_UN)
    with pytest.raises(NoKeeper, match="start one"):
        keeper_status(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(fd)


@pytest.mark.parametrize("new", [6, 4])
def test_a_reload_waits_for_another_daemon_that_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: int
) -> None:
    said = [(5, True), (5, True), (5, False), (new, False), (new, True)]
    sent: list[tuple[int, int]] = []

    def status(folder: Path) -> dict[str, Any]:
        pid, serving = said.pop(0) if len(said) > 1 else said[0]
        return {"pid": 99, "daemon_pid": pid, "serving": serving, "state": "running", "last_exit": "exit code 1"}

    monkeypatch.setattr(control, "keeper_status", status)
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    assert reload_daemon(tmp_path, 60) == (5, new)
    assert (sent, said) == ([(99, signal.SIGHUP)], [(new, True)])
    with pytest.raises(TimeoutError, match=r"does not serve after 0.01 s: running, exit code 1; see its log"):
        reload_daemon(tmp_path, 0.01)


def test_another_users_keeper_cannot_be_told_to_reload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(control, "keeper_status", lambda folder: {"pid": 99})
    monkeypatch.setattr(os, "kill", kill)
    with pytest.raises(NoKeeper, match="pid 99, is another user's"):
        reload_daemon(tmp_path, 1)
