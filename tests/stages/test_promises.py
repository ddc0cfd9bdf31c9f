"""Promises of memory: no byte of a device is promised twice, whoever else uses it."""

from __future__ import annotations

import asyncio
import mmap

import pytest

from weightd.daemon.devices.cpu import CpuDevice
from weightd.daemon.errors import InsufficientCapacity
from weightd.daemon.keeper.deposits import Deposits
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.stages.request import StageRequest
from weightd.daemon.stages.residency import Residency
from weightd.daemon.stages.stage import Stage

PAGE = mmap.PAGESIZE


class Shared(CpuDevice):
    """Memory of ``total`` bytes that other processes use as well, as a GPU's is."""

    def __init__(self, name: str, total: int) -> None:
        super().__init__(name, 1 << 40)
        self.left = total

    def available(self) -> int:
        return self.left


def test_what_is_promised_and_not_yet_taken_is_promised_to_nobody_else() -> None:
    async def promises() -> None:
        device = Shared("cpu", 10 * PAGE)
        residency = Residency({"cpu": device}, Deposits(), Metrics(), lease_grace=1, max_leases_per_user=1)

        def promise(pages: int) -> Stage:
            residency.make_room("/x", {"cpu": pages * PAGE})
            stage = Stage("file:///x", ["cpu"], StageRequest(model="/x"), None)
            stage.reserved = {"cpu": pages * PAGE}
            residency.keep(stage)
            return stage

        assert residency.room("cpu") == 10 * PAGE
        first = promise(6)
        assert residency.room("cpu") == 4 * PAGE, "nothing of it is taken, but it is promised"
        with pytest.raises(InsufficientCapacity) as refused:
            promise(5)
        assert refused.value.details["missing_bytes"] == PAGE
        second = promise(4)
        for stage, pages in ((first, 6), (second, 4)):  # they take it, one after the other
            stage.segments.append(device.allocate(pages * PAGE, stage.id))
            device.left -= pages * PAGE
            assert residency.room("cpu") == 0
        device.left += PAGE  # another process lets go
        assert residency.room("cpu") == PAGE
        for stage, left in ((first, 7), (second, 11)):
            residency.release(stage)
            device.left = left * PAGE
            assert residency.room("cpu") == left * PAGE

    asyncio.run(promises())
