"""Reading other processes' memory through NIXL, over UCX: RDMA, NVLink, shared memory or TCP, whichever reaches it.

What the bindings (nixl_cu12 1.5.1 with UCX 1.23) do not do, and what is done about it here, stands beside each call.
Three things nothing here can mend, so that who holds an agent must be able to lose the process:

- Over TCP UCX moves bytes by having the other process read or write whatever address it is told, registered or not.
  Whoever reaches its port, or hands over made-up metadata, can read and write this process, or end it.
- A transfer that is cut off, by the end of the reader or of the network, can end the process that is being *read*
  (over TCP: assertion below ``uct_tcp_ep_pending_purge``, or "unexpected error: Endpoint timeout"; 10 times of 12 where
  it was stalled meanwhile); so can unmapping memory that somebody still reads.
- A transfer cannot be cancelled (ai-dynamo/nixl#2044, #2067): releasing it says "success" while bytes keep landing.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from weightd.daemon.peers.moving import paths
from weightd.daemon.peers.moving.bindings import NixlUnavailable, load
from weightd.daemon.peers.moving.metadata import NAME, pack, unpack

_IDLE_POLL_US = 100_000
"""How often the progress thread looks by itself. It is woken by its descriptors; this is for lost wake-ups."""

_LOOK_SECONDS = 1.0
"""For how long it is taken that a peer is still read by the same transport; UCX can go on by another one."""


class TransferFailed(RuntimeError):
    """The peer is gone, cannot be reached or cannot be read. Nothing lands any more, unless ``landing`` is True."""

    def __init__(self, message: str, *, landing: bool = False) -> None:
        super().__init__(message)
        self.landing = landing


class Agent:
    """One end of transfers, with a thread of its own that serves what peers ask for. To be used from any threads.

    After the first, an agent costs 16 ms, 20 descriptors and a thread, so that each transfer of many bytes can have its
    own: ``close`` is the only thing that ends transfers for certain.
    """

    def __init__(self, name: str | None = None) -> None:
        """``name`` is unique among all peers, for ever: by default it is random. Raises NixlUnavailable."""
        self.name = name or f"weightd-{secrets.token_hex(8)}"
        if not NAME.fullmatch(self.name.encode()):
            raise ValueError(f"not a name for an agent: {self.name!r}")
        self.nixl: Any = load()
        self.regions: list[Region] = []
        self.transfers: set[Transfer] = set()
        """Those that may still write to local memory."""
        self.peers: dict[str, Peer] = {}
        self._idle = threading.Condition()
        self._calls = 0
        self._closing = False
        config = self.nixl.nixlAgentConfig()
        config.useProgThread = True  # without it a target serves nothing while its Python does something else
        config.useListenThread = False
        config.pthrDelay = _IDLE_POLL_US
        config.syncMode = self.nixl.NIXL_THREAD_SYNC_RW  # STRICT would have every call wait for a post, which may copy
        try:
            self.raw: Any = self.nixl.nixlAgent(self.name, config)
            """The agent of the bindings. No frame keeps it in a variable: a traceback would then keep it alive."""
            self.backend: int = self.raw.createBackend("UCX", {})
        except Exception as error:  # classes of NIXL's own, all below Exception
            raise NixlUnavailable(
                f"NIXL does not start ({error!r}): see what it says on stderr, and look at UCX_TLS and UCX_NET_DEVICES"
            ) from error

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Around calls to ``raw``: ``close`` waits for them. Raises RuntimeError once closed."""
        with self._idle:
            if self._closing:
                raise RuntimeError(f"agent {self.name} is closed")
            self._calls += 1
        try:
            yield
        finally:
            with self._idle:
                self._calls -= 1
                self._idle.notify_all()

    def register(self, address: int, nbytes: int, *, gpu: int | None = None) -> Region:
        """Make memory readable for peers that are given its metadata, and readable into. Raises ValueError.

        It may be mapped read-only to be read from. Takes next to nothing without RDMA, whatever the size; pins it with.
        """
        if nbytes <= 0 or address <= 0:
            raise ValueError(f"no memory: {nbytes} bytes at {address:#x}")
        region = Region(self, address, nbytes, gpu)
        with self.calling():
            try:
                self.raw.registerMem(region.descriptors, [self.backend])
            except Exception as error:
                raise ValueError(f"NIXL cannot register {nbytes} bytes at {address:#x}: {error!r}") from error
        self.regions.append(region)
        return region

    def add_peer(self, metadata: bytes) -> Peer:
        """Connect to the owner of a region by its ``metadata``. One peer per name at a time.

        Raises ValueError where it is not intact or not metadata, TransferFailed where the peer cannot be reached. What
        is intact is believed: one wrong byte in it can end this process, so it has to come from a trusted daemon.
        """
        name, blob = unpack(metadata)
        peer = Peer(self, name)
        if name == self.name or self.peers.setdefault(name, peer) is not peer:
            raise ValueError(f"there is an agent {name} already")
        try:
            peer.load(blob)
        except BaseException:
            peer.close()
            raise
        return peer

    def close(self, *, drain: float = 5.0) -> None:
        """End it: afterwards nothing writes to any region any more. Idempotent. Some ms.

        Waits up to ``drain`` seconds for transfers first, because cutting one off can end the peer's process. What it
        serves to others is cut off: tell them first.
        """
        limit = time.monotonic() + drain
        for transfer in list(self.transfers):
            with contextlib.suppress(RuntimeError):
                transfer.abandon(max(limit - time.monotonic(), 0.0))
        with self._idle:
            if self._closing:
                return
            self._closing = True
            self._idle.wait_for(lambda: not self._calls)
        for transfer in list(self.transfers):
            transfer.cut_off()
        # Regions are not deregistered one by one: that would free what a transfer under way still points to.
        alive = weakref.ref(self.raw)
        self.raw = None  # the last reference: joins the progress thread, destroys the worker and so every endpoint
        if alive() is not None:
            raise RuntimeError(f"agent {self.name} is still in use: transfers may go on")
        self.transfers.clear()
        self.regions.clear()
        self.peers.clear()


