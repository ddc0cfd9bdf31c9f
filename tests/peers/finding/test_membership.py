"""Who listens to whom, and who reads the origin: every node finds the same, of what it has heard."""

from __future__ import annotations

from collections import Counter

from weightd.daemon.peers.finding.membership import READERS, Readers, degree, first_readers, neighbours

KEY = "0" * 32
PATIENCE = 10.0


def test_a_small_fleet_listens_to_all_and_a_large_one_to_as_many_as_its_logarithm() -> None:
    names = [f"node-{i}" for i in range(4000)]
    assert set(neighbours("node-0", KEY, names[:17])) == set(names[1:17])
    assert len(neighbours("node-0", KEY, names)) == degree(3999) < 30
    listening = {name: set(neighbours(name, KEY, names[:1000])) for name in names[:1000]}
    assert all(name not in others for name, others in listening.items())
    listened_to = Counter(other for others in listening.values() for other in others)
    assert max(listened_to.values()) < 4 * degree(999)
    reached, edge = {"node-0"}, {"node-0"}
    hops = 0
    while edge:
        edge = {name for name in listening if listening[name] & edge} - reached
        reached |= edge
        hops += 1
    assert reached == set(listening), "what one node has comes to all"
    assert hops < 8


def test_nodes_agree_on_the_readers_and_know_no_more_than_these() -> None:
    names = [f"node-{i}" for i in range(500)]
    everyone = dict.fromkeys(names, 1)
    found = set()
    for name in names[:40]:
        readers = Readers(name, KEY, PATIENCE)
        readers.heard(everyone, 0.0)
        found.add(tuple(readers.now(1.0)))
        assert len(readers.stamps(1, 1.0)) == READERS
    agreed = max(found, key=len)
    assert len(agreed) == READERS
    assert found == {agreed}, "also with those who are none themselves"


def test_a_reader_is_one_as_long_as_its_stamp_grows() -> None:
    readers = Readers("me", KEY, PATIENCE)
    readers.heard({"a": 5, "b": 5}, 0.0)
    readers.heard({"a": 6, "b": 5}, 9.0)
    assert set(readers.now(9.5)) == {"me", "a", "b"}
    assert set(readers.now(11.0)) == {"me", "a"}, "what others repeat of it does not keep it alive"
    readers.heard({"b": 6}, 12.0)
    assert set(readers.now(12.0)) == {"me", "a", "b"}
    readers.lost("a", 12.0)
    assert set(readers.now(12.0)) == {"me", "b"}
    readers.pass_over("b", 12.0)
    readers.heard({"b": 7}, 13.0)
    assert readers.now(13.0) == ["me"], "whatever it says"
    readers.heard({"b": 8}, 12.0 + 6 * PATIENCE)
    assert set(readers.now(12.0 + 6 * PATIENCE)) == {"me", "b"}


def test_who_reads_first_is_known_before_anybody_has_said_so() -> None:
    names = [f"node-{i}" for i in range(500)]
    readers, heard = Readers("node-0", KEY, PATIENCE), Readers("node-0", KEY, PATIENCE)
    readers.heard(first_readers(KEY, names), 0.0)
    heard.heard(dict.fromkeys(names, 1), 0.0)
    assert readers.now(1.0) == heard.now(1.0)
    silent = heard.now(1.0)[0]
    heard.heard(first_readers(KEY, names), PATIENCE)
    assert silent not in heard.now(PATIENCE), "it is no sign of life"


def test_a_flood_of_names_is_forgotten_down_to_the_best() -> None:
    readers = Readers("me", KEY, PATIENCE)
    for batch in range(100):
        readers.heard({f"ghost-{batch}-{i}": 1 for i in range(READERS)}, float(batch) / 100)
    assert len(readers._known) <= 4 * READERS
    assert len(readers.now(1.0)) == READERS
