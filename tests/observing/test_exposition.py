"""What GET /metrics says, how much of it there can be, and what it costs."""

from __future__ import annotations

import http.server
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy
import pytest
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import save_file

from tests.conftest import command
from tests.observing.page import PAGE, page
from tests.observing.prometheus import HOW
from tests.servers import Daemon, s3_env, until
from weightd.daemon.observing.families import FAMILIES, LABELS, PROCESS

MODELS = 1000
SECRET = "5ec2e7"


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Path]]:
    """A daemon where a thousand models were staged, some with names that mean harm, and the folder with them."""
    folder = tmp_path_factory.mktemp("models")
    save_file({"w": numpy.zeros(16, numpy.float32)}, folder / "one.safetensors")
    for number in range(MODELS):
        odd = {0: 'a"quote', 1: "a\\backslash", 2: "x" * 250, 3: "ü ⚙", 4: "{a=b}"}.get(number, f"m{number}")
        (folder / odd).mkdir()
        os.link(folder / "one.safetensors", folder / odd / "model.safetensors")
    env = {"WEIGHTD_MAX_QUEUED": str(MODELS), "WEIGHTD_CONCURRENT_LOADS": "8"}
    with Daemon(tmp_path_factory.mktemp("weightd"), "--capacity", "cpu=1GiB", env=env) as daemon:
        uds = str(daemon.runtime_dir / "api.sock")
        with httpx.Client(transport=httpx.HTTPTransport(uds=uds), timeout=120) as client, ThreadPoolExecutor(4) as pool:

            def stage(name: str) -> int:
                return client.post("http://weightd/v1/stage", json={"model": str(folder / name)}).status_code

            names = [path.name for path in folder.iterdir() if path.is_dir()]
            assert set(pool.map(stage, names)) <= {200, 202}
        ready = re.compile(rf'^weightd_stages{{state="ready"}} {MODELS}\.0$', re.MULTILINE)
        until(lambda: ready.search(daemon.get("/metrics")), "all of them are ready", 120)
        yield daemon, folder


def series(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("#")]


