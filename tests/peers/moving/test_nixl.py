"""Reading other processes' memory through NIXL: real NIXL, real processes, and what happens when they end."""

from __future__ import annotations

import base64
import ctypes
import hashlib
import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import lacking
from tests.peers.moving.nixl_agent import Process, Refused
from weightd.daemon.peers.moving import bindings
from weightd.daemon.peers.moving.bindings import NixlUnavailable

MiB = 1 << 20
TRANSPORTS = ("tcp", "all")
"""Values of UCX_TLS: copies by the other process over a socket, and the best there is, CMA between processes."""


@pytest.fixture
def spawn() -> Iterator[Callable[..., Process]]:
    """Start processes with an agent each: ``spawn("tcp")``."""
    if not any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13")):
        lacking("NIXL is not installed: pip install --no-deps nixl_cu12")
    started: list[Process] = []

    def start(tls: str = "all", *, agent: bool = True) -> Process:
        started.append(Process(tls))
        if agent:
            started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.end()


def digest(nbytes: int, seed: int) -> str:
    return hashlib.sha256(random.Random(seed).randbytes(nbytes)).hexdigest()


def connected(spawn: Callable[..., Process], tls: str, nbytes: int) -> tuple[Process, int, Process]:
    """A target that shares memory, its address, and a reader that knows it and has a region of the same size."""
    target, reader = spawn(tls), spawn(tls)
    address, metadata = target.share(nbytes, 1)
    reader.share(nbytes)
    reader.add(metadata)
    return target, address, reader


@pytest.mark.parametrize("tls", TRANSPORTS)
@pytest.mark.parametrize("sealed", [False, True])
def test_reads_at_odd_offsets(spawn: Callable[..., Process], tls: str, sealed: bool) -> None:
    target, reader = spawn(tls), spawn(tls)
    size = 8 * MiB + 13
    address, metadata = target.share(size, 1, sealed=sealed)
    reader.share(size)
    reader.add(metadata)
    cuts = [0, 1, 4_097, 70_001, MiB - 1, MiB, 5 * MiB + 3, size]
    reader.read([(start, address + start, end - start) for start, end in zip(cuts[::2], cuts[1::2], strict=True)])
    reader.wait(20)
    for start, end in zip(cuts[1::2], cuts[2::2], strict=False):
        reader.read([(start, address + start, end - start)])
        reader.wait(20)
    assert reader.landed() == digest(size, 1)
    reader.close("peer")
    reader.close("region")
    assert reader.close("agent") < 2
    assert reader.close("agent") < 0.1
    with pytest.raises(Refused, match=r"RuntimeError: agent .* is closed"):
        reader.add(metadata)


@pytest.mark.parametrize("tls", TRANSPORTS)
def test_self_test(spawn: Callable[..., Process], tls: str) -> None:
    process = spawn(tls)
    process.self_test()
    process.self_test()


@pytest.mark.parametrize("tls", TRANSPORTS)
def test_threads_share_an_agent(spawn: Callable[..., Process], tls: str) -> None:
    _, address, reader = connected(spawn, tls, 16 * MiB)
    assert reader.threads(4, address, 16 * MiB) == digest(16 * MiB, 1)


def needs_cma() -> None:
    """Skip where processes, children of one parent at that, may not read each other's memory."""
    memory = ctypes.create_string_buffer(b"readable")
    script = (
        "import ctypes, sys\n"
        "class Vector(ctypes.Structure): _fields_ = [('at', ctypes.c_void_p), ('nbytes', ctypes.c_size_t)]\n"
        "ours = ctypes.create_string_buffer(8)\n"
        "to, at = Vector(ctypes.addressof(ours), 8), Vector(int(sys.argv[2]), 8)\n"
        "read = ctypes.CDLL(None).process_vm_readv\n"
        "sys.exit(read(int(sys.argv[1]), ctypes.byref(to), 1, ctypes.byref(at), 1, 0) != 8)\n"
    )
    arguments = [str(os.getpid()), str(ctypes.addressof(memory))]
    if subprocess.run([sys.executable, "-c", script, *arguments]).returncode:
        lacking("process_vm_readv is not allowed here")


