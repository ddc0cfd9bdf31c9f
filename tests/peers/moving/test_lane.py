"""Parts on their way from one peer: what each may become, and what is asked of the peer meanwhile."""

from __future__ import annotations

import itertools
from concurrent.futures import Future

import pytest

from weightd.daemon.filling.account import PeerUse
from weightd.daemon.peers.finding.claims import Claims
from weightd.daemon.peers.finding.listening import Peer
from weightd.daemon.peers.moving.lane import Lane
from weightd.daemon.peers.moving.parts import NEXT, Part, PartState, Span

MiB = 1 << 20


def part(group: int = 0) -> Part:
    return Part(group, [Span(0, 0, 0, 8 * MiB, 0)])


def lane(*parts: Part) -> Lane:
    found = Lane(Peer("10.0.0.2:7401", Claims([]), PeerUse()))
    found.queue(parts)
    return found


@pytest.mark.parametrize(("before", "after"), list(itertools.product(PartState, PartState)))
def test_a_part_becomes_what_the_table_allows_and_nothing_else(before: PartState, after: PartState) -> None:
    found = Part(0, [], state=before)
    if after in NEXT[before]:
        found.become(after)
        assert found.state is after
    else:
        with pytest.raises(AssertionError, match=f"{before.value} cannot become {after.value}"):
            found.become(after)
        assert found.state is before


def test_every_part_can_be_lost_until_it_has_ended() -> None:
    ended = {state for state, following in NEXT.items() if not following}
    assert ended == {PartState.SETTLED, PartState.LOST}
    assert all(PartState.LOST in NEXT[state] for state in set(PartState) - ended)


def test_one_part_is_asked_for_until_it_is_known_how_fast_they_come() -> None:
    parts = [part() for _ in range(8)]
    found = lane(*parts)
    assert found.has_room
    found.move(parts[0], PartState.READING)
    assert not found.has_room
    found.peer.use.nbytes, found.peer.use.seconds = 1000 * MiB, 1.0  # 250 MiB in a quarter of a second
    for asked in parts[1:4]:
        assert found.has_room
        found.move(asked, PartState.AWAITED)
    assert found.busy == 4
    assert not found.has_room, "four at the same time"
    found.peer.use.seconds = 100.0
    found.came(parts[0], 0.0)
    assert found.busy == 3
    assert not found.has_room, "24 MiB are more than come in a quarter of a second"


def test_what_the_peer_has_no_room_for_is_asked_for_next() -> None:
    first, second = part(), part()
    found = lane(first, second)
    found.move(first, PartState.AWAITED)
    assert found.next is second
    found.move(first, PartState.QUEUED)
    assert found.next is first


def test_a_part_is_found_by_its_ticket_while_it_is_read() -> None:
    first, second = part(), part()
    found = lane(first, second)
    first.ticket, second.ticket = 7, 8
    found.move(first, PartState.READING)
    assert found.reading(7) is first
    assert found.reading(8) is None, "it is not read yet"
    found.came(first, 1.0)
    assert found.reading(7) is None


def test_the_peer_is_waited_for_from_when_it_was_asked() -> None:
    first, second = part(), part()
    found = lane(first, second)
    found.begin(10.0)
    found.move(first, PartState.READING)
    found.begin(11.0)
    assert found.arrived == 10.0, "it is busy since then"
    found.full = True
    found.came(first, 12.5)
    assert (found.arrived, found.full, found.peer.use.seconds) == (12.5, False, 2.5)
    found.full = True
    found.begin(20.0)
    assert found.arrived == 12.5, "who says that it has no room is not asked anew each time"


def test_what_the_peer_has_put_is_given_back_once() -> None:
    come, waiting = part(1), part(2)
    found = lane(come, waiting)
    for one, address in ((come, 100), (waiting, 200)):
        found.move(one, PartState.AWAITED)
        one.at = address
        found.move(one, PartState.READING)
    found.came(come, 1.0)
    assert found.take_read_out() == [100]
    come.settling = Future()
    come.settling.set_result([])
    assert {lost.group for lost in found.let_go()} == {1, 2}
    assert found.take_read_out() == [200], "and not again what was given back: somebody else may have it by now"


def test_what_is_let_go_is_lost_and_what_has_settled_is_not() -> None:
    parts = [part() for _ in range(4)]
    settled, settling, reading, queued = parts
    found = lane(*parts)
    found.number = 3
    for one in parts[:3]:
        found.move(one, PartState.READING)
    for one in (settled, settling):
        found.came(one, 1.0)
        one.settling = Future()
        one.settling.set_result([])
    found.move(settled, PartState.SETTLED)
    assert set(found.let_go()) == {settling, reading, queued}
    assert {one.state for one in (settling, reading, queued)} == {PartState.LOST}
    assert settled.state is PartState.SETTLED
    assert found.empty
    assert found.number is None
