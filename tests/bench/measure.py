"""Samples, rows and targets; and what every contender does around the part that is timed."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

Sample = dict[str, Any]
"""What one repetition of one contender found: ``seconds``, ``nbytes`` where bytes moved, and details."""

MADV_POPULATE_WRITE = 23
"""linux/mman.h, since 5.14; not in Python's mmap module."""


@dataclass(frozen=True)
class Target:
    """What a row was to reach, and what it did: ``found`` against ``wanted``, at least or at most."""

    against: str
    """The row that it is a ratio to, or empty where the target is a number by itself."""
    wanted: float
    found: float
    sense: Literal["at least", "under"]
    unit: str = "×"

    @property
    def met(self) -> bool:
        return self.found >= self.wanted if self.sense == "at least" else self.found < self.wanted

    @property
    def short_by(self) -> float:
        """Share by which the target is missed; 0 where it is met."""
        if self.met:
            return 0.0
        return 1 - self.found / self.wanted if self.sense == "at least" else self.found / self.wanted - 1


@dataclass
class Row:
    """One line of a table: the repetitions of one contender in ``unit``, and its targets."""

    contender: str
    unit: str
    values: list[float]
    note: str = ""
    targets: list[Target] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.values)

    def at_least(self, share: float, of: Row) -> None:
        """Add the target of reaching ``share`` times another row's median."""
        self.targets.append(Target(of.contender, share, self.median / of.median, "at least"))

    def under(self, bound: float, of: Row | None = None) -> None:
        """Add the target of a median below ``bound``, in the row's own unit, or in medians of another row."""
        if of is None:
            self.targets.append(Target("", bound, self.median, "under", self.unit))
        else:
            self.targets.append(Target(of.contender, bound, self.median / of.median, "under"))


@dataclass
class Section:
    """One table. ``samples`` keeps everything that was measured, calibration included, for the JSON."""

    name: str
    title: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    samples: dict[str, Any] = field(default_factory=dict)


def gigabytes_per_second(samples: Iterable[Sample]) -> list[float]:
    """10⁹ bytes a second, of each sample."""
    return [sample["nbytes"] / sample["seconds"] / 1e9 for sample in samples]


def milliseconds(samples: Iterable[Sample], key: str = "seconds") -> list[float]:
    """One of the samples' times, in milliseconds."""
    return [sample[key] * 1e3 for sample in samples]


def interleave(
    contenders: Mapping[str, Callable[[], Sample]], repetitions: int, progress: Callable[[str], None]
) -> dict[str, list[Sample]]:
    """Run everybody once, then everybody again, and so on: what disturbs the machine disturbs all alike."""
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    for repetition in range(1, repetitions + 1):
        for name, run in contenders.items():
            progress(f"{name}: repetition {repetition} of {repetitions}")
            samples[name].append(run())
    return samples


@contextmanager
def timed() -> Iterator[Sample]:
    """Time a block: fills the sample that it yields with ``seconds``, own CPU seconds and the machine's steal share."""
    sample: Sample = {}
    steal, total = _machine_jiffies()
    cpu = os.times()
    start = time.perf_counter()
    yield sample
    sample["seconds"] = time.perf_counter() - start
    spent = os.times()
    sample["cpu_user"] = round(spent.user - cpu.user, 3)
    sample["cpu_system"] = round(spent.system - cpu.system, 3)
    steal_after, total_after = _machine_jiffies()
    sample["steal_share"] = round((steal_after - steal) / max(1, total_after - total), 4)


def _machine_jiffies() -> tuple[int, int]:
    with open("/proc/stat") as file:
        fields = [int(number) for number in file.readline().split()[1:9]]  # later ones are part of user time already
    return fields[7], sum(fields)


def in_threads(count: int, work: Sequence[Any], do: Callable[[Any], object]) -> None:
    """Call ``do`` on each item, from ``count`` threads. Raises the first error."""
    items = iter(work)
    lock = threading.Lock()
    errors: list[BaseException] = []

    def run() -> None:
        while not errors:
            with lock:
                item = next(items, None)
            if item is None:
                return
            try:
                do(item)
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def warm_memory(nbytes: int) -> None:
    """Allocate, touch and free so much memory, so that what is allocated next has host memory behind it already."""
    size = _whole_pages(nbytes + nbytes // 8 + (64 << 20))
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        populate(block)


def populate(block: mmap.mmap) -> None:
    """Fault in every page of a writable mapping, from as many threads as there are cores."""
    size = len(block)
    step = 64 << 20

    def fault(offset: int) -> None:
        length = min(step, size - offset)
        try:
            block.madvise(MADV_POPULATE_WRITE, offset, length)
        except OSError:  # a kernel before 5.14
            zeros = bytes(1)
            for page in range(offset, offset + length, mmap.PAGESIZE):
                block[page : page + 1] = zeros

    in_threads(cores(), range(0, size, step), fault)


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def faulted_memfd(nbytes: int) -> tuple[int, mmap.mmap]:
    """A memfd and its shared mapping, as a segment is one, with all its pages there."""
    fd = os.memfd_create("bench", os.MFD_CLOEXEC)
    size = max(mmap.PAGESIZE, _whole_pages(nbytes))
    os.ftruncate(fd, size)
    block = mmap.mmap(fd, size, mmap.MAP_SHARED)
    block.madvise(mmap.MADV_HUGEPAGE)
    populate(block)
    return fd, block


def fresh_memfd(nbytes: int) -> mmap.mmap:
    """The shared mapping of a new memfd, none of whose pages is there yet."""
    fd = os.memfd_create("bench", os.MFD_CLOEXEC)
    size = max(mmap.PAGESIZE, _whole_pages(nbytes))
    os.ftruncate(fd, size)
    block = mmap.mmap(fd, size, mmap.MAP_SHARED)
    os.close(fd)
    block.madvise(mmap.MADV_HUGEPAGE)
    return block


def warm_cache(files: Sequence[str]) -> None:
    """Read files until the page cache holds them: proactive reclaim may have taken some since they were last read."""
    local = threading.local()

    def read(item: tuple[str, int]) -> None:
        name, offset = item
        if not hasattr(local, "buffer"):
            local.buffer = bytearray(1 << 20)
        fd = os.open(name, os.O_RDONLY)
        try:
            os.preadv(fd, [local.buffer], offset)
        finally:
            os.close(fd)

    step = 1 << 20
    in_threads(cores(), [(name, at) for name in files for at in range(0, os.path.getsize(name), step)], read)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def address(block: mmap.mmap) -> int:
    """Where a writable mapping lies."""
    return ctypes.addressof(ctypes.c_char.from_buffer(block))
