"""The limits of this machine: parallel ``preadv`` and nothing else. Contenders; run in processes of their own."""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tests.bench.measure import (
    MADV_POPULATE_WRITE,
    Sample,
    cores,
    faulted_memfd,
    in_threads,
    timed,
    warm_cache,
    warm_memory,
)


class Configuration(NamedTuple):
    """How to read. ``fault`` says who brings the pages: the read itself, or what is called on a chunk before it."""

    threads: int
    chunk: int
    fault: str

    def __str__(self) -> str:
        return f"{self.threads} threads, {self.chunk >> 20} MiB, {self.fault}"


FAULTS = ("by the read", "MADV_POPULATE_WRITE ahead", "fallocate ahead", "fallocate all first")


def configurations(faults: Sequence[str] = FAULTS) -> list[Configuration]:
    """Everything that is tried."""
    threads = sorted({cores(), min(64, 2 * cores()), min(64, 4 * cores())})
    chunks = (1 << 20, 8 << 20, 32 << 20)
    return [Configuration(*choice) for choice in itertools.product(threads, chunks, faults)]


def _reads(files: Sequence[str], chunk: int) -> Iterator[tuple[str, int, int, int]]:
    """(file, offset in it, offset in memory, length) of every read."""
    base = 0
    for name in files:
        size = os.path.getsize(name)
        for offset in range(0, size, chunk):
            yield name, offset, base + offset, min(chunk, size - offset)
        base += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _footprint(files: Sequence[str]) -> int:
    return sum(-(-os.path.getsize(name) // mmap.PAGESIZE) * mmap.PAGESIZE for name in files)


def _read_all(files: Sequence[str], how: Configuration, block: mmap.mmap, memfd: int) -> None:
    fds = {name: os.open(name, os.O_RDONLY | os.O_CLOEXEC) for name in files}
    view = memoryview(block)
    if how.fault == "fallocate all first":
        os.posix_fallocate(memfd, 0, len(block))

    def read(item: tuple[str, int, int, int]) -> None:
        name, offset, target, length = item
        if how.fault == "MADV_POPULATE_WRITE ahead":
            block.madvise(MADV_POPULATE_WRITE, target, -(-length // mmap.PAGESIZE) * mmap.PAGESIZE)
        elif how.fault == "fallocate ahead":
            os.posix_fallocate(memfd, target, length)
        done = 0
        while done < length:
            count = os.preadv(fds[name], [view[target + done : target + length]], offset + done)
            if not count:
                raise OSError(f"{name} ends at byte {offset + done}")
            done += count

    try:
        in_threads(how.threads, list(_reads(files, how.chunk)), read)
    finally:
        view.release()
        for fd in fds.values():
            os.close(fd)


def into_fresh_memfd(files: list[str], tries: list[list[Any]]) -> Sample:
    """Read all files into a new memfd, once with each configuration. The sample has ``runs``, one for each."""
    runs = []
    nbytes = sum(os.path.getsize(name) for name in files)
    footprint = _footprint(files)
    for choice in tries:
        how = Configuration(*choice)
        warm_cache(files)
        warm_memory(footprint)
        with timed() as sample:
            memfd = os.memfd_create("raw", os.MFD_CLOEXEC)
            os.ftruncate(memfd, footprint)
            block = mmap.mmap(memfd, footprint, mmap.MAP_SHARED)
            block.madvise(mmap.MADV_HUGEPAGE)
            _read_all(files, how, block, memfd)
        block.close()
        os.close(memfd)
        runs.append({**sample, "nbytes": nbytes, "configuration": choice, "named": str(how)})
    return {"runs": runs}


def into_faulted_memory(files: list[str], tries: list[list[Any]]) -> Sample:
    """Read all files into a memfd mapping whose pages are all there, once with each configuration."""
    runs = []
    nbytes = sum(os.path.getsize(name) for name in files)
    _, block = faulted_memfd(_footprint(files))
    for choice in tries:
        how = Configuration(*choice)
        warm_cache(files)
        with timed() as sample:
            _read_all(files, how, block, -1)
        runs.append({**sample, "nbytes": nbytes, "configuration": choice, "named": str(how)})
    return {"runs": runs}
