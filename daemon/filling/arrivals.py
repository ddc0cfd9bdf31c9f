"""Bytes on their way into device memory: copies that are waited for in their order, and digests of what has come.

Two threads, so that neither readers nor copies wait for digests: while one lot is being hashed, the next one gathers,
so that a GPU is given as many leaves at once as have come meanwhile.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from weightd.daemon.layouts.extents import Extent

if TYPE_CHECKING:
    from weightd.daemon.devices.base import Copier, Mark, Segment
    from weightd.daemon.layouts.recipe import Block


class Arrivals:
    """What is on its way into ``segments``, all of them in device memory.

    ``digest`` is given the extents whose bytes are all there, in the second thread; ``failed`` is told of what either
    thread raises. Waiting for copies is ``phase("copying")``.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        digest: Callable[[Sequence[Extent]], None],
        failed: Callable[[BaseException], None],
        phase: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._segments = segments
        self._digest = digest
        self._failed = failed
        self._phase = phase
        self._copiers: dict[str, Copier] = {}
        for segment in segments:
            if segment.device.name not in self._copiers:
                copier = segment.device.copier()
                assert copier is not None, "host memory needs no copier"
                self._copiers[segment.device.name] = copier
        self._copying: deque[tuple[Extent | None, Sequence[Mark], Callable[[], None]]] = deque()
        self._there: deque[Extent] = deque()
        self._unfinished = 0
        self._broken = False
        self._closing = False
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def put(self, segment: int, block: Block, source: int) -> None:
        """Copy one block from host memory at ``source``; the block counts from there, and from the segment's start."""
        target = self._segments[segment]
        self._copiers[target.device.name].put(target.address, block, source)

    def check(self, segment: int, block: Block, source: int) -> bool:
        """Whether what was put is what lies there."""
        target = self._segments[segment]
        return self._copiers[target.device.name].holds(target.address, block, source)

    def marks(self, segments: set[int]) -> list[Mark]:
        """After what was put into these so far."""
        names = {self._segments[segment].device.name for segment in segments}
        return [self._copiers[name].mark() for name in sorted(names)]

    def add(self, extent: Extent | None, marks: Sequence[Mark] = (), done: Callable[[], None] = lambda: None) -> None:
        """The extent's bytes are there when ``marks`` are; then its source is free, which ``done`` is to know.

        None: bytes of extents that are added later.
        """
        with self._changed:
            if not self._threads:
                for work in (self._wait_for_copies, self._digest_what_came):
                    self._threads.append(threading.Thread(target=work, name=work.__name__.strip("_"), daemon=True))
                    self._threads[-1].start()
            self._unfinished += 1
            self._copying.append((extent, marks, done))
            self._changed.notify_all()

    def leaves(self, ranges: Sequence[tuple[int, int, int]]) -> list[int]:
        """Leaf digests of (segment, offset, bytes)."""
        found = [0] * len(ranges)
        by_device: Mapping[str, list[int]] = {name: [] for name in self._copiers}
        for index, (segment, _, _) in enumerate(ranges):
            by_device[self._segments[segment].device.name].append(index)
        for name, indices in by_device.items():
            if indices:
                places = [(self._segments[ranges[i][0]].address + ranges[i][1], ranges[i][2]) for i in indices]
                for i, leaf in zip(indices, self._copiers[name].leaves(places), strict=True):
                    found[i] = leaf
        return found

    def finish(self) -> None:
        """Wait until everything that was added is there and digested, or something has failed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._unfinished or self._broken)

    def close(self) -> None:
        """Wait for copies, which read from bounce buffers; let go of the rest."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        with contextlib.ExitStack() as stack:  # all of them, whatever becomes of one
            for copier in self._copiers.values():
                stack.callback(copier.close)
        self._copiers = {}

    # ------------------------------------------------------------------ the two threads

    def _wait_for_copies(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._copying or self._closing)
                if not self._copying:
                    return
                extent, marks, done = self._copying.popleft()
            try:
                if marks:
                    with self._phase("copying"):
                        for mark in marks:
                            mark.wait()
                done()
            except BaseException as error:
                self._break(error)
                continue
            with self._changed:
                if extent is None:
                    self._unfinished -= 1
                else:
                    self._there.append(extent)
                self._changed.notify_all()

    def _digest_what_came(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._there or self._closing)
                if self._broken or self._closing:
                    return
                extents = list(self._there)
                self._there.clear()
            try:
                self._digest(extents)
            except BaseException as error:
                self._break(error)
                return
            with self._changed:
                self._unfinished -= len(extents)
                self._changed.notify_all()

    def _break(self, error: BaseException) -> None:
        self._failed(error)  # before anybody who waits can go on
        with self._changed:
            self._broken = True
            self._changed.notify_all()