class Region:
    """Memory that transfers read from or write to. Its owner keeps it mapped until this, or the agent, is closed."""

    def __init__(self, agent: Agent, address: int, nbytes: int, gpu: int | None) -> None:
        """Use ``Agent.register``."""
        self.agent = agent
        self.address = address
        self.nbytes = nbytes
        self.gpu = gpu
        self.descriptors: Any = agent.nixl.nixlRegDList(kind(agent, gpu), [(address, nbytes, gpu or 0, "")])

    def metadata(self) -> bytes:
        """What a peer needs to read this region, and no other of the agent: some hundred bytes, not secret, no key."""
        with self.agent.calling():
            blob: bytes = self.agent.raw.getLocalPartialMD(self.descriptors, True, [self.agent.backend])
        return pack(blob)

    def close(self) -> None:
        """Deregister it. Raises RuntimeError while transfers may still write to it. Idempotent.

        That does not stop peers from reading it: the memory must not be unmapped before they have said that they are
        done, or are known to be dead. Over TCP unmapping ends this process (SIGSEGV), elsewhere the peer's transfer.
        """
        landing = sum(transfer.region is self for transfer in list(self.agent.transfers))
        if landing:
            raise RuntimeError(f"{landing} transfers may still write to it: wait, abandon them, or close the agent")
        if self in self.agent.regions:
            with self.agent.calling():
                self.agent.raw.deregisterMem(self.descriptors, [self.agent.backend])
            self.agent.regions.remove(self)


