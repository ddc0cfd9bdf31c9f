"""Freed segments that somebody may still map: host memory that is neither ours to give nor free."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable

from weightd.daemon.devices.base import Segment


class LeftBehind:
    """Segments that were lent and have been closed, as long as any process maps them. On the event loop."""

    def __init__(self) -> None:
        self._footprints: dict[int, int] = {}
        """Bytes by the inode of their memfd."""

    def note(self, segment: Segment) -> None:
        """A segment that was lent is about to be closed."""
        # Who maps a GPU's memory, the system does not say.
        if segment.device.uuid is None:
            self._footprints[os.fstat(segment.fd).st_ino] = segment.footprint

    async def mapped_bytes(self) -> int:
        """Bytes that other processes still map, as far as that can be seen from here."""
        suspects = list(self._footprints)
        seen = await asyncio.to_thread(mapping_processes, suspects)
        for inode in suspects:
            if inode not in seen:
                self._footprints.pop(inode, None)
        return sum(self._footprints.values())


def mapping_processes(inodes: Iterable[int]) -> dict[int, set[int]]:
    """Of memfds by inode, the processes that still map them, as far as this process may look into others.

    Reads ``/proc/*/maps``: what is in another pid namespace, or another user's, is not seen.
    """
    wanted = {str(inode): inode for inode in inodes}
    found: dict[int, set[int]] = {}
    for name in os.listdir("/proc") if wanted else ():
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/maps") as file:
                for line in file:
                    if "/memfd:weightd:" in line and (inode := wanted.get(line.split(None, 5)[4])) is not None:
                        found.setdefault(inode, set()).add(int(name))
        except OSError:
            continue
    return found
