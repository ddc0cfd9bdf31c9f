"""``make screenshots``: pictures of the status page for the README, of real daemons that stage, lend and fail.

Two daemons that are peers, on fake GPUs, with an object store behind a proxy that keeps one stage loading. The models
are called, and are as large, as those that one knows; their bytes are random.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
from PIL import Image
from playwright.sync_api import sync_playwright
from safetensors.numpy import save_file

from tests.api.status.conftest import FLAGS
from tests.api.status.view import View
from tests.devices.cuda.fakes import Machine
from tests.fakecuda import build
from tests.fault_proxy import FaultProxy, Kind, Request
from tests.servers import Daemon, SeaweedFS, free_ports, until

MB = 1_000_000
SIZES = {
    "qwen2.5-0.5b-instruct": 988 * MB,
    "smollm2-360m-instruct": 724 * MB,
    "smollm2-135m-instruct": 269 * MB,
    "bge-small-en-v1.5": 133 * MB,
    "all-minilm-l6-v2": 91 * MB,
}
PHONE = "status-360"
SHOTS: dict[str, dict[str, Any]] = {
    "status-light": {"color_scheme": "light", "viewport": {"width": 1440, "height": 1000}},
    "status-dark": {"color_scheme": "dark", "viewport": {"width": 1440, "height": 1000}},
    PHONE: {"color_scheme": "light", "viewport": {"width": 360, "height": 780}, "device_scale_factor": 2},
}
SLOW = "smollm2-135m-instruct"


def main(target: Path) -> None:
    """Write them to a folder, as PNG."""
    target.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weightd-screenshots-")))
        daemon, url = stack.enter_context(staged(folder))
        playwright = stack.enter_context(sync_playwright())
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        stack.callback(chromium.close)
        (slow,) = (stage["id"] for stage in daemon.client.stages() if stage["model"].endswith(SLOW))
        views = {name: View(chromium, **options) for name, options in SHOTS.items()}
        for name, view in views.items():
            view.open(url)
            view.page.wait_for_selector(f"#s-{slow}[data-state=loading]")
            if name != PHONE:
                view.page.click(f"#s-{slow} summary")
                view.page.mouse.move(0, 0)
                view.page.evaluate("document.activeElement.blur()")
        next(iter(views.values())).page.wait_for_timeout(3000)  # so that the rate is one of some seconds
        for name, view in views.items():
            file = target / f"{name}.png"
            view.page.screenshot(path=file, full_page=name != PHONE)
            with Image.open(file) as image:  # a third of the bytes, for the same to the eye
                image.quantize(256).save(file, optimize=True)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[tuple[Daemon, str]]:
    """The daemon to be seen, and its URL."""
    with contextlib.ExitStack() as stack:
        s3 = stack.enter_context(SeaweedFS(folder / "s3"))
        rng = numpy.random.default_rng(0)
        for name, size in SIZES.items():
            (folder / name).mkdir()
            part = size // 30
            tensors = {f"model.layers.{i}.weight": rng.integers(0, 256, part, numpy.uint8) for i in range(30)}
            save_file(tensors, folder / name / "model.safetensors")
            s3.upload(folder / name, name)
            shutil.rmtree(folder / name)
        proxy = stack.enter_context(FaultProxy(s3.url))
        proxy.fault = _Trickle()
        machine = Machine(build(folder / "cuda").parent, folder / "gpus", devices=2, memory=2 << 30, strict=True)
        stack.callback(machine.close)
        port, *peers = free_ports(4)
        addresses = [f"127.0.0.1:{peer}" for peer in peers]
        env = {
            **s3.env, "AWS_ENDPOINT_URL": proxy.url, "UCX_TLS": "tcp", "WEIGHTD_PEER_TOKEN": "fleet",
            "WEIGHTD_PEERS": f"static:{','.join(addresses)}", "WEIGHTD_EXTENT": "1MiB", "WEIGHTD_IN_FLIGHT": "16MiB",
        }  # fmt: skip
        other = stack.enter_context(Daemon(folder / "peer", env={**env, "WEIGHTD_PEER_LISTEN": addresses[1]}))
        other.stage("s3://models/bge-small-en-v1.5", device="cpu", sources=["origin"])
        daemon = machine.daemon(
            "--listen", f"127.0.0.1:{port}", "--capacity", "cpu=512MiB",
            **env, WEIGHTD_PEER_LISTEN=addresses[0], WEIGHTD_CUDA_RESERVE="256MiB",
        )  # fmt: skip
        for request in (
            {"model": "s3://models/qwen2.5-0.5b-instruct", "device": "cuda:0", "sources": ["origin"]},
            {"model": "s3://models/smollm2-360m-instruct", "device": "cuda:0", "sources": ["origin"], "pin": True},
            {"model": "s3://models/llama-3.2-1b-instruct"},
            {"model": "s3://models/bge-small-en-v1.5", "device": "cpu"},
            {"model": "s3://models/all-minilm-l6-v2", "device": "cuda:1", "sources": ["origin"]},
        ):
            daemon.client.stage(wait=300, **request)
        with contextlib.suppress(Exception):  # for which there is no room
            daemon.stage("s3://models/qwen2.5-0.5b-instruct", device="cpu")
        for model in ("qwen2.5-0.5b-instruct", "qwen2.5-0.5b-instruct", "smollm2-360m-instruct"):
            machine.attach(daemon, f"s3://models/{model}", device="cuda:0")
        stack.enter_context(daemon.attach("s3://models/bge-small-en-v1.5", device="cpu"))
        daemon.client.stage(f"s3://models/{SLOW}", wait=0, device="cuda:1", sources=["origin"])
        until(lambda: 0 < _left(daemon) < 200 * MB, "it loads", 120)
        yield daemon, f"http://127.0.0.1:{port}"


def _left(daemon: Daemon) -> int:
    """Bytes that the slow model still lacks; 0 before it loads."""
    loading = (stage for stage in daemon.client.stages() if stage["state"] == "loading")
    return sum(stage["bytes_total"] - stage["bytes_done"] for stage in loading)


class _Trickle:
    """Lets everything through but the slow model's weights, of which a few megabytes a second."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ever = threading.Event()

    def __call__(self, request: Request) -> Kind | None:
        if SLOW in request.path and request.nbytes > 300_000:
            with self._lock:
                self._ever.wait(0.25)
        return None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
