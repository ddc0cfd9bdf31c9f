"""``weightd doctor``: what staging and attaching need, looked at one by one, each with its remedy."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weightd.daemon.devices import libstreamer
from weightd.daemon.devices.cpu import available_memory
from weightd.daemon.doctor.access import examine_access
from weightd.daemon.doctor.gpus import examine_gpus
from weightd.daemon.doctor.report import Finding
from weightd.daemon.doctor.s3 import examine_s3
from weightd.daemon.keeper.control import NoKeeper, keeper_status
from weightd.daemon.settings import Settings
from weightd.ipc import Client, DaemonNotTrusted, WeightdError
from weightd.ipc.runtime_dir import API_SOCKET, LEASE_SOCKET, runtime_dir

_PROBE_SECONDS = 5.0


def examine() -> list[Finding]:
    """Look at everything. Raises nothing: what cannot be looked at is a finding."""
    findings: list[Finding] = []
    checks = (
        _keeper, _daemon, _sockets, examine_access, _memory, _memlock, _huge_pages, _files, _streamer, examine_gpus,
        examine_s3, _credentials, _cache,
    )  # fmt: skip
    for check in checks:
        try:
            findings += check()
        except Exception as error:
            findings.append(Finding(check.__name__.strip("_"), "error", f"{type(error).__name__}: {error}"))
    return findings


def probe(*, ready: bool) -> list[Finding]:
    """Ask the daemon alone: whether it answers, or whether it is ``ready``."""
    import httpx

    socket_path = str(runtime_dir() / API_SOCKET)
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=socket_path), timeout=_PROBE_SECONDS) as client:
            answer = client.get("http://weightd/readyz" if ready else "http://weightd/livez")
    except httpx.HTTPError as error:
        return [Finding("daemon", "error", f"does not answer at {socket_path}: {error}", "weightd serve")]
    if answer.is_error:
        return [Finding("daemon", "error", answer.json()["detail"], "wait where it loads; else see weightd doctor")]
    return [Finding("daemon", "ok", f"{'is ready' if ready else 'answers'} at {socket_path}")]


def _keeper() -> Iterator[Finding]:
    folder = Settings().runtime_dir
    try:
        status = keeper_status(folder)
    except NoKeeper as error:
        yield Finding("keeper", "warning", str(error), "weightd serve: without it weights die with the daemon")
        return
    found = f"pid {status['pid']}: {status['state']}, {status['restarts']} restarts, {status['held']} descriptors held"
    if status["state"] == "crash loop":
        yield Finding("keeper", "error", f"{found}; the daemon died last by {status['last_exit']}",
                      "look at the daemon's log, mend the cause, then: weightd reload")  # fmt: skip
    else:
        yield Finding("keeper", "ok", found)


def _daemon() -> Iterator[Finding]:
    try:
        with Client() as client:
            node, directory = client.node(), client.peers()
    except WeightdError as error:
        remedy = "set what it names" if isinstance(error, DaemonNotTrusted) else "weightd serve"
        yield Finding("daemon", "error", str(error), remedy)
        return
    yield Finding("daemon", "ok", f"pid {node['pid']} at {client.address}")
    for why in node["not_ready"]:
        yield Finding("preload", "warning", why, "wait where it loads; else mend what it says, or WEIGHTD_PRELOAD")
    yield from _peers(node["peers"], directory)
    for device in node["devices"]:
        if device["quarantined"]:
            yield Finding(
                f"device {device['name']}", "error", f"in quarantine: {device['quarantined']}; what it holds is kept",
                "look at the GPU (nvidia-smi, the kernel's log for Xid errors), then: weightd reload",
            )  # fmt: skip
            continue
        yield Finding(
            f"device {device['name']}",
            "ok" if device["free_bytes"] else "warning",
            f"{device['used_bytes']} of {device['capacity_bytes']} bytes in use",
            "" if device["free_bytes"] else "drop a stage (weightd rm), or raise WEIGHTD_CAPACITY",
        )


def _peers(state: dict[str, Any], directory: dict[str, Any]) -> Iterator[Finding]:
    meanwhile = "stages load from their sources meanwhile"
    if state["state"] == "off":
        yield Finding("peers", "error", f"off: {state['reason']}", meanwhile)
    elif state["state"] == "none" and Settings().peers != "none":
        yield Finding("peers", "warning", "the daemon was started without them", "set WEIGHTD_PEERS where it starts")
    elif state["state"] == "ok" and directory["directory"] != "ok":
        yield Finding("peers", "error", directory["directory"], f"see WEIGHTD_PEERS; {meanwhile}")
    elif state["state"] == "ok":
        where = f"found at {state['address']}" if state["address"] else "reading only (no WEIGHTD_PEER_LISTEN)"
        yield Finding("peers", "ok", f"{len(directory['peers'])} daemons in the directory, {where}")


def _sockets() -> Iterator[Finding]:
    for name in (API_SOCKET, LEASE_SOCKET):
        path = Settings().runtime_dir / name
        if not path.exists():
            yield Finding(
                name, "error", f"{path} does not exist",
                "start the daemon, or share its runtime directory and set WEIGHTD_RUNTIME_DIR to it",
            )  # fmt: skip
            continue
        mode = path.stat().st_mode & 0o777
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except PermissionError:
                yield Finding(
                    name, "error", f"{path}: permission denied (mode {mode:o}, gid {path.stat().st_gid})",
                    "run as a user of that group, in Kubernetes by fsGroup",
                )  # fmt: skip
                continue
            except OSError as error:
                yield Finding(name, "error", f"{path}: {error.strerror}", "the daemon is dead: start it again")
                continue
        if mode & 0o007:
            yield Finding(name, "warning", f"{path} has mode {mode:o}: everybody may connect", f"chmod 660 {path}")
        else:
            yield Finding(name, "ok", f"{path}, mode {mode:o}")


def _memory() -> Iterator[Finding]:
    available = available_memory()
    small = available < 1 << 30
    remedy = "raise the container's memory limit: segments on cpu count towards it"
    yield Finding("memory", "warning" if small else "ok", f"{available} bytes available", remedy if small else "")
    # memfd does not live in /dev/shm, but torch's data loaders and NCCL of the engine beside it do.
    if not os.path.isdir("/dev/shm"):
        yield Finding("/dev/shm", "warning", "not mounted", "mount a tmpfs there: engines' worker processes use it")
        return
    shm = os.statvfs("/dev/shm")
    size = shm.f_blocks * shm.f_frsize
    remedy = "engines' worker processes want 1 GiB and more: --shm-size, or an emptyDir of medium Memory"
    small = size < 1 << 30
    yield Finding("/dev/shm", "warning" if small else "ok", f"{size} bytes", remedy if small else "")


def _memlock() -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft in (resource.RLIM_INFINITY, -1):
        yield Finding("memlock", "ok", "unlimited")
    else:
        yield Finding(
            "memlock", "warning", f"limit is {soft} bytes",
            "ulimit -l unlimited, or CAP_IPC_LOCK: pinned buffers, fast moves between cpu and GPUs, and RDMA need it",
        )  # fmt: skip


def _huge_pages() -> Iterator[Finding]:
    path = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    chosen = path.read_text().split("[")[1].split("]")[0] if path.exists() else "not supported"
    if chosen in ("advise", "always", "within_size", "force"):
        yield Finding("huge pages", "ok", f"shared memory: {chosen}")
    else:
        yield Finding("huge pages", "warning", f"shared memory: {chosen}",
                      f"echo advise > {path}, as root: host segments then fill up to twice as fast")  # fmt: skip


def _files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = soft < 4096
    yield Finding("open files", "warning" if low else "ok", f"limit is {soft} (hard {hard})",
                  "ulimit -n 65536: every lease, shard and connection takes one" if low else "")  # fmt: skip


def _streamer() -> Iterator[Finding]:
    try:
        libstreamer.Streamer().close()
        yield Finding("streamer library", "ok", "libstreamer loads and starts")
    except (libstreamer.StreamerUnavailable, OSError) as error:
        yield Finding("streamer library", "error", str(error), "pip install 'weightd[daemon]'; object stores need it")


def _credentials() -> Iterator[Finding]:
    home = Path.home()

    def found(variables: tuple[str, ...], files: tuple[Path, ...]) -> list[str]:
        return [name for name in variables if os.environ.get(name)] + [str(path) for path in files if path.exists()]

    schemes = {
        "gs://": (
            ("GOOGLE_APPLICATION_CREDENTIALS", "CLOUD_STORAGE_EMULATOR_ENDPOINT"),
            (home / ".config" / "gcloud" / "application_default_credentials.json",),
            "set GOOGLE_APPLICATION_CREDENTIALS, or use workload identity",
        ),
        "az://": (
            (
                "AZURE_STORAGE_ACCOUNT_KEY",
                "AZURE_CLIENT_SECRET",
                "AZURE_FEDERATED_TOKEN_FILE",
                "AZURE_STORAGE_SAS_TOKEN",
            ),
            (home / ".azure",),
            "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or use workload identity",
        ),
        "hf://": (
            ("HF_TOKEN",),
            (Path(os.environ.get("HF_HOME", home / ".cache" / "huggingface")) / "token",),
            "set HF_TOKEN for private and gated repositories; public ones need none",
        ),
    }
    for scheme, (variables, files, remedy) in schemes.items():
        sources = found(variables, files)
        if sources:
            yield Finding(f"credentials {scheme}", "ok", ", ".join(sources))
        else:
            yield Finding(
                f"credentials {scheme}", "warning", "none in sight; an instance's own role may still do", remedy
            )


def _cache() -> Iterator[Finding]:
    folder = Settings().cache_dir
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if os.access(existing, os.W_OK):
        yield Finding("cache", "ok", str(folder))
    else:
        yield Finding("cache", "warning", f"{folder} cannot be written",
                      "set WEIGHTD_CACHE_DIR: without it, configuration files are not kept for engines")  # fmt: skip
