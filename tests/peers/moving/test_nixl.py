"""Reading other processes' memory through NIXL: real NIXL, real processes, and what happens when they end.

Every agent lives in a process of its own, which does what lines on its stdin say:
``python -m tests.peers.moving.test_nixl``.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import json
import logging
import mmap
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import lacking
from weightd.daemon.peers.moving import nixl
from weightd.daemon.peers.moving.nixl import Agent, NixlUnavailable, Peer, Region, Transfer, TransferFailed, self_test

MiB = 1 << 20
TRANSPORTS = ("tcp", "all")
"""Values of UCX_TLS: copies by the other process over a socket, and the best there is, CMA between processes."""


class Memory:
    """Host memory: writable, or a sealed memfd that is mapped read-only, as segments of the daemon are."""

    def __init__(self, nbytes: int, content: bytes | None = None, *, sealed: bool = False) -> None:
        if not sealed:
            self.map = mmap.mmap(-1, nbytes)
            self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
            if content is not None:
                self.map[:] = content
            return
        fd = os.memfd_create("weightd-test", os.MFD_ALLOW_SEALING)
        os.truncate(fd, nbytes)
        with mmap.mmap(fd, nbytes) as writable:
            writable[:] = content or bytes(nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self.map = mmap.mmap(fd, nbytes, prot=mmap.PROT_READ)
        os.close(fd)
        buffer = ctypes.create_string_buffer(128)  # a Py_buffer: ctypes gives no address of read-only memory
        ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(self.map), buffer, 0)
        self.address = ctypes.c_void_p.from_buffer(buffer).value or 0


class Commands:
    """What the process of an agent does."""

    def __init__(self) -> None:
        self.agent: Agent
        self.memories: list[Memory] = []
        self.regions: list[Region] = []
        self.peers: list[Peer] = []
        self.transfers: list[Transfer] = []

    def start(self, name: str | None = None) -> str:
        self.agent = Agent(name)
        return self.agent.name

    def self_test(self) -> None:
        self_test(self.agent)

    def share(self, nbytes: int, seed: int | None = None, sealed: bool = False) -> tuple[int, str]:
        """Register memory, filled by a seed; its address and metadata."""
        memory = Memory(nbytes, None if seed is None else random.Random(seed).randbytes(nbytes), sealed=sealed)
        self.memories.append(memory)
        self.regions.append(self.agent.register(memory.address, nbytes))
        return memory.address, base64.b64encode(self.regions[-1].metadata()).decode()

    def add(self, metadata: str) -> str:
        self.peers.append(self.agent.add_peer(base64.b64decode(metadata)))
        return self.peers[-1].name

    def extend(self, peer: int, metadata: str) -> None:
        self.peers[peer].extend(base64.b64decode(metadata))

    def read(self, pairs: list[tuple[int, int, int]], peer: int = -1, region: int = -1) -> int:
        """Offsets in the region, addresses of the peer, bytes. The transfer's number."""
        there = [(self.regions[region].address + at, remote, nbytes) for at, remote, nbytes in pairs]
        self.transfers.append(self.peers[peer].read(there, self.regions[region]))
        return len(self.transfers) - 1

    def read_in_background(self, pairs: list[tuple[int, int, int]]) -> None:
        threading.Thread(target=self.read, args=(pairs,), daemon=True).start()

    def transport(self, transfer: int = -1) -> str:
        return self.transfers[transfer].transport

    def tcp_received(self) -> int:
        """Bytes that have come over TCP, as the kernel counts them for each connection."""
        received = 0
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(fd))) as connection:
                if connection.proto == socket.IPPROTO_TCP:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
                    received += struct.unpack_from("<Q", info, 128)[0]  # tcpi_bytes_received
        return received

    def wait(self, seconds: float, transfer: int = -1) -> None:
        self.transfers[transfer].wait(seconds)

    def abandon(self, seconds: float, transfer: int = -1) -> bool:
        return self.transfers[transfer].abandon(seconds)

    def landed(self, memory: int = -1) -> str:
        return hashlib.sha256(self.memories[memory].map[:]).hexdigest()

    def written(self, memory: int = -1) -> int:
        """Bytes that are not zero, of one in 4096."""
        return sum(byte != 0 for byte in self.memories[memory].map[::4096])

    def clear(self, memory: int = -1) -> None:
        ctypes.memset(self.memories[memory].address, 0, len(self.memories[memory].map))

    def threads(self, count: int, remote: int, nbytes: int) -> str:
        """Read a region in ``count`` threads, in pieces of 64 KiB and some; the digest of what came."""
        errors: list[BaseException] = []
        piece = 65_537

        def work(first: int) -> None:
            try:
                for at in range(first * piece, nbytes, count * piece):
                    size = min(piece, nbytes - at)
                    pair = (self.regions[-1].address + at, remote + at, size)
                    self.peers[-1].read([pair], self.regions[-1]).wait(20)
            except BaseException as error:
                errors.append(error)

        workers = [threading.Thread(target=work, args=(first,)) for first in range(count)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if errors:
            raise errors[0]
        return self.landed()

    def close(self, what: str, drain: float = 5.0) -> float:
        """Seconds that it took."""
        before = time.monotonic()
        if what == "agent":
            self.agent.close(drain=drain)
        elif what == "peer":
            self.peers[-1].close()
        else:
            self.regions[-1].close()
        return time.monotonic() - before

    def manners(self) -> dict[str, Any]:
        """What starting an agent does to a process that has things of its own."""
        handler = logging.FileHandler(os.devnull)
        logging.getLogger().addHandler(handler)
        caught = signal_mask()
        agent = Agent()
        before = time.process_time()
        time.sleep(1)
        busy = time.process_time() - before
        agent.close()
        return {
            "modules": sorted({"numpy", "torch", "nixl_cu12", "nixl_cu13"} & set(sys.modules)),
            "handlers": handler in [found() for found in logging._handlerList],  # type: ignore[attr-defined]
            "exceptions": logging.raiseExceptions,
            "signals": caught == signal_mask(),
            "busy": busy,
        }


def signal_mask() -> list[int]:
    """Signals that the process has handlers for, real-time ones, which threads of C libraries use, left out."""
    with open("/proc/self/status") as status:
        caught = next(int(line.split()[1], 16) for line in status if line.startswith("SigCgt"))
    return [number + 1 for number in range(31) if caught >> number & 1]


def main() -> None:
    commands = Commands()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        name, arguments, options = json.loads(line)
        try:
            answer = {"result": getattr(commands, name)(*arguments, **options)}
        except (NixlUnavailable, TransferFailed, ValueError, TimeoutError, RuntimeError) as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        answers.write(json.dumps(answer) + "\n")
    os._exit(0)  # as a daemon that ends without closing anything


class Refused(Exception):
    """The name of the exception that the agent's process met, and its message."""


class Process:
    """An agent's process: methods are those of Commands."""

    def __init__(self, tls: str) -> None:
        self.tls = tls
        environment = {**os.environ, "UCX_TLS": tls}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.peers.moving.test_nixl"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            self.process.stdin.write(json.dumps([name, arguments, options]) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
            assert line, f"the process ended, by {self.process.wait()}"
            answer = json.loads(line)
            if "error" in answer:
                raise Refused(f"{answer['error']}: {answer['message']}")
            return answer["result"]

        return call

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


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
    monkeypatch.setattr(nixl, "_driver_major", lambda: driver)
    if chosen in installed:
        assert nixl._choose() == chosen
    else:
        with pytest.raises(NixlUnavailable, match=chosen):
            nixl._choose()


def test_never_both_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl_cu12", object())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(nixl, "_driver_major", lambda: 13)
    assert nixl._choose() == "nixl_cu12"


if __name__ == "__main__":
    main()