def value(daemon: Daemon, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", daemon.get("/metrics"), re.MULTILINE)
    assert found is not None, name
    return float(found.group(1))


def test_the_page_is_what_the_code_makes() -> None:
    assert PAGE.read_text() == page(), "run: python -m tests.observing.page"


def test_every_label_is_explained_and_every_explanation_is_of_one() -> None:
    used = {label for family in FAMILIES.values() for label in family.labels}
    assert used == {label for label in LABELS if "." not in label}
    for name in LABELS:
        family, _, label = name.rpartition(".")
        assert not family or label in FAMILIES[family].labels


def test_a_thousand_models_make_no_more_series_than_a_hundred(crowded: tuple[Daemon, Path]) -> None:
    text = crowded[0].get("/metrics")
    lines = series(text)
    assert len(lines) < 1000, "and most of these are buckets"
    assert len(lines) == len({line.rpartition(" ")[0] for line in lines}), "no series twice"
    resident = [line for line in lines if line.startswith("weightd_resident_bytes{")]
    assert len(resident) == 21
    assert 'weightd_resident_bytes{device="cpu",model="other"}' in text
    held = sum(float(line.rpartition(" ")[2]) for line in resident)
    assert held == value(crowded[0], 'weightd_used_bytes{device="cpu"}')
    assert held == value(crowded[0], 'weightd_evictable_bytes{device="cpu"}')


def test_only_families_that_are_declared_are_there_with_their_labels(crowded: tuple[Daemon, Path]) -> None:
    for family in text_string_to_metric_families(crowded[0].get("/metrics")):
        name = family.name + ("_total" if family.type == "counter" else "")
        if name in PROCESS:
            continue
        assert (family.type, family.documentation) == (FAMILIES[name].kind, FAMILIES[name].text)
        for sample in family.samples:
            assert sample.labels.keys() - {"le"} == set(FAMILIES[name].labels)


def test_promtool_has_nothing_to_say_of_it(crowded: tuple[Daemon, Path]) -> None:
    result = subprocess.run(
        [command("promtool", HOW), "check", "metrics"], input=crowded[0].get("/metrics"), text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


def test_whoever_polls_all_the_time_leaves_the_daemon_time_for_others(
    crowded: tuple[Daemon, Path], record_property: Callable[[str, object], None]
) -> None:
    uds = str(crowded[0].runtime_dir / "api.sock")
    stopped = threading.Event()

    def poll() -> None:
        with httpx.Client(transport=httpx.HTTPTransport(uds=uds), timeout=60) as client:
            while not stopped.is_set():
                client.get("http://weightd/metrics")

    with httpx.Client(transport=httpx.HTTPTransport(uds=uds), timeout=60) as client, ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(poll)
        took = []
        for _ in range(30):
            started = time.perf_counter()
            client.get("http://weightd/livez")
            took.append(time.perf_counter() - started)
        stopped.set()
    record_property("seconds", sorted(took)[15])
    assert sorted(took)[15] < 0.25


def test_methods_that_a_client_makes_up_make_no_series(crowded: tuple[Daemon, Path]) -> None:
    before = len(series(crowded[0].get("/metrics")))
    for number in range(30):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(crowded[0].runtime_dir / "api.sock"))
            client.sendall(f"METHOD{number} /v1/stage HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            assert b" 405 " in client.recv(4096)
    text = crowded[0].get("/metrics")
    assert "METHOD" not in text
    assert len(series(text)) - before < 30


@pytest.fixture(scope="module")
def locked_out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that its object store does not let in."""

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            self.send_response(401 if "unknown" in self.path else 403)
            self.send_header("X-Error-Code", "RepoNotFound" if "unknown" in self.path else "GatedRepo")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Not on stderr."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, folder = f"http://127.0.0.1:{server.server_port}", tmp_path_factory.mktemp("weightd")
    env = {**s3_env(url), "HF_ENDPOINT": url, "HF_HOME": str(folder / "hf")}
    with Daemon(folder, env=env) as daemon:
        yield daemon
    server.shutdown()
    server.server_close()


def test_what_is_secret_in_a_uri_is_in_no_label_and_refused_credentials_have_a_code(locked_out: Daemon) -> None:
    # What looks like a credential is refused already; labels do not depend on its looks.
    uris = (
        f"s3://models/llama#{SECRET}", f"s3://models/llama?se={SECRET}", "s3://models/unknown",
        "s3://models/llama/one.safetensors", "hf://org/gated",
    )  # fmt: skip
    for uri in uris:
        record = locked_out.stage(uri)
        assert (record["state"], record["error"]["code"]) == ("failed", "credentials_refused")
    # What the hub says 401 of, without a token, is most often not there.
    assert locked_out.stage("hf://org/unknown")["error"]["code"] == "checkpoint_not_found"
    text = locked_out.get("/metrics")
    assert SECRET not in text
    assert 'weightd_errors_total{code="credentials_refused"} 5.0' in text
    assert 'weightd_latest_stage_state{device="cpu",model="s3://models/llama",state="failed"} 1.0' in text


def test_bytes_that_are_not_the_expected_ones_are_counted_by_their_source(locked_out: Daemon, tmp_path: Path) -> None:
    save_file({"w": numpy.ones(1 << 10, numpy.float32)}, tmp_path / "model.safetensors")
    failed = locked_out.stage(tmp_path, expect_digest="xxh3:" + "0" * 32)
    assert failed["error"]["code"] == "digest_mismatch"
    assert value(locked_out, 'weightd_digest_mismatches_total{source="file"}') == 1
    assert value(locked_out, 'weightd_digest_mismatches_total{source="s3"}') == 0


def test_leases_have_ages_and_what_goes_and_comes_again_is_counted(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_file({"w": numpy.ones(1 << 18, numpy.float32)}, tmp_path / name / "model.safetensors")
    daemon = start_daemon("--capacity", "cpu=1200KiB")
    with daemon.attach(tmp_path / "a"):
        assert value(daemon, "weightd_leases") == 1
        assert value(daemon, 'weightd_leases_by_age{age="<1m"}') == 1
        until(lambda: value(daemon, "weightd_lease_oldest_seconds") > 0, "it ages")
        assert value(daemon, 'weightd_evictable_bytes{device="cpu"}') == 0
        with pytest.raises(Exception, match="are missing"):
            daemon.stage(tmp_path / "b")
    assert value(daemon, 'weightd_errors_total{code="insufficient_capacity"}') == 1
    assert value(daemon, 'weightd_stages_finished_total{state="failed"}') == 0
    until(lambda: value(daemon, "weightd_leases") == 0, "it has ended")
    assert value(daemon, "weightd_lease_oldest_seconds") == 0
    assert value(daemon, "weightd_stages_restaged_total") == 0
    for name in ("b", "a"):
        assert daemon.stage(tmp_path / name)["state"] == "ready"
    assert value(daemon, 'weightd_evictions_total{reason="capacity"}') == 2
    assert value(daemon, "weightd_stages_restaged_total") == 1
