"""What the page and the events give away and cost: of very many stages, of hostile ones, to whom without a token."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from tests.api.status.made import MadeNode
from tests.servers import until
from weightd.api.overview import MAX_STAGES
from weightd.daemon.errors import QueueFull, SourceFailed
from weightd.daemon.node import feed as feed_module

MOST_PAGE_BYTES = 60_000
HOSTILE = "s3://models/" + "<script>alert('x')</script>\"'&\u202e" * 100


@pytest.fixture
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MadeNode]:
    with MadeNode(tmp_path_factory.mktemp("made")) as found:
        yield found


def events(made: MadeNode) -> list[dict[str, object]]:
    text = httpx.get(f"{made.url}/v1/events?follow=false", timeout=60).text
    return [json.loads(line.removeprefix("data:")) for line in text.splitlines() if line.startswith("data:")]


def test_of_very_many_stages_the_latest_are_told_and_the_rest_is_counted(made: MadeNode) -> None:
    for number in range(MAX_STAGES + 200):
        made.add(f"s3://models/model-{number}", created_at=1e9 + number)
    waiting = made.add("s3://models/old", "queued", created_at=1.0)
    found = events(made)
    stages = [stage for event in found for stage in event.get("stages", [])]  # type: ignore[attr-defined]
    assert len(stages) == MAX_STAGES
    assert waiting.id in {stage["id"] for stage in stages}, "one that is on its way is never left out"
    assert min(stage["created_at"] for stage in stages if stage["id"] != waiting.id) == 1e9 + 201
    (about,) = [node for event in found for node in event.get("node", [])]  # type: ignore[attr-defined]
    assert about["stages"]["ready"] == MAX_STAGES + 200
    assert max(len(json.dumps(event)) for event in found) < 80_000
    assert sum(len(json.dumps(event)) for event in found) < 2_000_000


def test_names_and_messages_without_end_are_cut(made: MadeNode) -> None:
    error = SourceFailed("x" * 1_000_000, huge=["y" * 1000] * 1000)
    made.add("s3://models/" + "z" * 4000, "failed", error=error)
    assert sum(len(json.dumps(event)) for event in events(made)) < 5000


class Reader(HTMLParser):
    """Tags of a page, and the text of its table cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.within = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        self.within = tag
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.within in ("td", "th"):
            self.cells[-1] += data


def test_the_page_is_below_its_limit_whatever_there_is(tmp_path: Path) -> None:
    with MadeNode(tmp_path, peers=[f"10.0.{number // 200}.{number % 200}:7401" for number in range(2, 500)]) as made:
        empty = httpx.get(made.url)
        assert len(empty.content) < MOST_PAGE_BYTES
        stages = []
        for number in range(300):
            state, error = ("failed", SourceFailed(HOSTILE)) if number % 2 else ("ready", None)
            stages.append(made.add(f"{HOSTILE}{number}", state, nbytes=1 << 30, error=error))
            made.call(made.node.refusals.note, QueueFull(f"{number} {HOSTILE}"))
        for number in range(50):
            made.lease(stages[number * 2], number)
        assert made.node.fleet is not None
        for member in made.node.directory.members():  # type: ignore[union-attr]
            made.call(made.node.fleet.dropped, member.address, "gone", HOSTILE)
        page = httpx.get(made.url)
    assert MOST_PAGE_BYTES - 2000 < len(page.content) < MOST_PAGE_BYTES
    read = Reader(page.text)
    assert read.tags.count("script") == 1, "a name became markup"
    assert any(cell.startswith("s3://models/<script>") for cell in read.cells)
    assert len(re.findall(r"And \d+ more", page.text)) == 4


def test_the_policy_allows_what_is_in_the_page_and_nothing_else(made: MadeNode) -> None:
    answer = httpx.get(made.url)
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["form-action"] == policy["base-uri"] == "'none'"
    for source in (policy["script-src"], policy["style-src"]):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", source)
    assert "http:" not in re.sub(r"http://(www\.w3\.org/2000/svg|127\.0\.0\.1:7400)", "", answer.text)
    assert "https:" not in answer.text
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_without_the_token_there_is_nothing_of_the_node_in_page_or_events(tmp_path: Path) -> None:
    with MadeNode(tmp_path, token="s3cret") as made:
        stage = made.add("s3://models/llama-3-8b")
        assert httpx.get(f"{made.url}/v1/events").status_code == 401
        right = {"Authorization": "Bearer s3cret"}
        for route in ("/v1/events?follow=false", "/"):
            answer = httpx.get(f"{made.url}{route}", headers=right)
            assert answer.status_code == 200
            assert stage.id in answer.text
        for headers in (
            {},
            {"Authorization": "Bearer nope"},
            {"Authorization": "s3cret"},
        ):
            shell = httpx.get(made.url, headers=headers)
            assert shell.status_code == 401
            assert shell.headers["content-type"].startswith("text/html")
            for secret in (stage.id, "llama", f"pid {os.getpid()}", "s3cret"):
                assert secret not in shell.text
        for route in ("//", "/?x", "/%2e", "/index.html"):
            assert "llama" not in httpx.get(f"{made.url}{route}").text


def test_who_stops_reading_in_the_middle_is_hung_up_on_and_leaves_nothing(
    made: MadeNode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(feed_module, "_STUCK", 0.5)
    for number in range(400):
        made.add(f"s3://models/{'m' * 500}{number}")
    tasks = made.tasks()
    sleepers = []
    for _ in range(3):
        sleeper = socket.socket()
        sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sleeper.connect(("127.0.0.1", int(made.url.rpartition(":")[2])))
        sleeper.sendall(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        sleepers.append(sleeper)

    until(lambda: made.tasks() > tasks, "they are served")
    until(lambda: made.tasks() == tasks, "they are hung up on, and no task is left")
    assert not caplog.records, "somebody's hanging up is no error"
    for sleeper in sleepers:
        sleeper.settimeout(20)
        with contextlib.suppress(ConnectionResetError):
            while sleeper.recv(1 << 20):
                pass
        sleeper.close()


def test_clients_that_hang_up_leave_no_task_behind(made: MadeNode, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(MAX_STAGES):
        made.add(f"s3://models/{number}")
    tasks = made.tasks()
    for number in range(30):
        client = socket.create_connection(("127.0.0.1", int(made.url.rpartition(":")[2])))
        client.sendall(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        if number % 3:
            client.recv(1)
        if number % 2:  # by a reset
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    until(lambda: made.tasks() == tasks, "no task is left")
    assert not caplog.records
