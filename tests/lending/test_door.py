"""The entrance alone: who is let in, who makes room, who is hung up on, and what is said of it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import resource
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.lending.rooms import Room, inside, noticed
from weightd.daemon.lending import entrance as module
from weightd.daemon.lending.credentials import Peer
from weightd.daemon.lending.entrance import reserve, share


@pytest.fixture
def users(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Whom the next connections are of, in turn; uid 0 without."""
    coming: list[int] = []
    monkeypatch.setattr(module, "peer_of", lambda _: Peer(1, coming.pop(0) if coming else 0, 0, ()))
    return coming


def test_a_user_has_a_share_and_makes_room_for_itself_alone(tmp_path: Path, users: list[int]) -> None:
    async def body(room: Room) -> None:
        users.extend([1000] + [2000] * 8)
        for _ in range(9):
            await room.come()
        assert room.door.users == {1000: 1, 2000: share(8)} == {1000: 1, 2000: 7}
        assert room.hung_up == [room.visits[1]], "the oldest of the same user, not of all"
        for visit in room.visits[2:]:
            visit.works()
        users.extend([2000, 1000])
        connection = await room.come()
        assert str(room.refused[0]).startswith("uid 2000 has 7 of the 8 connections to lease.sock")
        assert "WEIGHTD_MAX_LEASES" in str(room.refused[0])
        assert (await asyncio.wait_for(asyncio.get_running_loop().sock_recv(connection, 1000), 60)) == str(
            room.refused[0]
        ).encode()
        await room.come()
        assert room.door.users == {1000: 1, 2000: 7}
        assert room.hung_up == [room.visits[1], room.visits[0]], "there is room for others by their own idle ones"

    inside(tmp_path, 8, body)


def test_a_full_room_drops_the_oldest_idle_one_and_what_is_busy_never(tmp_path: Path, users: list[int]) -> None:
    async def body(room: Room) -> None:
        users.extend([0, 1000, 2000] * 2)
        for _ in range(6):
            await room.come()
        room.visits[0].works()
        room.visits[1].sends()  # idle since now: it has not said all
        users.extend([1000, 0])
        await room.come()
        await room.come()
        assert room.hung_up == [room.visits[2], room.visits[3]]
        assert len(room.door.visits) == 6
        for visit in room.door.visits:
            visit.works()
        users.append(1000)
        await room.come()
        assert "6 connections to lease.sock are open" in str(room.refused[0])
        room.visits[0].end()
        await room.come()
        assert len(room.refused) == 1

    inside(tmp_path, 6, body)


def test_the_last_descriptors_are_for_others_and_a_few_places_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(room: Room) -> None:
        monkeypatch.setattr(room.entrance, "_scarce", lambda: True)
        for _ in range(module.KEPT):
            await room.come()
        assert not room.hung_up
        await room.come()
        assert room.hung_up == [room.visits[0]]
        for visit in room.door.visits:
            visit.works()
        await room.come()
        assert "ulimit -n" in str(room.refused[0])

    inside(tmp_path, 1000, body)


def test_who_is_idle_for_too_long_is_hung_up_on_and_who_is_served_is_not(tmp_path: Path) -> None:
    async def body(room: Room) -> None:
        for _ in range(4):
            await room.come()
        silent, busy, slow, taking = room.visits
        busy.works()
        slow.sends()
        taking.works()
        left = [100, 80, 60, 40, 20]
        taking.unsent = lambda: left.pop(0) if len(left) > 1 else left[0]
        started = time.monotonic()
        taking.waits()
        await noticed(lambda: silent in room.hung_up and slow in room.hung_up and taking in room.hung_up)
        assert time.monotonic() - started >= 5 * 0.1, "as long as it takes some of what it was answered"
        assert room.hung_up[0] is silent
        assert busy not in room.hung_up
        assert busy in room.door.visits

    inside(tmp_path, 10, body, head_seconds=0.1, rest_seconds=0.2)


