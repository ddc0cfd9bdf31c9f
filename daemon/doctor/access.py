"""What ``weightd doctor`` says of who may come in, and whether clients believe what they find."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from weightd.daemon.addresses import is_loopback, parse_listen
from weightd.daemon.doctor.report import Finding
from weightd.daemon.settings import Settings
from weightd.ipc import trust
from weightd.ipc.runtime_dir import TOKEN_FILE

_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def examine_access() -> Iterator[Finding]:
    """The folder of the sockets, the S3 endpoint, the TCP port, and its token."""
    settings = Settings()
    folder = settings.runtime_dir
    if folder.is_dir():
        yield _folder(folder)
    if settings.s3_listen:
        yield _s3_endpoint(settings)
    if not settings.listen:
        yield Finding("TCP port", "ok", "none: the Unix sockets only")
        return
    yield _port(settings)
    if settings.token is None:
        yield _token(folder)


def _s3_endpoint(settings: Settings) -> Finding:
    who = "whoever signs with its keys" if settings.s3_access_key else "every user of the machine"
    told = f"{settings.s3_listen}, for {who}; stages to {settings.s3_device}"
    if settings.s3_device.startswith("cpu"):
        return Finding("S3 endpoint", "ok", told)
    return Finding(
        "S3 endpoint", "warning", f"{told}, from where every byte that is sent has to be copied back",
        "WEIGHTD_S3_DEVICE=cpu, unless engines map the same stages",
    )  # fmt: skip


def _folder(folder: Path) -> Finding:
    found = folder.stat()
    mode, named = stat.S_IMODE(found.st_mode), trust.named()
    told = f"{folder}, uid {found.st_uid}, mode {mode:o}"
    if named:
        users = ", ".join(map(str, sorted(named | {0, os.geteuid()})))
        return Finding("runtime directory", "ok", f"{told}; daemons of uid {users} are believed ({trust.VARIABLE})")
    if found.st_uid not in trust.trusted():
        return Finding(
            "runtime directory", "error", f"{told}: another user's, so that clients of uid {os.geteuid()} say nothing",
            f"{trust.VARIABLE}={found.st_uid} where that user runs the daemon; else set WEIGHTD_RUNTIME_DIR",
        )  # fmt: skip
    if mode & _OTHERS:
        return Finding(
            "runtime directory", "error", f"{told}: others may write to it, so that clients say nothing",
            f"chmod go-w {folder}, or name the daemon's user in clients' {trust.VARIABLE}",
        )  # fmt: skip
    return Finding("runtime directory", "ok", told)


def _port(settings: Settings) -> Finding:
    host, port = parse_listen(settings.listen)
    strangers = sorted(set(trust.listeners(port)) - trust.trusted())
    if strangers:
        return Finding(
            "TCP port", "error", f"at port {port} uid {strangers[0]} listens, which is neither root nor who runs this",
            "no token is shown to it; let the daemon listen elsewhere (WEIGHTD_LISTEN)",
        )  # fmt: skip
    if settings.token is not None:
        return Finding("TCP port", "ok", f"{settings.listen}, for whoever shows WEIGHTD_TOKEN")
    if not is_loopback(host):  # the settings refuse it
        return Finding("TCP port", "error", f"{settings.listen} is open to the network", "set WEIGHTD_TOKEN")
    return Finding(
        "TCP port", "ok",
        f"{settings.listen}: every user of the machine may read, and stage what fits; all else takes the token",
    )  # fmt: skip


def _token(folder: Path) -> Finding:
    path = folder / TOKEN_FILE
    again = f"rm {path}, then: weightd reload, which makes another"
    try:
        found = path.lstat()
    except FileNotFoundError:
        return Finding(
            "token", "warning", f"{path} is not there: over TCP nobody may change anything", "weightd reload"
        )
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISREG(found.st_mode) or mode & 0o077:
        return Finding(
            "token", "error", f"{path} has mode {mode:o}: others may know it, and change things by it", again
        )
    if found.st_uid not in trust.trusted():
        return Finding("token", "error", f"{path} belongs to uid {found.st_uid}, who may have put it there", again)
    return Finding("token", "ok", f"{path}, mode {mode:o}")
