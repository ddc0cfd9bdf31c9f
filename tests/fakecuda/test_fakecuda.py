"""The fake CUDA driver does what the tests on it rely on."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from tests.fakecuda import FakeCuda
from tests.fakecuda.scripts import finish, kill, said, start

MiB = 1 << 20


@pytest.fixture
def fake(fake_library: Path, tmp_path: Path) -> FakeCuda:
    return FakeCuda(fake_library, tmp_path / "fakecuda")


def test_exported_memory_shows_the_same_bytes_in_another_process_and_outlives_the_exporter(fake: FakeCuda) -> None:
    ends = socket.socketpair()
    exporter = start(
        fake,
        """
handle = ok(driver.cuMemCreate(SIZE, properties(), 0))
address = place(handle, SIZE, READ_WRITE)
ok(to_device(address, bytes(range(256)) * (SIZE // 256)))
descriptor = ok(driver.cuMemExportToShareableHandle(handle, FD, 0))
channel = socket.socket(fileno=0)
socket.send_fds(channel, [b"x"], [descriptor])
os.close(descriptor)
ok(driver.cuMemRelease(handle))
time.sleep(60)
""",
        ends[0],
    )
    importer = start(
        fake,
        """
channel = socket.socket(fileno=0)
_, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
handle = ok(driver.cuMemImportFromShareableHandle(descriptors[0], FD))
os.close(descriptors[0])
address = place(handle, SIZE, ONLY_READ)
ok(driver.cuMemRelease(handle))
print("mapped", flush=True)
channel.recv(1)  # ends with the exporter
assert from_device(address, SIZE) == bytes(range(256)) * (SIZE // 256)
print(ok(driver.cuMemGetInfo()))
lift(address, SIZE)
print(ok(driver.cuMemGetInfo()))
""",
        ends[1],
    )
    assert said(importer) == "mapped"
    assert fake.used(0) == 4 * MiB
    kill(exporter)
    assert finish(importer) == [str((1020 * MiB, 1024 * MiB)), str((1024 * MiB, 1024 * MiB))]
    assert fake.used(0) == 0
    assert fake.leaks() == {exporter.pid: {"reservations": 1, "mappings": 1}}
    assert fake.counters()[exporter.pid]["exports"] == 1


@pytest.mark.parametrize(
    "touch", ["ctypes.c_char.from_address(address).value", "ctypes.c_char.from_address(address).value = b'x'"]
)
def test_a_host_that_touches_device_memory_dies_of_it(fake: FakeCuda, touch: str) -> None:
    process = start(fake, "address = int(ok(driver.cuMemAlloc(SIZE)))\nprint(1)\n" + touch)
    assert process.communicate(timeout=60)[0] == "1\n"
    assert process.returncode == -signal.SIGSEGV


def test_read_only_memory_can_be_read_by_the_host_where_asked_for_and_a_write_kills(
    fake_library: Path, tmp_path: Path
) -> None:
    fake = FakeCuda(fake_library, tmp_path / "fakecuda", strict=False)
    process = start(
        fake,
        """
handle = ok(driver.cuMemCreate(SIZE, properties(), 0))
address = place(handle, SIZE, READ_WRITE)
ctypes.c_char.from_address(address).value = b"x"
ok(rights(address, SIZE, ONLY_READ))
print(ctypes.c_char.from_address(address).value, flush=True)
ctypes.c_char.from_address(address).value = b"y"
""",
    )
    assert process.communicate(timeout=60)[0] == "b'x'\n"
    assert process.returncode == -signal.SIGSEGV


def test_a_copy_into_read_only_memory_is_an_error_that_stays(fake: FakeCuda) -> None:
    script = """
handle = ok(driver.cuMemCreate(SIZE, properties(), 0))
address = place(handle, SIZE, ONLY_READ)
print(code(to_device(address, b"x")), code(driver.cuMemGetInfo()), code(driver.cuInit(0)))
print(ok(driver.cuGetErrorName(driver.CUresult(700))))
"""
    assert finish(start(fake, script)) == ["700 700 700", "b'CUDA_ERROR_ILLEGAL_ADDRESS'"]


def test_a_copy_beyond_what_is_mapped_is_an_error_that_stays(fake: FakeCuda) -> None:
    script = """
handle = ok(driver.cuMemCreate(SIZE, properties(), 0))
address = int(ok(driver.cuMemAddressReserve(2 * SIZE, 0, 0, 0)))
ok(driver.cuMemMap(address, SIZE, 0, handle, 0))
ok(rights(address, SIZE, READ_WRITE))
ok(to_device(address + SIZE - 1, b"x"))
print(code(to_device(address + SIZE - 1, b"xy")), code(driver.cuMemUnmap(address, SIZE)))
"""
    assert finish(start(fake, script)) == ["700 700"]


def test_an_asynchronous_copy_reads_pinned_memory_when_it_runs_and_pageable_memory_at_once(fake: FakeCuda) -> None:
    fake.control.delay_us = 100_000
    script = """
address = int(ok(driver.cuMemAlloc(SIZE)))
stream = ok(driver.cuStreamCreate(1))
source = ctypes.create_string_buffer(b"A" * 4096, 4096)
late = 0
for attempt in range(8):
    ok(driver.cuMemHostRegister(ctypes.addressof(source), 4096, 0))
    ctypes.memset(source, ord("A"), 4096)
    ok(driver.cuMemcpyHtoDAsync(address, ctypes.addressof(source), 4096, stream))
    ctypes.memset(source, ord("B"), 4096)
    ok(driver.cuStreamSynchronize(stream))
    late += from_device(address, 4096) == b"B" * 4096
    ok(driver.cuMemHostUnregister(ctypes.addressof(source)))
    ctypes.memset(source, ord("C"), 4096)
    ok(driver.cuMemcpyHtoDAsync(address, ctypes.addressof(source), 4096, stream))
    ctypes.memset(source, ord("D"), 4096)
    assert from_device(address, 4096) == b"C" * 4096
print(late)
"""
    assert int(finish(start(fake, script))[0]) >= 6  # a delay may be drawn that is too short to see


def test_events_order_streams_and_know_when_they_are_done(fake: FakeCuda) -> None:
    fake.control.delay_us = 20_000
    script = """
address = int(ok(driver.cuMemAlloc(SIZE)))
first, second = ok(driver.cuStreamCreate(1)), ok(driver.cuStreamCreate(1))
event, never = ok(driver.cuEventCreate(2)), ok(driver.cuEventCreate(2))
assert code(driver.cuEventQuery(never)) == 0
ok(driver.cuEventSynchronize(never))
unready = 0
for value in range(20):
    for _ in range(3):
        ok(driver.cuMemsetD8Async(address, value, SIZE, first))
    ok(driver.cuEventRecord(event, first))
    unready += code(driver.cuEventQuery(event)) == 600
    ok(driver.cuStreamWaitEvent(second, event, 0))
    ok(driver.cuMemcpyDtoDAsync(address + SIZE // 2, address, SIZE // 2, second))
    ok(driver.cuMemsetD8Async(address, 255, SIZE // 2, second))
    ok(driver.cuStreamSynchronize(second))
    assert code(driver.cuEventQuery(event)) == 0
    assert from_device(address, SIZE) == b"\\xff" * (SIZE // 2) + bytes([value]) * (SIZE // 2)
print(unready)
"""
    assert int(finish(start(fake, script))[0]) >= 18


def test_a_full_device_refuses_and_can_be_used_again(fake: FakeCuda) -> None:
    fake.control.others_use[0] = 1016 * MiB
    fake.set(fail_allocation=3)
    script = """
first = ok(driver.cuMemCreate(SIZE, properties(), 0))
print(code(driver.cuMemCreate(SIZE + (2 << 20), properties(), 0)), code(driver.cuMemCreate(1, properties(), 0)))
print(code(driver.cuMemAlloc(1)), code(driver.cuMemAlloc(SIZE)), code(driver.cuMemAlloc(1)))
ok(driver.cuMemRelease(first))
print(code(driver.cuMemAlloc(1)))
"""
    assert finish(start(fake, script)) == ["2 1", "2 0 2", "0"]
    assert fake.get("fail_allocation") == 0


def test_a_launch_failure_stays_in_its_process_alone(fake: FakeCuda) -> None:
    fake.set(sticky_at=2)
    script = """
address = int(ok(driver.cuMemAlloc(SIZE)))
ok(to_device(address, b"x"))
stream = ok(driver.cuStreamCreate(1))
ok(driver.cuMemcpyDtoDAsync(address, address + 1, 1, stream))
print(code(driver.cuStreamSynchronize(stream)), code(to_device(address, b"x")), code(driver.cuMemGetInfo()))
"""
    assert finish(start(fake, script)) == ["719 719 719"]
    assert finish(start(fake, "print(code(driver.cuMemGetInfo()))")) == ["0"]


def test_faults_land_wrong_bytes_once(fake: FakeCuda) -> None:
    fake.set(flip_at=2)
    script = """
address = int(ok(driver.cuMemAlloc(SIZE)))
source = int(ok(driver.cuMemHostAlloc(64, 0)))
ctypes.memset(source, 7, 64)
def differing():
    ok(driver.cuMemcpyHtoDAsync(address, source, 64, 0))
    ok(driver.cuStreamSynchronize(0))
    return [index for index, value in enumerate(from_device(address, 64)) if value != 7]
print(differing(), differing(), differing())
print(code(driver.cuMemHostRegister(ctypes.addressof(ctypes.create_string_buffer(9)), 9, 0)))
"""
    assert finish(start(fake, script)) == ["[] [32] []", "0"]
    fake.set(corrupt_streamer=1, fail_register=1)
    assert finish(start(fake, script)) == ["[0] [0] [0]", "800"]


def test_visible_devices_are_chosen_and_renumbered(fake_library: Path, tmp_path: Path) -> None:
    fake = FakeCuda(fake_library, tmp_path / "fakecuda", devices=3)
    script = """
for ordinal in range(ok(driver.cuDeviceGetCount())):
    print(ok(driver.cuDeviceGetUuid(ordinal)).bytes.hex(), ok(driver.cuDeviceGetPCIBusId(13, ordinal))[:12].decode())
ok(driver.cuMemCreate(SIZE, properties(), 0))
print(os.popen(f"ls -l /proc/{os.getpid()}/fd").read().count("fakecuda:2:"))
"""
    chosen = f"{fake.uuid(2)},0,1x,1"
    expected = [f"{fake.uuid(n).removeprefix('GPU-').replace('-', '')} 0000:0{n + 1}:00.0" for n in (2, 0)]
    assert finish(start(fake, script, CUDA_VISIBLE_DEVICES=chosen)) == [*expected, "1"]
    assert finish(start(fake, script, CUDA_VISIBLE_DEVICES="GPU-a2")) == [expected[0], "1"]
    process = start(fake, script, CUDA_VISIBLE_DEVICES="")
    assert "Failed: 100" in process.communicate(timeout=60)[1]


def test_a_legacy_ipc_handle_dies_with_its_exporter(fake: FakeCuda) -> None:
    ends = socket.socketpair()
    exporter = start(
        fake,
        """
address = int(ok(driver.cuMemAlloc(100)))
ok(to_device(address, b"x" * 100))
handle = ok(driver.cuIpcGetMemHandle(address))
print(code(driver.cuIpcOpenMemHandle(handle, 1)), flush=True)
mapped = place(ok(driver.cuMemCreate(SIZE, properties(), 0)), SIZE, READ_WRITE)
print(code(driver.cuIpcGetMemHandle(mapped)), flush=True)
channel = socket.socket(fileno=0)
channel.send(ctypes.string_at(handle.getPtr(), 64))
time.sleep(60)
""",
        ends[0],
    )
    importer = start(
        fake,
        """
channel = socket.socket(fileno=0)
handle = driver.CUipcMemHandle()
ctypes.memmove(handle.getPtr(), channel.recv(64), 64)
address = int(ok(driver.cuIpcOpenMemHandle(handle, 1)))
assert int(ok(driver.cuIpcOpenMemHandle(handle, 1))) == address
print(from_device(address, 100) == b"x" * 100, flush=True)
channel.recv(1)
print(from_device(address, 100) == b"x" * 100)
ok(driver.cuIpcCloseMemHandle(address))
ok(driver.cuIpcCloseMemHandle(address))
print(code(driver.cuIpcOpenMemHandle(handle, 1)))
""",
        ends[1],
    )
    assert [said(exporter), said(exporter)] == ["201", "1"]
    assert said(importer) == "True"
    kill(exporter)
    assert finish(importer) == ["True", "1"]
    assert fake.leaks([importer.pid]) == {}


def test_what_a_process_holds_is_counted_and_given_back(fake: FakeCuda) -> None:
    script = """
handle = ok(driver.cuMemCreate(SIZE, properties(), 0))
address = place(handle, SIZE, READ_WRITE)
assert int(ok(driver.cuMemRetainAllocationHandle(address))) == int(handle)
assert code(driver.cuMemAddressFree(address, SIZE)) == 1
plain, pinned = int(ok(driver.cuMemAlloc(9))), int(ok(driver.cuMemHostAlloc(9, 0)))
stream, event = ok(driver.cuStreamCreate(1)), ok(driver.cuEventCreate(2))
print("held", flush=True)
socket.socket(fileno=0).recv(1)
ok(driver.cuEventDestroy(event))
ok(driver.cuStreamDestroy(stream))
ok(driver.cuMemFreeHost(pinned))
ok(driver.cuMemFree(plain))
lift(address, SIZE)
ok(driver.cuMemRelease(handle))
ok(driver.cuMemRelease(handle))
print(code(driver.cuMemRelease(handle)), ok(driver.cuMemGetInfo()))
ok(driver.cuDevicePrimaryCtxRelease(0))
"""
    here, there = socket.socketpair()
    process = start(fake, script, there)
    assert said(process) == "held"
    assert fake.counters()[process.pid] == {
        "contexts": 1, "handles": 2, "exports": 0, "reservations": 1, "mappings": 1, "allocations": 1,
        "ipc_opened": 0, "pinned": 1, "streams": 1, "events": 1,
    }  # fmt: skip
    here.send(b"x")
    assert finish(process) == [f"1 ({1024 * MiB}, {1024 * MiB})"]
    assert fake.leaks() == {}
    assert fake.counters()[process.pid]["contexts"] == 0


def test_calls_need_a_current_context_and_streams_keep_to_theirs(fake_library: Path, tmp_path: Path) -> None:
    fake = FakeCuda(fake_library, tmp_path / "fakecuda", devices=2)
    script = """
address = int(ok(driver.cuMemAlloc(SIZE)))
stream = ok(driver.cuStreamCreate(1))
ok(driver.cuCtxSetCurrent(0))
print(code(driver.cuMemAlloc(1)), code(to_device(address, b"x")), code(driver.cuStreamCreate(1)))
ok(driver.cuCtxPushCurrent(ok(driver.cuDevicePrimaryCtxRetain(1))))
print(code(driver.cuMemsetD8Async(address, 0, 1, stream)), code(driver.cuStreamSynchronize(stream)))
"""
    assert finish(start(fake, script)) == ["201 201 201", "400 0"]


def test_a_function_that_the_fake_lacks_is_found_missing(fake: FakeCuda) -> None:
    script = """
library = ctypes.CDLL("libcuda.so.1")
found, status = ctypes.c_void_p(1), ctypes.c_int()
for name in (b"cuLaunchKernel", b"cuMemAlloc", b"malloc"):
    answer = library.cuGetProcAddress_v2(name, ctypes.byref(found), 13000, ctypes.c_uint64(0), ctypes.byref(status))
    print(answer, bool(found.value), status.value)
"""
    assert finish(start(fake, script)) == ["500 False 1", "0 True 0", "500 False 1"]


@pytest.mark.parametrize("mode", ["allocate", "register"])
def test_libstreamer_reads_a_file_into_fake_device_memory(fake: FakeCuda, tmp_path: Path, mode: str) -> None:
    content = tmp_path / "content"
    content.write_bytes(os.urandom(40 * MiB + 12345))
    script = """
from weightd.daemon.devices import libstreamer
path = os.environ["CONTENT"]
expected = open(path, "rb").read()
address = int(ok(driver.cuMemAlloc(len(expected))))
libstreamer._HOST = libstreamer._Device(1, 0)
streamer = libstreamer.Streamer()
offsets = [0, 1, 20 << 20]
sizes = [after - before for before, after in zip(offsets, [*offsets[1:], len(expected)])]
streamer.submit(path, offsets, sizes, [address + offset for offset in offsets])
for _ in offsets:
    answer = streamer.response(30)
    assert answer is not None and answer.code == 0, answer
    offset, size = offsets[answer.range_index], sizes[answer.range_index]
    assert from_device(address + offset, size) == expected[offset : offset + size]
streamer.close()
ok(driver.cuMemFree(address))
"""
    process = start(fake, script, CONTENT=str(content), RUNAI_STREAMER_PINNED_MEMORY_MODE=mode)
    finish(process)
    assert fake.leaks([process.pid]) == {}
