"""What outlives this process: the daemon's side of the keeper, whose protocol ``supervisor`` has."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import socket

from weightd.daemon.keeper.supervisor import FD_VARIABLE, MAX_MESSAGE

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Deposits:
    """Named descriptors that the keeper holds. Without a keeper nothing is held, and nothing outlives the process.

    Methods may be called from any thread; a keeper that has died is no error, as the daemon dies with it.
    """

    def __init__(self, channel: socket.socket | None = None) -> None:
        self._channel = channel
        self.stop_ordered = False
        """Whether the keeper has said to drop everything and end."""

    @classmethod
    def inherited(cls) -> Deposits:
        """The channel that the keeper left in the environment; from here on this process dies when the keeper does."""
        number = os.environ.pop(FD_VARIABLE, None)
        if number is None:
            return cls()
        channel = socket.socket(fileno=int(number))
        channel.set_inheritable(False)
        keeper = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:  # it died before it could be told
            os.kill(os.getpid(), signal.SIGKILL)
        return cls(channel)

    @property
    def kept(self) -> bool:
        """Whether there is a keeper."""
        return self._channel is not None

    def put(self, name: str, fd: int) -> None:
        """Hold a descriptor under a name, instead of what had it. The caller keeps its own."""
        self._send(f"put {name}", [fd])

    def drop(self, name: str) -> None:
        """Let go of a name; one that is not held is none."""
        self._send(f"drop {name}", [])

    def _send(self, message: str, fds: list[int]) -> None:
        if self._channel is not None:
            # Where the keeper has died, this process is about to.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                socket.send_fds(self._channel, [message.encode()], fds)

    def up(self) -> None:
        """Say that this daemon serves."""
        self._send("up", [])

    def dying(self, reason: str) -> None:
        """Say why this process is about to end by itself: for those who look after it has."""
        self._send(f"dying {reason[:1000]}", [])

    def agree_to_stop(self) -> None:
        """Say yes to an order to stop: what is held goes with this daemon."""
        self._send("stopping", [])

    def refuse_stop(self) -> None:
        """Say no to an order to stop: the keeper goes on as before."""
        self.stop_ordered = False
        self._send("refuse", [])

    def collect(self) -> dict[str, int]:
        """Everything that is held, by name; the caller owns the descriptors. At the start, before anything else."""
        held: dict[str, int] = {}
        if self._channel is None:
            return held
        self._send("list", [])
        while True:
            data, fds, _, _ = socket.recv_fds(self._channel, MAX_MESSAGE, 1)
            verb, _, name = data.decode("ascii").partition(" ")
            if verb == "held":
                if not fds:
                    raise OSError(errno.EMFILE, f"no descriptor left for {name}: raise the hard limit of open files")
                os.set_inheritable(fds[0], False)
                held[name] = fds[0]
            elif verb == "stop":
                self.stop_ordered = True
            else:
                return held

    def fileno(self) -> int:
        """Readable where the keeper has something to say."""
        assert self._channel is not None
        return self._channel.fileno()

    def listen(self) -> bool:
        """Take what the keeper says; False where it is gone."""
        assert self._channel is not None
        try:
            message = self._channel.recv(MAX_MESSAGE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.stop_ordered = self.stop_ordered or message == b"stop"
        return bool(message)
