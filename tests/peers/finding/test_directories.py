"""The directories of peers, against a real etcd and a real DNS server on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dns.asyncresolver
import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import httpx
import pytest

from tests.conftest import command
from tests.servers import HERE, Place, Server, free_ports
from weightd.daemon.peers.finding import directory as directory_module
from weightd.daemon.peers.finding import dns as dns_directory
from weightd.daemon.peers.finding import etcd as etcd_directory
from weightd.daemon.peers.finding.directory import Directory, Member, open_directory, parse

DEADLINE = 60.0


async def eventually(condition: Callable[[], Any], what: str, deadline: float = DEADLINE) -> Any:
    """Wait until a condition holds; returns its value."""
    end = time.monotonic() + deadline
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {deadline} s: {what}"
        await asyncio.sleep(0.005)
    return value


@contextlib.asynccontextmanager
async def opened(text: str, node: str = "me", address: str = "127.0.0.1:7401") -> AsyncIterator[Directory]:
    async with started(open_directory(text, node=node, address=address)) as directory:
        yield directory


@contextlib.asynccontextmanager
async def started(directory: Directory) -> AsyncIterator[Directory]:
    await directory.start()
    try:
        yield directory
    finally:
        await directory.close()


def addresses(directory: Directory) -> list[str]:
    return [member.address for member in directory.members()]


def stages(directory: Directory, node: str) -> Mapping[str, float] | None:
    """What a node has, as the directory knows it; None where it does not know the node."""
    return next((member.stages for member in directory.members() if member.node == node), None)


# The setting, static and none


def test_a_static_list_knows_all_its_peers_but_ourselves() -> None:
    text = "static:198.51.100.2:7401, [::1]:7401,node-b:7401,127.0.0.1:7401,[0:0::1]:7401"

    async def check() -> None:
        async with opened(text) as directory:
            assert addresses(directory) == ["198.51.100.2:7401", "[::1]:7401", "node-b:7401"]
            assert directory.members()[1] == Member("[::1]:7401", "[::1]:7401", None)
            assert directory.status() == "ok"
            await directory.publish({"xxh3:1": 1.0})
            assert not await directory.changed(0.01)
        async with opened(text, node="node-b", address="[::1]:7401") as directory:
            assert addresses(directory) == ["127.0.0.1:7401", "198.51.100.2:7401"]

    asyncio.run(check())


def test_another_address_of_this_machine_at_our_port_is_ourselves() -> None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("198.51.100.1", 9))  # sends nothing, and tells the address that would
        own = probe.getsockname()[0]
        directory = open_directory(f"static:{own}:7401,{own}:7402,127.0.0.2:7401", node="me", address="127.0.0.1:7401")
        assert addresses(directory) == ["127.0.0.2:7401", f"{own}:7402"]


@pytest.mark.parametrize("text", ["", "none", " none "])
def test_no_directory_knows_nobody(text: str) -> None:
    async def check() -> None:
        async with opened(text, node="", address="") as directory:
            assert (list(directory.members()), directory.status()) == ([], "ok")
            await directory.publish({"xxh3:1": 1.0})
            assert not await directory.changed(0.01)

    asyncio.run(check())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("consul:http://h", r"expected none, static:.*, dns:.* or etcd:.*, found 'consul'"),
        ("none:x", "found 'x'"),
        ("static:", "static lists 1 to 10000 peers.*found 0"),
        ("static:198.51.100.1", "expected HOST:PORT.*found '198.51.100.1'"),
        ("static:::1:7401", r"\[::1\]:7401, found '::1:7401'"),
        ("static:198.51.100.1:0", "found '198.51.100.1:0'"),
        ("static:198.51.100.1:65536", "found '198.51.100.1:65536'"),
        ("static:0.0.0.0:7401", "one can connect to"),
        ("static:[::]:7401", "one can connect to"),
        ("static:[fe80:1]:7401", "no IPv6 address"),
        ("static:a b:7401", "found 'a b:7401'"),
        ("dns:weightd.svc", "dns takes NAME:PORT.*found 'weightd.svc'"),
        ("dns:198.51.100.1:7401", "no name"),
        ("etcd:", "found 0"),
        ("etcd:198.51.100.1:2379", "etcd takes http://HOST:2379.*'198.51.100.1:2379'"),
        ("etcd:http://h:99999", "Found 'http://h:99999'"),
        ("etcd:http://a/x,http://b/y", "'/x', '/y'"),
        ("etcd:http://name:secret@h:2379", "ETCDCTL_USER.*Found 'h:2379'"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_is_allowed(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        parse(text)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("node", "address"), [("", "h:1"), ("a/b", "h:1"), ("a\n", "h:1"), ("me", "0.0.0.0:7401"), ("me", "h")]
)
def test_we_are_no_peer_that_others_would_leave_out(node: str, address: str) -> None:
    with pytest.raises(ValueError, match=r"found|connect"):
        open_directory("etcd:http://127.0.0.1:1", node=node, address=address)


def test_a_setting_is_read_without_starting_anything() -> None:
    for text in ["static:h:1", "dns:weightd.default.svc:7401", "dns:_peers._tcp.weightd", "etcd:https://a,https://b/x"]:
        parse(text)


# etcd


class Etcd(Server):
    """A real etcd. Its data survive a kill."""

    def __init__(self, folder: Path, *arguments: str, scheme: str = "http", place: Place = HERE) -> None:
        with place.entered():
            port, peers = free_ports(2, host=place.host)
        self.url = f"{scheme}://{place.host}:{port}"
        self.peers = f"http://{place.host}:{peers}"
        self.data = folder / "data"
        self.arguments = list(arguments)
        self.verify: Any = True
        super().__init__([], folder, place=place)

    def start(self) -> None:
        self._command = [
            command("etcd", "apt-get install etcd-server"), "--name", self.log.parent.name,
            "--data-dir", str(self.data), "--unsafe-no-fsync",
            "--listen-client-urls", self.url, "--advertise-client-urls", self.url,
            "--listen-peer-urls", self.peers, *self.arguments,
        ]  # fmt: skip
        super().start()

    def ready(self) -> bool:
        try:
            # Grants and revokes, so that there is a leader, and room.
            self("lease/revoke", ID=self("lease/grant", TTL=60)["ID"])
        except (httpx.TransportError, AssertionError):
            return False
        return True

    def __call__(self, path: str, **body: Any) -> dict[str, Any]:
        answer = httpx.post(f"{self.url}/v3/{path}", json=body, timeout=10, verify=self.verify)
        assert answer.is_success, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def put(self, key: str, value: bytes) -> None:
        self("kv/put", key=b64(key), value=b64encode(value).decode())

    def entries(self, prefix: str = "/") -> dict[str, dict[str, Any]]:
        """Key → what etcd knows of it."""
        found = self("kv/range", key=b64(prefix), range_end=b64("\x7f"))
        return {b64decode(entry["key"]).decode(): entry for entry in found.get("kvs", [])}

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def b64(text: str) -> str:
    return b64encode(text.encode()).decode()


def entry(node: str, address: str, stages: object = None) -> tuple[str, bytes]:
    """Key and value as another daemon would put them."""
    value = {"node": node, "address": address, "stages": {} if stages is None else stages}
    return f"/weightd/peers/{node}/{address}", json.dumps(value).encode()


@pytest.fixture(scope="module")
def shared_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    with Etcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
def etcd(shared_etcd: Etcd) -> Etcd:
    """An empty etcd that nobody kills."""
    shared_etcd("kv/deleterange", key=b64("/"), range_end=b64("\x7f"))
    return shared_etcd


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[Etcd]:
    """An etcd that may be killed."""
    with Etcd(tmp_path / "etcd") as server:
        yield server


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd_directory, "TTL", 3)
    monkeypatch.setattr(etcd_directory, "KEEPALIVE", 1.0)
    monkeypatch.setattr(etcd_directory, "BETWEEN_WRITES", 0.2)


def test_daemons_find_each_other_and_what_they_have_in_etcd(etcd: Etcd) -> None:
    async def check() -> None:
        async with opened(f"etcd:{etcd.url}", "a", "127.0.0.1:1001") as a:
            assert "not connected yet" in a.status()
            async with opened(f"etcd:{etcd.url}", "b", "[::1]:1002") as b:
                await eventually(lambda: a.members() and b.members(), "both know each other")
                assert list(a.members()) == [Member("b", "[::1]:1002", {})]
                await eventually(lambda: a.status() == b.status() == "ok", "all is well")
                await b.publish({"xxh3:1/tp0": 0.259, "xxh3:2": 1.0, "xxh3:3": 0.999})
                await eventually(lambda: stages(a, "b"), "a knows what b has")
                assert stages(a, "b") == {"xxh3:1/tp0": 0.25, "xxh3:2": 1.0, "xxh3:3": 0.99}
                await b.publish({})
                await eventually(lambda: stages(a, "b") == {}, "b has nothing any more")
            await eventually(lambda: not a.members(), "b has withdrawn", deadline=5)
            assert len(etcd.entries()) == 1

    asyncio.run(check())


def test_changes_wake_the_one_who_waits(etcd: Etcd) -> None:
    async def check() -> None:
        async with opened(f"etcd:{etcd.url}") as directory:
            await eventually(lambda: directory.status() == "ok", "connected")
            assert not await directory.changed(0.05)
            waiting = asyncio.create_task(directory.changed(DEADLINE))
            await asyncio.to_thread(etcd.put, *entry("b", "h:1"))
            assert await waiting
            assert addresses(directory) == ["h:1"]
            await asyncio.to_thread(etcd.put, *entry("b", "h:1"))
            await asyncio.to_thread(etcd.put, *entry("c", "h:2"))
            assert await directory.changed(DEADLINE)
            await eventually(lambda: addresses(directory) == ["h:1", "h:2"], "c is known")
            assert not await directory.changed(0.05), "writing the same again is no change, and each is told once"

    asyncio.run(check())


_A_DAEMON = """
import asyncio, sys
from weightd.daemon.peers.finding import etcd
from weightd.daemon.peers.finding.directory import open_directory
etcd.TTL, etcd.KEEPALIVE = 3, 1.0
async def main():
    directory = open_directory("etcd:" + sys.argv[1], node="doomed", address="127.0.0.1:1")
    await directory.start()
    await directory.publish({"xxh3:1": 1})
    await asyncio.Event().wait()
