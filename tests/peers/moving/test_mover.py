"""The process that moves bytes between nodes: real NIXL in real processes, which are stopped and killed."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import itertools
import os
import queue
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import lacking
from tests.servers import until
from weightd.daemon.devices.cpu import CpuDevice
from weightd.daemon.peers.moving.inlet import Inlet
from weightd.daemon.peers.moving.movers import Arrival, Mover, MoverFailed, Movers
from weightd.daemon.peers.moving.parts import Part, Span

MiB = 1 << 20
DEADLINE = 60.0
ARRIVALS: dict[Mover, queue.SimpleQueue[Arrival | None]] = {}
"""What each mover has told."""


@pytest.fixture
def movers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Mover]]:
    if importlib.util.find_spec("nixl_cu12") is None and importlib.util.find_spec("nixl_cu13") is None:
        lacking("NIXL: pip install nixl-cu12")
    monkeypatch.setenv("UCX_TLS", "tcp")  # as between machines; within one UCX would copy by itself
    made: list[Mover] = []

    def make() -> Mover:
        arrivals: queue.SimpleQueue[Arrival | None] = queue.SimpleQueue()
        made.append(Mover())
        made[-1].on_arrival = arrivals.put
        ARRIVALS[made[-1]] = arrivals
        return made[-1]

    yield make
    for mover in made:
        mover.kill()
        del ARRIVALS[mover]


def memory(content: bytes, *, sealed: bool = False) -> int:
    fd = os.memfd_create("mover-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    if sealed:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


def arrival(mover: Mover) -> Arrival:
    found = ARRIVALS[mover].get(timeout=DEADLINE)
    assert found is not None, "the process is gone"
    return found


def test_sealed_memory_is_read_by_another_process_at_any_offset(movers: Callable[[], Mover]) -> None:
    content = random.Random(1).randbytes(8 * MiB)
    source, target = memory(content, sealed=True), memory(bytes(8 * MiB))
    giver, taker = movers(), movers()
    offered = giver.offer(source, len(content))
    region, peer = taker.into(target, len(content)), taker.peer(offered.metadata)
    cuts = [0, 1, 4097, 3 * MiB + 5, 5 * MiB, len(content)]
    expected = dict[int, tuple[int, int]]()
    for first, last in itertools.pairwise(cuts):
        expected[taker.read(peer, region, [(first, offered.address + first, last - first)])] = (first, last)
    for _ in range(len(expected)):
        found = arrival(taker)
        assert found.error is None
        assert found.transport == "tcp"
        first, last = expected[found.ticket]
        assert os.pread(target, last - first, first) == content[first:last]
    taker.close_region(region)
    giver.close_region(offered.region)
    fcntl.fcntl(target, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)  # no writable mapping is left of it


def test_what_is_refused_says_why_and_ends_nothing(movers: Callable[[], Mover]) -> None:
    source, target = memory(bytes(MiB)), memory(bytes(MiB))
    giver, taker = movers(), movers()
    offered = giver.offer(source, MiB)
    region = taker.into(target, MiB)
    for garbage in (b"", b"garbage", offered.metadata[:-7], os.urandom(500)):
        with pytest.raises(MoverFailed, match="metadata"):
            taker.peer(garbage)
    peer = taker.peer(offered.metadata)
    for pair in [(0, offered.address, 2 * MiB), (MiB - 1, offered.address, 2), (0, offered.address + MiB - 1, 2)]:
        ticket = taker.read(peer, region, [pair])
        found = arrival(taker)
        assert found.ticket == ticket
        assert found.error
    assert taker.read(peer, region, [(0, offered.address, MiB)]) == arrival(taker).ticket


def test_a_giver_that_is_killed_is_noticed_and_another_one_gives(movers: Callable[[], Mover]) -> None:
    content = random.Random(2).randbytes(64 * MiB)
    source, target = memory(content, sealed=True), memory(bytes(64 * MiB))
    first, second, taker = movers(), movers(), movers()
    region = taker.into(target, len(content))
    doomed = first.offer(source, len(content))
    peer = taker.peer(doomed.metadata)
    first.kill()
    taker.read(peer, region, [(0, doomed.address, len(content))])
    assert arrival(taker).error
    with pytest.raises(MoverFailed, match="killed by SIGKILL"):
        first.offer(source, len(content))
    offered = second.offer(source, len(content))
    taker.read(taker.peer(offered.metadata), region, [(0, offered.address, len(content))])
    assert arrival(taker).error is None
    assert os.pread(target, len(content), 0) == content


def test_after_it_was_killed_nothing_writes_to_the_memory_any_more(movers: Callable[[], Mover]) -> None:
    content = random.Random(3).randbytes(128 * MiB)
    source, target = memory(content, sealed=True), memory(bytes(128 * MiB))
    giver, taker = movers(), movers()
    offered = giver.offer(source, len(content))
    region, peer = taker.into(target, len(content)), taker.peer(offered.metadata)
    taker.read(peer, region, [(0, offered.address, len(content))])
    until(lambda: any(os.pread(target, 4096, 0)), "it has begun")
    os.kill(giver._process.pid, signal.SIGSTOP)
    taker.kill()
    fcntl.fcntl(target, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)  # which the kernel refuses while anybody could write
    before = os.pread(target, len(content), 0)
    with contextlib.suppress(ProcessLookupError):  # a reader that is cut off can end who is read
        os.kill(giver._process.pid, signal.SIGCONT)
    assert os.pread(target, len(content), 0) == before
    assert ARRIVALS[taker].get(timeout=DEADLINE) is None


def test_it_ends_with_its_daemon(movers: Callable[[], Mover], tmp_path: Path) -> None:
    script = (
        "import os, sys, time\n"
        "from weightd.daemon.peers.moving.movers import Mover\n"
        "mover = Mover()\n"
        "mover.offer(int(sys.argv[1]), 4096)\n"
        "print(mover._process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    fd = memory(bytes(4096))
    daemon = subprocess.Popen([sys.executable, "-c", script, str(fd)], pass_fds=[fd], stdout=subprocess.PIPE, text=True)
    assert daemon.stdout is not None
    pid = int(daemon.stdout.readline())
    daemon.kill()
    daemon.wait()
    daemon.stdout.close()
    until(lambda: not Path(f"/proc/{pid}").exists() or ") Z " in Path(f"/proc/{pid}/stat").read_text(), "it has ended")


def test_one_is_kept_at_hand_for_whoever_takes_the_next(movers: Callable[[], Mover]) -> None:
    source = Movers()
    assert source.test() == ""
    first = source.take()
    first.ping()
    other = source.take()
    other.ping()
    assert other is not first, "each has its own, at hand or not"
    source.prepare()
    spare = source._spare
    assert spare is not None
    source.prepare()
    assert source._spare is spare, "one is enough"
    spare.kill()
    third = source.take()
    third.ping()
    assert third is not spare, "what has died at hand is given to nobody"
    source.prepare()
    left = source._spare
    assert left is not None
    source.close()
    assert not left.alive
    source.prepare()
    assert source._spare is None, "after the end there are no more"
    for mover in (first, other, third):
        mover.kill()


def test_where_none_can_work_the_test_says_why_and_leaves_nothing(
    movers: Callable[[], Mover], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", "nonsense")
    source = Movers()
    assert "UCX_TLS" in source.test()
    assert source._spare is None
    monkeypatch.setattr(sys, "executable", "/no/python")
    assert "/no/python" in Movers().test()
    with pytest.raises(MoverFailed, match="/no/python"):
        Movers().take()


@pytest.mark.parametrize("buffered", [True, False], ids=["through slots", "straight"])
def test_parts_land_where_they_belong_whichever_way_they_go(movers: Callable[[], Mover], *, buffered: bool) -> None:
    content = random.Random(2).randbytes(4 * MiB)
    giver, taker = movers(), movers()
    offered = giver.offer(memory(content, sealed=True), len(content))
    segment = CpuDevice("cpu", 1 << 30).allocate(len(content), "landing")
    segment.buffered = buffered  # as it is where pages are small, or huge
    inlet = Inlet([segment], slots=1)
    inlet.connect(taker)
    part = Part(0, [Span(0, 0, 256, MiB + 3, 0), Span(0, 1, 3 * MiB, MiB // 2, 0)])
    assert inlet.acquire(part)
    assert inlet.acquire(Part(1, [])) == (not buffered), "there is one slot"
    places = inlet.places(part)
    pairs = [
        (offset, offered.address + span.offset, span.nbytes)
        for (_, offset), span in zip(places, part.spans, strict=True)
    ]
    taker.read(taker.peer(offered.metadata), places[0][0], pairs)
    assert arrival(taker).error is None
    written = "weightd:landing" in Path(f"/proc/{taker._process.pid}/maps").read_text()
    assert written != buffered, "with slots, nobody who makes the process write changes the segment"
    inlet.settle(part)
    for span, view in zip(part.spans, inlet.views(part), strict=True):
        assert bytes(view) == content[span.offset : span.offset + span.nbytes]
        view.release()
    assert inlet.acquire(Part(2, [])), "its slot is free again"
    taker.kill()
    inlet.close()
    segment.seal()
    segment.close()
