"""What strangers put into etcd, or answer in its place: left out, and said."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging

import pytest

from tests.peers.finding.directories import eventually, opened, stages
from tests.peers.finding.etcd import Etcd, entry
from weightd.daemon.peers.finding import etcd as etcd_directory
from weightd.daemon.peers.finding.directory import Member

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