asyncio.run(main())
"""


def test_a_daemon_that_is_killed_vanishes_when_its_lease_ends(etcd: Etcd) -> None:
    async def check(doomed: subprocess.Popen[bytes]) -> None:
        async with opened(f"etcd:{etcd.url}") as directory:
            await eventually(lambda: stages(directory, "doomed"), "it is there")
            while await directory.changed(3.5):  # longer than the lease: it is kept alive
                assert stages(directory, "doomed") == {"xxh3:1": 1.0}
            doomed.kill()
            await eventually(lambda: not directory.members(), "it is gone", deadline=15)

    with subprocess.Popen([sys.executable, "-c", _A_DAEMON, etcd.url]) as doomed:
        try:
            asyncio.run(check(doomed))
        finally:
            doomed.kill()


def test_many_changes_are_few_writes_and_the_last_one_counts(etcd: Etcd) -> None:
    async def check() -> None:
        async with opened(f"etcd:{etcd.url}", "a", "h:1") as a, opened(f"etcd:{etcd.url}", "b", "h:2") as b:
            begin = time.monotonic()
            for done in range(2001):
                await a.publish({"xxh3:1": done / 2000})
                await asyncio.sleep(0.001)
            await eventually(lambda: stages(b, "a") == {"xxh3:1": 1.0}, "the last one")
            writes = int(etcd.entries()["/weightd/peers/a/h:1"]["version"])
            assert writes <= (time.monotonic() - begin) / etcd_directory.BETWEEN_WRITES + 3

    asyncio.run(check())


def test_a_lease_that_was_lost_is_granted_anew(etcd: Etcd, short_lease: None) -> None:
    async def check() -> None:
        async with opened(f"etcd:{etcd.url}", "a", "h:1") as a, opened(f"etcd:{etcd.url}", "b", "h:2") as b:
            await a.publish({"xxh3:1": 1.0})
            await eventually(lambda: stages(b, "a"), "a is known")
            lease = etcd.entries()["/weightd/peers/a/h:1"]["lease"]
            await asyncio.to_thread(etcd, "lease/revoke", ID=lease)
            await eventually(lambda: not b.members(), "it was lost")
            await eventually(lambda: stages(b, "a") == {"xxh3:1": 1.0}, "a is known again")
            assert a.status() == "ok"

    asyncio.run(check())


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
                await eventually(lambda: all(len(each.members()) == others for each in all_of_them), "all are known")
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


GARBAGE = [
    ("/weightd/peers/x/h:1", b""),
    ("/weightd/peers/x/h:2", b"\xff\xfe\x00"),
    ("/weightd/peers/x/h:3", b"[" * 100_000),
    ("/weightd/peers/x/h:4", b"9" * 10_000),
    ("/weightd/peers/x/h:5", b"null"),
    ("/weightd/peers/x/h:6", json.dumps({"node": "x", "address": "h:6"}).encode()),
    ("/weightd/peers/x/h:7", json.dumps({"node": "y", "address": "h:7", "stages": {}}).encode()),
    ("/weightd/peers/\n\x1b[31m/h:8", json.dumps({"node": "\n\x1b[31m", "address": "h:8", "stages": {}}).encode()),
    entry("x", "0.0.0.0:1"),
    entry("x", "h"),
    entry("x", "h:70000"),
    entry("x" * 254, "h:1"),
    entry("x", "h:9", [1, 2]),
    entry("x", "h:10", {"a": 1.5}),
    entry("x", "h:11", {"a": float("nan")}),
    entry("x", "h:12", {"a": True}),
    entry("x", "h:13", {"a": "1"}),
    entry("x", "h:14", {"a" * 129: 1}),
    entry("x", "h:15", {"a\n": 1}),
    entry("x", "h:16", {str(number): 1 for number in range(257)}),
    ("/weightd/peers/huge/h:1", b"x" * 1_400_000),
]


@pytest.mark.parametrize("first", ["garbage", "directory"])
def test_what_is_no_entry_of_a_daemon_is_left_out_and_said_once(
    etcd: Etcd, first: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)

    def litter() -> None:
        for key, value in GARBAGE:
            etcd.put(key, value)
        etcd.put(*entry("zz", "good:1", {"xxh3:1": 1}))

    async def check() -> None:
        if first == "garbage":
            litter()
        async with opened(f"etcd:{etcd.url}") as directory:
            await eventually(lambda: directory.status() == "ok", "connected")
            if first == "directory":
                await asyncio.to_thread(litter)
            await eventually(directory.members, "the good one is known")
            assert list(directory.members()) == [Member("zz", "good:1", {"xxh3:1": 1.0})]
            await asyncio.to_thread(litter)
            await asyncio.to_thread(etcd.put, *entry("zz", "good:2"))
            await eventually(lambda: len(directory.members()) == 2, "the next one is known")
            assert directory.status() == "ok"

    asyncio.run(check())
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(said) == len(GARBAGE)
    assert all(line.isprintable() and len(line) < 1000 for line in said)


def test_an_entry_that_turns_into_garbage_is_gone(etcd: Etcd) -> None:
    key, value = entry("b", "h:2")
    etcd.put(key, value)

    async def check() -> None:
        async with opened(f"etcd:{etcd.url}") as directory:
            await eventually(directory.members, "it is known")
            await asyncio.to_thread(etcd.put, key, b"garbage")
            await eventually(lambda: not directory.members(), "it is gone")

    asyncio.run(check())


def test_we_never_publish_what_others_would_leave_out(etcd: Etcd) -> None:
    many = {f"\N{GRINNING FACE}{number:0127d}"[:128]: 1.0 for number in range(400)}

    async def check() -> None:
        async with opened(f"etcd:{etcd.url}", "a", "h:1") as a, opened(f"etcd:{etcd.url}", "b", "h:2") as b:
            await a.publish({"x" * 129: 1.0, "\n": 1.0, "": 1.0, **many})
            await eventually(lambda: stages(b, "a"), "it has stages")
            assert len(stages(b, "a") or {}) == 256
            assert (stages(b, "a") or {}).items() <= many.items()

    asyncio.run(check())


def test_clusters_under_different_prefixes_do_not_mix(etcd: Etcd) -> None:
    async def check() -> None:
        async with contextlib.AsyncExitStack() as stack:
            found = {}
            for prefix in ["", "/a", "/ab", "/a/b"]:
                for name in ["1", "2"]:
                    node = f"{prefix.replace('/', '-')}{name}"
                    found[prefix, name] = await stack.enter_async_context(
                        opened(f"etcd:{etcd.url}{prefix}", node, f"h:{len(found) + 1}")
                    )
            await eventually(lambda: all(each.members() for each in found.values()), "all have found their peer")
            for (prefix, name), each in found.items():
                other = "2" if name == "1" else "1"
                assert [member.node for member in each.members()] == [f"{prefix.replace('/', '-')}{other}"]

    asyncio.run(check())


def test_more_entries_than_one_answer_holds_are_all_known_up_to_the_limit(
    etcd: Etcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    with httpx.Client() as client:
        for number in range(450):
            key, value = entry(f"n{number:03}", f"h{number:03}:1")
            body = {"key": b64(key), "value": b64encode(value).decode()}
            client.post(f"{etcd.url}/v3/kv/put", json=body).raise_for_status()

    async def check() -> None:
        async with opened(f"etcd:{etcd.url}") as directory:
            await eventually(lambda: directory.status() == "ok", "connected")
            assert addresses(directory) == [f"h{number:03}:1" for number in range(450)]
        monkeypatch.setattr(directory_module, "MAX_MEMBERS", 220)
        monkeypatch.setattr(etcd_directory, "MAX_MEMBERS", 220)
        async with opened(f"etcd:{etcd.url}") as directory:
            await eventually(lambda: directory.status() == "ok", "connected")
            assert len(directory.members()) == 220
            await asyncio.to_thread(etcd.put, *entry("zzz", "zzz:1"))
            await asyncio.to_thread(etcd.put, *entry("n000", "h000:1", {"xxh3:1": 1}))
            await eventually(lambda: stages(directory, "n000"), "a later change is known")
            assert len(directory.members()) == 220

    asyncio.run(check())


def test_a_revision_that_was_compacted_is_no_end_but_a_new_list(etcd: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    etcd.put(*entry("b", "h:2"))
    etcd.put(*entry("c", "h:3"))
    revision = int(etcd("kv/range", key=b64("/"))["header"]["revision"])
    etcd("kv/compaction", revision=revision)
    begun: list[int] = []
    watch = etcd_directory.EtcdDirectory._watch

    async def late(self: etcd_directory.EtcdDirectory, start: int) -> None:
        begun.append(start)
        await watch(self, start if len(begun) > 1 else 1)  # the first time as if it had taken very long to get here

    monkeypatch.setattr(etcd_directory.EtcdDirectory, "_watch", late)

    async def check() -> None:
        async with opened(f"etcd:{etcd.url}") as directory:
            await eventually(lambda: len(begun) > 1 and directory.status() == "ok", "it has begun anew")
            await asyncio.to_thread(etcd.put, *entry("d", "h:4"))
            await eventually(lambda: addresses(directory) == ["h:2", "h:3", "h:4"], "it watches again")

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


def certificates(folder: Path) -> dict[str, Path]:
    """A CA, and a certificate for both ends; without a CN, which etcd's gateway refuses beside users."""
    openssl = command("openssl", "apt-get install openssl")
    folder.mkdir()
    paths = {name: folder / name for name in ["ca.key", "ca.crt", "own.key", "own.csr", "own.crt", "extensions"]}
    paths["extensions"].write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    for arguments in (
        ["req", "-x509", *curve, "-keyout", paths["ca.key"], "-out", paths["ca.crt"], "-subj", "/CN=test CA", "-days",
         "2", "-addext", "keyUsage=critical,keyCertSign"],
        ["req", *curve, "-keyout", paths["own.key"], "-out", paths["own.csr"], "-subj", "/O=etcd"],
        ["x509", "-req", "-in", paths["own.csr"], "-CA", paths["ca.crt"], "-CAkey", paths["ca.key"], "-CAcreateserial",
         "-out", paths["own.crt"], "-days", "2", "-extfile", paths["extensions"]],
    ):  # fmt: skip
        subprocess.run([openssl, *map(str, arguments)], check=True, capture_output=True)
    return paths