class Peer:
    """Another agent, from which this one reads."""

    def __init__(self, agent: Agent, name: str) -> None:
        """Use ``Agent.add_peer``."""
        self.agent = agent
        self.name = name
        self.transport = paths.UNKNOWN
        """By what it is read: rdma, cuda_ipc, shm, tcp or unknown. Known from the first read on."""
        self._look_at = 0.0

    def extend(self, metadata: bytes) -> None:
        """Learn of a further region of the same peer. Raises as ``Agent.add_peer`` does.

        Regions are never forgotten: when the peer has replaced one, close this and add it again.
        """
        name, blob = unpack(metadata)
        if name != self.name:
            raise ValueError(f"metadata of {name}, not of {self.name}")
        self.load(blob)

    def load(self, blob: bytes) -> None:
        """Give NIXL its own form of metadata."""
        nixl = self.agent.nixl
        with self.agent.calling():
            try:
                self.agent.raw.loadRemoteMD(blob)
            except (nixl.nixlMismatchError, nixl.nixlInvalidParamError, nixl.nixlNotFoundError) as error:
                # What it has taken in until then stays: the name cannot be used with this agent any more.
                raise ValueError(f"NIXL does not understand the metadata of {self.name}: {error!r}") from error
            except Exception as error:
                raise TransferFailed(f"{self.name} cannot be reached: {error!r}") from error

    def read(self, pairs: Sequence[tuple[int, int, int]], region: Region, *, gpu: int | None = None) -> Transfer:
        """Start reading (local address, remote address, bytes) into a local region, from the peer's memory or its GPU.

        One transfer of 1 to 64 MiB in all, some at a time, is best. Within a machine this may return only when all is
        copied (CMA); drops the GIL. Raises ValueError for addresses outside of the region or of what the peer has
        registered, TransferFailed when the peer is gone.
        """
        ours = self.agent
        if not pairs or region.agent is not ours:
            raise ValueError("nothing to read, or into a region of another agent")
        for local, remote, nbytes in pairs:
            if nbytes <= 0 or remote < 0 or local < region.address or local + nbytes > region.address + region.nbytes:
                raise ValueError(f"{nbytes} bytes from {remote:#x} to {local:#x}: not within the region")
        into = ours.nixl.nixlXferDList(
            kind(ours, region.gpu), [(local, nbytes, region.gpu or 0) for local, _, nbytes in pairs]
        )
        source = ours.nixl.nixlXferDList(kind(ours, gpu), [(remote, nbytes, gpu or 0) for _, remote, nbytes in pairs])
        with ours.calling():
            try:
                handle = ours.raw.createXferReq(ours.nixl.NIXL_READ, into, source, self.name, "", [ours.backend])
            except (ours.nixl.nixlNotFoundError, ours.nixl.nixlInvalidParamError) as error:
                raise ValueError(f"{self.name} offers no such memory, or it is not known yet: {error!r}") from error
            except Exception as error:
                raise TransferFailed(f"{self.name}: {error!r}") from error
            transfer = Transfer(self, region, handle, sum(nbytes for _, _, nbytes in pairs))
            transfer.post()
            # Only now: NIXL estimates without a look at whether the endpoint is still there, which posting has shown.
            self._look(max(pairs, key=lambda pair: pair[2]), region, gpu)
            transfer.transport = self.transport
        return transfer

    def _look(self, pair: tuple[int, int, int], region: Region, gpu: int | None) -> None:
        """Find out by what it is read. Some 100 µs, once in a while."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_SECONDS
        self.transport = paths.UNKNOWN
        ours, (local, remote, nbytes) = self.agent, pair
        with contextlib.suppress(Exception):  # NIXL's own; nothing depends on what is found
            into = ours.nixl.nixlXferDList(kind(ours, region.gpu), [(local, nbytes, region.gpu or 0)])
            source = ours.nixl.nixlXferDList(kind(ours, gpu), [(remote, nbytes, gpu or 0)])
            handle = ours.raw.createXferReq(ours.nixl.NIXL_READ, into, source, self.name, "", [ours.backend])
            try:
                microseconds, *_ = ours.raw.estimateXferCost(handle)
            finally:
                ours.raw.releaseXferReq(handle)
            gpus = (region.gpu is not None) + (gpu is not None)
            self.transport = paths.transport(ours.name, nbytes, microseconds, gpus=gpus)

    def close(self) -> None:
        """Forget it. Raises RuntimeError while transfers from it may still write. Idempotent."""
        landing = sum(transfer.peer is self for transfer in list(self.agent.transfers))
        if landing:  # they would go on, and NIXL would not say when they end
            raise RuntimeError(f"{landing} transfers from it may still write: wait, abandon them, or close the agent")
        if self.agent.peers.get(self.name) is self:
            nixl = self.agent.nixl
            with contextlib.suppress(nixl.nixlNotFoundError, nixl.nixlInvalidParamError), self.agent.calling():
                self.agent.raw.invalidateRemoteMD(self.name)
            del self.agent.peers[self.name]


class Transfer:
    """Bytes on their way from a peer. ``nbytes`` in all; NIXL does not say how many have come."""

    def __init__(self, peer: Peer, region: Region, handle: int, nbytes: int) -> None:
        """Use ``Peer.read``."""
        self.peer = peer
        self.region = region
        self.nbytes = nbytes
        self.transport = paths.UNKNOWN
        """By what it is read, as ``Peer.transport``."""
        self._agent = peer.agent
        self._handle: int | None = handle
        self._failure: str | None = None
        self._landing = True
        self._lock = threading.Lock()  # a handle that is released while it is looked at is used after free (#1955)

    def post(self) -> None:
        """Start it. Raises TransferFailed."""
        self._agent.transfers.add(self)
        with self._lock:
            try:
                if self._agent.raw.postXferReq(self._handle, "") == self._agent.nixl.NIXL_SUCCESS:
                    self._settle()
            except Exception as error:
                self._fail(error)
                raise self._failed() from error

    def done(self) -> bool:
        """Whether all bytes are there. Raises TransferFailed, each time."""
        with self._lock:
            if self._failure is None and self._handle is not None:
                with self._agent.calling():
                    try:
                        if self._agent.raw.getXferStatus(self._handle) == self._agent.nixl.NIXL_SUCCESS:
                            self._settle()
                    except Exception as error:
                        self._fail(error)
            if self._failure is not None:
                raise self._failed()
            return self._handle is None

    def wait(self, seconds: float) -> None:
        """Return when all bytes are there. Raises TransferFailed, and TimeoutError, after which it still goes on.

        A peer that is killed is noticed within milliseconds; one that is stopped, or behind a dead network, is not.
        """
        limit = time.monotonic() + seconds
        pause = 50e-6
        while not self.done():
            if time.monotonic() > limit:
                raise TimeoutError(f"{self.nbytes} bytes from {self.peer.name} have not come in {seconds:g} s")
            time.sleep(pause)
            pause = min(pause * 1.5, 1e-3)

    def abandon(self, seconds: float = 0.0) -> bool:
        """Whether it is certain that nothing of it writes any more; waits up to ``seconds`` for that.

        Where it is not: keep the memory, ask again later, or close the agent.
        """
        try:
            self.wait(seconds)
        except TransferFailed as error:
            return not error.landing
        except TimeoutError:
            return False
        return True

    def cut_off(self) -> None:
        """For ``Agent.close``: release the handle, which does not stop it, right before the agent goes, which does."""
        with self._lock:
            if self._failure is None:
                self._failure = f"agent {self._agent.name} was closed"
            self._settle()

    def _settle(self) -> None:
        """Nothing of it lands any more."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with contextlib.suppress(Exception):
                self._agent.raw.releaseXferReq(handle)
        self._landing = False
        self._agent.transfers.discard(self)

    def _fail(self, error: Exception) -> None:
        """Note an error. When the connection is gone, so is everything on it; after any other, parts may still land."""
        self._failure = repr(error)
        if isinstance(error, self._agent.nixl.nixlRemoteDisconnectError):
            self._settle()

    def _failed(self) -> TransferFailed:
        return TransferFailed(
            f"{self.nbytes} bytes from {self.peer.name} failed: {self._failure}", landing=self._landing
        )


def kind(agent: Agent, gpu: int | None) -> Any:
    """NIXL's kind of memory for a GPU's ordinal, or for None, host memory."""
    return agent.nixl.DRAM_SEG if gpu is None else agent.nixl.VRAM_SEG