def test_the_transport_of_each_peer_is_told_and_is_what_the_kernel_counts(spawn: Callable[..., Process]) -> None:
    needs_cma()
    size = 16 * MiB
    center, others = spawn("all"), {"tcp": spawn("tcp"), "shm": spawn("all")}
    address, metadata = center.share(size, 1)
    offered = {expected: other.share(size, 2) for expected, other in others.items()}
    for process in (center, *others.values()):
        process.share(size)  # to read into
    for expected, other in others.items():
        other.add(metadata)
        other.read([(0, address, size)])
        other.wait(20)
        assert other.transport() == expected
    # Now the other way: UCX goes on with the connections that they have made, and makes none of its own.
    for expected, (there, described) in offered.items():
        center.add(described)
        center.clear()
        before = center.tcp_received()
        for pairs in ([(0, there, 1)], [(0, there, size // 2), (size // 2, there + size // 2, size // 2)]):
            center.read(pairs)
            center.wait(20)
            assert center.transport() == expected
        over_tcp = center.tcp_received() - before
        assert over_tcp > size if expected == "tcp" else over_tcp < size / 100
        assert center.landed() == digest(size, 2)


def test_regions_are_offered_one_by_one(spawn: Callable[..., Process]) -> None:
    target, address, reader = connected(spawn, "tcp", MiB)
    other, metadata = target.share(MiB, 2)
    with pytest.raises(Refused, match=r"ValueError: .* offers no such memory"):
        reader.read([(0, other, MiB)])
    reader.extend(0, metadata)
    for remote, seed in ((other, 2), (address, 1)):
        reader.read([(0, remote, MiB)])
        reader.wait(10)
        assert reader.landed() == digest(MiB, seed)


def test_addresses_outside_are_refused(spawn: Callable[..., Process]) -> None:
    target, address, reader = connected(spawn, "all", MiB)
    for pair in ((1, address, MiB), (-1, address, 10), (0, address, 0), (0, address, -5), (0, -1, 10)):
        with pytest.raises(Refused, match=r"ValueError: .* not within the region"):
            reader.read([pair])
    for pair in ((0, address + 1, MiB), (0, address - 1, 10), (0, 0x10000, 10), (0, address + MiB, 1)):
        with pytest.raises(Refused, match=r"ValueError: .* offers no such memory"):
            reader.read([(0, address, 10), pair])
    with pytest.raises(Refused, match="ValueError"):
        reader.read([])
    reader.read([(0, address, MiB)])
    reader.wait(10)
    assert reader.landed() == digest(MiB, 1)
    assert target.process.poll() is None


def test_metadata_that_is_not(spawn: Callable[..., Process]) -> None:
    target, reader = spawn("tcp"), spawn("tcp")
    address, encoded = target.share(MiB, 1)
    _, own = reader.share(MiB)
    good = base64.b64decode(encoded)
    chance = random.Random(5)
    hostile = [good[:length] for length in range(0, len(good), 7)]
    for _ in range(200):
        damaged = bytearray(good)
        damaged[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
        hostile.append(bytes(damaged))
    hostile += [chance.randbytes(500), good + b"x", good + bytes(2 << 20)]

    def sealed(blob: bytes) -> bytes:
        return good[:15] + hashlib.sha256(blob).digest() + blob

    blob = good[15 + 32 :]
    assert sealed(blob) == good
    hostile += [sealed(b""), sealed(blob[:16]), sealed(blob[:20]), sealed(blob[:40]), sealed(chance.randbytes(400))]
    hostile += [sealed(blob[:16] + (1 << 63).to_bytes(8, "little") + blob[24:])]
    for metadata in hostile:
        with pytest.raises(Refused, match="ValueError"):
            reader.add(base64.b64encode(metadata).decode())
    with pytest.raises(Refused, match="ValueError: there is an agent"):
        reader.add(own)
    clean = spawn("tcp")
    clean.share(MiB)
    clean.add(encoded)
    with pytest.raises(Refused, match="ValueError: there is an agent"):
        clean.add(encoded)
    clean.read([(0, address, MiB)])
    clean.wait(10)
    assert clean.landed() == digest(MiB, 1)


@pytest.mark.parametrize("tls", TRANSPORTS)
def test_a_killed_peer_is_noticed(spawn: Callable[..., Process], tls: str) -> None:
    size = 192 * MiB
    target, address, reader = connected(spawn, tls, size)
    reader.read([(0, address, MiB)])
    reader.wait(10)
    if tls == "tcp":
        target.signal(signal.SIGSTOP)  # so that nothing is read whole before it is gone
        reader.read([(0, address, size)])
        target.end()
        before = time.monotonic()
        with pytest.raises(Refused, match=r"TransferFailed: .*DISCONNECT"):
            reader.wait(20)
        assert time.monotonic() - before < 5
        assert reader.abandon(0)
        reader.clear()
        time.sleep(0.5)
        assert not reader.written()
        reader.close("region")  # nothing of it lands, so it can be let go of
        reader.share(size)
    else:
        target.end()
        time.sleep(0.2)
    with pytest.raises(Refused, match=r"TransferFailed: .*DISCONNECT"):
        reader.read([(0, address, MiB)])
    reader.close("peer")
    successor = spawn(tls)
    address, metadata = successor.share(size, 2)
    reader.add(metadata)
    reader.read([(0, address, size)])
    reader.wait(20)
    assert reader.landed() == digest(size, 2)


def test_nobody_there(spawn: Callable[..., Process]) -> None:
    target, reader = spawn("tcp"), spawn("tcp")
    _, metadata = target.share(MiB, 1)
    target.end()
    with pytest.raises(Refused, match=r"TransferFailed: .* cannot be reached"):
        reader.add(metadata)


def test_a_stopped_peer_and_closing(spawn: Callable[..., Process]) -> None:
    """Over TCP, the bytes under way go on landing whatever is released: until the agent is closed."""
    size = 192 * MiB
    target, address, reader = connected(spawn, "tcp", size)
    reader.read([(0, address, MiB)])
    reader.wait(10)
    reader.read([(0, address, size)])
    target.signal(signal.SIGSTOP)
    with pytest.raises(Refused, match="TimeoutError"):
        reader.wait(0.5)
    assert not reader.abandon(0.1)
    with pytest.raises(Refused, match="RuntimeError: 1 transfers"):
        reader.close("region")
    with pytest.raises(Refused, match="RuntimeError: 1 transfers"):
        reader.close("peer")
    assert reader.close("agent", drain=0.1) < 2
    assert reader.abandon(0)
    with pytest.raises(Refused, match=r"TransferFailed: .* was closed"):
        reader.wait(1)
    reader.clear()
    target.signal(signal.SIGCONT)
    time.sleep(1)
    assert not reader.written()
    reader.start()  # the process goes on, with a new agent
    reader.self_test()


def test_abandoned_transfers_are_waited_for(spawn: Callable[..., Process]) -> None:
    size = 128 * MiB
    target, address, reader = connected(spawn, "tcp", size)
    reader.read([(0, address, size)])
    assert reader.abandon(20)
    reader.read([(0, address, size)])
    assert reader.close("agent") < 5
    assert reader.landed() == digest(size, 1)
    assert target.process.poll() is None


def test_manners(spawn: Callable[..., Process]) -> None:
    found = spawn(agent=False).manners()
    assert found.pop("busy") < 0.3
    assert found == {"modules": [], "handlers": True, "exceptions": True, "signals": True}


def test_unusable_transports(spawn: Callable[..., Process]) -> None:
    with pytest.raises(Refused, match="NixlUnavailable: NIXL does not start"):
        spawn("posix,self", agent=False).start()


@pytest.mark.parametrize(
    ("installed", "driver", "chosen"),
    [
        ({"nixl_cu12"}, None, "nixl_cu12"),
        ({"nixl_cu13"}, None, "nixl_cu13"),
        ({"nixl_cu12", "nixl_cu13"}, None, "nixl_cu13"),
        ({"nixl_cu12", "nixl_cu13"}, 12, "nixl_cu12"),
        ({"nixl_cu12", "nixl_cu13"}, 13, "nixl_cu13"),
        ({"nixl_cu12", "nixl_cu13"}, 14, "nixl_cu13"),
        ({"nixl_cu12"}, 13, "nixl_cu12"),
        ({"nixl_cu13"}, 12, "pip install --no-deps nixl_cu12"),
        (set(), 12, "pip install --no-deps nixl_cu12"),
        (set(), None, "pip install --no-deps nixl_cu13"),
    ],
)
def test_choice_of_build(monkeypatch: pytest.MonkeyPatch, installed: set[str], driver: int | None, chosen: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(bindings, "_driver_major", lambda: driver)
    if chosen in installed:
        assert bindings._choose() == chosen
    else:
        with pytest.raises(NixlUnavailable, match=chosen):
            bindings._choose()


def test_never_both_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl_cu12", object())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(bindings, "_driver_major", lambda: 13)
    assert bindings._choose() == "nixl_cu12"
