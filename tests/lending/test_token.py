"""The daemon's own token: made once, for its user alone, and anew where others could know it or have put it there."""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from weightd.daemon.lending.token import forget_token, own_token
from weightd.ipc.runtime_dir import TOKEN_FILE


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / TOKEN_FILE


@pytest.mark.parametrize("umask", [0, 0o022, 0o377])
def test_it_is_made_once_for_its_user_alone_whatever_the_umask(file: Path, umask: int) -> None:
    before, descriptors = os.umask(umask), len(os.listdir("/proc/self/fd"))
    try:
        made = own_token(file.parent)
    finally:
        os.umask(before)
    assert re.fullmatch("[0-9a-f]{64}", made)
    assert file.read_text() == f"{made}\n"
    assert mode_of(file) == 0o600
    assert own_token(file.parent) == made
    assert [path.name for path in file.parent.iterdir()] == [TOKEN_FILE]
    assert len(os.listdir("/proc/self/fd")) == descriptors
    forget_token(file.parent)
    assert not file.exists()
    forget_token(file.parent)
    assert own_token(file.parent) != made


def test_it_is_open_to_nobody_else_at_any_moment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    monkeypatch.setattr(os, "fchmod", lambda fd, mode: modes.extend((stat.S_IMODE(os.fstat(fd).st_mode), mode)))
    before = os.umask(0)
    try:
        own_token(file.parent)
    finally:
        os.umask(before)
    assert modes == [0o600, 0o600]


@pytest.mark.parametrize("mode", [0o640, 0o620, 0o610, 0o604, 0o602, 0o601])
def test_one_that_anybody_else_may_read_write_or_run_is_made_anew(file: Path, mode: int) -> None:
    made = own_token(file.parent)
    file.chmod(mode)
    assert own_token(file.parent) != made
    assert mode_of(file) == 0o600


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o700])
def test_what_its_user_may_do_with_it_does_not_matter(file: Path, mode: int) -> None:
    made = own_token(file.parent)
    file.chmod(mode)
    assert own_token(file.parent) == made
    assert mode_of(file) == mode


@pytest.mark.parametrize("text", ["", "short\n", "0" * 63, "0" * 65, "A" * 64, "g" * 64, "0" * 64 + "\n0", "\xff" * 64])
def test_what_is_no_token_is_made_anew(file: Path, text: str) -> None:
    file.write_bytes(text.encode("latin-1"))
    file.chmod(0o600)
    assert own_token(file.parent) != text.strip()
    assert len(file.read_text()) == 65


def linked(file: Path) -> None:
    os.link(file, file.parent / "elsewhere")


def behind_a_symlink(file: Path) -> None:
    file.rename(file.parent / "elsewhere")
    file.symlink_to("elsewhere")


def given_away(file: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root, to give it to another user")
    os.chown(file, 65534, -1)


def a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)


@pytest.mark.parametrize("done", [linked, behind_a_symlink, given_away, a_pipe])
def test_one_that_somebody_else_may_have_made_or_have_is_made_anew(file: Path, done: Callable[[Path], None]) -> None:
    made = own_token(file.parent)
    done(file)
    assert own_token(file.parent) != made
    assert stat.S_ISREG(file.lstat().st_mode)
    assert (file.lstat().st_uid, mode_of(file)) == (os.geteuid(), 0o600)


@pytest.mark.parametrize("there", ["file", "symlink", "symlink to nothing"])
def test_it_is_written_into_no_file_that_is_there(file: Path, there: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda count: "ab" * count)
    fresh, precious = file.parent / f".{TOKEN_FILE}.{'ab' * 6}", file.parent / "precious"
    if there != "symlink to nothing":
        precious.write_text("precious")
    if there == "file":
        precious.rename(fresh)
    else:
        fresh.symlink_to(precious)
    with pytest.raises(FileExistsError):
        own_token(file.parent)
    assert not file.exists()
    if there == "symlink to nothing":
        assert not precious.exists()
    else:
        assert fresh.read_text() == "precious"
