"""The keeper: the small parent process that holds what must outlive the daemon.

It holds named descriptors that the daemon deposits (segments, their records, listening sockets), starts the daemon, and
starts it again when it dies; the next daemon asks for what is held and goes on with it. It knows nothing of what it
holds. Standard library only and one thread, so that there is nothing in it to crash; it can be PID 1 of a container.

Run as ``python -m weightd.daemon.keeper COMMAND...``. The daemon inherits one end of a SEQPACKET socket pair, whose
number is in ``WEIGHTD_KEEPER_FD``. A message is one packet, a descriptor goes with it where there is one::

    daemon → keeper   put NAME + descriptor     hold it, instead of what had that name
                      drop NAME                 close it, and everything below NAME/
                      list                      send everything that is held
                      up                        it serves
                      refuse                    the stop is off: weights are leased
                      stopping                  the stop is on: it drops everything
                      dying REASON              why it is about to end by itself
    keeper → daemon   held NAME + descriptor    one for each, then:  end
                      stop                      an ordered stop: drop everything and end

SIGTERM and SIGINT are an ordered stop: the keeper ends when the daemon has, with its exit code. SIGHUP replaces the
daemon by a new one, of the version that is installed now. A daemon that dies of anything else is started again, unless
it is the first one and ends by itself before it has served: what keeps it from it is its settings.

Whether weights are leased only a daemon can say. With ``WEIGHTD_ON_STOP=refuse`` an order to stop that finds none, or
one that dies over it, is therefore for the next one to take; where no next one is to be, the order is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from typing import NoReturn

from weightd.daemon import control_groups

FD_VARIABLE = "WEIGHTD_KEEPER_FD"
LOCK = "lock"
"""Name of the runtime directory's lock, among what is held, and of its file."""
LISTEN = "listen:"
"""Names of listening sockets begin with it."""
STATUS = "keeper.json"
"""File in the runtime directory that says how the keeper fares."""
MAX_MESSAGE = 4096
MAX_DELAY = 5.0
_AT_ONCE = 3
"""Deaths within the window after which the next daemon is started at once: engines wait. Each further one doubles a
delay."""
_STATUS_PAUSE = 0.5
"""Seconds at least between two writings of the status that only say how much is held."""
_ANYBODYS = 0o1002
"""Mode bits of a folder such as /tmp, in which anybody may make anything that is not there yet."""
_KILLED = 128
"""Exit codes from here on stand for signals, as in a shell."""
_HAND_OVER_DEADLINE = 10.0
"""Seconds that a daemon may take to make room for its successor."""


