"""What the GPU tests run on: the machine's own GPUs, or fake ones; and engines and checkpoints for either."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import random
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx

from tests.bench.contender import ROOT, die_with_parent
from tests.checkpoint_files import Tensor, nbytes, write_checkpoint
from tests.fakecuda import FakeCuda
from tests.servers import Daemon

ANSWER_DEADLINE = 300.0
"""Seconds that an engine may take to answer: importing torch, and a first context, take long on a busy machine."""
MiB = 1 << 20


class EngineDied(Exception):
    """The engine's process ended instead of answering: ``returncode``, and the end of what it said."""

    def __init__(self, returncode: int, said: str) -> None:
        super().__init__(f"the engine ended with {returncode}: {said[-2000:]}")
        self.returncode = returncode


class EngineRefused(Exception):
    """The engine answered that it could not: ``code``, and for the driver's errors its ``result``."""

    def __init__(self, answer: Mapping[str, Any], said: str) -> None:
        super().__init__(f"{answer['error']}: {answer['message']}\n{said[-2000:]}".strip())
        self.code: str = answer["error"]
        self.result: int | None = answer.get("result")
        self.sticky: bool = answer.get("sticky", False)


class Engine:
    """The other end of ``tests.gpu.engine``."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.engine"],
            cwd=ROOT,
            env={**os.environ, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            preexec_fn=die_with_parent,
        )

    def ask(self, do: str, **arguments: Any) -> Any:
        """Have it do something; returns its answer. Raises EngineRefused, EngineDied."""
        assert self.process.stdin
        assert self.process.stdout
        with contextlib.suppress(BrokenPipeError):  # it has ended: so says the end of its answers
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], ANSWER_DEADLINE)
        assert ready, f"no answer to {do!r} within {ANSWER_DEADLINE:g} s: {self.said}"
        line = self.process.stdout.readline()
        if not line:
            raise EngineDied(self.process.wait(ANSWER_DEADLINE), self.said)
        answer = json.loads(line)
        if "error" in answer:
            raise EngineRefused(answer, self.said)
        return answer["ok"]

    @property
    def said(self) -> str:
        """What it has written to its log."""
        self._log.seek(0)
        return self._log.read()

    def close(self) -> None:
        """Kill it, as engines end."""
        self.process.kill()
        self.process.communicate()
        self._log.close()


@dataclass
class Machine:
    """GPUs to test on. ``gpus`` are their UUIDs in the daemon's order; ``env`` is for every process that uses them."""

    kind: str
    slack: int
    """Bytes of a GPU that may come and go unasked: a driver keeps some for itself, a fake none."""
    gpus: list[str]
    env: dict[str, str] = field(default_factory=dict)
    fake: FakeCuda | None = None
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def daemon(self, folder: Path, *arguments: str, **env: str) -> Daemon:
        """A daemon that has the GPUs, stopped at the test's end."""
        settings = {"WEIGHTD_CUDA_RESERVE": "16MiB", "WEIGHTD_RESTART_LIMIT": "0", "WEIGHTD_RESTART_WINDOW": "1"}
        server = Daemon(folder, "--capacity", "cpu=1GiB", *arguments, env={**self.env, **settings, **env})
        self.stack.callback(server.stop)
        server.start()
        return server

    def engine(self, **env: str) -> Engine:
        """An engine, killed at the test's end at the latest."""
        engine = Engine({**self.env, **env})
        self.stack.callback(engine.close)
        return engine

    def free_bytes(self, index: int = 0) -> int:
        """Bytes of a GPU that nobody uses, by a process that has just started and so always takes the same."""
        engine = self.engine()
        free: int = engine.ask("free_bytes", uuid=self.gpus[index])
        engine.close()
        return free

    def visible(self, *indices: int) -> str:
        """``CUDA_VISIBLE_DEVICES`` for these GPUs in this order."""
        return ",".join(self.gpus[index] for index in indices)


@cache
def no_gpu() -> str | None:
    """Why this machine's own GPUs cannot be tested on; None where they can."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"no GPU here: the NVIDIA driver's libcuda.so.1 cannot be loaded ({error})"
    engine = Engine({})
    try:
        return None if engine.ask("gpus") else "no GPU here: the driver sees none"
    except (EngineRefused, EngineDied) as error:
        return f"no GPU here: {str(error).splitlines()[0]}"
    finally:
        engine.close()


@contextlib.contextmanager
def real_machine() -> Iterator[Machine]:
    """The machine's own GPUs. Only where ``no_gpu`` has nothing to say."""
    with contextlib.ExitStack() as stack:
        engine = Engine({})
        stack.callback(engine.close)
        found = [gpu["uuid"] for gpu in engine.ask("gpus")]
        engine.close()
        yield Machine("gpu", 64 * MiB, found, stack=stack)


