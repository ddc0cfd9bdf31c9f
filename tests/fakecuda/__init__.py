"""A fake CUDA driver for machines without a GPU: built by gcc, steered and read by the tests through shared files.

Programs under test load it as ``libcuda.so.1`` by ``FakeCuda.env``. Its device memory is memfds, so what is still held
anywhere shows in /proc; what it holds per process it counts in a file that outlives the process.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.servers import Missing

SOURCES = Path(__file__).parent
COUNTERS = (
    "contexts", "handles", "exports", "reservations", "mappings", "allocations", "ipc_opened", "pinned", "streams",
    "events",
)  # fmt: skip
"""What is counted per process, in the order of struct counters in fake.h. ``exports`` only ever grows."""

_DEVICES = 16
_CONTROLS = (
    "fail_allocation", "sticky_at", "delay_us", "no_posix_fd", "no_fabric", "no_rdma", "no_vmm", "flip_at",
    "fail_register", "corrupt_streamer", "sticky_import", "silent",
)  # fmt: skip


class Control(ctypes.Structure):
    """What a test asks of the fake, in effect at once in every process. As struct control in fake.h.

    Countdowns are 0 when off; at n, the n-th such call from now on is the one.
    """

    fail_allocation: int
    """Countdown over cuMemCreate and cuMemAlloc: that one is out of memory."""
    sticky_at: int
    """Countdown over copies: that one fails as a launch would (719), and its process can do nothing more."""
    delay_us: int
    """Each operation on a stream begins up to this much late."""
    no_posix_fd: int
    no_fabric: int
    no_rdma: int
    no_vmm: int
    flip_at: int
    """Countdown over asynchronous copies to a device: one bit of that one lands wrong."""
    fail_register: int
    """Nonzero: cuMemHostRegister is not permitted."""
    corrupt_streamer: int
    """Nonzero: the first byte of each copy to a device lands inverted where its source is from cuMemHostAlloc."""
    sticky_import: int
    """1 + a physical device: importing memory there is an uncorrectable ECC error (214); negative: it aborts."""
    silent: int
    """1 + a physical device that says nothing of itself: an unknown error (999)."""
    others_use: ctypes.Array[ctypes.c_int64]
    """Bytes per physical device that someone else holds."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _CONTROLS),
        ("others_use", ctypes.c_int64 * _DEVICES),
    ]


def build(folder: Path) -> Path:
    """Compile the fake to ``folder``/libcuda.so.1. Raises Missing without gcc, RuntimeError with what gcc said."""
    gcc = shutil.which("gcc")
    if not gcc:
        raise Missing("the fake CUDA driver: apt-get install gcc")
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libcuda.so.1"
    command = [gcc, "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o", str(library)]
    sources = sorted(str(path) for path in SOURCES.glob("*.c"))
    done = subprocess.run([*command, *sources, "-lpthread"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the fake CUDA driver does not compile:\n{done.stdout}{done.stderr}")
    return library


class FakeCuda:
    """Fake GPUs of one test: every process started with ``env`` shares their memory."""

    def __init__(
        self, library_folder: Path, folder: Path, devices: int = 1, memory: int = 1 << 30, strict: bool = True
    ) -> None:
        """``library_folder`` is what ``build`` filled; ``folder`` is this test's own.

        ``strict``: touching a device address from the host ends the program, as with a real GPU; otherwise the host
        can read there, and write where the mapping is writable.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.devices = devices
        self.env = {
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(library_folder), os.environ.get("LD_LIBRARY_PATH")])),
            "FAKECUDA_DIR": str(folder),
            "FAKECUDA_DEVICES": str(devices),
            "FAKECUDA_MEMORY": str(memory),
            "FAKECUDA_STRICT": str(int(strict)),
        }
        path = folder / "control"
        with path.open("w+b") as file:
            file.write(bytes(ctypes.sizeof(Control)))
            file.flush()
            self.control = Control.from_buffer(mmap.mmap(file.fileno(), ctypes.sizeof(Control)))
        self.control.delay_us = 2000
        self.control.no_fabric = 1

    def set(self, **values: int) -> None:
        """Set fields of ``control`` by name."""
        for name, value in values.items():
            self.get(name)
            setattr(self.control, name, value)

    def get(self, name: str) -> Any:
        """One field of ``control``; raises AttributeError for one that there is not."""
        return getattr(self.control, name)

    def counters(self) -> dict[int, dict[str, int]]:
        """What each process holds, or held when it ended: process id to counts."""
        found: dict[int, dict[str, int]] = {}
        for path in self.folder.glob("counters.*"):
            raw = path.read_bytes()
            if len(raw) == 8 * len(COUNTERS):  # one that just starts has not sized it yet
                counts = (ctypes.c_int64 * len(COUNTERS)).from_buffer_copy(raw)
                found[int(path.suffix[1:])] = dict(zip(COUNTERS, counts, strict=True))
        return found

    def leaks(self, pids: Iterable[int] | None = None) -> dict[int, dict[str, int]]:
        """What the processes (all by default) hold beside contexts; empty when there is nothing."""
        wanted = None if pids is None else set(pids)
        found: dict[int, dict[str, int]] = {}
        for pid, counts in self.counters().items():
            held = {name: count for name, count in counts.items() if count and name not in ("contexts", "exports")}
            if held and (wanted is None or pid in wanted):
                found[pid] = held
        return found

    def uuid(self, physical_ordinal: int) -> str:
        """The device's UUID, in the words of nvidia-smi and CUDA_VISIBLE_DEVICES."""
        return f"GPU-{0xA0 + physical_ordinal:02x}facede-fa4e-4cda-8000-0000000000{physical_ordinal:02x}"

    def used(self, physical_ordinal: int) -> int:
        """Bytes of the device's memory that any process holds, by /proc."""
        status = self.folder.stat()
        target = f"/memfd:fakecuda:{physical_ordinal}:{status.st_dev:x}.{status.st_ino:x} (deleted)"
        sizes: dict[int, int] = {}
        for path in Path("/proc").glob("[0-9]*/fd/*"):
            try:
                if os.readlink(path) == target:
                    found = path.stat()
                    sizes[found.st_ino] = found.st_size
            except OSError:  # it was closed, or its process ended, meanwhile
                continue
        return sum(sizes.values())
