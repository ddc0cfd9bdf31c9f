"""The control groups that this process's memory counts in: what their limits leave, and whom the kernel killed.

Versions 1 and 2, own namespace or the host's. Standard library only: the keeper reads it too.
"""

from __future__ import annotations

import os

PROC = "/proc/self"
"""Where the process's own ``cgroup`` and ``mountinfo`` are."""

_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")
"""Bytes that a group may take: of version 2 the hard limit and the one from which it is throttled, of version 1."""
_USED = ("memory.current", "memory.usage_in_bytes")
_KILLS = ("memory.events", "memory.oom_control")
_CACHE = ("inactive_file ", "total_inactive_file ")


def memory_left() -> int | None:
    """Bytes that the limits of its groups and of all their parents that can be seen leave; None without any limit.

    What the kernel would drop to make room, files' pages that nobody has used lately, counts as left.
    """
    left = []
    for mount, folder in _memory_groups():
        while True:
            limits = [limit for name in _LIMITS if (limit := _number(f"{folder}/{name}")) is not None]
            used = next((used for name in _USED if (used := _number(f"{folder}/{name}")) is not None), None)
            if limits and used is not None:
                left.append(max(0, min(limits) - max(0, used - _dropped(folder))))
            if folder == mount:
                break
            folder = os.path.dirname(folder)
    return min(left, default=None)


def oom_kills() -> int | None:
    """Processes of its group that the kernel has killed for lack of memory, so far; None where it does not say."""
    for _, folder in _memory_groups():
        for name in _KILLS:
            for line in _lines(f"{folder}/{name}"):
                key, _, count = line.partition(" ")
                if key == "oom_kill" and count.isdigit():
                    return int(count)
    return None


def _memory_groups() -> list[tuple[str, str]]:
    """(mount point, folder of this process's group below it) of each hierarchy that may account for memory."""
    paths = {}
    for line in _lines(f"{PROC}/cgroup"):
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    found = []
    for line in _lines(f"{PROC}/mountinfo"):
        before, _, after = line.partition(" - ")
        kind, _, options = [*after.split(), "", "", ""][:3]
        if kind not in paths or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        root, mount = (field.replace("\\040", " ") for field in before.split()[3:5])
        # A bind mount shows a part of the hierarchy; in the host's namespace the path is of all of it.
        path = paths[kind]
        inner = path[len(root) :] if root != "/" and f"{path}/".startswith(f"{root}/") else path
        folder = f"{mount}{inner}".rstrip("/")
        while not os.path.isdir(folder) and folder != mount:
            folder = os.path.dirname(folder)
        found.append((mount, folder))
    return found


def _dropped(folder: str) -> int:
    """Bytes of files' pages that go first where room is needed. Of version 1 those of groups below count as well."""
    found = 0
    for line in _lines(f"{folder}/memory.stat"):
        if line.startswith(_CACHE):
            found = max(found, int(line.split()[1]))
    return found


def _number(path: str) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().splitlines()
    except OSError:
        return []
