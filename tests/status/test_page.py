"""The status page, in a browser, of a real daemon: what happens on the node is seen on the page by itself."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from tests.fakecuda import FakeCuda
from tests.fault_proxy import FaultProxy, Kind, Request
from tests.servers import Daemon, SeaweedFS, free_ports, until
from tests.status.view import LIVE, View, viewing

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
def view(browser: Any, node: Daemon) -> Iterator[View]:
    for stage in node.client.stages():
        node.client.remove(stage["id"])
    with viewing(browser, node.url) as found:
        yield found.open()
        assert all(url.startswith((node.url, "data:")) for url in found.requests), found.requests
        assert [line for line in found.complaints if "ERR_" not in line] == []


def test_a_stage_appears_progresses_and_becomes_ready(view: View, node: Daemon, uri: str, brake: Brake) -> None:
    view.shows("#stages", "None yet")
    started = node.client.stage(uri, wait=0, device="cpu", sources=["origin"])
    row = view.stage(started["id"])
    view.page.wait_for_selector(f"{row}[data-state=loading]")
    view.shows(f"{row} .bytes", "0 %")
    view.shows("#states", "active 1")
    view.shows("#devices", "loading · 12.0 MiB")
    percents = []
    for _ in range(3):
        brake.let(3)
        percents.append(
            view.until(
                f"(() => {{ const n = parseInt(document.querySelector('{row} .bytes small').textContent);"
                f" return n > {percents[-1] if percents else 0} && n }})()",
                "it progresses",
            )
        )
    assert percents == sorted(percents)
    assert 0 < percents[0] < 100
    assert view.page.evaluate(f"document.querySelector('{row} .track > span').style.width") != "0%"
    view.shows(f"{row} .speed", "iB/s")
    view.shows("#totals", "iB/s")
    brake.off()
    view.page.wait_for_selector(f"{row}[data-state=ready]")
    view.shows("#news", "llama-3-8b is ready")
    view.shows(f"{row} .bytes", "100 %")
    view.shows("#devices", "ready · 12.0 MiB")
    parts = view.page.evaluate(f"[...document.querySelectorAll('{row} .stack > span')].map((part) => part.offsetWidth)")
    assert len(parts) >= 2
    view.page.click(f"{row} summary")
    view.shows(f"{row} .inside", "Where the time went")
    seconds = view.page.evaluate(
        f"[...document.querySelectorAll('{row} table:first-of-type tbody tr')].map((line) => line.innerText)"
    )
    assert len(seconds) >= 2
    view.shows(f"{row} .inside", "Bytes by source")
    for fact in (started["id"], "s3://models/llama-3-8b", "12 tensors", "12.0 MiB on cpu", "xxh3:"):
        assert fact in view.text(f"{row} .inside")


def test_a_lease_shows_on_its_segment_its_stage_and_in_the_table_and_goes(view: View, node: Daemon, uri: str) -> None:
    stage = node.stage(uri, device="cpu")
    row = view.stage(stage["id"])
    view.page.wait_for_selector(f"{row}[data-state=ready]")
    view.page.click(f"{row} summary")
    view.shows(f"{row} .inside", "Nobody leases it")
    with node.attach(stage=stage["id"]):
        view.shows("#leases", f"pid {os.getpid()}")
        for place, words in (
            (f"{row} .held", "1 lease"), (f"{row} .inside", f"uid {os.geteuid()}"), ("#devices", "1 lease"),
            ("#totals", "Leases\n1"),
        ):  # fmt: skip
            view.shows(place, words)
        assert view.page.query_selector("#devices [data-leased]")
    view.shows("#leases", "Nobody leases anything")
    view.shows(f"{row} .inside", "Nobody leases it")
    view.page.wait_for_selector("#devices [data-leased]", state="detached")


def test_an_error_shows_with_its_remedy(view: View, node: Daemon, tmp_path: Path) -> None:
    failed = node.stage(tmp_path / "nowhere")
    error = failed["error"]
    view.shows("#errors", error["message"])
    assert error["code"] in view.text("#errors")
    assert f"Remedy: {error['remedy']}" in view.text("#errors")
    view.page.click("#errors a")
    view.shows(f"{view.stage(failed['id'])} .inside", error["remedy"])
    view.shows("#totals", "Failed\n1")
    save_file({"w": numpy.zeros((65, MiB), numpy.uint8)}, tmp_path / "m.safetensors")
    with pytest.raises(Exception, match="missing"):
        node.stage(tmp_path, device="cpu")
    view.shows("#errors", "insufficient_capacity")
    assert "raise WEIGHTD_CAPACITY" in view.text("#errors")


def test_devices_are_bars_to_scale_with_what_is_reserved(view: View, node: Daemon, uri: str) -> None:
    stage = node.stage(uri, device="cuda:0", sources=["origin"])
    view.shows("#devices", "reserve 32.0 MiB")
    view.shows("#devices", "capacity 224.0 MiB")
    view.page.wait_for_selector("#devices [data-kind=ready]")
    record = next(device for device in node.client.node()["devices"] if device["name"] == "cuda:0")
    widths = view.page.evaluate(
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
    view: View, node: Daemon, uri: str, tmp_path: Path
) -> None:
    save_file({"w": numpy.zeros((MiB,), numpy.uint8)}, tmp_path / "m.safetensors")
    stage, other = node.stage(uri, device="cpu"), node.stage(tmp_path, device="cpu")
    row = view.stage(stage["id"])
    for record in (stage, other):
        view.page.wait_for_selector(f"{view.stage(record['id'])}[data-state=ready]")
    view.page.evaluate("window.same = true")
    view.context.set_offline(True)
    pid = node.status["daemon_pid"]
    os.kill(pid, signal.SIGKILL)
    view.page.wait_for_selector("#link[data-state=waiting]")
    view.shows("#news", "Reconnecting")
    until(lambda: node.status["daemon_pid"] not in (pid, None, 0), "the next daemon")
    node.client.remove(other["id"])  # while the page is away
    view.context.set_offline(False)
    view.page.wait_for_selector(LIVE)
    view.shows("#news", "A new daemon runs")
    assert f"pid {pid} " not in view.text("#about")
    view.page.wait_for_selector(f"{row}[data-state=ready]")
    assert view.page.query_selector(view.stage(other["id"])) is None, "what has gone meanwhile"
    assert view.page.evaluate("window.same"), "it was loaded anew"
