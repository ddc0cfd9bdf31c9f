"""Scripts that call the fake driver, each in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from tests.fakecuda import FakeCuda

# What every script begins with: the calls, checked, and a context that is current.
PRELUDE = """
import ctypes, os, signal, socket, subprocess, sys, time
from cuda.bindings import driver

class Failed(Exception):
    pass

def ok(answer):
    code, *values = answer
    if code != driver.CUresult.CUDA_SUCCESS:
        raise Failed(int(code))
    return values[0] if len(values) == 1 else tuple(values)

def code(answer):
    return int(answer[0])

def properties(device=0):
    wanted = driver.CUmemAllocationProp()
    wanted.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    wanted.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    wanted.location.id = device
    wanted.requestedHandleTypes = FD
    return wanted

def rights(address, size, flags, device=0):
    access = driver.CUmemAccessDesc()
    access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = device
    access.flags = flags
    return driver.cuMemSetAccess(address, size, [access], 1)

def place(handle, size, flags):
    address = int(ok(driver.cuMemAddressReserve(size, 0, 0, 0)))
    ok(driver.cuMemMap(address, size, 0, handle, 0))
    ok(rights(address, size, flags))
    return address

def lift(address, size):
    ok(driver.cuMemUnmap(address, size))
    ok(driver.cuMemAddressFree(address, size))

def to_device(address, data):
    return driver.cuMemcpyHtoD(address, data, len(data))

def from_device(address, size):
    data = bytearray(size)
    ok(driver.cuMemcpyDtoH((ctypes.c_char * size).from_buffer(data), address, size))
    return bytes(data)

FD = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
ONLY_READ = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ
READ_WRITE = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
SIZE = 4 << 20
ok(driver.cuInit(0))
context = ok(driver.cuDevicePrimaryCtxRetain(0))
ok(driver.cuCtxSetCurrent(context))
"""


def start(fake: FakeCuda, script: str, channel: socket.socket | None = None, **env: str) -> subprocess.Popen[str]:
    """A process that runs the script; ``channel`` is its standard input."""
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + script],
        env={**os.environ, **fake.env, **env},
        stdin=channel.fileno() if channel else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if channel:
        channel.close()
    return process


def finish(process: subprocess.Popen[str]) -> list[str]:
    """What it printed; it must end well."""
    printed, complaints = process.communicate(timeout=60)
    assert process.returncode == 0, complaints
    return printed.splitlines()


def said(process: subprocess.Popen[str]) -> str:
    """The next line that it prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
