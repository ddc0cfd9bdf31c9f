"""The log: one event a line, of what it is about, on whose request, and without secrets."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.checkpoint_files import write_checkpoint
from tests.servers import Daemon, free_ports, until
from weightd.daemon import redaction
from weightd.daemon.errors import SourceFailed
from weightd.daemon.observing import logs
from weightd.daemon.redaction import redacted

SIGNED = (
    "https://bucket.s3.amazonaws.com/model.safetensors?X-Amz-Algorithm=AWS4-HMAC-SHA256"
    "&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F20260101&X-Amz-Signature=5ca1ab1e5ca1ab1e&X-Amz-Security-Token=FwoGZXplanted"
)
PLANTED = {
    SIGNED: ["5ca1ab1e5ca1ab1e", "AKIAIOSFODNN7EXAMPLE", "FwoGZXplanted"],
    "https://a.blob.core.windows.net/c/m?sv=2024&sig=p1anted%2Bsig%3D&se=2026": ["p1anted"],
    "https://storage.googleapis.com/b/o?X-Goog-Signature=p1anted&X-Goog-Credential=me%40x": ["p1anted", "me%40x"],
    "Authorization: Bearer eyJhbGciOi.p1anted.sig": ["p1anted"],
    "{'authorization': 'Basic dXNlcjpwMWFudGVk'}": ["dXNlcjpwMWFudGVk"],
    "proxy http://user:p1anted@proxy:3128 refused": ["p1anted"],
    "hf_abcdefghijklmnopqrstuvwxyz0123 is no token": ["hf_abcdefghijklmnopqrstuvwxyz0123"],
    "secret_access_key=p1anted, region=x": ["p1anted"],
    "the key is wJalrXUtnFEMI/planted+KEY ok": ["wJalrXUtnFEMI/planted+KEY"],
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/planted+KEY")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/secrets/token")
    redaction._secrets.cache_clear()
    yield
    redaction._secrets.cache_clear()


@pytest.mark.parametrize("text", PLANTED)
def test_secrets_and_signatures_are_taken_out_wherever_they_are(text: str) -> None:
    for found in (redacted(text), str(SourceFailed(text)), str(SourceFailed("x", where=[{"url": text}]).details)):
        assert not [secret for secret in PLANTED[text] if secret in found], found
    assert "***" in redacted(text)


@pytest.mark.parametrize(
    "text",
    [
        "s3://models/llama-3-8b: bytes 8388608 and up: connection reset",
        "the file /var/run/secrets/token cannot be read",
        "tensor 'model.layers.0.self_attn.q_proj.weight', leaf 3: not the bytes that it claims",
        "http://127.0.0.1:2379/v3/kv/range: 503",
        "device 'cuda:99' is not on this node, it has cpu",
        "found 4 tokens of 12, expected xxh3:0123456789abcdef0123456789abcdef",
    ],
)
def test_all_else_stays_as_it_is(text: str) -> None:
    assert redacted(text) == text


def logged(form: str, log: Callable[[logging.Logger], object]) -> str:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    try:
        logs.configure("info", form, stream)
        log(logging.getLogger("weightd.test"))
    finally:
        root.handlers[:], root.level = handlers, level
        logging.captureWarnings(False)
    return stream.getvalue()


@pytest.mark.parametrize("form", ["json", "text", "auto"])
def test_an_event_is_one_line_whatever_is_in_it(form: str) -> None:
    hostile = "s3://x/\n2026 INFO st-000000000000 ready\r\x1b[2J\u2028\x85"
    found = logged(form, lambda log: log.warning("%s", hostile))
    assert len(found.splitlines()) == 1, repr(found)
    assert "\x1b" not in found


def test_failures_are_logged_with_their_traceback_and_without_secrets() -> None:
    def fails(log: logging.Logger) -> None:
        try:
            raise RuntimeError(SIGNED)
        except RuntimeError:
            log.exception("it failed")

    for form in ("json", "text"):
        found = logged(form, fails)
        assert "RuntimeError" in found
        assert not [secret for secret in PLANTED[SIGNED] if secret in found]
    assert "Traceback" in json.loads(logged("json", fails))["exception"]


def events(daemon: Daemon) -> list[dict[str, Any]]:
    return [json.loads(line) for line in daemon.log.read_text().splitlines()]


def test_a_stage_is_followed_by_its_id_and_by_that_of_the_request_through_log_api_and_events(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "m", {"model.safetensors": {"w": ("U8", (1 << 20,), b"\1" * (1 << 20))}})
    (port,) = free_ports(1)
    # What is planted has nothing to do with the storage that is used, so that it would be a leak wherever it showed.
    secrets = {"AWS_SECRET_ACCESS_KEY": "planted-secret-key", "HF_TOKEN": "hf_plantedplantedplanted00"}
    daemon = start_daemon(
        "--listen", f"127.0.0.1:{port}", "--token", "planted-api-token", "--log-level", "debug",
        env={**secrets, "WEIGHTD_PEER_TOKEN": "planted-peer-token"},
    )  # fmt: skip
    url, auth = f"http://127.0.0.1:{port}", {"Authorization": "Bearer planted-api-token"}
    with httpx.Client(base_url=url, headers={**auth, "X-Request-ID": "deploy-42"}, timeout=60) as client:
        answer = client.post("/v1/stage", params={"wait": 60}, json={"model": str(tmp_path / "m")})
        stage = answer.json()
        assert answer.headers["x-request-id"] == "deploy-42"
        assert stage["request_id"] == "deploy-42"
        shown = client.get(f"/v1/stage/{stage['id']}/events", headers={"X-Request-ID": "somebody-else"})
        assert '"request_id":"deploy-42"' in shown.text
        missing = client.post("/v1/stage", params={"wait": 60}, json={"model": str(tmp_path / "none")}).json()
        assert missing["state"] == "failed"
        refused = client.get("/v1/stage/st-000000000000")
        assert refused.json()["request_id"] == refused.headers["x-request-id"] == "deploy-42"
        hostile = client.get("/livez", headers={"X-Request-ID": 'x" onload=' + "y" * 500}).headers["x-request-id"]
        assert len(hostile) == 32, "only ids are taken over"
        client.post("/v1/stage", json={"model": SIGNED})
        client.post("/v1/stage", json={"model": "s3://key:p1anted-password@bucket/x"})
        assert client.post("/v1/stage", json={"model": "s3://b/x?X-Amz-Signature=5ca1ab1e5ca1ab1e"}).status_code == 422
    told = [event for event in events(daemon) if event.get("event") == "stage"]
    own = [event for event in told if event["stage"] == stage["id"]]
    assert [event["state"] for event in own] == ["queued", "planning", "loading", "verifying", "ready"]
    assert {event["request_id"] for event in own} == {"deploy-42"}
    assert own[-1]["bytes"] == 1 << 20
    (failed,) = [event for event in told if event["stage"] == missing["id"]]
    assert (failed["level"], failed["code"], failed["state"]) == ("warning", "checkpoint_not_found", "failed")

    os.kill(daemon.pid, signal.SIGKILL)
    until(lambda: any(event["logger"] == "weightd.keeper" for event in events(daemon)), "the keeper's line")
    again = daemon.client.show(stage["id"])
    assert again["request_id"] == "deploy-42", "the next daemon does not know any more whose it is"
    text = daemon.log.read_text() + daemon.get("/metrics") + daemon.get("/v1/stage") + daemon.get("/v1/node")
    for secret in ("planted", "5ca1ab1e5ca1ab1e", "p1anted", "AKIAIOSFODNN7EXAMPLE"):
        lines = [line for line in text.splitlines() if secret in line.replace(str(tmp_path), "")]
        assert not lines, (secret, lines)