def test_descriptors_that_run_out_end_no_accept_loop(
    tmp_path: Path, opened: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(room: Room) -> None:
        await room.come()
        room.visits[0].works()
        connection = socket.socket(socket.AF_UNIX)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            connection.connect(room.path)
            await noticed(lambda: "cannot accept" in caplog.text)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await noticed(lambda: len(room.visits) == 2)
        connection.close()

    inside(tmp_path, 10, body)


def test_a_connection_that_is_gone_before_it_is_let_in_ends_no_accept_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(room: Room) -> None:
        await room.come()
        loop = asyncio.get_running_loop()
        accept, gone = loop.sock_accept, [errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN]

        async def accepting(listener: socket.socket) -> Any:
            if gone:
                raise OSError(gone.pop(0), "of the one that is gone")
            return await accept(listener)

        monkeypatch.setattr(loop, "sock_accept", accepting)
        await room.come()
        await room.come()
        assert (len(room.visits), gone) == (3, [])

    inside(tmp_path, 10, body)


def test_one_that_is_gone_before_it_is_known_who_it_is_ends_no_accept_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = [OSError(errno.ENOTCONN, "it is gone")]

    def peer_of(connection: socket.socket) -> Peer:
        if gone:
            raise gone.pop()
        return Peer(1, 0, 0, ())

    monkeypatch.setattr(module, "peer_of", peer_of)

    async def body(room: Room) -> None:
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(room.path)
            first.setblocking(False)
            assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(first, 1), 60) == b""
        await room.come()
        assert len(room.door.visits) == 1

    inside(tmp_path, 10, body)


# ---------------------------------------------------------------------- how many places, and whose


@pytest.mark.parametrize(("most", "own"), [(1, 1), (3, 3), (4, 3), (8, 7), (15, 14), (16, 14), (1000, 875)])
def test_an_eighth_of_the_places_is_others_where_there_are_enough_to_part(most: int, own: int) -> None:
    assert share(most) == own


@pytest.mark.parametrize(("limit", "left"), [(0, 0), (3, 0), (400, 100), (4096, 1024), (4100, 1024), (1 << 20, 1024)])
def test_a_quarter_of_the_descriptors_is_left_to_others_and_a_thousand_at_most(limit: int, left: int) -> None:
    assert reserve(limit) == left


@pytest.mark.parametrize(
    ("address", "user"),
    [(("127.0.0.5", 9), "this machine"), (("::1", 9, 0, 0), "this machine"), (("10.0.0.7", 9), "10.0.0.7"), ("", "")],
)
def test_all_that_is_on_this_machine_is_one_user_of_a_port(address: object, user: str) -> None:
    assert module._user_at(address) == user


def test_where_few_have_all_places_the_words_name_no_user(tmp_path: Path) -> None:
    async def body(room: Room) -> None:
        for _ in range(3):
            await room.come()
        for visit in room.visits:
            visit.works()
        await room.come()
        said = "3 connections to lease.sock are open, which is all that WEIGHTD_MAX_LEASES allows"
        assert str(room.refused[0]) == said

    inside(tmp_path, 3, body)


class Machine:
    """What the entrance asks of time and of descriptors."""

    RLIM_INFINITY = resource.RLIM_INFINITY
    RLIMIT_NOFILE = resource.RLIMIT_NOFILE

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.limit, self.open = 1000.0, 100, 10
        self.takes = 0.0
        """Seconds to count descriptors."""
        monkeypatch.setattr(module, "time", self)
        monkeypatch.setattr(module, "resource", self)
        monkeypatch.setattr(module, "os", self)

    def monotonic(self) -> float:
        return self.now

    def getrlimit(self, which: int) -> tuple[int, int]:
        assert which == self.RLIMIT_NOFILE
        return self.limit, self.limit

    def listdir(self, folder: str) -> list[str]:
        assert folder == "/proc/self/fd"
        self.now += self.takes
        return ["x"] * self.open


def test_descriptors_are_scarce_from_three_quarters_on_and_counted_twice_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(room: Room) -> None:
        machine = Machine(monkeypatch)

        def scarce(descriptors: int, seconds: float = 0.5) -> bool:
            machine.open = descriptors
            machine.now += seconds
            return room.entrance._scarce()

        assert [scarce(74), scarce(75), scarce(74)] == [False, True, False]
        assert [scarce(75, 0.4375), scarce(75, 0.0625)] == [False, True], "the count of before holds for so long"
        assert not scarce(70)
        for _ in range(4):
            await room.come()
        assert not scarce(0, 0.0)
        await room.come()
        assert scarce(0, 0.0), "connections count as they come"
        room.visits[0].end()
        assert not scarce(0, 0.0), "and as they go"
        machine.limit = machine.RLIM_INFINITY
        assert not scarce(10**9)
        machine.limit, machine.takes = 100, 0.125
        assert not scarce(20)
        assert [scarce(90, 6.125), scarce(90, 0.125)] == [False, True], "counting takes a fiftieth of the time"

    inside(tmp_path, 100, body)


