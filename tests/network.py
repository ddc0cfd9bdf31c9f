"""Machines of a network, made of network namespaces: links with a rate, that can be cut, on one kernel.

A bridge in a namespace of its own, and a namespace for each node, joined to it by a pair of virtual interfaces. Nothing
of the machine's own network changes. For root on Linux; elsewhere ``Missing`` says what is in the way.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.servers import Daemon, Missing, Place

PEER_PORT = 7401
_CLONE_NEWNET = 0x40000000
_MTU = 9000  # with 1500 nearly 5 % of what a link carries would be headers
_NAME = "weightd-test-{pid}-{number}-{what}"
_libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count()


class Node(Place):
    """One machine: what runs there sees its link and its own loopback, and no other network."""

    def __init__(self, network: Network, name: str, host: str, port: str) -> None:
        self.name = name
        """Of its namespace."""
        self.host = host
        self._network = network
        self._port = port
        # Not nsenter: this one mounts the namespace's own /sys as well, where UCX looks for interfaces.
        self.command = [_tool("ip"), "netns", "exec", name]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Sockets that this thread makes within the block belong to the node, and stay its own afterwards."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter(f"/run/netns/{self.name}")
            try:
                yield
            finally:
                _set(before)
        finally:
            os.close(before)

    def limit(self, rate: int | None) -> None:
        """Bytes a second that its link carries, each way; None for no limit."""
        for namespace, device in ((self.name, "eth0"), (self._network.hub, self._port)):
            if rate is None:
                _run("tc", "-n", namespace, "qdisc", "del", "dev", device, "root", check=False)
                continue
            # A burst below one offloaded packet, 64 KiB, would have it taken apart; more than this would be no limit.
            shape = ["rate", f"{8 * rate}bit", "burst", str(max(128 << 10, rate // 100)), "latency", "50ms"]
            _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf", *shape)

    def cut(self) -> None:
        """Drop all that comes and goes, without a word: its interface stays up, as behind a switch that has died."""
        _run("ip", "-n", self._network.hub, "link", "set", self._port, "nomaster")

    def mend(self) -> None:
        """Undo a cut."""
        _run("ip", "-n", self._network.hub, "link", "set", self._port, "master", "hub")

    @property
    def sent(self) -> int:
        """Bytes that it has put on its link so far, headers included."""
        return self._counter("tx")

    @property
    def received(self) -> int:
        return self._counter("rx")

    def _counter(self, way: str) -> int:
        (link,) = json.loads(_run("ip", "-n", self.name, "-s", "-j", "link", "show", "eth0"))
        return int(link["stats64"][way]["bytes"])

    @property
    def timeouts(self) -> int:
        """How often its TCP has sent something again because no answer came."""
        with self.entered():
            names, values = Path("/proc/thread-self/net/netstat").read_text().splitlines()[:2]
        found: Mapping[str, str] = dict(zip(names.split(), values.split(), strict=True))
        return int(found["TCPTimeouts"])

    def run(self, *command: str) -> str:
        """Run a command there; returns its output. Raises RuntimeError with what it said."""
        return _run(*self.command, *command)


class Network:
    """So many nodes, used in a ``with`` block, which ends all that still runs there and removes everything.

    ``rate``: bytes a second of each link, each way. Nodes can be added, and links limited, at any time.
    """

    def __init__(self, count: int, rate: int | None = None) -> None:
        self._number = next(_numbers)
        self._count = count
        self._rate = rate
        self._namespaces: list[str] = []
        self.hub = ""
        self.nodes: list[Node] = []

    def __enter__(self) -> Network:
        if os.geteuid():
            raise Missing("network namespaces: only root can make them")
        for name in _namespaces():
            _remove_if_left(name)
        try:
            self.hub = self._namespace("hub")
            _run("ip", "-n", self.hub, "link", "add", "hub", "mtu", str(_MTU), "type", "bridge")
            _run("ip", "-n", self.hub, "link", "set", "hub", "up")
            for _ in range(self._count):
                self.add()
        except RuntimeError as error:
            self.__exit__()
            raise Missing(f"network namespaces cannot be made here: {error}") from None
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._namespaces:
            _remove(name)
        self._namespaces.clear()

    def add(self) -> Node:
        """Another node."""
        number = len(self.nodes) + 1
        node = Node(self, self._namespace(str(number)), f"10.77.{number >> 8}.{number & 255}", f"node{number}")
        link = ["name", node._port, "mtu", str(_MTU), "type", "veth", "peer", "name", "eth0", "mtu", str(_MTU)]
        _run("ip", "-n", self.hub, "link", "add", *link, "netns", node.name)
        _run("ip", "-n", self.hub, "link", "set", node._port, "master", "hub", "up")
        _run("ip", "-n", node.name, "address", "add", f"{node.host}/16", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run("ip", "-n", node.name, "link", "set", device, "up")
        if self._rate is not None:
            node.limit(self._rate)
        self.nodes.append(node)
        return node

    def cpu_seconds(self) -> float:
        """CPU time of all that runs there, with that of its children that have ended."""
        found = 0
        for name in self._namespaces:
            for pid in _run("ip", "netns", "pids", name).split():
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                    found += sum(map(int, fields[11:15]))
        return found / os.sysconf("SC_CLK_TCK")

    def _namespace(self, what: str) -> str:
        name = _NAME.format(pid=os.getpid(), number=self._number, what=what)
        _run("ip", "netns", "add", name)
        self._namespaces.append(name)
        return name


def daemons_on(
    nodes: Sequence[Node], folder: Path, *arguments: str, peers: str = "", env: Mapping[str, str]
) -> list[Daemon]:
    """A daemon for each node, not started yet, that know each other: by a static list, or by what ``peers`` says."""
    common = {
        "UCX_TLS": "tcp",  # within one kernel it would copy from process to process, beside the links
        "UCX_NET_DEVICES": "eth0",
        "WEIGHTD_PEERS": peers or "static:" + ",".join(f"{node.host}:{PEER_PORT}" for node in nodes),
        "WEIGHTD_PEER_TOKEN": "fleet",
        **env,
    }
    return [
        Daemon(
            folder / node.name.rpartition("-")[2],  # a socket's path has to be short
            *arguments,
            env={**common, "WEIGHTD_PEER_LISTEN": f"{node.host}:{PEER_PORT}"},
            place=node,
        )
        for node in nodes
    ]


def at_once(do: Callable[[Daemon], object], daemons: Iterable[Daemon]) -> None:
    """Do the same with all of them at the same time, as starting or stopping. Raises the first error."""
    with ThreadPoolExecutor(64) as pool:
        list(pool.map(do, daemons))


def _tool(name: str) -> str:
    # Not every shell of root has the administrator's folders in its path.
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        raise Missing(f"{name} is not installed: apt-get install iproute2")
    return path


def _run(tool: str, *arguments: str, check: bool = True) -> str:
    result = subprocess.run([_tool(tool), *arguments], capture_output=True, text=True, check=False)
    if check and result.returncode:
        raise RuntimeError(f"{' '.join([tool, *arguments])}: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def _enter(path: str) -> None:
    namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _set(namespace)
    finally:
        os.close(namespace)


def _set(namespace: int) -> None:
    if _libc.setns(namespace, _CLONE_NEWNET):  # of the thread alone; os.setns came with Python 3.12
        raise OSError(ctypes.get_errno(), "setns")


def _namespaces() -> Sequence[str]:
    try:
        return os.listdir("/run/netns")
    except FileNotFoundError:
        return []


def _remove_if_left(name: str) -> None:
    """Remove what a run that was killed has left."""
    found = re.fullmatch(_NAME.format(pid=r"(\d+)", number=r"\d+", what=r"\w+"), name)
    if found and not os.path.exists(f"/proc/{found[1]}"):
        _remove(name)


def _remove(name: str) -> None:
    end = time.monotonic() + 10
    while (pids := _run("ip", "netns", "pids", name, check=False).split()) and time.monotonic() < end:
        for pid in pids:
            if int(pid) != os.getpid():  # one of our threads may be there just now
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.02)
    _run("ip", "netns", "del", name, check=False)
