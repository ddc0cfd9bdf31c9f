"""Machines with fake GPUs, daemons and engines on them, and a checkpoint with all that is special."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy

from tests.checkpoint_files import Tensor, nbytes
from tests.fakecuda import FakeCuda
from tests.gpu.machine import Engine, EngineRefused
from tests.servers import Daemon, until

MiB = 1 << 20
WEIGHTD = str(Path(sys.executable).parent / "weightd")
PATHS = ("auto", "ring")
"""Settings of cuda_fill: libstreamer's CUDA backend, which passes its self-test on the fake, and our own ring."""


class Machine:
    """Fake GPUs, and daemons on them, which have to leave nothing behind."""

    def __init__(self, library: Path, folder: Path, devices: int, memory: int, strict: bool) -> None:
        self.fake = FakeCuda(library, folder / "fake", devices=devices, memory=memory, strict=strict)
        self._folder = folder
        self._daemons: list[Daemon] = []
        self.readers: list[Reader] = []
        self.killed: set[int] = set()
        """Daemons, by pid, that had no time to let go of anything."""

    def daemon(self, *arguments: str, **env: str) -> Daemon:
        # torch takes half a second to import, and none of the fake's readers wants it.
        settings = {"WEIGHTD_CUDA_RESERVE": "0", **self.fake.env, **env}
        server = Daemon(self._folder / f"daemon{len(self._daemons)}", *arguments, env=settings)
        self._daemons.append(server)
        server.start()
        return server

    def attach(self, daemon: Daemon, model: Path | str | None = None, **options: Any) -> Reader:
        """An engine that attaches; its first answer is ``found``."""
        env = options.pop("env", {})
        if model is not None:
            options["model"] = os.fspath(model)
        reader = Reader(daemon, options, {**self.fake.env, "FAKECUDA_STRICT": "0", **env})
        self.readers.append(reader)
        return reader

    def close(self) -> None:
        for reader in self.readers:
            reader.end()
        for daemon in self._daemons:
            daemon.stop()

    def check_clean(self) -> None:
        """Nothing is held any more: by the daemons, which have let go of it all, and by the engines, which are dead."""
        engines = {reader.engine.process.pid for reader in self.readers}
        assert self.fake.leaks(self.fake.counters().keys() - engines - self.killed) == {}
        until(lambda: not any(self.fake.used(i) for i in range(self.fake.devices)), "GPU memory is free")


class Reader:
    """An engine that has attached; ``found`` says what it got, with the SHA-256 of each tensor, or why it did not."""

    def __init__(self, daemon: Daemon, options: dict[str, Any], env: dict[str, str]) -> None:
        self.engine = Engine(env)
        try:
            self.found = self.engine.ask("attach", runtime_dir=str(daemon.runtime_dir), **options)
            self.found["digests"] = self.digests()
        except EngineRefused as refused:
            self.found = {"code": refused.code, "message": str(refused)}

    def digests(self) -> Any:
        """SHA-256 of each tensor, as it is now."""
        return self.engine.ask("hashes")

    def write(self) -> None:
        """Write to the first tensor, at the address where this process has it."""
        self.engine.ask("write", how="host pointer", name=next(iter(EXPECTED)))

    def end(self) -> None:
        self.engine.close()


NewMachine = Callable[..., Machine]


def tensors(seed: int, sizes: list[tuple[str, str, tuple[int, ...]]]) -> dict[str, Tensor]:
    rng = numpy.random.default_rng(seed)
    return {name: (dtype, shape, rng.bytes(nbytes(dtype, shape))) for name, dtype, shape in sizes}


SHARDS = {
    "a.safetensors": tensors(1, [
        ("embed", "BF16", (1000, 513)), ("norm", "F32", (7,)), ("empty", "F16", (0, 4)), ("scale", "F8_E4M3", ()),
        ("wide", "BF16", (512, 4096)), ("bits", "F4", (3, 6)),
    ]),
    "b.safetensors": tensors(2, [("q", "F16", (256, 2048)), ("o", "F16", (2048, 256)), ("bias", "F64", (513,))]),
}  # fmt: skip
EXPECTED = {name: hashlib.sha256(data).hexdigest() for shard in SHARDS.values() for name, (_, _, data) in shard.items()}


def devices(daemon: Daemon) -> dict[str, dict[str, Any]]:
    return {device["name"]: device for device in daemon.client.node()["devices"]}


def killed(daemon: Daemon, number: int = signal.SIGKILL) -> None:
    """Kill the daemon, and wait for the next one."""
    pid = daemon.status["daemon_pid"]
    os.kill(pid, number)
    until(lambda: daemon.status["serving"] and daemon.status["daemon_pid"] != pid, "another daemon serves", 60)