@contextlib.contextmanager
def fake_machine(library: Path, folder: Path) -> Iterator[Machine]:
    """Two fake GPUs of 1 GiB."""
    fake = FakeCuda(library, folder, devices=2)
    fake.set(delay_us=200)
    with contextlib.ExitStack() as stack:
        yield Machine("fake", 0, [fake.uuid(0), fake.uuid(1)], fake.env, fake, stack)


# ---------------------------------------------------------------------- lending over HTTP


@contextlib.contextmanager
def leased_by_handle(daemon: Daemon, stage: str) -> Iterator[dict[str, Any]]:
    """What ``POST /v1/leases`` lends, for as long as the block lasts; with the manifest's tensors."""
    transport = httpx.HTTPTransport(uds=str(daemon.runtime_dir / "api.sock"))
    with (
        httpx.Client(transport=transport, timeout=ANSWER_DEADLINE) as client,
        client.stream("POST", "http://weightd/v1/leases", json={"stage": stage}) as response,
    ):
        if response.is_error:
            response.read()
            raise AssertionError(response.text)
        for line in response.iter_lines():
            if line.startswith("data:") and (event := json.loads(line.removeprefix("data:")))["type"] == "lease":
                tensors = client_manifest(daemon, event["manifest"])
                yield {**event, "tensors": tensors}
                return
        raise AssertionError("the stream ended before it lent anything")


def client_manifest(daemon: Daemon, path: str) -> list[dict[str, Any]]:
    """The tensors of a manifest, by the path that the lease names."""
    tensors: list[dict[str, Any]] = json.loads(daemon.get(path))["tensors"]
    return [{key: tensor[key] for key in ("name", "offset", "nbytes")} for tensor in tensors]


# ---------------------------------------------------------------------- checkpoints

TORCH_DTYPES = (
    "BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "BF16", "F32", "F64", "C64", "F8_E5M2",
    "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ",
)  # fmt: skip
"""What ``safetensors.torch.load_file`` has a type for."""
PACKED_DTYPES = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0")
_AT_ONCE = 64 * MiB  # randbytes counts bits in an int of C
LENGTHS = (1, 2, 3, 8, 9, 16, 17, 128, 129, 240, 241, 256, 1023, 1024, 1025, 4097, MiB - 1, MiB, MiB + 1, 2 * MiB + 3)
"""Bytes of a tensor at which digests, leaves and pages begin to behave differently."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk; ``typed`` are those of its files that hold only types that torch has."""

    folder: Path
    typed: tuple[str, ...]

    @property
    def model(self) -> str:
        return str(self.folder)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each tensor as the files have it, by the format alone: nothing of weightd reads them here."""
        return _hashes(self.folder)


@cache
def _hashes(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            first, end = entry["data_offsets"]
            found[name] = hashlib.sha256(data[start + first : start + end]).hexdigest()
    return found


def checkpoint(folder: Path, seed: int = 0, ballast: int = 0) -> Checkpoint:
    """About 8 MiB: each dtype in odd shapes, scalars, empty tensors, and bytes of every awkward length.

    ``ballast``: so many bytes more, in a file of their own.
    """
    rng = random.Random(seed)

    def made(dtype: str, *shape: int) -> Tensor:
        size = nbytes(dtype, shape)
        data = b"".join(rng.randbytes(min(_AT_ONCE, size - at)) for at in range(0, size, _AT_ONCE))
        return dtype, shape, bytes(byte & 1 for byte in data) if dtype == "BOOL" else data

    kinds: dict[str, Tensor] = {}
    for dtype in TORCH_DTYPES:
        kinds[f"{dtype}.odd"] = made(dtype, 3, 5, 7)
        kinds[f"{dtype}.wide"] = made(dtype, 1, 4099)
        kinds[f"{dtype}.scalar"] = made(dtype)
        kinds[f"{dtype}.empty"] = made(dtype, 0, 4)
    kinds["model.embed.weight"] = made("BF16", 1031, 521)
    lengths = {f"bytes.{length}": made("U8", length) for length in LENGTHS}
    packed = {f"{dtype}.packed": made(dtype, 33, 8) for dtype in PACKED_DTYPES}
    files = {
        "model-00001-of-00003.safetensors": kinds,
        "model-00002-of-00003.safetensors": lengths,
        "model-00003-of-00003.safetensors": packed,
    }
    if ballast:
        files["ballast.safetensors"] = {"ballast": made("U8", ballast)}
    write_checkpoint(folder, files, index=True)
    return Checkpoint(folder, tuple(str(folder / name) for name in list(files)[:2]))
