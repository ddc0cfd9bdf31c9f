"""Messages of the lease socket, byte by byte, and manifests in their wire form."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from weightd.ipc import wire
from weightd.ipc.manifest import Entry, Manifest

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    ours.settimeout(30)
    theirs.settimeout(30)
    with ours, theirs:
        yield ours, theirs


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_message_is_its_length_and_json_without_spaces() -> None:
    assert wire.encode({"a": [1, 2], "b": None}) == b'\x14\0\0\0{"a":[1,2],"b":null}'
    assert wire.MAX_REQUEST_BYTES == 16 << 20
    assert wire.MAX_REPLY_BYTES == 64 << 20
    assert wire.MAX_FDS == 4


@pytest.mark.parametrize("body", [b"[]", b"1", b'"x"', b"null"])
def test_what_is_no_object_is_no_message(body: bytes) -> None:
    with pytest.raises(ValueError, match="expected a JSON object"):
        wire.decode(body)


def test_what_is_nested_too_deeply_is_no_message() -> None:
    with pytest.raises(ValueError, match=r"nested too deeply"):
        wire.decode(b'{"a":' * 200_000)


def test_messages_come_one_after_another_and_each_with_its_own_descriptors(pair: Pair) -> None:
    ours, theirs = pair
    fds = [os.memfd_create(f"test{i}") for i in range(4)]
    wire.send(theirs, {"n": 1}, fds)
    wire.send(theirs, {"n": 2})
    wire.send(theirs, {"n": 3}, fds[:1])
    found = [wire.receive(ours) for _ in range(3)]
    assert [message for message, _ in found] == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert [len(got) for _, got in found] == [4, 0, 1]
    for sent, got in zip(fds, found[0][1], strict=True):
        assert os.fstat(sent).st_ino == os.fstat(got).st_ino
        assert not os.get_inheritable(got), "an engine's children do not get it"
    wire.close_all([fd for _, got in found for fd in got] + fds)


def test_a_message_may_come_byte_by_byte(pair: Pair) -> None:
    ours, theirs = pair
    fd = os.memfd_create("test")
    data = wire.encode({"long": "x" * 100_000})

    def send() -> None:
        socket.send_fds(theirs, [data[:1]], [fd])
        for at in (1, 2, 3):
            theirs.sendall(data[at : at + 1])
        theirs.sendall(data[4:])

    thread = threading.Thread(target=send)
    thread.start()
    message, fds = wire.receive(ours)
    thread.join()
    assert (len(message["long"]), len(fds)) == (100_000, 1)
    wire.close_all([*fds, fd])


@pytest.mark.parametrize("sent", [b"\1", b"\1\0\0", b"\5\0\0\0", b"\5\0\0\0{}  "])
def test_a_connection_that_ends_within_a_message_is_broken_and_nothing_stays_open(sent: bytes, pair: Pair) -> None:
    ours, theirs = pair
    fd = os.memfd_create("test")
    socket.send_fds(theirs, [sent], [fd])
    os.close(fd)
    before = open_fds()
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionError, match="the connection ended within a message") as error:
        wire.receive(ours)
    assert not isinstance(error.value, wire.Closed)
    assert open_fds() == before


def test_a_connection_that_ends_between_messages_was_closed(pair: Pair) -> None:
    ours, theirs = pair
    wire.send(theirs, {})
    theirs.shutdown(socket.SHUT_WR)
    assert wire.receive(ours) == ({}, [])
    with pytest.raises(wire.Closed):
        wire.receive(ours)


def test_a_message_may_be_as_long_as_is_allowed_and_no_longer(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair
    monkeypatch.setattr(wire, "MAX_REPLY_BYTES", 20)
    message = {"a": "x" * 12}
    assert len(wire.encode(message)) == 4 + 20
    wire.send(theirs, message)
    assert wire.receive(ours)[0] == message
    theirs.sendall(struct.pack("<I", 21))
    with pytest.raises(ConnectionError, match="a message of 21 bytes, allowed are 20"):
        wire.receive(ours)


def test_nobody_who_says_nothing_is_waited_for_longer_than_the_timeout(pair: Pair) -> None:
    ours, _ = pair
    ours.settimeout(0.001)
    with pytest.raises(TimeoutError):
        wire.receive(ours)


# ---------------------------------------------------------------------------- manifests

MANIFEST = Manifest(
    "st-1", "file:///m", "cpu", 1, 2, 1000, "xxh3:1", "xxh3:2", "/cache", ["a", "b", "c"], ["U8", "F4", "BF16"],
    [[7], [3, 4], []], [0, 256, 512], ["1", "2", "3"],
)  # fmt: skip


def test_a_manifest_has_its_tensors_by_columns_and_their_types_by_number() -> None:
    assert json.loads(MANIFEST.encode()) == {
        "format": 1, "stage": "st-1", "model": "file:///m", "device": "cpu", "tp_rank": 1, "tp_size": 2,
        "nbytes": 1000, "digest": "xxh3:1", "checkpoint_digest": "xxh3:2", "metadata": "/cache",
        "dtypes": ["BF16", "F4", "U8"], "names": ["a", "b", "c"], "types": [2, 1, 0], "shapes": [[7], [3, 4], []],
        "offsets": [0, 256, 512], "digests": ["1", "2", "3"],
    }  # fmt: skip
    assert b" " not in MANIFEST.encode()
    assert Manifest.decode(MANIFEST.encode()) == MANIFEST


def test_an_entry_says_how_many_bytes_its_bits_come_to() -> None:
    assert list(MANIFEST) == [
        Entry("a", "U8", (7,), 0, 7),
        Entry("b", "F4", (3, 4), 256, 6),
        Entry("c", "BF16", (), 512, 2),
    ]
    assert (len(MANIFEST), MANIFEST.entry(1).nbytes) == (3, 6)


@pytest.mark.parametrize("other", [0, 2, "1", None])
def test_another_format_is_refused_with_the_remedy(other: object) -> None:
    table = json.loads(MANIFEST.encode()) | {"format": other}
    with pytest.raises(ValueError, match="another manifest format: use the same release"):
        Manifest.decode(json.dumps(table).encode())
