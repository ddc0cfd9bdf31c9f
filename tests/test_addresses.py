"""HOST:PORT: where one listens, where one connects, and whose machine a host is."""

from __future__ import annotations

import pytest

from weightd.daemon.addresses import is_address, is_local, is_loopback, join_address, parse_address, parse_listen


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:7400", "127.0.0.1", 7400),
        ("0.0.0.0:7401", "0.0.0.0", 7401),
        ("[::]:7401", "::", 7401),
        ("[2001:DB8:0::1]:7401", "2001:DB8:0::1", 7401),
        ("Localhost:0", "Localhost", 0),
        ("a b:65535", "a b", 65535),
    ],
)
def test_where_one_listens_is_as_it_was_written(text: str, host: str, port: int) -> None:
    assert parse_listen(text) == (host, port)
    assert join_address(host, port) == text


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("10.0.0.1:7401", "10.0.0.1", 7401),
        ("[2001:DB8:0::1]:7401", "2001:db8::1", 7401),
        ("[0:0:0:0:0:0:0:1]:65535", "::1", 65535),
        ("Node-1.example:1", "node-1.example", 1),
        ("_peers._tcp.weightd:1", "_peers._tcp.weightd", 1),
    ],
)
def test_where_one_connects_has_one_spelling(text: str, host: str, port: int) -> None:
    assert parse_address(text) == (host, port)
    assert parse_address(join_address(host, port)) == (host, port)


@pytest.mark.parametrize(
    "text", ["", "nonsense", ":7400", "127.0.0.1", "127.0.0.1:", "h:x", "h:-1", "h:65536", "::1:7400", "[::1]", "[h]:1"]
)
def test_what_is_no_host_and_port_is_refused_either_way(text: str) -> None:
    for parse in (parse_listen, parse_address):
        with pytest.raises(ValueError, match=r"expected HOST:PORT, as in .*, found ") as refused:
            parse(text)
        assert str(refused.value).endswith(repr(text))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0.0.0.0:7401", "'0.0.0.0:7401' is no address that one can connect to"),
        ("[::]:7401", "no address that one can connect to"),
        ("224.0.0.1:7401", "no address that one can connect to"),
        ("[fe80:1]:7401", "no IPv6 address stands in the brackets"),
        ("h:0", "found 'h:0'"),
        ("a b:7401", "found 'a b:7401'"),
        (f"{'h' * 254}:1", "expected HOST:PORT"),
    ],
)
def test_one_listens_where_one_cannot_connect(text: str, says: str) -> None:
    parse_listen(text)
    with pytest.raises(ValueError, match=says):
        parse_address(text)


def test_names_are_no_addresses() -> None:
    assert is_address("10.0.0.1")
    assert is_address("::1")
    assert not is_address("localhost")
    assert not is_address("[::1]")


def test_what_only_this_machine_reaches() -> None:
    for host in ("localhost", "127.0.0.1", "127.1.2.3", "::1"):
        assert is_loopback(host)
    for host in ("0.0.0.0", "::", "192.0.2.77", "weightd", ""):
        assert not is_loopback(host)


def test_addresses_of_this_machine() -> None:
    assert is_local("127.0.0.1")
    assert not is_local("192.0.2.77")  # of no network, by RFC 5737
    assert not is_local("2001:db8::1")
    assert not is_local("not an address")
