"""A NIXL agent in a process of its own, which does what lines on its stdin say.

``python -m tests.peers.moving.nixl_agent`` is that process, ``Process`` starts it and has it do things.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import fcntl
import hashlib
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
from collections.abc import Callable
from typing import Any

from weightd.daemon.peers.moving.bindings import NixlUnavailable
from weightd.daemon.peers.moving.nixl import Agent, Peer, Region, Transfer, TransferFailed
from weightd.daemon.peers.moving.self_test import self_test


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
            [sys.executable, "-m", "tests.peers.moving.nixl_agent"],
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


if __name__ == "__main__":
    main()