class Keeper:
    """Holds descriptors for the daemon that ``command`` starts, and keeps such a daemon running.

    ``limit`` deaths within ``window`` seconds, of whatever, are a crash loop: no further daemon is started until
    SIGHUP, what is held stays held. 0: no limit. ``refuses``: an ordered stop does not drop weights that are leased.
    """

    def __init__(self, command: list[str], folder: str, *, limit: int, window: float, refuses: bool = False) -> None:
        self._command = command
        self._folder = folder
        self._limit = limit
        self._window = window
        self._refuses = refuses
        self._held: dict[str, int] = {LOCK: lock(folder)}
        self._pid = 0
        self._channel: socket.socket | None = None
        self._outbox: deque[tuple[bytes, int]] = deque()
        self._deaths: deque[float] = deque()
        self._restarts = 0
        self._ends = {"crashed": 0, "killed": 0, "out_of_memory": 0, "replaced": 0}
        """Daemons by how they ended."""
        self._last_exit = ""
        self._reason = ""
        """Why the daemon that runs is about to end, in its own words."""
        self._start_at: float | None = 0.0
        """When to start the next daemon (monotonic seconds); None: one is running, or none is to be."""
        self._kill_at: float | None = None
        self._stopping = False
        self._agreed = False
        """Whether the daemon has said that it drops everything and ends."""
        self._oom_kills: int | None = None
        """What the control group had counted when the daemon was started."""
        self._status_at: float | None = None
        """When to write the status (monotonic seconds); None: it is true."""
        self._status_written = 0.0
        self._replacing = False
        self._served = False
        """Whether any daemon ever did."""
        self._serving = False
        """Whether this one does."""
        self._failed_starts = 0
        """Daemons, one after another, that died without having served."""
        self._wakeup, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, _only_wake)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))  # held back by weightd serve, as PID 1

    def run(self) -> int:
        """Keep a daemon running until an ordered stop; returns its exit code."""
        while True:
            now = time.monotonic()
            if self._start_at is not None and now >= self._start_at:
                self._start()
            if self._kill_at is not None and now >= self._kill_at:
                self._kill_at = None
                log(f"the daemon, pid {self._pid}, does not make room: killing it")
                os.kill(self._pid, signal.SIGKILL)
            if self._status_at is not None and now >= self._status_at:
                self._write_status()
            for number in self._wait():
                self._signalled(number)
            code = self._reap()
            if code is not None and (self._may_end() or not (self._served or code >= _KILLED)):
                self._clean()
                return code
            if not self._pid and self._may_end():
                self._clean()
                return 0

    def _may_end(self) -> bool:
        """Whether an ordered stop is all that there is left to do, once no daemon runs."""
        if not self._stopping:
            return False
        # Names with a colon at their front are of what the daemon itself works with, no weights.
        weights = any(name != LOCK and ":" not in name.partition("/")[0] for name in self._held)
        return self._agreed or not (self._refuses and weights)

    # ------------------------------------------------------------------ events

    def _wait(self) -> bytes:
        """Serve the daemon's messages until something else is to be done; returns the signals that came."""
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        channel = self._channel
        if channel is not None:
            poll.register(channel, select.POLLIN | (select.POLLOUT if self._outbox else 0))
        due = min((at for at in (self._start_at, self._kill_at, self._status_at) if at is not None), default=None)
        timeout = None if due is None else max(0.0, due - time.monotonic()) * 1000 + 1
        signals = b""
        for fd, events in poll.poll(timeout):
            if fd == self._wakeup:
                signals = os.read(self._wakeup, 4096)
            elif channel is not None:
                if events & select.POLLOUT:
                    self._send(channel)
                if events & (select.POLLIN | select.POLLHUP | select.POLLERR) and not self._receive(channel):
                    self._hang_up()
        return signals

    def _receive(self, channel: socket.socket) -> bool:
        """Take one message; whether the daemon's end is still open."""
        try:
            data, fds, flags, _ = socket.recv_fds(channel, MAX_MESSAGE, 4)
        except BlockingIOError:
            return True
        except OSError:
            return False
        for fd in fds:
            os.set_inheritable(fd, False)
        if not data:
            return False
        verb, _, name = data.decode("utf-8", "replace").partition(" ")
        if verb == "put" and name and name != LOCK and len(fds) == 1 and not flags & socket.MSG_CTRUNC:
            if name in self._held:
                os.close(self._held[name])
            self._held[name] = fds.pop()
            self._held_changed()
        elif verb == "drop" and name and name != LOCK:
            self._drop(name)
        elif verb == "up":
            self._served = self._serving = True
            self._write_status()
        elif verb == "refuse":
            self._stopping = False
        elif verb == "stopping":
            self._agreed = self._stopping
        elif verb == "dying":
            self._reason = name
        elif verb == "list":
            self._outbox.extend((f"held {held}".encode(), fd) for held, fd in self._held.items())
            self._outbox.append((b"end", -1))
        elif verb == "put":
            log(f"cannot hold {name[:80]!r}: no descriptor is left (ulimit -n), it will not outlive the daemon")
        else:
            log(f"a message that means nothing here: {verb[:20]!r} {name[:80]!r} with {len(fds)} descriptors")
        for fd in fds:
            os.close(fd)
        return True

    def _drop(self, name: str) -> None:
        for held in [held for held in self._held if held == name or held.startswith(name + "/")]:
            os.close(self._held.pop(held))
            self._held_changed()

    def _held_changed(self) -> None:
        if self._status_at is None:
            self._status_at = max(time.monotonic(), self._status_written + _STATUS_PAUSE)

    def _send(self, channel: socket.socket) -> None:
        try:
            while self._outbox:
                data, fd = self._outbox[0]
                socket.send_fds(channel, [data], [fd] if fd >= 0 else [])
                self._outbox.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self._outbox.clear()  # it is dying: its end says so

    def _hang_up(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._outbox.clear()

    def _signalled(self, number: int) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            self._stopping = True
            if self._channel is not None:
                self._outbox.append((b"stop", -1))
                self._send(self._channel)
            elif self._may_end():
                self._start_at = None
            elif self._start_at is not None:
                self._start_at = 0.0  # the next daemon is to decide, and now
            else:
                self._refuse_stop()
        elif number == signal.SIGHUP and not self._stopping:
            self._deaths.clear()
            if self._pid:
                self._replacing = True
                self._kill_at = time.monotonic() + _HAND_OVER_DEADLINE
                os.kill(self._pid, signal.SIGTERM)
            else:
                self._start_at = 0.0

    # ------------------------------------------------------------------ the daemon

    def _start(self) -> None:
        self._start_at, self._agreed = None, False
        self._oom_kills = control_groups.oom_kills()
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.setblocking(False)  # a daemon that reads nothing holds up nobody; send_fds passes no flags on
        theirs.set_inheritable(True)
        environment = {**os.environ, FD_VARIABLE: str(theirs.fileno())}
        try:
            # A process group of its own: a terminal's Ctrl-C is for the keeper, which then orders the stop.
            self._pid = os.posix_spawn(
                self._command[0],
                self._command,
                environment,
                setpgroup=0,
                setsigdef=[signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD],
            )
        except OSError as error:
            self._hang_up()
            if not self._served:
                fail(f"{self._command[0]} cannot be started: {error}")
            self._died(f"cannot be started: {error}")
        finally:
            theirs.close()
        if self._stopping and self._channel is not None:
            self._outbox.append((b"stop", -1))
        self._write_status()

    def _reap(self) -> int | None:
        """Take the exit codes of all children that have ended; returns the daemon's where it is among them."""
        code = None
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            if pid == self._pid:
                code = os.waitstatus_to_exitcode(status)
        if code is None:
            return None
        while self._channel is not None and self._receive_left(self._channel):
            pass  # what it said before it died counts
        self._hang_up()
        self._pid, self._kill_at = 0, None
        if not self._may_end() and (self._served or code < 0):
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            end = "killed" if code == -signal.SIGKILL else "crashed"
            if end == "killed" and (control_groups.oom_kills() or 0) > (self._oom_kills or 0):
                end, self._reason = "out_of_memory", "the kernel had no memory left for it (oom_kill of its cgroup)"
            if self._reason:
                how, self._reason = f"{how}: {self._reason}", ""
            self._died(how, end)
        return code if code >= 0 else _KILLED - code

    def _receive_left(self, channel: socket.socket) -> bool:
        ready, _, _ = select.select([channel], [], [], 0)
        return bool(ready) and self._receive(channel)

    def _died(self, how: str, end: str = "crashed") -> None:
        now = time.monotonic()
        self._restarts += 1
        self._last_exit = how
        self._failed_starts = 0 if self._serving else self._failed_starts + 1
        self._serving = False
        self._ends["replaced" if self._replacing else end] += 1
        if self._replacing:
            self._replacing = False
            log("the daemon has made room for its successor")
            self._start_at = now
            return
        self._deaths.append(now)
        while self._deaths[0] < now - self._window:
            self._deaths.popleft()
        count = len(self._deaths)
        if self._limit and count >= self._limit:
            log(
                f"the daemon died ({how}), {count} times within {self._window:g} s: not starting it again "
                f"(WEIGHTD_RESTART_LIMIT). {len(self._held)} descriptors stay held; 'weightd reload' tries again"
            )
            # Whoever connects is to be refused now, not to wait for ever.
            for name in [name for name in self._held if name.startswith(LISTEN)]:
                self._drop(name)
            if self._stopping:
                self._refuse_stop()
        else:
            # At once where it served and seldom dies: engines wait.
            doublings = max(self._failed_starts, count - _AT_ONCE) - 1
            delay = min(MAX_DELAY, 0.1 * 2.0 ** min(doublings, 10)) if doublings >= 0 else 0.0
            log(f"the daemon died ({how}): starting it again" + (f" in {delay:g} s" if delay else ""))
            self._start_at = now + delay
        self._write_status()

    def _refuse_stop(self) -> None:
        """No daemon is there to say whether weights are leased, nor is one to be."""
        self._stopping = False
        log(
            f"not stopping: {len(self._held)} descriptors are held, and no daemon runs that knows whether they are "
            f"leased (WEIGHTD_ON_STOP=refuse): 'weightd reload' starts one; kill -9 {os.getpid()} drops them all"
        )

    # ------------------------------------------------------------------ the runtime directory

    def _write_status(self) -> None:
        self._status_at, self._status_written = None, time.monotonic()
        state = "running" if self._pid else "stopping" if self._stopping else "restarting"
        if not self._pid and not self._stopping and self._start_at is None:
            state = "crash loop"
        status = {
            "pid": os.getpid(),
            "daemon_pid": self._pid,
            "state": state,
            "serving": self._serving,
            "restarts": self._restarts,
            "ends": self._ends,
            "last_exit": self._last_exit,
            "held": len(self._held),
        }
        path = f"{self._folder}/{STATUS}"
        try:
            with open(f"{path}.new", "w") as file:
                json.dump(status, file)
            os.replace(f"{path}.new", path)
        except OSError as error:
            log(f"cannot say in {path} how things are: {error}")

    def _clean(self) -> None:
        try:  # noqa: SIM105 - contextlib is one more module to hold
            os.unlink(f"{self._folder}/{STATUS}")
        except OSError:
            pass


def lock(folder: str) -> int:
    """Create the runtime directory where it is missing, and lock it. Exits naming the holder where there is one."""
    path = f"{folder}/{LOCK}"
    try:
        os.makedirs(folder, mode=0o750, exist_ok=True)
        above = os.stat(os.path.dirname(os.path.abspath(folder))).st_mode
        owner = os.lstat(folder).st_uid
        if above & _ANYBODYS == _ANYBODYS and owner not in (0, os.geteuid()):
            fail(
                f"{folder} was made by uid {owner}, who may put there what is to be overwritten: remove it, or choose "
                "another --runtime-dir"
            )
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        fail(f"cannot use the runtime directory {folder}: {error.strerror}: {error.filename}")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(fd, 32).decode("ascii", "replace").strip()
        fail(
            f"{folder} is in use by another weightd, pid {holder or 'unknown'}: stop it, "
            "or choose another --runtime-dir"
        )
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def log(text: str) -> None:
    """One line on stderr, as the daemon's are (``weightd.daemon.observing.logs``)."""
    form = os.environ.get("WEIGHTD_LOG_FORMAT", "auto")
    try:
        if form == "text" or (form != "json" and sys.stderr.isatty()):
            line = f"{time.strftime('%H:%M:%S')}     INFO    keeper: {text}"
        else:
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            line = json.dumps({"time": now, "level": "info", "logger": "weightd.keeper", "message": text})
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    except OSError:
        pass  # whoever read it is gone; what is held matters more


def fail(text: str) -> NoReturn:
    """End for a reason that the user can do something about."""
    sys.exit(f"weightd: {text}")


def _only_wake(number: int, frame: object) -> None:
    """What is to be done is done in the loop, which the wakeup descriptor wakes."""


def main() -> int:
    """The process. Settings have been checked by ``weightd serve``."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    environment = os.environ
    keeper = Keeper(
        sys.argv[1:],
        environment["WEIGHTD_RUNTIME_DIR"],
        limit=int(environment.get("WEIGHTD_RESTART_LIMIT", "10")),
        window=float(environment.get("WEIGHTD_RESTART_WINDOW", "60")),
        refuses=environment.get("WEIGHTD_ON_STOP") == "refuse",
    )
    return keeper.run()
