"""Mover processes, as the daemon has them: started, spoken with, one kept at hand, and killed.

Killing one is what ends transfers for certain: its mappings go with it, and nothing writes to the memory any more. What
is said to it is in ``mover``.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import itertools
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from weightd.ipc import wire

_ANSWER_SECONDS = 20.0
"""Seconds that it may take to answer; starting takes it half a second."""


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
        self.on_arrival: Callable[[Arrival | None], object] = lambda _: None
        """Called from a thread with every read that has ended, and with None once the process is gone."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket = ours
        try:
            self._process = subprocess.Popen(  # noqa: S603 - ourselves
                [sys.executable, "-m", "weightd.daemon.peers.moving.mover", str(theirs.fileno())],
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
        """Start reading (offset in the region, address at the peer, bytes); returns the ticket that its Arrival has."""
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
                    self.on_arrival(Arrival(answer["ticket"], answer["error"], answer.get("transport", "unknown")))
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
        self.on_arrival(None)


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
