"""A process of its own that moves bytes between nodes: it holds NIXL's agent, which can end the process that has it.

``python -m weightd.daemon.peers.moving.mover FD``, at the other end of the daemon's socket pair. It is given memory by
descriptor, which it maps: to be read by peers, read-only, or to be read into.

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
import os
import select
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

from weightd.daemon.devices.host_memory import RawMapping
from weightd.ipc import wire

if TYPE_CHECKING:
    from weightd.daemon.peers.moving.nixl import Agent, Peer, Region, Transfer

_POLL_MS = (1.0, 10.0)
"""Milliseconds between looks at transfers under way, of which NIXL says nothing by itself: more as nothing happens."""


class _Process:
    """What runs at the other end."""

    def __init__(self, channel: socket.socket) -> None:
        # Only here: what is wrong with NIXL is said to the daemon.
        from weightd.daemon.peers.moving.nixl import Agent
        from weightd.daemon.peers.moving.self_test import self_test

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
