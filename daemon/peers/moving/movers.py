"""A process of its own that moves bytes between nodes: it holds NIXL's agent, which can end the process that has it.

``Mover`` is the daemon's side; ``python -m weightd.daemon.peers.moving.movers FD`` is the process, at the other end of a
socket pair. It is given memory by descriptor, which it maps: to be read by peers, read-only, or to be read into.
Killing it is what ends transfers for certain: its mappings go with it, and nothing writes to the memory any more.

Messages are those of ``weightd.ipc.wire``::

    → {"op": "offer", "region": number, "nbytes"} + descriptor        ← {"region", "address", "metadata"}
    → {"op": "into", "region": number, "nbytes"} + descriptor         ← {"region", "address", "metadata": null}
    → {"op": "ping", "region": number}                                ← {"region"}
    → {"op": "close", "region": number}                               ← {"region", "closed": true}
    → {"op": "peer", "peer": number, "metadata": [of each region]}    ← {"peer"}
    → {"op": "read", "ticket", "peer", "region", "pairs": [[offset in the region, address at the peer, bytes], ...]}
                                                                      ← {"ticket", "error": null or words, "transport"}
    ← {"error": words, and what of these it is about}                 instead of any of them
    ← {"failed": words}                                               before anything else: it cannot start

Metadata in base64. Answers to ``read`` come when all bytes are there, in any order.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import itertools
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from weightd.daemon.devices.host_memory import RawMapping
from weightd.ipc import wire

if TYPE_CHECKING:
    from weightd.daemon.peers.moving.nixl import Agent, Peer, Region, Transfer

_ANSWER_SECONDS = 20.0
"""Seconds that it may take to answer; starting takes it half a second."""
_POLL_MS = (1.0, 10.0)
"""Milliseconds between looks at transfers under way, of which NIXL says nothing by itself: more as nothing happens."""


def unavailable() -> str:
    """Why there can be no such process here, with the remedy; empty where nothing is known to be in its way."""
    # find_spec of a top-level package reads no code of it.
    if any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13")):
        return ""
    return "NIXL is not installed: pip install --no-deps nixl-cu13, or nixl-cu12 with an older driver or none"


class MoverFailed(RuntimeError):
    """The process refused, or is gone: what it was to move has to come another way."""


class Offered(NamedTuple):
    """Memory that peers may read: what they need for it."""

    region: int
    address: int
    metadata: bytes


class Arrival(NamedTuple):
    """A read that has ended; ``error`` says why where its bytes have not come."""

    ticket: int
    error: str | None
    transport: str = "unknown"
    """By what the bytes came: rdma, cuda_ipc, shm, tcp or unknown."""


def _environment() -> dict[str, str]:
    """What the process needs of ours: whoever can read its memory is to find no credentials in it."""
    passed = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "HOME", "LANG", "TMPDIR")
    own = {name: value for name, value in os.environ.items() if name in passed or name.startswith(("UCX_", "NIXL_"))}
    # It has to do with host memory only, and a context takes some hundred MiB of each GPU that UCX finds.
    return {**own, "CUDA_VISIBLE_DEVICES": ""}


class Mover:
    """One such process. Methods may be called from many threads; all raise MoverFailed once it is gone."""

    _numbers = itertools.count(1)
    """Of all movers: a ticket of one that has died is none of the next one's."""

    def __init__(self) -> None:
        """Start it; that it works shows with the first answer, half a second later. Raises MoverFailed."""
        self.tell: Callable[[Arrival | None], object] = lambda _: None
        """Called from a thread with every read that has ended, and with None once the process is gone."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket = ours
        try:
            self._process = subprocess.Popen(  # noqa: S603 - ourselves
                [sys.executable, "-m", "weightd.daemon.peers.moving.movers", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True, env=_environment(),
            )  # fmt: skip
        except OSError as error:
            ours.close()
            raise MoverFailed(f"no mover process can be started: {error}") from None
        finally:
            theirs.close()
        self._answers: dict[tuple[str, int], queue.SimpleQueue[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._gone = self._failed = ""
        self._listener = threading.Thread(target=self._listen, name="mover", daemon=True)
        self._listener.start()

    def ping(self) -> None:
        """Return once it has started, tested itself, and answers."""
        number = next(self._numbers)
        self._ask({"op": "ping", "region": number}, "region", number)

    def offer(self, fd: int, nbytes: int) -> Offered:
        """Let peers read memory, of which the process gets a read-only mapping. The caller keeps ``fd``."""
        return self._region("offer", fd, nbytes)

    def into(self, fd: int, nbytes: int) -> int:
        """Memory to read into; returns its region. The caller keeps ``fd``."""
        return self._region("into", fd, nbytes).region

    def _region(self, op: str, fd: int, nbytes: int) -> Offered:
        number = next(self._numbers)
        answer = self._ask({"op": op, "region": number, "nbytes": nbytes}, "region", number, [fd])
        return Offered(number, int(answer["address"]), base64.b64decode(answer["metadata"] or ""))

    def close_region(self, region: int) -> None:
        """Unmap it. Peers must have said that they are done with it: unmapping under a reader can end the process."""
        self._ask({"op": "close", "region": region}, "region", region)

    def peer(self, *metadata: bytes) -> int:
        """Connect to the owner of what one mover offers elsewhere, region by region; returns a number for ``read``."""
        number = next(self._numbers)
        regions = [base64.b64encode(of_region).decode() for of_region in metadata]
        self._ask({"op": "peer", "peer": number, "metadata": regions}, "peer", number)
        return number

    def read(self, peer: int, region: int, pairs: Sequence[tuple[int, int, int]]) -> int:
        """Start reading (offset in the region, address at the peer, bytes); returns the ticket, as ``tell`` is told."""
        ticket = next(self._numbers)
        self._send({"op": "read", "ticket": ticket, "peer": peer, "region": region, "pairs": pairs})
        return ticket

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return not self._gone

    def kill(self) -> None:
        """End it; when this returns, nothing of it writes anywhere any more. Safe to call twice."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        self._listener.join()

    # ------------------------------------------------------------------ messages

    def _ask(self, message: dict[str, Any], kind: str, number: int, fds: Sequence[int] = ()) -> dict[str, Any]:
        answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        with self._lock:
            self._answers[kind, number] = answers
        self._send(message, fds)
        try:
            answer = answers.get(timeout=_ANSWER_SECONDS)
        except queue.Empty:
            self.kill()
            raise MoverFailed(f"the mover process has not answered within {_ANSWER_SECONDS:g} s") from None
        if "error" in answer:
            raise MoverFailed(answer["error"])
        return answer

    def _send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        with self._lock:
            if self._gone:
                raise MoverFailed(self._gone)
            try:
                wire.send(self._socket, message, fds)
            except OSError as error:
                raise MoverFailed(f"the mover process is gone: {error}") from None

    def _listen(self) -> None:
        try:
            while True:
                answer, fds = wire.receive(self._socket)
                wire.close_all(fds)
                self._failed = answer.get("failed", "")
                if "ticket" in answer:
                    self.tell(Arrival(answer["ticket"], answer["error"], answer.get("transport", "unknown")))
                    continue
                key = ("region", answer["region"]) if "region" in answer else ("peer", answer.get("peer", 0))
                with self._lock:
                    waiting = self._answers.pop(key, None)
                if waiting is not None:
                    waiting.put(answer)
        except (OSError, ValueError):  # it has ended, or what it says cannot be understood any more
            self._process.kill()
        code = self._process.wait()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        with self._lock:
            self._gone = self._failed or f"the mover process is gone: {how}"
            waiting_for, self._answers = self._answers, {}
            self._socket.close()
        for answers in waiting_for.values():
            answers.put({"error": self._gone})
        self.tell(None)


