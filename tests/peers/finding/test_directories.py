"""What all directories of peers share: the setting, ourselves among the members, a static list and none."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from tests.peers.finding.directories import addresses, opened
from weightd.daemon.peers.finding.directory import Member, open_directory, parse


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
