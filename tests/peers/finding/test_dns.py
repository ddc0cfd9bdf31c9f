"""Peers by DNS, of a real server on loopback: addresses, SRV records, and what stays when it is away."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.peers.finding.directories import DEADLINE, addresses, eventually, started
from tests.peers.finding.zone import Zone
from weightd.daemon.peers.finding import directory as directory_module
from weightd.daemon.peers.finding import dns as dns_directory
from weightd.daemon.peers.finding.directory import Member


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Zone]:
    monkeypatch.setattr(dns_directory, "SOONEST", 0.05)
    monkeypatch.setattr(dns_directory, "NOTHING", 0.05)
    monkeypatch.setattr(dns_directory, "LIFETIME", 1.0)
    found = Zone()
    found.start()
    yield found
    found.stop()


def test_the_addresses_of_a_name_are_the_peers_and_change_with_it(zone: Zone) -> None:
    zone.records["weightd.svc", "A"] = ["198.51.100.1", "198.51.100.2", "198.51.100.3"]
    zone.records["weightd.svc", "AAAA"] = ["2001:db8::2"]

    async def check() -> None:
        async with started(zone.open("Weightd.svc:7401")) as directory:
            all_of_them = ["198.51.100.2:7401", "198.51.100.3:7401", "[2001:db8::2]:7401"]
            await eventually(lambda: addresses(directory) == all_of_them, "they are known")
            assert directory.members()[0] == Member("198.51.100.2:7401", "198.51.100.2:7401", None)
            assert directory.status() == "ok"
            assert await directory.changed(0)
            zone.records["weightd.svc", "A"] = ["198.51.100.3", "198.51.100.4"]
            del zone.records["weightd.svc", "AAAA"]
            assert await directory.changed(DEADLINE)
            await eventually(
                lambda: addresses(directory) == ["198.51.100.3:7401", "198.51.100.4:7401"], "they have changed"
            )
            await directory.changed(0)
            await directory.publish({"xxh3:1": 1.0})
            assert not await directory.changed(0.2)

    asyncio.run(check())


def test_srv_records_name_peers_and_their_ports(zone: Zone) -> None:
    srv = "_peers._tcp.weightd.svc"
    zone.records[srv, "SRV"] = ["0 50 7401 a.weightd.svc.", "0 50 7402 b.weightd.svc.", "0 50 7403 c.weightd.svc."]
    zone.additional["a.weightd.svc", "A"] = ["198.51.100.1"]  # ourselves
    zone.additional["b.weightd.svc", "A"] = ["198.51.100.2"]
    zone.records["c.weightd.svc", "AAAA"] = ["2001:db8::3"]  # has to be looked up

    async def check() -> None:
        for place in [srv, f"{srv}:7401"]:
            async with started(zone.open(place)) as directory:
                await eventually(directory.members, "they are known")
                assert list(directory.members()) == [
                    Member("b.weightd.svc", "198.51.100.2:7402", None),
                    Member("c.weightd.svc", "[2001:db8::3]:7403", None),
                ]
                zone.records[srv, "SRV"] = ["0 50 7500 b.weightd.svc.", "0 50 7501 nowhere.weightd.svc."]
                await eventually(lambda d=directory: addresses(d) == ["198.51.100.2:7500"], "they have changed")
                zone.records[srv, "SRV"] = [f"0 50 740{number} {name}.weightd.svc." for number, name in
                                            enumerate("abc", 1)]  # fmt: skip

    asyncio.run(check())


def test_a_name_that_does_not_exist_has_no_peers_until_it_does(zone: Zone) -> None:
    async def check() -> None:
        async with started(zone.open("weightd.svc:7401")) as directory:
            await eventually(lambda: "does not exist" in directory.status(), "it says so")
            zone.records["weightd.svc", "A"] = ["198.51.100.2"]
            await eventually(directory.members, "it exists")
            assert directory.status() == "ok"
            zone.records.clear()
            await eventually(lambda: not directory.members(), "the last pod has gone")
            assert "does not exist" in directory.status()

    asyncio.run(check())


@pytest.mark.parametrize("how", ["away", "failing"])
def test_peers_stay_for_a_while_when_dns_is_away(zone: Zone, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    zone.records["weightd.svc", "A"] = ["198.51.100.2"]

    async def check() -> None:
        async with started(zone.open("weightd.svc:7401")) as directory:
            await eventually(directory.members, "it is known")
            zone.failing = {"A", "AAAA"}
            if how == "away":
                await asyncio.to_thread(zone.stop)
            await eventually(lambda: "1 members are known" in directory.status(), "it is away")
            assert addresses(directory) == ["198.51.100.2:7401"]
            monkeypatch.setattr(directory_module, "KEEP", 0.5)
            await eventually(lambda: not directory.members(), "it is dropped")
            zone.failing = set()
            if how == "away":
                zone.start()
            await eventually(directory.members, "it is known again")
            assert directory.status() == "ok"

    asyncio.run(check())


def test_one_family_of_addresses_is_enough_where_the_other_cannot_be_looked_up(zone: Zone) -> None:
    zone.records["weightd.svc", "A"] = ["198.51.100.2"]
    zone.failing = {"AAAA"}

    async def check() -> None:
        async with started(zone.open("weightd.svc:7401")) as directory:
            await eventually(directory.members, "it is known")
            assert directory.status() == "ok"
            zone.records["weightd.svc", "AAAA"] = ["2001:db8::2"]
            zone.failing = set()
            both = ["198.51.100.2:7401", "[2001:db8::2]:7401"]
            await eventually(lambda: addresses(directory) == both, "both are known")
            zone.failing = {"AAAA"}
            await eventually(lambda: "2 members are known" in directory.status(), "half of it is away")
            assert addresses(directory) == both

    asyncio.run(check())


def test_many_addresses_come_by_tcp_and_nonsense_among_them_is_left_out(
    zone: Zone, caplog: pytest.LogCaptureFixture
) -> None:
    many = [f"198.18.{number // 250}.{number % 250 + 1}" for number in range(1000)]
    zone.records["weightd.svc", "A"] = ["0.0.0.0", "224.0.0.1", *many]

    async def check() -> None:
        async with started(zone.open("weightd.svc:7401")) as directory:
            await eventually(directory.members, "they are known")
            assert set(addresses(directory)) == {f"{address}:7401" for address in many}

    asyncio.run(check())
    assert zone.by_tcp
    assert sorted(record.args[1] for record in caplog.records if record.args) == ["0.0.0.0:7401", "224.0.0.1:7401"]


@pytest.mark.parametrize(("ttl", "pause"), [(0, 1.0), (7, 7.0), (3600, 30.0)])
def test_records_are_looked_up_again_when_they_expire(ttl: int, pause: float) -> None:
    zone = Zone()
    zone.ttl = ttl
    zone.records["weightd.svc", "A"] = ["198.51.100.2"]
    zone.start()
    try:
        directory = zone.open("weightd.svc:7401")
        assert isinstance(directory, dns_directory.DnsDirectory)
        assert asyncio.run(directory._look()) == pause
    finally:
        zone.stop()