def test_tls_and_a_user_come_from_the_variables_of_etcdctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = certificates(tmp_path / "certificates")
    server = Etcd(
        tmp_path / "etcd", "--cert-file", str(files["own.crt"]), "--key-file", str(files["own.key"]),
        "--trusted-ca-file", str(files["ca.crt"]), "--client-cert-auth", scheme="https",
    )  # fmt: skip
    monkeypatch.setenv("ETCDCTL_CACERT", str(files["ca.crt"]))
    monkeypatch.setenv("ETCDCTL_CERT", str(files["own.crt"]))
    monkeypatch.setenv("ETCDCTL_KEY", str(files["own.key"]))
    server.verify = ssl.create_default_context(cafile=str(files["ca.crt"]))
    server.verify.load_cert_chain(files["own.crt"], files["own.key"])

    async def check() -> None:
        async with opened(f"etcd:{server.url}", "a", "h:1") as a:
            await eventually(lambda: a.status() != "ok", "nobody has logged in")
            await eventually(lambda: "not connected yet" not in a.status(), "it was tried")
            monkeypatch.setenv("ETCDCTL_USER", "root:wrong")
            await eventually(lambda: "authentication failed" in a.status(), "the password is wrong")
            monkeypatch.setenv("ETCDCTL_USER", "root:secret:too")
            async with opened(f"etcd:{server.url}", "b", "h:2") as b:
                await eventually(lambda: a.status() == b.status() == "ok" and a.members() and b.members(), "logged in")
                server.kill()  # which forgets who was logged in
                await asyncio.to_thread(Server.start, server)
                await a.publish({"xxh3:1": 1.0})
                await eventually(lambda: stages(b, "a") and a.status() == "ok", "logged in again")
                assert "secret" not in a.status()

    with server:
        server("auth/user/add", name="root", password="secret:too")
        server("auth/role/add", name="root")
        server("auth/user/grant", user="root", role="root")
        server("auth/enable")
        server.ready = lambda: server.process is not None  # type: ignore[method-assign]  # it is no user
        asyncio.run(check())


