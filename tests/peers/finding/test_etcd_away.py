"""An etcd that is killed, restarted, emptied, late or away: what is known stays for a while, and comes again."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from pathlib import Path

import pytest

from tests.peers.finding.directories import DEADLINE, addresses, eventually, opened, stages
from tests.peers.finding.etcd import Etcd, entry
from weightd.daemon.peers.finding import directory as directory_module
from weightd.daemon.peers.finding.directory import Directory


def test_etcd_killed_and_restarted_under_load_takes_nothing_from_anybody(own_etcd: Etcd, short_lease: None) -> None:
    names = [f"node-{number}" for number in range(6)]

    async def load(directory: Directory, stop: asyncio.Event) -> None:
        count = 0
        while not stop.is_set():
            count += 1
            await directory.publish({f"xxh3:{count % 50}": count % 100 / 100})
            await asyncio.sleep(0.002)

    async def check() -> None:
        async with contextlib.AsyncExitStack() as stack:
            all_of_them = [
                await stack.enter_async_context(opened(f"etcd:{own_etcd.url}", name, f"{name}:7401")) for name in names
            ]
            stop = asyncio.Event()
            writers = [asyncio.create_task(load(directory, stop)) for directory in all_of_them]
            others = len(names) - 1
            for _ in range(3):
                await eventually(
                    lambda: all(len(each.members()) == others and each.status() == "ok" for each in all_of_them),
                    "all are known",
                )
                await asyncio.to_thread(own_etcd.kill)
                await eventually(lambda: all(each.status() != "ok" for each in all_of_them), "all have noticed")
                assert all(len(each.members()) == others for each in all_of_them), "what is known stays"
                assert f"{others} members are known" in all_of_them[0].status()
                await asyncio.to_thread(own_etcd.start)
                await eventually(lambda: all(each.status() == "ok" for each in all_of_them), "all are back")
            stop.set()
            await asyncio.gather(*writers)
            for directory, name in zip(all_of_them, names, strict=True):
                await directory.publish({name: 1.0})
            for directory, own in zip(all_of_them, names, strict=True):
                for name in names:
                    if name != own:
                        await eventually(lambda d=directory, n=name: stages(d, n) == {n: 1.0}, "the last word is known")

    asyncio.run(check())


def test_an_etcd_that_comes_back_empty_is_filled_again(own_etcd: Etcd, short_lease: None) -> None:
    async def check() -> None:
        async with opened(f"etcd:{own_etcd.url}", "a", "h:1") as a, opened(f"etcd:{own_etcd.url}", "b", "h:2") as b:
            await a.publish({"xxh3:1": 1.0})
            await eventually(lambda: stages(b, "a"), "a is known")
            own_etcd.kill()
            shutil.rmtree(own_etcd.data)
            await asyncio.to_thread(own_etcd.start)
            await eventually(lambda: len(own_etcd.entries("/weightd/")) == 2, "both are there again")
            await eventually(lambda: stages(b, "a") == {"xxh3:1": 1.0} and a.members(), "they know each other")

    asyncio.run(check())


def test_etcd_that_is_away_at_the_start_is_waited_for(tmp_path: Path) -> None:
    server = Etcd(tmp_path / "etcd")

    async def check() -> None:
        async with opened(f"etcd:{server.url}", "a", "h:1") as directory:
            await directory.publish({"xxh3:1": 0.5})
            await eventually(lambda: "no members are known" in directory.status(), "it says so")
            assert server.url in directory.status()
            await asyncio.to_thread(server.start)
            await eventually(lambda: directory.status() == "ok", "it is there")
            assert list(server.entries()) == ["/weightd/peers/a/h:1"]
        server.kill()
        async with opened(f"etcd:{server.url}", "a", "h:1") as directory:
            begin = time.monotonic()
            await eventually(lambda: "members" in directory.status(), "it says so")
        assert time.monotonic() - begin < 10, "closing waits for nobody"

    try:
        asyncio.run(check())
    finally:
        server.stop()


def test_members_are_dropped_when_etcd_was_away_for_long(own_etcd: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "KEEP", 2.0)
    own_etcd.put(*entry("b", "h:2"))

    async def check() -> None:
        async with opened(f"etcd:{own_etcd.url}") as directory:
            await eventually(lambda: directory.status() == "ok", "it is there")
            await asyncio.to_thread(own_etcd.kill)
            await eventually(lambda: directory.status() != "ok", "it is away")
            assert addresses(directory) == ["h:2"]
            assert await directory.changed(0)
            assert await directory.changed(DEADLINE)
            assert addresses(directory) == []
            await asyncio.to_thread(own_etcd.start)
            await eventually(lambda: addresses(directory) == ["h:2"], "it is known again")

    asyncio.run(check())


def test_the_loss_of_one_member_of_a_cluster_goes_unnoticed_and_of_two_is_said(
    tmp_path: Path, short_lease: None
) -> None:
    servers = [Etcd(tmp_path / f"m{number}") for number in range(3)]
    for server in servers:
        everybody = ",".join(f"{each.log.parent.name}={each.peers}" for each in servers)
        server.arguments += ["--initial-cluster", everybody, "--initial-advertise-peer-urls", server.peers]
    text = "etcd:" + ",".join(server.url for server in servers)

    async def check() -> None:
        # They wait for each other.
        await asyncio.gather(*(asyncio.to_thread(server.start) for server in servers))
        async with opened(text, "a", "h:1") as a, opened(text, "b", "h:2") as b:
            await eventually(lambda: a.members() and b.members(), "both know each other")
            servers[0].kill()
            await a.publish({"xxh3:1": 1.0})
            await eventually(lambda: stages(b, "a") == {"xxh3:1": 1.0} and a.status() == "ok", "it goes on")
            servers[1].kill()
            await eventually(lambda: a.status() != "ok" and b.status() != "ok", "without a quorum it is away")
            assert addresses(a) == ["h:2"]
            await asyncio.to_thread(servers[1].start)
            await a.publish({"xxh3:2": 1.0})
            await eventually(lambda: stages(b, "a") == {"xxh3:2": 1.0} and a.status() == "ok", "it goes on again")

    try:
        asyncio.run(check())
    finally:
        for server in servers:
            server.stop()
