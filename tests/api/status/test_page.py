"""The status page, in a browser, of a real daemon: what happens on the node is seen on the page by itself."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from tests.api.status.view import LIVE, View
from tests.fakecuda import FakeCuda
from tests.fault_proxy import FaultProxy, Kind, Request
from tests.servers import Daemon, SeaweedFS, free_ports, until

MiB = 1 << 20


class Brake:
    """Lets so many reads of weights through to the object store, and holds the others."""

    def __init__(self) -> None:
        self._free = threading.Semaphore(0)
        self.held = 0
        self._off = threading.Event()

    def __call__(self, request: Request) -> Kind | None:
        if request.nbytes > 300_000 and not self._off.is_set():
            self.held += 1
            while not self._off.is_set() and not self._free.acquire(timeout=0.05):
                pass
        return None

    def let(self, reads: int) -> None:
        self._free.release(reads)

    def off(self) -> None:
        self._off.set()


@pytest.fixture(scope="module")
def proxy(s3: SeaweedFS) -> Iterator[FaultProxy]:
    with FaultProxy(s3.url) as found:
        yield found


@pytest.fixture
def brake(proxy: FaultProxy) -> Iterator[Brake]:
    found = Brake()
    proxy.fault = found
    yield found
    found.off()
    proxy.fault = lambda _: None


@pytest.fixture(scope="module")
def uri(s3: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    save_file({f"w{i}": numpy.full((MiB,), i, numpy.uint8) for i in range(12)}, folder / "model.safetensors")
    return s3.upload(folder, "llama-3-8b")


@pytest.fixture(scope="module")
def node(
    tmp_path_factory: pytest.TempPathFactory, fake_library: Path, s3: SeaweedFS, proxy: FaultProxy
) -> Iterator[Daemon]:
    """A daemon with a GPU and host memory, and an object store that can be slowed down."""
    folder = tmp_path_factory.mktemp("page")
    fake = FakeCuda(fake_library, folder / "fake", memory=256 * MiB)
    (port,) = free_ports(1)
    env = {
        **s3.env,
        **fake.env,
        "AWS_ENDPOINT_URL": proxy.url,
        "WEIGHTD_CUDA_RESERVE": "32MiB",
        "WEIGHTD_EXTENT": "1MiB",
        "WEIGHTD_IN_FLIGHT": "2MiB",
    }
    arguments = ("--listen", f"127.0.0.1:{port}", "--capacity", "cpu=64MiB", "--restart-limit", "0")
    with Daemon(folder / "daemon", *arguments, env=env) as daemon:
        daemon.url = f"http://127.0.0.1:{port}"
        yield daemon


@pytest.fixture
def seen(view: View, node: Daemon) -> Iterator[View]:
    """The page of the daemon, which has no stages yet."""
    for stage in node.client.stages():
        node.client.remove(stage["id"])
    view.open(node.url)
    yield view
    assert all(url.startswith((node.url, "data:")) for url in view.requests), view.requests
    assert [line for line in view.complaints if "ERR_" not in line] == []


def test_a_stage_appears_progresses_and_becomes_ready(seen: View, node: Daemon, uri: str, brake: Brake) -> None:
    seen.shows("#stages", "None yet")
    started = node.client.stage(uri, wait=0, device="cpu", sources=["origin"])
    row = seen.stage(started["id"])
    seen.page.wait_for_selector(f"{row}[data-state=loading]")
    seen.shows(f"{row} .bytes", "0 %")
    seen.shows("#states", "active 1")
    seen.shows("#devices", "loading · 12.0 MiB")
    percents = []
    for _ in range(3):
        brake.let(3)
        percents.append(
            seen.until(
                f"(() => {{ const n = parseInt(document.querySelector('{row} .bytes small').textContent);"
                f" return n > {percents[-1] if percents else 0} && n }})()",
                "it progresses",
            )
        )
    assert percents == sorted(percents)
    assert 0 < percents[0] < 100
    assert seen.page.evaluate(f"document.querySelector('{row} .track > span').style.width") != "0%"
    seen.shows(f"{row} .speed", "iB/s")
    seen.shows("#totals", "iB/s")
    brake.off()
    seen.page.wait_for_selector(f"{row}[data-state=ready]")
    seen.shows("#news", "llama-3-8b is ready")
    seen.shows(f"{row} .bytes", "100 %")
    seen.shows("#devices", "ready · 12.0 MiB")
    parts = seen.page.evaluate(f"[...document.querySelectorAll('{row} .stack > span')].map((part) => part.offsetWidth)")
    assert len(parts) >= 2
    seen.page.click(f"{row} summary")
    seen.shows(f"{row} .inside", "Where the time went")
    seconds = seen.page.evaluate(
        f"[...document.querySelectorAll('{row} table:first-of-type tbody tr')].map((line) => line.innerText)"
    )
    assert len(seconds) >= 2
    seen.shows(f"{row} .inside", "Bytes by source")
    for fact in (started["id"], "s3://models/llama-3-8b", "12 tensors", "12.0 MiB on cpu", "xxh3:"):
        assert fact in seen.text(f"{row} .inside")


def test_a_lease_shows_on_its_segment_its_stage_and_in_the_table_and_goes(seen: View, node: Daemon, uri: str) -> None:
    stage = node.stage(uri, device="cpu")
    row = seen.stage(stage["id"])
    seen.page.wait_for_selector(f"{row}[data-state=ready]")
    seen.page.click(f"{row} summary")
    seen.shows(f"{row} .inside", "Nobody leases it")
    with node.attach(stage=stage["id"]):
        seen.shows("#leases", f"pid {os.getpid()}")
        for place, words in (
            (f"{row} .held", "1 lease"), (f"{row} .inside", f"uid {os.geteuid()}"), ("#devices", "1 lease"),
            ("#totals", "Leases\n1"),
        ):  # fmt: skip
            seen.shows(place, words)
        assert seen.page.query_selector("#devices [data-leased]")
    seen.shows("#leases", "Nobody leases anything")
    seen.shows(f"{row} .inside", "Nobody leases it")
    seen.page.wait_for_selector("#devices [data-leased]", state="detached")


def test_an_error_shows_with_its_remedy(seen: View, node: Daemon, tmp_path: Path) -> None:
    failed = node.stage(tmp_path / "nowhere")
    error = failed["error"]
    seen.shows("#errors", error["message"])
    assert error["code"] in seen.text("#errors")
    assert f"Remedy: {error['remedy']}" in seen.text("#errors")
    seen.page.click("#errors a")
    seen.shows(f"{seen.stage(failed['id'])} .inside", error["remedy"])
    seen.shows("#totals", "Failed\n1")
    save_file({"w": numpy.zeros((65, MiB), numpy.uint8)}, tmp_path / "m.safetensors")
    with pytest.raises(Exception, match="missing"):
        node.stage(tmp_path, device="cpu")
    seen.shows("#errors", "insufficient_capacity")
    assert "raise WEIGHTD_CAPACITY" in seen.text("#errors")


def test_devices_are_bars_to_scale_with_what_is_reserved(seen: View, node: Daemon, uri: str) -> None:
    stage = node.stage(uri, device="cuda:0", sources=["origin"])
    seen.shows("#devices", "reserve 32.0 MiB")
    seen.shows("#devices", "capacity 224.0 MiB")
    seen.page.wait_for_selector('#devices .device:has(h3:has-text("cuda:0")) [data-kind=ready]')
    record = next(device for device in node.client.node()["devices"] if device["name"] == "cuda:0")
    widths = seen.page.evaluate(
        """Object.fromEntries([...[...document.querySelectorAll(".device")]
           .find((one) => one.innerText.startsWith("cuda:0")).querySelectorAll(".segments > li")]
           .map((part) => [part.dataset.kind, part.offsetWidth]))"""
    )
    share = stage["footprint_bytes"] / record["total_bytes"]
    assert widths["ready"] / sum(widths.values()) == pytest.approx(share, abs=0.02)
    assert widths["reserve"] / sum(widths.values()) == pytest.approx(32 / 256, abs=0.02)
    assert widths["free"] / sum(widths.values()) == pytest.approx(
        record["free_bytes"] / record["total_bytes"], abs=0.02
    )


def test_after_kill_9_the_page_reconnects_by_itself_and_shows_what_was_adopted(
    seen: View, node: Daemon, uri: str, tmp_path: Path
) -> None:
    save_file({"w": numpy.zeros((MiB,), numpy.uint8)}, tmp_path / "m.safetensors")
    stage, other = node.stage(uri, device="cpu"), node.stage(tmp_path, device="cpu")
    row = seen.stage(stage["id"])
    for record in (stage, other):
        seen.page.wait_for_selector(f"{seen.stage(record['id'])}[data-state=ready]")
    seen.page.evaluate("window.same = true")
    seen.context.set_offline(True)
    pid = node.status["daemon_pid"]
    os.kill(pid, signal.SIGKILL)
    seen.page.wait_for_selector("#link[data-state=waiting]")
    seen.shows("#news", "Reconnecting")
    until(lambda: node.status["daemon_pid"] not in (pid, None, 0), "the next daemon")
    node.client.remove(other["id"])  # while the page is away
    seen.context.set_offline(False)
    seen.page.wait_for_selector(LIVE)
    seen.shows("#news", "A new daemon runs")
    assert f"pid {pid} " not in seen.text("#about")
    seen.page.wait_for_selector(f"{row}[data-state=ready]")
    assert seen.page.query_selector(seen.stage(other["id"])) is None, "what has gone meanwhile"
    assert seen.page.evaluate("window.same"), "it was loaded anew"