def test_where_descriptors_run_short_the_socket_with_most_idle_ones_makes_room(tmp_path: Path) -> None:
    async def body(room: Room) -> None:
        other = Room(tmp_path / "other", 10, entrance=room.entrance)
        try:
            assert not room.entrance._make_room(), "there is nobody"
            for _ in range(2):
                await room.come()
            for _ in range(3):
                await other.come()
            for visit in other.visits[:2]:
                visit.works()
            assert room.entrance._make_room()
            assert (room.hung_up, other.hung_up) == ([room.visits[0]], [])
            other.visits[0].waits()
            assert room.entrance._make_room()
            assert other.hung_up == [other.visits[2]], "the one that is idle for longest of two"
        finally:
            await other.close()

    (tmp_path / "other").mkdir()
    inside(tmp_path, 10, body)


# ---------------------------------------------------------------------- what is said of it


def dropped(room: Room, reason: str) -> float:
    labels = {"listener": "lease.sock", "reason": reason}
    return room.metrics.registry.get_sample_value("weightd_connections_dropped_total", labels) or 0.0


def test_each_drop_is_counted_and_told_once_a_minute_with_how_many_more_there_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(room: Room) -> None:
        machine = Machine(monkeypatch)
        assert room.metrics.registry.get_sample_value(
            "weightd_connections_dropped_total", {"listener": "lease.sock", "reason": "full"}
        ) == 0.0, "before its first step"  # fmt: skip
        caplog.set_level(logging.INFO)
        for seconds in (0.0, 1.0, 58.5):
            machine.now += seconds
            room.door.note("room")
        room.door.note("silent")
        assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.INFO]
        assert "more since" not in caplog.text
        machine.now += 0.5
        room.door.note("room")
        assert caplog.records[-1].getMessage().endswith(", and 2 more since the last line")
        machine.now += 60.0
        room.door.note("room")
        assert "more since" not in caplog.records[-1].getMessage()
        assert (len(caplog.records), dropped(room, "room"), dropped(room, "silent")) == (4, 5.0, 1.0)

    inside(tmp_path, 10, body)


def test_who_ends_by_itself_is_gone_once_and_for_all(tmp_path: Path) -> None:
    async def body(room: Room) -> None:
        labels = {"listener": "lease.sock"}
        for _ in range(2):
            await room.come()
        visit = room.visits[0]
        assert (visit.state, list(room.door.idle)) == ("waits", room.visits)
        visit.works()
        visit.waits()
        assert list(room.door.idle) == [room.visits[1], visit], "it is idle since now"
        room.visits[1].waits()
        assert list(room.door.idle) == [room.visits[1], visit], "it was idle all the time"
        for _ in range(2):
            visit.end()
            visit.sends()
        assert (visit.state, room.door.visits, list(room.door.idle)) == ("gone", {room.visits[1]}, [room.visits[1]])
        assert room.metrics.registry.get_sample_value("weightd_connections", labels) == 1.0
        assert room.hung_up == []

    inside(tmp_path, 10, body)


# ---------------------------------------------------------------------- who is turned away


def test_who_is_turned_away_is_told_and_heard_out_and_of_many_the_first_ones_are_not_waited_for(
    tmp_path: Path, users: list[int]
) -> None:
    async def body(room: Room) -> None:
        loop = asyncio.get_running_loop()
        users.extend([4711] * 9)
        connections = [await room.come() for _ in range(9)]
        said = []
        for connection in connections:
            said.append(await asyncio.wait_for(loop.sock_recv(connection, 1000), 60))
            assert await asyncio.wait_for(loop.sock_recv(connection, 1000), 60) == b""
        assert all(b"uid 4711, gid 0 may not use this socket" in words for words in said[1:])
        await noticed(lambda: len(room.entrance._leaving) == 8)
        connections[3].close()
        await noticed(lambda: len(room.entrance._leaving) == 7)
        assert (len(room.visits), dropped(room, "not_admitted")) == (0, 9.0)

    inside(tmp_path, 10, body)


def test_who_is_turned_away_and_does_not_hang_up_is_hung_up_on(
    tmp_path: Path, users: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LEAVING_SECONDS", 0.05)

    async def body(room: Room) -> None:
        users.append(4711)
        await room.come()
        await noticed(lambda: not room.entrance._leaving)

    inside(tmp_path, 10, body)


def test_whom_there_is_nothing_to_say_to_is_hung_up_on_at_once(tmp_path: Path, users: list[int]) -> None:
    async def body(room: Room) -> None:
        users.append(4711)
        room.words = False
        connection = await room.come()
        assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(connection, 1000), 60) == b""
        assert not room.entrance._leaving

    inside(tmp_path, 10, body)
