"""Whether NIXL works here at all, before anything is trusted to it."""

from __future__ import annotations

import ctypes
import mmap
import secrets

from weightd.daemon.peers.moving.bindings import NixlUnavailable
from weightd.daemon.peers.moving.nixl import Agent, Peer, Region, TransferFailed

_kept: list[tuple[mmap.mmap, mmap.mmap]] = []
"""Buffers of self-tests that have failed."""


def self_test(agent: Agent) -> None:
    """Read random bytes from the agent to itself, at odd offsets, and compare. Raises NixlUnavailable. Some ms."""
    size = 1 << 20
    source, target = mmap.mmap(-1, size), mmap.mmap(-1, size)
    source[:] = secrets.token_bytes(size)
    expected = bytearray(size)
    pairs = [(13, 1, 100_003), (100_017, 200_001, 1), (100_019, 300_007, 700_001)]
    addresses = [ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in (source, target)]
    regions: list[Region] = []
    try:
        regions += [agent.register(address, size) for address in addresses]
        there = [(addresses[1] + to, addresses[0] + at, nbytes) for to, at, nbytes in pairs]
        transfer = Peer(agent, agent.name).read(there, regions[1])
        transfer.wait(10)
    except (TransferFailed, TimeoutError, ValueError) as error:
        _kept.append((source, target))  # they may still be written to
        raise NixlUnavailable(f"NIXL's self-test failed ({error}): look at UCX_TLS and UCX_NET_DEVICES") from error
    for region in regions:
        region.close()
    for to, at, nbytes in pairs:
        expected[to : to + nbytes] = source[at : at + nbytes]
    if target[:] != expected:
        raise NixlUnavailable("NIXL's self-test failed: other bytes than were sent: do not use it on this machine")