class Movers:
    """Where movers come from. One is kept at hand: where many stages begin at once, starting theirs takes seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spare: Mover | None = None
        self._closed = False

    def test(self) -> str:
        """Have one start, which tests itself: why that does not work, empty where it does. Half a second."""
        try:
            self.prepare()
            if (spare := self._spare) is not None:  # unless a stage was quicker
                spare.ping()
        except MoverFailed as error:
            self.close()
            return str(error)
        return ""

    def prepare(self) -> None:
        """Start one for whoever takes the next, if none is at hand; does not wait for it. Raises MoverFailed."""
        with self._lock:
            if not self._closed and (self._spare is None or not self._spare.alive):
                self._spare = Mover()

    def take(self) -> Mover:
        """One for the caller, who ends it. Raises MoverFailed."""
        with self._lock:
            spare, self._spare = self._spare, None
        return spare if spare is not None and spare.alive else Mover()

    def close(self) -> None:
        """End the one at hand, and keep none any more."""
        with self._lock:
            spare, self._spare, self._closed = self._spare, None, True
        if spare is not None:
            spare.kill()


# ---------------------------------------------------------------------- the process


class _Process:
    """What runs at the other end."""

    def __init__(self, channel: socket.socket) -> None:
        from weightd.daemon.peers.moving.nixl import Agent, self_test

        self._channel = channel
        self._agent: Agent = Agent()
        self_test(self._agent)
        self._regions: dict[int, tuple[Region, RawMapping]] = {}
        self._peers: dict[int, Peer] = {}
        self._transfers: dict[int, Transfer] = {}

    def run(self) -> None:
        """Serve until the daemon hangs up, which the kernel does for it when it dies."""
        # NIXL's calls may take long; what the daemon had mapped here must not be written to once there is another one.
        threading.Thread(target=self._end_with_the_daemon, daemon=True).start()
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        pause = _POLL_MS[0]
        while True:
            pause = min(1.3 * pause, _POLL_MS[1])
            if poll.poll(pause if self._transfers else None):
                pause = _POLL_MS[0]
                try:
                    message, fds = wire.receive(self._channel)
                except OSError:
                    return
                try:
                    self._serve(message, fds)
                finally:
                    wire.close_all(fds)
            if self._look():
                pause = _POLL_MS[0]

    def _end_with_the_daemon(self) -> None:
        poll = select.poll()
        poll.register(self._channel, select.POLLHUP)
        poll.poll()
        os._exit(0)

    def _serve(self, message: dict[str, Any], fds: list[int]) -> None:
        about: dict[str, Any] = {key: message[key] for key in ("region", "peer", "ticket") if key in message}
        try:
            answer = getattr(self, f"_{message['op']}")(message, fds)
        except Exception as error:  # NIXL's own classes among them
            answer = {"error": f"{type(error).__name__}: {error}"}
        if answer is not None:
            wire.send(self._channel, {**({"ticket": about["ticket"]} if "ticket" in about else about), **answer})

    def _ping(self, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        return {}

    def _offer(self, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        region = self._map(message, fds, writable=False)
        return {"address": region.address, "metadata": base64.b64encode(region.metadata()).decode()}

    def _into(self, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        return {"address": self._map(message, fds, writable=True).address, "metadata": None}

    def _map(self, message: dict[str, Any], fds: list[int], *, writable: bool) -> Region:
        memory = RawMapping(fds[0], message["nbytes"], writable=writable)
        region = self._agent.register(memory.address, memory.nbytes)
        self._regions[message["region"]] = (region, memory)
        return region

    def _close(self, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        region, memory = self._regions.pop(message["region"])
        region.close()
        memory.close()
        return {"closed": True}

    def _peer(self, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        first, *others = (base64.b64decode(of_region) for of_region in message["metadata"])
        peer = self._peers[message["peer"]] = self._agent.add_peer(first)
        for metadata in others:
            peer.extend(metadata)
        return {}

    def _read(self, message: dict[str, Any], fds: list[int]) -> None:
        region, _ = self._regions[message["region"]]
        pairs = [(region.address + offset, remote, nbytes) for offset, remote, nbytes in message["pairs"]]
        self._transfers[message["ticket"]] = self._peers[message["peer"]].read(pairs, region)

    def _look(self) -> bool:
        """Report transfers that have ended; whether any has."""
        before = len(self._transfers)
        for ticket, transfer in list(self._transfers.items()):
            error: str | None = None
            try:
                if not transfer.done():
                    continue
            except Exception as failure:
                error = str(failure)
            del self._transfers[ticket]
            wire.send(self._channel, {"ticket": ticket, "error": error, "transport": transfer.transport})
        return len(self._transfers) < before


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    try:
        process = _Process(channel)
    except Exception as error:
        with contextlib.suppress(OSError):
            wire.send(channel, {"failed": str(error)})
        os._exit(1)
    process.run()
    os._exit(0)  # transfers end with the process; tearing NIXL down in order could end a peer's


if __name__ == "__main__":
    main()
