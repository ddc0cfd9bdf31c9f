"""One peer: a stage that is read from it beside NIXL itself and beside a plain copy over the same link."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import httpx

from tests.bench.checkpoints import language_model, many_tensors
from tests.bench.contender import ROOT, contend, die_with_parent
from tests.bench.from_file import where_the_time_went
from tests.bench.machine import require
from tests.bench.measure import (
    Row,
    Sample,
    Section,
    Target,
    address,
    faulted_memfd,
    fresh_memfd,
    gigabytes_per_second,
    interleave,
    milliseconds,
    timed,
    warm_memory,
)
from tests.bench.session import Session
from tests.network import Network, Node, at_once, daemons_on
from tests.peers.fleet import movers_at_work
from tests.servers import Daemon, Missing, free_ports
from weightd.daemon.peers.finding.listening import FORMAT
from weightd.daemon.peers.moving.movers import unavailable

MAX_SIZE = 2 << 30
LINK_RATE = 60_000_000
OF_NIXL, OF_LINK = 0.9, 0.95
TENSORS = (10, 10_000)
EACH = 1.0
"""Times that being told where 10,000 tensors lie may take as long as NIXL takes to register each of them."""
TRANSFER = 8 << 20
IN_FLIGHT = 4
TOKEN = "bench"


def run(session: Session) -> Section:
    """Measure; everything is made here and removed by the session."""
    size = min(session.size, MAX_SIZE)
    section = Section("peer", f"a stage from one peer, {size / 2**30:.2f} GiB, digests on")
    if why := unavailable():
        section.notes.append(f"not measured: {why}")
        return section
    require(session.folder, disk=2 * size, memory=4 * size + (1 << 30))
    session.progress("making the checkpoint")
    model = session.folder / "model"
    language_model(model, size)
    _same_machine(session, section, model)
    _registration(session, section)
    link_size = max(64 << 20, session.size // 8)
    try:
        _link(session, section, link_size)
    except Missing as missing:
        section.notes.append(f"over a link: not measured: {missing}")
    return section


def _local(session: Session, capacity: int, addresses: list[str]) -> list[AbstractContextManager[Daemon]]:
    """Daemons on this machine that know each other, not started."""
    env = {"WEIGHTD_PEERS": "static:" + ",".join(addresses), "WEIGHTD_PEER_TOKEN": TOKEN}
    return [session.daemon(own, capacity, {**env, "WEIGHTD_PEER_LISTEN": own}) for own in addresses]


def _staged(first: Daemon, model: Path) -> int:
    """Have a daemon stage a model; returns its bytes."""
    record = first.stage(model, wait=3600)
    if record["state"] != "ready":
        raise RuntimeError(f"the stage is {record['state']}: {record['error']}")
    nbytes: int = record["bytes_total"]
    return nbytes


def _from_peer(second: Daemon, model: Path, nbytes: int) -> Sample:
    """Stage what the peer has, in a process of its own. Raises RuntimeError where it did not come from the peer."""
    sample = contend("staging:stage", runtime_dir=str(second.runtime_dir), model=str(model), nbytes=nbytes, files=[])
    if sample["peer_bytes"] != nbytes:
        raise RuntimeError(f"{sample['peer_bytes']} of {nbytes} bytes came from the peer, all were to")
    return sample


# ---------------------------------------------------------------------- the same machine


def _same_machine(session: Session, section: Section, model: Path) -> None:
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    one, other = _local(session, int(1.2 * MAX_SIZE), addresses)
    with one as first, other as second:
        nbytes = _staged(first, model)
        session.progress("warming up")
        staging = partial(_from_peer, second, model, nbytes)
        section.samples["warm-up"] = [staging()]
        contenders: dict[str, Callable[[], Sample]] = {
            "NIXL, fresh": partial(contend, "peer:raw_read", nbytes=nbytes, fresh=True),
            "NIXL, faulted": partial(contend, "peer:raw_read", nbytes=nbytes, fresh=False),
            "weightd": staging,
        }
        samples = interleave(contenders, session.repetitions, session.progress)
    section.samples["the same machine"] = samples
    transport = f"{TRANSFER >> 20} MiB a transfer, {IN_FLIGHT} in flight, no digests"
    fresh = Row("NIXL READ between two processes", "GB/s", gigabytes_per_second(samples["NIXL, fresh"]))
    fresh.note = f"into a fresh memfd, as a segment is one; {transport}"
    faulted = Row("the same into memory that is there", "GB/s", gigabytes_per_second(samples["NIXL, faulted"]))
    ours = Row("weightd: POST /v1/stage until ready", "GB/s", gigabytes_per_second(samples["weightd"]))
    ours.note = "from a peer on this machine, whatever UCX finds for both"
    ours.at_least(OF_NIXL, fresh)
    section.rows += [fresh, faulted, ours]
    section.notes.append("weightd, median of all: " + where_the_time_went(samples["weightd"]))


def raw_read(nbytes: int, fresh: bool) -> Sample:
    """Contender: read memory of another process into a memfd, with NIXL and nothing else."""
    from weightd.daemon.peers.moving.nixl import Agent, Transfer

    source = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.peer", str(nbytes)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent,
    )  # fmt: skip
    assert source.stdout
    remote, metadata = json.loads(source.stdout.readline())
    agent = Agent()
    if fresh:
        warm_memory(nbytes)
        block = fresh_memfd(nbytes)
    else:
        _, block = faulted_memfd(nbytes)
    region = agent.register(address(block), nbytes)
    peer = agent.add_peer(base64.b64decode(metadata))
    flying: deque[Transfer] = deque()
    with timed() as sample:
        for at in range(0, nbytes, TRANSFER):
            if len(flying) == IN_FLIGHT:
                flying.popleft().wait(60)
            flying.append(peer.read([(region.address + at, remote + at, min(TRANSFER, nbytes - at))], region))
        for transfer in flying:
            transfer.wait(60)
    assert block[nbytes - 1] == block[nbytes // 2] == 1
    source.kill()
    source.wait()
    return {**sample, "nbytes": nbytes}


def serve_memory(nbytes: int) -> None:
    """The process that ``raw_read`` reads from: ones, all of them there, until stdin ends."""
    from weightd.daemon.peers.moving.nixl import Agent

    _, block = faulted_memfd(nbytes)
    ones = b"\1" * (1 << 20)
    for at in range(0, len(block), len(ones)):
        block[at : at + len(ones)] = ones[: len(block) - at]
    agent = Agent()
    region = agent.register(address(block), nbytes)
    print(json.dumps([region.address, base64.b64encode(region.metadata()).decode()]), flush=True)
    sys.stdin.read()
    os._exit(0)


# ---------------------------------------------------------------------- a link


def _link(session: Session, section: Section, size: int) -> None:
    model = session.folder / "link"
    language_model(model, size)
    with Network(2, LINK_RATE) as network:
        first, second = daemons_on(network.nodes, session.folder, "--capacity", f"cpu={2 * size + (256 << 20)}", env={})
        try:
            at_once(Daemon.start, (first, second))
            nbytes = _staged(first, model)
            contenders = {
                "copy": lambda: _copy(network.nodes[0], network.nodes[1], nbytes),
                "weightd": lambda: _from_peer(second, model, nbytes),
            }
            samples = interleave(contenders, session.repetitions, session.progress)
        finally:
            at_once(Daemon.stop, (first, second))
    section.samples["over a link"] = samples

    def megabytes(found: list[Sample]) -> list[float]:
        return [1e3 * value for value in gigabytes_per_second(found)]

    limit = Row("sendall() to recv_into() over a link", "MB/s", megabytes(samples["copy"]))
    limit.note = f"of {LINK_RATE // 10**6} MB/s, both ways, {nbytes / 2**20:.0f} MiB, one connection"
    ours = Row("weightd: from a peer over that link", "MB/s", megabytes(samples["weightd"]))
    ours.at_least(OF_LINK, limit)
    section.rows += [limit, ours]
    section.notes.append("over the link, median of all: " + where_the_time_went(samples["weightd"]))


def _copy(source: Node, target: Node, nbytes: int) -> Sample:
    """A plain copy over TCP, from nothing to nowhere."""
    block = bytearray(1 << 20)
    with source.entered():
        server = socket.create_server((source.host, 0))

    def send() -> None:
        connection, _ = server.accept()
        with connection:
            for at in range(0, nbytes, len(block)):
                connection.sendall(memoryview(block)[: nbytes - at])

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    into = bytearray(1 << 20)
    left = nbytes
    with server, target.entered(), timed() as sample, socket.create_connection(server.getsockname()) as connection:
        while left and (count := connection.recv_into(into)):
            left -= count
    sender.join()
    if left:
        raise RuntimeError(f"the copy ended {left} bytes early")
    return {**sample, "nbytes": nbytes}


# ---------------------------------------------------------------------- registration


def register(nbytes: int, count: int) -> Sample:
    """Contender: make memory readable as so many regions, and the metadata that peers need for it."""
    from weightd.daemon.peers.moving.nixl import Agent, kind

    agent = Agent()
    _, block = faulted_memfd(nbytes)
    step = nbytes // count
    regions = [(address(block) + number * step, step, 0, "") for number in range(count)]
    with timed() as sample:
        descriptors = agent.nixl.nixlRegDList(kind(agent, None), regions)
        agent.raw.registerMem(descriptors, [agent.backend])
        metadata = agent.raw.getLocalPartialMD(descriptors, True, [agent.backend])
    return {**sample, "metadata": len(metadata)}


def _registration(session: Session, section: Section) -> None:
    nbytes = 1 << 30 if session.size >= 4 << 30 else session.size // 4
    contenders: dict[str, Callable[[], Sample]] = {}
    own = f"127.0.0.1:{free_ports(1)[0]}"
    (one,) = _local(session, 3 * nbytes, [own])
    with one as daemon:
        for count in TENSORS:
            folder = session.folder / f"tensors-{count}"
            many_tensors(folder, count, nbytes, 1)
            key = daemon.stage(folder, wait=3600)["key"]
            _told(daemon, own, key)  # the process that registers has been started
            contenders[f"weightd, {count}"] = partial(_told, daemon, own, key)
            contenders[f"NIXL, {count}"] = partial(contend, "peer:register", nbytes=nbytes, count=count)
        samples = interleave(contenders, max(5, session.repetitions), session.progress)
    section.samples["registration"] = samples
    rows = {}
    for name, found in samples.items():
        whose, tensors = name.split(", ")
        what = "until a peer is told where its memory is" if whose == "weightd" else "a region for each"
        row = rows[name] = Row(f"{whose}: {int(tensors):,} tensors, {what}", "ms", milliseconds(found))
        row.note = f"{nbytes / 2**30:.2f} GiB; {found[0]['metadata'] / 1e3:.1f} kB of metadata"
        section.rows.append(row)
    ours, theirs = (rows[f"{whose}, {TENSORS[-1]}"] for whose in ("weightd", "NIXL"))
    ours.targets.append(Target(theirs.contender, EACH, ours.median / theirs.median, "under"))


def _told(daemon: Daemon, own: str, key: str) -> Sample:
    """Ask for a stage as a peer does, until its memory is registered and told; nobody else listens."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=f"http://{own}", headers=headers, timeout=60) as client:
        client.get("/peer/v1/stages").raise_for_status()
        query = {"format": str(FORMAT)}
        with timed() as sample, client.stream("GET", f"/peer/v1/stages/{key}", params=query) as answer:
            answer.raise_for_status()
            line = next(line for line in answer.iter_lines() if line.startswith("data:") and '"segments"' in line)
    segments = json.loads(line[5:])["segments"]
    deadline = time.monotonic() + 30
    while movers_at_work(daemon):
        if time.monotonic() > deadline:
            raise RuntimeError("what a peer has hung up on stays mapped")
        time.sleep(0.01)
    return {**sample, "metadata": sum(len(base64.b64decode(segment["metadata"])) for segment in segments)}


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve_memory(int(sys.argv[1]))