@pytest.mark.parametrize(
    "answer", ["hello", "null", "{}", '{"error":{"message":"no"}}', "endless", "silent", "{}\n" * 100]
)
def test_a_server_that_is_no_etcd_is_named_and_does_no_harm(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd_directory, "ANSWER_TIMEOUT", 1.0)
    monkeypatch.setattr(etcd_directory, "MAX_ANSWER", 1 << 20)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await reader.readuntil(b"\r\n\r\n")
            if answer == "silent":
                await reader.read()
            elif answer == "endless":
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
                while not writer.is_closing():
                    writer.write(b"x" * 65536)
                    await writer.drain()
            else:
                writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(answer)}\r\n\r\n{answer}".encode())
        writer.close()

    async def check() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            async with opened(f"etcd:{url}") as directory:
                await eventually(lambda: "no members are known" in directory.status(), "it is named")
                assert url in directory.status()
                assert list(directory.members()) == []

    asyncio.run(check())


# DNS


class Zone:
    """A DNS server on loopback, by UDP and TCP. ``records`` may change at any time."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, str], Sequence[str]] = {}
        self.additional: dict[tuple[str, str], Sequence[str]] = {}
        self.ttl = 0
        self.failing: set[str] = set()
        """Types of records that are answered with SERVFAIL."""
        self.by_tcp = 0
        self._servers: list[socketserver.BaseServer] = []
        self.port = free_ports(1)[0]

    def start(self) -> None:
        zone = self

        class Datagram(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                data, channel = self.request
                channel.sendto(zone.answer(data, limit=512), self.client_address)

        class Stream(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                (size,) = struct.unpack("!H", self.rfile.read(2))
                answer = zone.answer(self.rfile.read(size), limit=65535)
                zone.by_tcp += 1
                self.wfile.write(struct.pack("!H", len(answer)) + answer)

        class TcpServer(socketserver.ThreadingTCPServer):
            allow_reuse_address = True

        place = ("127.0.0.1", self.port)
        self._servers = [socketserver.ThreadingUDPServer(place, Datagram), TcpServer(place, Stream)]
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._servers = []

    def answer(self, data: bytes, limit: int) -> bytes:
        query = dns.message.from_wire(data)
        answer = dns.message.make_response(query)
        name, kind = query.question[0].name, dns.rdatatype.to_text(query.question[0].rdtype)
        asked = name.to_text().lower().rstrip(".")
        if kind in self.failing:
            answer.set_rcode(dns.rcode.SERVFAIL)
        elif (asked, kind) in self.records:
            answer.answer.append(dns.rrset.from_text_list(name, self.ttl, "IN", kind, self.records[asked, kind]))
            for (other, other_kind), texts in self.additional.items():
                answer.additional.append(dns.rrset.from_text_list(f"{other}.", self.ttl, "IN", other_kind, texts))
        elif asked not in {known for known, _ in self.records}:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        wire = answer.to_wire(max_size=65535)
        if len(wire) > limit:
            answer.answer.clear()
            answer.additional.clear()
            answer.flags |= dns.flags.TC
            wire = answer.to_wire()
        return wire

    def open(self, place: str, address: str = "198.51.100.1:7401") -> Directory:
        """The directory that looks here instead of where resolv.conf says."""

        def resolver() -> dns.asyncresolver.Resolver:
            found = dns.asyncresolver.Resolver(configure=False)
            found.nameservers = ["127.0.0.1"]
            found.port = self.port
            return found

        return dns_directory.parse("dns", place)(node="me", address=address, resolver=resolver)  # type: ignore[call-arg]


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
