"""This process, as the kernel sees it."""

from __future__ import annotations

import os
import time
from pathlib import Path


def seconds_since_start() -> float:
    """Seconds since this process was started, its interpreter's own start included; in steps of 10 ms."""
    # proc(5): the 22nd field; the 2nd is the command in parentheses, which may hold anything.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
