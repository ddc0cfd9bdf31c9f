"""A GPU's memory as this process holds it: by address, as long as anybody wants it, and not for writing."""

from __future__ import annotations

import contextlib
import gc
from types import SimpleNamespace
from typing import Any, cast

import pytest

from weightd.ipc import mapping
from weightd.ipc.manifest import Entry
from weightd.ipc.mapping import CudaMapping, DeviceBytes, DeviceMemory

ENTRY = Entry("w", "U8", (7,), 256, 7)


class Driver:
    """What was asked of the driver; ``fails`` names what it refuses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.fails = ""
        self.closed: list[str] = []
        self.gpu = cast(Any, SimpleNamespace(ordinal=3, context=contextlib.nullcontext))
        monkeypatch.setattr(mapping, "call", self.call)
        monkeypatch.setattr(mapping, "DeviceRange", SimpleNamespace(imported=self.imported))

    def call(self, name: str, *arguments: Any) -> int:
        self.asked.append((name, *arguments))
        if name == self.fails:
            raise RuntimeError(name)
        return 5000

    def imported(self, gpu: Any, fd: int, allocation: int, *, writable: bool) -> Any:
        self.asked.append(("imported", fd, allocation, writable))
        return SimpleNamespace(address=1000, close=lambda: self.closed.append("shared"))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


def test_bytes_on_a_gpu_are_told_by_their_address_and_keep_their_memory() -> None:
    freed: list[int] = []
    memory = DeviceMemory(1000, freed.append, 7)
    some, none = DeviceBytes(memory, 24, 9), DeviceBytes(memory, 24, 0)
    assert some.__cuda_array_interface__ == {
        "shape": (9,), "typestr": "|u1", "data": (1024, False), "strides": None, "stream": None, "version": 3,
    }  # fmt: skip
    assert none.__cuda_array_interface__["data"] == (0, False)
    assert (some.address, some.nbytes) == (1024, 9)
    del memory, none
    gc.collect()
    assert freed == []
    del some
    gc.collect()
    assert freed == [7]


def test_a_segment_is_mapped_for_reading_only_and_let_go_of_with_its_last_bytes(driver: Driver) -> None:
    found = CudaMapping(driver.gpu, 9, 1000, 4096)
    assert driver.asked == [("imported", 9, 4096, False)]
    assert (found.device, found.nbytes) == ("cuda:3", 1000)
    kept = found.bytes(ENTRY)
    assert (kept.address, kept.nbytes) == (1256, 7)
    del found
    gc.collect()
    assert driver.closed == []
    del kept
    gc.collect()
    assert driver.closed == ["shared"]


@pytest.mark.parametrize(("nbytes", "copied"), [(1000, True), (0, False)])
def test_a_copy_of_ones_own_is_made_and_what_it_is_of_let_go(nbytes: int, copied: bool, driver: Driver) -> None:
    found = CudaMapping(driver.gpu, 9, nbytes, 4096, private=True)
    copy = [("cuMemcpyDtoD", 5000, 1000, 1000), ("cuCtxSynchronize",)] if copied else []
    assert driver.asked == [("imported", 9, 4096, False), ("cuMemAlloc", max(nbytes, 1)), *copy]
    assert (driver.closed, found.bytes(ENTRY).address) == (["shared"], 5256)
    del found
    gc.collect()
    assert driver.asked[-1] == ("cuMemFree", 5000)


@pytest.mark.parametrize("fails", ["cuMemAlloc", "cuMemcpyDtoD", "cuCtxSynchronize"])
def test_a_copy_that_fails_leaves_nothing_behind(fails: str, driver: Driver) -> None:
    driver.fails = fails
    with pytest.raises(RuntimeError, match=fails):
        CudaMapping(driver.gpu, 9, 1000, 4096, private=True)
    assert driver.closed == ["shared"]
    assert (("cuMemFree", 5000) in driver.asked) is (fails != "cuMemAlloc")
